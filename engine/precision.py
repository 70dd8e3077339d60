"""In which formats a run computes, as its config says it: bf16, fp16, gradients of their own dtype, autocast.

Keys and defaults are DeepSpeed's. What is not honoured is refused by name, with what to write instead.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from ..reading import STRICT
from .loss_scale import ScalePolicy

Format = Literal["fp32", "bf16", "fp16"]

AUTOCAST_FORMATS: dict[str, Literal["bf16", "fp16"]] = {
    "bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16",
}  # fmt: skip
"""Our name of a `torch_autocast.dtype`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bf16Section:
    """`bf16`.

    Attributes:
        enabled: parameters and gradients in bfloat16, fp32 masters in the optimizer's shards.
        check_grad_overflow: a step with a gradient that is inf or nan is skipped; else it is taken, as torch would.
    """

    __pydantic_config__ = STRICT
    enabled: bool = False
    check_grad_overflow: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp16Section:
    """`fp16`: as `bf16` in half precision, with a loss scale (engine/loss_scale.py) that is also that of autocast.

    Attributes:
        enabled: parameters and gradients in float16, fp32 masters in the optimizer's shards.
        loss_scale: a static scale; 0 for a dynamic one, which all keys below are about.
        initial_scale_power: the first scale is 2 to this power.
        loss_scale_window: clean steps before the scale doubles.
        hysteresis: overflows until it halves.
        consecutive_hysteresis: a clean step in between starts that count afresh.
        min_loss_scale: an overflow at this scale ends the training.
    """

    __pydantic_config__ = STRICT
    enabled: bool = False
    loss_scale: float = 0.0
    initial_scale_power: int = 16
    loss_scale_window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.loss_scale < math.inf:
            raise ValueError(f"loss_scale = {self.loss_scale}; allowed: a static scale > 0, or 0 for a dynamic one")
        if not 0 <= self.initial_scale_power <= 126:
            raise ValueError(f"initial_scale_power = {self.initial_scale_power}; allowed: 0 to 126")
        for name in ("loss_scale_window", "hysteresis"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; allowed: an integer >= 1")
        if not 0 < self.min_loss_scale <= 2.0**self.initial_scale_power:
            raise ValueError(
                f"min_loss_scale = {self.min_loss_scale}; allowed: above 0, at most the first scale"
                f" 2^{self.initial_scale_power}"
            )

    @property
    def policy(self) -> ScalePolicy:
        return ScalePolicy(
            initial=self.loss_scale or 2.0**self.initial_scale_power,
            skip=True,
            dynamic=self.loss_scale == 0,
            window=self.loss_scale_window,
            hysteresis=self.hysteresis,
            consecutive=self.consecutive_hysteresis,
            floor=self.min_loss_scale,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTypes:
    """`data_types`.

    Attributes:
        grad_accum_dtype: in which gradients are added up over micro-steps and reduced over ranks; by default that of
            the parameters.
    """

    __pydantic_config__ = STRICT
    grad_accum_dtype: Format | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AutocastSection:
    """`torch_autocast`.

    Attributes:
        enabled: forward runs under torch.autocast; parameters, gradients and optimizer stay as the model is.
        dtype: of the operators that torch calls safe in it; fp16 has the loss scale of the section `fp16`.
    """

    __pydantic_config__ = STRICT
    enabled: bool = False
    dtype: Literal["bfloat16", "bf16", "float16", "fp16"] = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The formats of a run.

    Attributes:
        parameters: "as is" keeps the model's own.
        gradients: in which gradients are accumulated and reduced; "as parameters" keeps theirs.
        autocast: of the operators that torch.autocast takes down; "off" leaves them alone.
        scaling: of the loss, and what happens to a step with gradients that are not finite.
    """

    parameters: Literal["as is", "bf16", "fp16"] = "as is"
    gradients: Literal["as parameters"] | Format = "as parameters"
    autocast: Literal["off", "bf16", "fp16"] = "off"
    scaling: ScalePolicy = field(default_factory=ScalePolicy)


def precision(
    bf16: Bf16Section,
    fp16: Fp16Section,
    types: DataTypes,
    autocast: AutocastSection,
    *,
    lossy: bool,
    where: str,
) -> Precision:
    """What the sections say together.

    Args:
        lossy: gradients or parameters travel in a format in which they may overflow on the way.
        where: what an error calls the config.

    Raises:
        ValueError: more than one of the three precisions is enabled.
    """
    switches = {"bf16": bf16.enabled, "fp16": fp16.enabled, "torch_autocast": autocast.enabled}
    on = [f"{name}.enabled" for name, enabled in switches.items() if enabled]
    if len(on) > 1:
        raise ValueError(f"{where}: {' and '.join(on)} are both true; allowed: at most one of them")
    cast = AUTOCAST_FORMATS[autocast.dtype] if autocast.enabled else "off"
    scaled = fp16.enabled or cast == "fp16"
    return Precision(
        parameters="bf16" if bf16.enabled else "fp16" if fp16.enabled else "as is",
        gradients=types.grad_accum_dtype or "as parameters",
        autocast=cast,
        scaling=fp16.policy if scaled else ScalePolicy(skip=lossy or (bf16.enabled and bf16.check_grad_overflow)),
    )
