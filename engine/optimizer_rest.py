"""Master, moments and reduced gradient of a unit's shard, off the device: in host memory, or in a file but for a step.

Ren et al. 2021 (ZeRO-Offload), sections 3 and 4: gradients go down and stepped parameters come up, 2 + 2 bytes per
parameter of a 16-bit shard and step. Rajbhandari et al. 2021 (ZeRO-Infinity), section 5: the same with files below.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..collectives.trace import Copy, HostWork
from .nvme import PAGE, Buffer, File, whole_pages
from .tier import Slot, StateLayout, Tiers
from .transfer import FINISHED, Task


class OptimizerRest:
    """Master, moments and reduced gradient of one unit's shard of s elements, off the device.

    Attributes:
        gradient: [s] in host memory, in the dtype of the gradients.
        master: [s] what the optimizer steps. Where it rests in a file, it has no elements but during a step.
        outgoing: [s] stepped parameters on their way back, where the master cannot serve: the gradient's memory, which
            is free by then, unless its dtype is another, or updates come late and meet the next gradient there.
    """

    def __init__(
        self,
        tiers: Tiers,
        label: str,
        shard: Tensor,
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
        layout: StateLayout,
    ) -> None:
        self.tiers, self.transfers, self.label = tiers, tiers.transfers, label
        placement, elements = tiers.placement, shard.numel()
        self.tier = placement.optimizer
        self.elements, self.layout = elements, layout
        self.gradient = self.transfers.empty(elements, gradient_dtype, "gradients")
        self.arrived: Task = FINISHED
        self.stepped: Task = FINISHED
        self.sent: Task = FINISHED
        self._fetched: Task | None = None
        self._slot: Slot | None = None
        self._at: Buffer | None = None
        self._written: Task = FINISHED
        self._kept: dict[tuple[int, str], Tensor] = {}
        self._bound: list[tuple[Tensor, int, int]] = []
        self._file: File | None = None
        if placement.optimizer == "host":
            self.master = self.transfers.empty(elements, dtype, "optimizer")
            self.transfers.fill(self.master, shard)
        else:
            self._lay_out_file(shard, dtype)
        tiers.staging.fit(PAGE + elements * gradient_dtype.itemsize)
        same = self._file is None and dtype == shard.dtype
        self.outgoing = self.master if same else self.gradient
        if not same and (placement.delay_after is not None or gradient_dtype != shard.dtype):
            self.outgoing = self.transfers.empty(elements, shard.dtype, "buffers")

    def _lay_out_file(self, shard: Tensor, dtype: torch.dtype) -> None:
        """Master, then each moment: regions of s elements."""
        self._regions: dict[str, int] = {}
        end = whole_pages(self.elements * dtype.itemsize)
        for name, kind in self.layout.items():
            self._regions[name] = end
            end += whole_pages(self.elements * kind.itemsize)
        self._file = self.tiers.file(self.tiers.placement.optimizer_path, "optimizer", self.label, end)
        self.tiers.optimizer_slots.fit(self._file.nbytes)
        self.master = torch.empty(0, dtype=dtype, device=self.gradient.device)
        self._bound.append((self.master, 0, self.elements))
        self.tiers.write_first(self._file, shard.to(dtype))

    @property
    def in_file(self) -> bool:
        """Whether master and moments rest in a file."""
        return self._file is not None

    # Gradients #

    def take(self, chunk: Tensor, add: bool) -> None:
        """A reduced gradient [s] of the device goes down; `add` to what came in earlier micro-steps."""
        nbytes = chunk.numel() * chunk.element_size()
        down = Copy("to_host", nbytes, "gradients")
        if not add:
            self.arrived = self.transfers.copy(down, chunk, self.gradient, [self.stepped, self.sent])
            return
        slot = self.tiers.staging.take()
        assert slot is not None
        staged = slot.buffer.view(0, chunk.numel(), chunk.dtype)
        landed = self.transfers.copy(down, chunk, staged, [slot.last])
        work = HostWork("accumulate", 2 * nbytes, nbytes)
        self.arrived = self.transfers.work(work, lambda: self.gradient.add_(staged), [landed, self.arrived])
        slot.last = self.arrived

    def norm(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Norm of the gradient as a scalar of `dtype` on the device."""
        result = torch.empty((), dtype=dtype, device=self.gradient.device)
        work = HostWork("norm", self.gradient.numel() * self.gradient.element_size(), 0)
        done = self.transfers.work(
            work, lambda: result.copy_(torch.linalg.vector_norm(self.gradient, dtype=dtype)), [self.arrived]
        )
        return self.transfers.lift(result, device, done)

    # Steps #

    def give_way(self) -> None:
        raise AssertionError("what is fetched for a step is stepped before the next unit needs its buffer")

    def piece(self, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the master, as a tensor of its own that the optimizer may hold for ever."""
        if self._file is None:
            return self.master[start:stop]
        tensor = self.master.new_empty(0)
        self._bound.append((tensor, start * self.master.element_size(), stop - start))
        return tensor

    def fetch(self) -> None:
        """Start to read the state, if it rests in a file and a buffer is free."""
        if self._file is None or self._fetched is not None:
            return
        slot = self.tiers.optimizer_slots.take()
        if slot is None:
            return
        after = [slot.last, self._written] + ([] if self.tiers.placement.pipeline_read else [self.tiers.last_step])
        slot.holder, self._slot = self, slot
        self._fetched = self.transfers.read(
            Copy("from_nvme", self._file.nbytes, "optimizer state"), self._file, slot.buffer, after
        )

    def step(self, job: Callable[[], object]) -> None:
        """Start `job` when gradient and state are there: it steps the master and leaves the result in `outgoing`."""
        after = [self.arrived, self.sent]
        if self._file is not None:
            self.fetch()
            assert self._fetched is not None, "every unit that was fetched before is stepped before"
            after += [self._fetched] + ([] if self.tiers.placement.pipeline_write else [self.tiers.last_write])
        slot, self._fetched = self._slot, None

        def perform() -> None:
            self._bind(slot)
            job()
            self._unbind()

        self.stepped = self.tiers.last_step = self.transfers.work(self._work(), perform, after)
        if self._file is not None and slot is not None:
            self._written = self.tiers.last_write = self.transfers.write(
                Copy("to_nvme", self._file.nbytes, "optimizer state"), self._file, slot.buffer, [self.stepped]
            )
            slot.last, slot.holder = self._written, None

    def _work(self) -> HostWork:
        """Each value once: gradient, master and moments are read, master and moments (and a copy) are written."""
        each = self.master.element_size() + sum(dtype.itemsize for dtype in self.layout.values())
        state = self.elements * each
        gradient = self.elements * self.gradient.element_size()
        copy = 0 if self.outgoing is self.master else self.elements * self.outgoing.element_size()
        return HostWork("step", state + gradient, state + copy)

    def _bind(self, slot: Slot | None) -> None:
        if slot is None:
            return
        self._at = slot.buffer
        for tensor, offset, elements in self._bound:
            tensor.data = slot.buffer.view(offset, elements, tensor.dtype)

    def _unbind(self) -> None:
        for tensor, _, _ in self._bound:
            tensor.data = tensor.new_empty(0)

    def keep(self, start: int, state: Mapping) -> None:
        """What the optimizer keeps for the piece that begins at `start`, after each step: new tensors rest here too."""
        for name, value in state.items():
            if name not in self.layout or self._kept.get((start, name)) is value:
                continue
            self._kept[start, name] = value
            if self._file is None:
                self.transfers.adopt(value)
                continue
            assert self._at is not None
            offset = self._regions[name] + start * value.element_size()
            home = self._at.view(offset, value.numel(), value.dtype)
            home.copy_(value)
            value.data = home
            self._bound.append((value, offset, value.numel()))

    def send(self, shard: Tensor) -> None:
        """The stepped parameters go up into the device's shard [s]; what is computed next sees them."""
        nbytes = shard.numel() * shard.element_size()
        sent = self.transfers.copy(Copy("to_device", nbytes, "parameters"), self.outgoing, shard, [self.stepped])
        sent.wait()
        self.stepped = FINISHED
        # Whatever comes down next does so after the computation that has waited. A late update asks for nothing new.
        self.sent = sent if self.tiers.placement.delay_after is not None else FINISHED

    def set(self, values: Tensor) -> None:
        """Step on from `values` [s] of the device."""
        with self.present():
            self.master.copy_(values)
        if self.outgoing is not self.master and self.outgoing is not self.gradient:
            self.outgoing.copy_(values)

    @contextmanager
    def present(self, *, changed: bool = True) -> Iterator[None]:
        """Master and moments in host memory, for this thread to read; if so `changed`, they go back to their file."""
        self.stepped.block()
        if self._file is None:
            yield
            return
        self.fetch()
        assert self._fetched is not None
        assert self._slot is not None
        self._fetched.block()
        slot, self._fetched = self._slot, None
        self._bind(slot)
        try:
            yield
        finally:
            self._unbind()
            if changed:
                self._written = slot.last = self.transfers.write(
                    Copy("to_nvme", self._file.nbytes, "optimizer state"), self._file, slot.buffer
                )
            slot.holder = None
