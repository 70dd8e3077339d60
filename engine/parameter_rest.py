"""This rank's parameters of a unit, off the device: in host memory or in a file, and on their way up ahead of a gather.

Rajbhandari et al. 2021 (ZeRO-Infinity), section 5.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..collectives.trace import Copy, HostWork
from .nvme import File
from .tier import Slot, Tiers
from .transfer import FINISHED, Task


class ParameterRest:
    """This rank's parameters of one unit, s elements, off the device.

    Attributes:
        shard: [s] in host memory; None where they rest in a file.
    """

    def __init__(self, tiers: Tiers, label: str, values: Tensor) -> None:
        self.tiers, self.transfers = tiers, tiers.transfers
        self.tier = tiers.placement.parameters
        self.elements, self.dtype, self.device = values.numel(), values.dtype, values.device
        self.nbytes = values.numel() * values.element_size()
        self.shard: Tensor | None = None
        self._file: File | None = None
        self._changed: Task = FINISHED
        self._coming: Task | None = None
        self._near: Tensor | None = None
        self._slot: Slot | None = None
        if tiers.placement.parameters == "host":
            self.shard = self.transfers.empty(self.elements, self.dtype, "parameters")
            self.transfers.fill(self.shard, values)
        else:
            self._file = tiers.file(tiers.placement.parameters_path, "parameters", label, self.nbytes)
            tiers.parameter_slots.fit(self._file.nbytes)
            tiers.write_first(self._file, values)

    def fetch(self) -> None:
        """Start to bring them up, unless they are on their way or there is no room."""
        if self._coming is not None:
            return
        source, coming = self.shard, self._changed
        if self._file is not None:
            slot = self.tiers.parameter_slots.take()
            if slot is None:
                return
            coming = self.transfers.read(
                Copy("from_nvme", self._file.nbytes, "parameters"), self._file, slot.buffer, [self._changed, slot.last]
            )
            source = slot.buffer.view(0, self.elements, self.dtype)
            slot.holder, self._slot = self, slot
        assert source is not None
        self._near = source
        if not self.transfers.near:
            with self.transfers.observer.category("buffers"):
                self._near = torch.empty(self.elements, dtype=self.dtype, device=self.device)
            coming = self.transfers.copy(Copy("to_device", self.nbytes, "parameters"), source, self._near, [coming])
            self._give_back_slot(coming)
        self._coming = coming

    def copy_into(self, target: Tensor) -> None:
        """Their values into a tensor [s] of the device; what is computed next sees them."""
        while self._coming is None:
            self.fetch()
            if self._coming is None:
                self.tiers.parameter_slots.free_next()
        self._coming.wait()
        assert self._near is not None
        target.copy_(self._near)
        self._coming = self._near = None
        self._give_back_slot(FINISHED)

    def give_way(self) -> None:
        """Give way to a unit that is needed earlier."""
        assert self._coming is not None
        waiting, self._coming, self._near = self._coming, None, None
        self._give_back_slot(waiting)

    def _give_back_slot(self, last: Task) -> None:
        if self._slot is not None:
            self._slot.holder, self._slot.last = None, last
            self._slot = None

    def store(self, values: Tensor, after: Task) -> Task:
        """New values [s], which are in host memory when `after` has ended; the task is that they have been taken."""
        work = HostWork("parameters", self.nbytes, self.nbytes)
        return self._replace(lambda home, last: self.transfers.work(work, lambda: home.copy_(values), [after, last]))

    def store_down(self, values: Tensor) -> Task:
        """New values [s] from the device."""
        op = Copy("to_host", self.nbytes, "parameters")
        return self._replace(lambda home, last: self.transfers.copy(op, values, home, [last]))

    def _replace(self, start: Callable[[Tensor, Task], Task]) -> Task:
        if self._coming is not None:
            self.give_way()
        if self._file is None:
            assert self.shard is not None
            self._changed = start(self.shard, self._changed)
            return self._changed
        while (slot := self.tiers.parameter_slots.take()) is None:
            self.tiers.parameter_slots.free_next()
        filled = start(slot.buffer.view(0, self.elements, self.dtype), slot.last)
        self._changed = slot.last = self.transfers.write(
            Copy("to_nvme", self._file.nbytes, "parameters"), self._file, slot.buffer, [filled, self._changed]
        )
        return filled
