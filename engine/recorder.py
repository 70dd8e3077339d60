"""Writes down what a flight does: every operator as a Kernel, every storage's life, every collective and wait."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..collectives.trace import (
    Alloc,
    Call,
    Collective,
    Copy,
    Free,
    HostWork,
    Op,
    Phase,
    Ref,
    Segment,
    Synchronize,
    Trace,
    Wait,
)
from .observer import Observer
from .operators import describe

DEVICE = torch.ops.prim.device.default
"""What a fake tensor's `device` is dispatched as."""

NEIGHBOURHOOD = 4
"""A Ref to a block at most this far away is relative: what reaches that far moves along with the block."""

DEFAULT_CATEGORY = {"initialize": "parameters", "forward": "activations", "input": "activations"}
"""Category of a storage by the first word of the segment that makes it; elsewhere it is temporary."""


class Address(NamedTuple):
    """Where an op was recorded: number `run` of the runs of segment `key` at `block`, position `op`."""

    key: str
    block: int
    run: int
    op: int


class Recorder(Observer):
    """An observer that keeps everything. Use it inside its `watching()`."""

    def __init__(self, world: dict[str, int]) -> None:
        self.world = world
        self._runs: Counter[tuple[str, int]] = Counter()
        self._ops: list[Op] = []
        self._key, self._block = "initialize.begin", -1
        self._category: str | None = None
        self._calls: list[Call] = []
        self._segments: dict[Segment, int] = {}
        self._phases: list[Phase] = []
        self._phase = ("initialize", 0, 1)
        self._storages: dict[int, tuple[Address, weakref.ref]] = {}
        self.blocks = 0

    # What the engine tells #

    def enter(self, key: str, block: int) -> None:
        self._close_segment()
        self._key, self._block = key, block

    def phase(self, name: str, step: int, every: int = 1) -> None:
        self._close_segment()
        self._close_phase()
        self._phase = (name, step, every)
        self.enter(f"{name}.begin", -1)

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        before, self._category = self._category, name
        try:
            yield
        finally:
            self._category = before

    def synchronized(self) -> None:
        self._append(Synchronize())

    def released(self, tensor: Tensor) -> None:
        address, _ = self._storages.pop(tensor.untyped_storage()._cdata)
        self._append(Free(self._ref(address)))

    def restored(self, tensor: Tensor, category: str) -> None:
        with self.category(category):
            self._allocated(tensor)

    def collective(self, op: Collective) -> Address:
        """Record the start of a collective; its address is what `wait` wants."""
        return self._append(op)

    def wait(self, started: Address) -> None:
        self._append(Wait(self._ref(started)))

    def moves(self, op: Copy | HostWork) -> Address:
        return self._append(op)

    def awaits(self, started: Address, stream: str) -> None:
        self._append(Wait(self._ref(started), stream))

    def rests(self, tier: str, nbytes: int, category: str) -> Address:
        return self._append(Alloc(nbytes, category, tier))

    def leaves(self, taken: Address) -> None:
        self._append(Free(self._ref(taken)))

    # What the dispatcher shows #

    def watching(self) -> "_Watch":
        """A dispatch mode that records every operator run inside it."""
        return _Watch(self)

    def operator(self, function: Any, arguments: tuple, keywords: dict, result: Any) -> None:
        operands = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not any(tensor.device.type == "sim" for tensor in (*operands, *results)):
            return
        kernel = describe(function, operands, arguments, results)
        for tensor in results:
            if tensor.untyped_storage()._cdata not in self._storages and tensor.untyped_storage().nbytes() > 0:
                self._allocated(tensor)
        if kernel is not None:
            self._append(kernel)

    # The trace #

    def trace(self) -> Trace:
        """All that was recorded. The recorder is done after that."""
        self._close_segment()
        self._close_phase()
        return Trace(self.world, self.blocks, tuple(self._segments), tuple(self._phases))

    def _append(self, op: Op) -> Address:
        if not self._ops:  # a segment without ops is not called, and so does not count as a run
            self._runs[self._key, self._block] += 1
        self._ops.append(op)
        return Address(self._key, self._block, self._runs[self._key, self._block], len(self._ops) - 1)

    def _allocated(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        category = self._category or DEFAULT_CATEGORY.get(self._key.partition(".")[0], "temporary")
        if category == "optimizer" and tensor.dim() == 0:
            category = "counters"
        address = self._append(Alloc(storage.nbytes(), category))
        number = storage._cdata
        self._storages[number] = (address, weakref.ref(storage, lambda _: self._died(number, address)))

    def _died(self, number: int, address: Address) -> None:
        """A storage's last reference is gone; its number may already serve another one."""
        held = self._storages.get(number)
        if held is not None and held[0] == address:
            del self._storages[number]
            self._append(Free(self._ref(address)))

    def _ref(self, target: Address) -> Ref:
        distance = target.block - self._block
        inside = 0 <= target.block < self.blocks and 0 <= self._block < self.blocks
        relative = distance == 0 or (inside and abs(distance) <= NEIGHBOURHOOD)
        begun = bool(self._ops) or (target.key, target.block) != (self._key, self._block)
        age = self._runs[target.key, target.block] + (not begun) - target.run
        return Ref(target.key, distance if relative else target.block, relative, age, target.op)

    def _close_segment(self) -> None:
        if self._ops:
            number = self._segments.setdefault(tuple(self._ops), len(self._segments))
            self._calls.append(Call(number, self._key, self._block))
            self._ops = []

    def _close_phase(self) -> None:
        name, step, every = self._phase
        if self._calls:
            self._phases.append(Phase(name, step, tuple(self._calls), every=every))
            self._calls = []


class _Watch(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is DEVICE and isinstance(args[0], FakeTensor):
            return args[
                0
            ].fake_device  # asked for twice per operator; the way through the fake mode takes as long as it
        result = function(*args, **(kwargs or {}))
        if function.namespace != "prim":
            self.recorder.operator(function, args, kwargs or {}, result)
        return result
