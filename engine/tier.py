"""What one rank keeps off its device: its files, and the buffers that its units share.

An `OptimizerRest` holds what the optimizer needs of a unit's shard (master, moments, reduced gradient), a
`ParameterRest` the shard of the parameters itself. A unit without them keeps everything on the device. Both only ask
`Transfers` for copies, reads and writes and say what comes after what.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..collectives.trace import HostWork
from .nvme import Buffer, File, Folder
from .placement import Placement
from .transfer import FINISHED, Task, Transfers

STAGING = 2
"""Gradients that wait on the host to be added to those of earlier micro-steps: one lands while one is added."""

StateLayout = Mapping[str, torch.dtype]
"""What an optimizer keeps per element, by name: its moments."""


def state_layout(kind: Callable[..., torch.optim.Optimizer], arguments: Mapping, dtype: torch.dtype) -> StateLayout:
    """What an optimizer keeps for each element of a parameter of `dtype`: it steps two elements to show it."""
    probe = torch.zeros(2, dtype=dtype, device="cpu")
    probe.grad = torch.zeros_like(probe)
    optimizer = kind([probe], **arguments)
    optimizer.step()
    return {
        name: value.dtype
        for name, value in optimizer.state[probe].items()
        if isinstance(value, Tensor) and value.shape == probe.shape
    }


class Holder(Protocol):
    """Who has asked for what is in a buffer."""

    def give_way(self) -> None:
        """Leave the buffer, to ask again later; only who can do without it is asked to."""


@dataclass(slots=True)
class Slot:
    """Host memory that units use in turn: free when `last` has ended, unless `holder` still needs what is there."""

    buffer: Buffer
    last: Task = FINISHED
    holder: "Holder | None" = None


@dataclass(slots=True)
class Slots:
    """`count` buffers, each as large as the largest that was asked for."""

    transfers: Transfers
    count: int
    nbytes: int = 0
    _slots: list[Slot] = field(default_factory=list)
    _turn: int = 0

    def fit(self, nbytes: int) -> None:
        self.nbytes = max(self.nbytes, nbytes)

    def make(self) -> None:
        """Take the memory, once all units are known, and touch it: page faults would count as the first steps' time."""
        for _ in range(self.count if self.nbytes else 0):
            buffer = self.transfers.buffer(self.nbytes)
            touched = self.transfers.work(HostWork("first touch", 0, self.nbytes), buffer.tensor.zero_)
            self._slots.append(Slot(buffer, touched))

    def take(self) -> Slot | None:
        """The next buffer in turn, or None while a unit needs what is in it."""
        slot = self._slots[self._turn % self.count]
        if slot.holder is not None:
            return None
        self._turn += 1
        return slot

    @property
    def made(self) -> bool:
        return bool(self._slots)

    def free_next(self) -> None:
        """Take the buffer whose turn it is from the unit that holds it."""
        holder = self._slots[self._turn % self.count].holder
        assert holder is not None
        holder.give_way()


class Tiers:
    """What one rank keeps off its device, and the buffers that its units share.

    Attributes:
        transfers: moves the bytes.
    """

    def __init__(self, placement: Placement, transfers: Transfers, rank: int) -> None:
        self.placement, self.transfers, self.rank = placement, transfers, rank
        self.optimizer_slots = Slots(transfers, placement.optimizer_buffers)
        self.parameter_slots = Slots(transfers, placement.parameter_buffers)
        self.staging = Slots(transfers, STAGING)
        self.last_step: Task = FINISHED
        self.last_write: Task = FINISHED
        self.file_bytes = 0
        self._folders: dict[str, Folder] = {}

    def file(self, path: str | None, category: str, label: str, nbytes: int) -> File:
        """A new file for `nbytes` of a category of collectives/trace.py."""
        assert path is not None
        if path not in self._folders:
            self._folders[path] = self.transfers.folder(path, self.rank)
        file = self._folders[path].file(f"{category} of {label}", nbytes)
        self.file_bytes += file.nbytes
        self.transfers.observer.rests("nvme", file.nbytes, category)
        return file

    def make_buffers(self, adds: bool) -> None:
        """Take the memory that units share; `adds`: several micro-steps add to the gradients on the host."""
        self.optimizer_slots.make()
        self.parameter_slots.make()
        if adds:
            self.staging.make()

    def write_first(self, file: File, values: Tensor) -> None:
        """A new file: `values` at the start of the payload, zeros elsewhere."""
        if values.device.type == "sim":
            return
        buffer = Buffer(file.nbytes)
        buffer.view(0, values.numel(), values.dtype).copy_(values)
        file.write(buffer)

    def close(self) -> None:
        """Wait for what is under way, end the threads, remove the files."""
        try:
            self.transfers.drain()
        finally:
            self.transfers.close()
            for folder in self._folders.values():
                folder.close()
            self._folders.clear()
