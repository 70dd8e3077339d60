"""Where state rests: `offload_optimizer` and `offload_param` of the JSON, and what they come to. No torch.

Ren et al. 2021 (ZeRO-Offload), Rajbhandari et al. 2021 (ZeRO-Infinity). Defaults are DeepSpeed's but for two: memory is
pinned and files are read and written while other units are stepped, because without these offload waits for itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..reading import STRICT

Device = Literal["none", "cpu", "nvme"]

TIER = {"none": "device", "cpu": "host", "nvme": "nvme"}
"""Our tier by DeepSpeed's name of a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOptimizerSection:
    """`zero_optimization.offload_optimizer`: masters, moments and reduced gradients rest off the device.

    Attributes:
        device: "cpu" is host memory; "nvme" keeps gradients in host memory, masters and moments in files.
        nvme_path: the folder for files; needed for "nvme".
        pin_memory: page-locked host memory, so that copies run beside computation (on CUDA).
        ratio: share of the elements that rest off the device (ZeRO-Offload++, Twin-Flow); the others are stepped there.
        buffer_count: how many units' masters and moments are in host memory at a time with "nvme".
        pipeline_read, pipeline_write: read the next unit, write the last one, while one is stepped.
        step_in_backward: ours; step a unit when its reduction ends, where nothing (clipping) needs all gradients first.
        delayed_update: ours; parameters show an update one step late, and the host steps during the next forward and
            backward (ZeRO-Offload, section 5.2).
        delayed_update_after: ours; how many steps are taken without the delay first, while training is still wild.
    """

    __pydantic_config__ = STRICT
    device: Device = "none"
    nvme_path: str | None = None
    pin_memory: bool = True
    ratio: float = 1.0
    buffer_count: int = 4
    pipeline_read: bool = True
    pipeline_write: bool = True
    step_in_backward: bool = True
    delayed_update: bool = False
    delayed_update_after: int = 40

    def __post_init__(self) -> None:
        _check_path(self.device, self.nvme_path)
        if not 0.0 <= self.ratio <= 1.0:
            raise ValueError(f"ratio = {self.ratio}; allowed: 0 to 1, the share of elements that is offloaded")
        if self.buffer_count < 2:
            raise ValueError(f"buffer_count = {self.buffer_count}; allowed: at least 2, one to step and one on its way")
        if self.delayed_update_after < 0:
            raise ValueError(f"delayed_update_after = {self.delayed_update_after}; allowed: at least 0 steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadParamSection:
    """`zero_optimization.offload_param`: at stage 3, this rank's parameters rest off the device too.

    Attributes:
        device: "cpu" is host memory; "nvme" keeps them in files.
        nvme_path: the folder for files; needed for "nvme".
        pin_memory: page-locked host memory, so that copies run beside computation (on CUDA).
        buffer_count: how many units' shards are in host memory at a time with "nvme".
    """

    __pydantic_config__ = STRICT
    device: Device = "none"
    nvme_path: str | None = None
    pin_memory: bool = True
    buffer_count: int = 5

    def __post_init__(self) -> None:
        _check_path(self.device, self.nvme_path)
        if self.buffer_count < 2:
            raise ValueError(f"buffer_count = {self.buffer_count}; allowed: at least 2, one in use and one on its way")


def _check_path(device: Device, path: str | None) -> None:
    if device == "nvme" and not path:
        raise ValueError("device = 'nvme' without nvme_path; name a folder on the drive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the shards of a run rest, as resolved. The default is the device for everything.

    Attributes:
        optimizer, parameters: a tier of collectives/trace.py.
        delay_after: after how many steps updates begin to come a step late; None: never.
    """

    optimizer: str = "device"
    optimizer_path: str | None = None
    optimizer_buffers: int = 4
    ratio: float = 1.0
    pipeline_read: bool = True
    pipeline_write: bool = True
    step_in_backward: bool = True
    delay_after: int | None = None
    parameters: str = "device"
    parameters_path: str | None = None
    parameter_buffers: int = 5
    pin_memory: bool = True

    @property
    def moves(self) -> bool:
        """Whether anything rests off the device."""
        return (self.optimizer, self.parameters) != ("device", "device")

    @classmethod
    def resolve(cls, stage: int, optimizer: OffloadOptimizerSection, parameters: OffloadParamSection) -> "Placement":
        """What the sections say together.

        Raises:
            ValueError: parameters off the device at a stage that keeps them whole, or keys that contradict each other.
        """
        if parameters.device != "none" and stage != 3:
            raise ValueError(
                f"offload_param.device = {parameters.device!r} and stage = {stage}; allowed: stage 3, where parameters"
                " are gathered for use"
            )
        if optimizer.delayed_update and optimizer.device == "none":
            raise ValueError("offload_optimizer.delayed_update = true and device = 'none'; allowed: 'cpu' or 'nvme'")
        if optimizer.delayed_update and optimizer.ratio < 1.0:
            raise ValueError(
                f"offload_optimizer.delayed_update = true and ratio = {optimizer.ratio}; allowed: ratio = 1, or some"
                " parameters would be a step older than others"
            )
        sections = [section for section in (optimizer, parameters) if section.device != "none"]
        return cls(
            optimizer="device" if optimizer.ratio == 0.0 else TIER[optimizer.device],
            optimizer_path=optimizer.nvme_path,
            optimizer_buffers=optimizer.buffer_count,
            ratio=optimizer.ratio,
            pipeline_read=optimizer.pipeline_read,
            pipeline_write=optimizer.pipeline_write,
            step_in_backward=optimizer.step_in_backward,
            delay_after=optimizer.delayed_update_after if optimizer.delayed_update else None,
            parameters=TIER[parameters.device],
            parameters_path=parameters.nvme_path,
            parameter_buffers=parameters.buffer_count,
            pin_memory=all(section.pin_memory for section in sections),
        )


def offloaded(elements: Sequence[int], ratio: float) -> list[bool]:
    """Which units rest off the device so that they hold a share `ratio` of the elements, whole units only.

    Args:
        elements: of the trainable units in the order in which backward finishes with them. The first ones go: what is
            stepped on the host first has most of the backward to hide behind (ZeRO-Offload++, Twin-Flow).

    Returns:
        One flag per unit. The share is met or exceeded by less than the last unit taken.
    """
    wanted = math.fsum(elements) * ratio
    flags, taken = [], 0
    for count in elements:
        flags.append(taken < wanted)
        taken += count * flags[-1]
    return flags
