"""Bytes in use through a step, by category, in the order of the program, and what the allocator holds for them.

A caching allocator hands out and takes back memory when the program says so, whatever the device is doing then, so
memory needs no clock: one walk over the trace gives the peak. On a GPU the walk plays PyTorch's caching allocator
(allocator.py); on a CPU, storages are counted as they are.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from ..collectives.trace import CATEGORIES, Alloc, Collective, Copy, Kernel, Segment, Trace
from .allocator import Block, CachingAllocator, OutOfMemoryError
from .framework import framework_bytes
from .hardware import Processor
from .storages import Moment, Tiers, moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """The first request that the device cannot serve.

    Attributes:
        phase: of the step, as the trace names it: "micro-step first", "forward middle 0", "update", ...; "initialize"
            where what training begins with is too much.
        micro_batch: of the step; None outside of them.
        block: of the model; None outside of the repeated ones.
        segment: what the program was doing, e.g. "forward".
        op: for which the bytes were asked.
        category, requested_bytes: of the request; no bytes where what training begins with is too much.
        live_bytes: in use just before, by category.
        reserved_bytes: held by the allocator then, after cached memory went back.
        limit_bytes: what the device has for it.
    """

    phase: str
    micro_batch: int | None
    block: int | None
    segment: str
    op: str
    category: str
    requested_bytes: int
    live_bytes: Mapping[str, int]
    reserved_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What one rank uses.

    Attributes:
        peak: bytes by category at the instant of the largest total, each storage rounded up as the allocator does.
        allocated_bytes: of the blocks that hold them at most; larger where what is left of a block is not split off.
            `torch.cuda.max_memory_allocated` counts these.
        reserved_bytes: what the allocator holds at most (`torch.cuda.max_memory_reserved`).
        segments: in how many stretches, at the end.
        state: bytes of parameters, gradients and optimizer values when the last step has ended.
        left: bytes of everything then, by category.
        changes: (number of the op in program order, category, bytes more or less), training and what precedes it.
        marks: (number of the first op, name) of each phase that was walked.
        elsewhere: bytes by tier that rest off the device, buffers for their sake included.
        framework_bytes: outside of the allocator.
        excess: the first request that the device could not serve; the walk went on as if it could. None: it fits.
    """

    peak: dict[str, int]
    allocated_bytes: int
    reserved_bytes: int
    segments: int
    state: dict[str, int]
    left: dict[str, int]
    changes: tuple[tuple[int, str, int], ...]
    marks: tuple[tuple[int, str], ...]
    elsewhere: dict[str, int]
    framework_bytes: int
    excess: Excess | None

    @property
    def total_bytes(self) -> int:
        return sum(self.peak.values())

    @property
    def fragmentation_bytes(self) -> int:
        """Held at most, less in use at most: what holes and remainders cost."""
        return self.reserved_bytes - self.total_bytes

    @property
    def events(self) -> tuple[tuple[int, int], ...]:
        """(number of the op, bytes in use) at each change."""
        total, events = 0, []
        for number, _, change in self.changes:
            total += change
            events.append((number, total))
        return tuple(events)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTimeline:
    """Bytes in use after each change, for a stacked plot.

    Attributes:
        ops: number of the op in program order.
        bytes_by_category: for each of CATEGORIES, a value for each op.
        marks: (number of the first op, name) of each phase.
    """

    ops: tuple[int, ...]
    bytes_by_category: Mapping[str, tuple[int, ...]]
    marks: tuple[tuple[int, str], ...]


def memory_timeline(memory: Memory) -> MemoryTimeline:
    """The course of the bytes by category; of changes at one op the last counts."""
    now = dict.fromkeys(CATEGORIES, 0)
    after: dict[int, tuple[int, ...]] = {}
    for number, category, change in memory.changes:
        now[_category(category)] += change
        after[number] = tuple(now.values())
    columns = zip(*after.values(), strict=True) if after else ((),) * len(CATEGORIES)
    return MemoryTimeline(
        ops=tuple(after), bytes_by_category=dict(zip(CATEGORIES, columns, strict=True)), marks=memory.marks
    )


def replay_memory(trace: Trace, processor: Processor, *, expandable_segments: bool = False) -> Memory:
    """Walk the trace with the allocator of `processor`.

    How the model was built is no part of a step: when training begins, what is free as a whole has gone back to the
    device, and peaks count from there.

    Args:
        expandable_segments: of the CUDA allocator.

    Raises:
        ValueError: the trace frees what it never allocated.
    """
    outside = framework_bytes(trace, processor)
    ledger = Ledger(trace.segments, processor, outside, expandable_segments=expandable_segments)
    elsewhere = Tiers()
    at = (-1, -1)
    for moment in moments(trace):
        if (moment.phase, moment.run) != at:
            at = (moment.phase, moment.run)
            phase = trace.phases[moment.phase]
            if phase.step > 0:
                ledger.begin()
            ledger.enter(moment.number, phase.name, _micro_batch(trace, *at))
        if moment.alloc.tier != "device":
            elsewhere.change(moment.alloc, moment.comes)
        elif moment.comes:
            ledger.take(moment.number, moment.storage, moment.alloc, moment)
        else:
            ledger.give(moment.number, moment.storage)
    return ledger.memory(elsewhere.most)


def _micro_batch(trace: Trace, number: int, run: int) -> int | None:
    """Which micro-batch of its step a phase works on; None if it is no micro-step."""
    phase = trace.phases[number]
    if not phase.name.startswith("micro-step"):
        return None
    before = (each for each in trace.phases[:number] if each.step == phase.step)
    return sum(each.repeat for each in before if each.name.startswith("micro-step")) + run


class Ledger:
    """Who has what of the device's memory, as a program takes it and gives it back."""

    def __init__(
        self,
        segments: Sequence[Segment],
        processor: Processor,
        framework_bytes: int,
        *,
        expandable_segments: bool = False,
    ) -> None:
        """
        Args:
            segments: of the trace, to name the op for which a storage comes.
            framework_bytes: that the process takes outside of the allocator.
        """
        self._segments, self._processor, self._framework_bytes = segments, processor, framework_bytes
        self._allocator = CachingAllocator(rounding=processor.allocation_bytes, expandable=expandable_segments)
        self._blocks: dict[Hashable, tuple[str, int, Block | None]] = {}
        self._now = dict.fromkeys((*CATEGORIES, "counters"), 0)
        self._peak = dict(self._now)
        self._total = self._peak_total = self._peak_allocated = 0
        self._changes: list[tuple[int, str, int]] = []
        self._marks: list[tuple[int, str]] = []
        self._excess: Excess | None = None
        self._training = False
        self._phase = "initialize"
        self._micro_batch: int | None = None

    def begin(self) -> None:
        """Training begins: the device's limit counts, and peaks do."""
        if self._training:
            return
        self._training = True
        self._peak, self._peak_total = dict(self._now), self._total
        self._allocator.empty_cache()
        self._allocator.begin()
        self._peak_allocated = self._allocator.allocated_bytes
        if self._held > self._limit:
            self._exceed("training begins", "parameters", 0, None)
        else:
            self._allocator.limit_bytes = self._limit

    def enter(self, number: int, phase: str, micro_batch: int | None) -> None:
        """What follows, from op `number` on, is part of a phase."""
        self._phase, self._micro_batch = phase, micro_batch
        self._marks.append((number, phase))

    def take(self, number: int, key: Hashable, alloc: Alloc, moment: Moment | None = None) -> None:
        """A storage comes at op `number`; `key` names it until it goes.

        Args:
            moment: where in the trace it does; None if the trace does not show it.
        """
        size = -(-alloc.nbytes // self._processor.allocation_bytes) * self._processor.allocation_bytes
        self._blocks[key] = (alloc.category, size, self._block(size, alloc, moment))
        self._change(number, alloc.category, size)
        if self._total > self._peak_total:
            self._peak, self._peak_total = dict(self._now), self._total
        self._peak_allocated = max(self._peak_allocated, self._allocator.allocated_bytes)

    def give(self, number: int, key: Hashable) -> None:
        """A storage goes."""
        category, size, block = self._blocks.pop(key)
        if block is not None:
            self._allocator.free(block)
        self._change(number, category, -size)

    def holds(self, key: Hashable) -> bool:
        return key in self._blocks

    def memory(self, elsewhere: dict[str, int]) -> Memory:
        """What was seen."""
        paged = self._processor.kind == "gpu"
        return Memory(
            peak=_merged(self._peak),
            allocated_bytes=self._peak_allocated if paged else self._peak_total,
            reserved_bytes=self._allocator.most_reserved_bytes if paged else self._peak_total,
            segments=self._allocator.segments,
            state={name: self._now[name] for name in ("parameters", "gradients", "optimizer")},
            left=_merged(self._now),
            changes=tuple(self._changes),
            marks=tuple(self._marks),
            elsewhere=elsewhere,
            framework_bytes=self._framework_bytes,
            excess=self._excess,
        )

    @property
    def _held(self) -> int:
        return self._allocator.reserved_bytes if self._processor.kind == "gpu" else self._total

    @property
    def _limit(self) -> int:
        return self._processor.memory_bytes - self._framework_bytes

    def _block(self, size: int, alloc: Alloc, moment: Moment | None) -> Block | None:
        """Of the allocator; None where there is none."""
        if self._processor.kind != "gpu":
            if self._training and self._excess is None and self._total + size > self._limit:
                self._exceed(_wants(self._segments, moment), alloc.category, alloc.nbytes, moment)
            return None
        try:
            return self._allocator.allocate(size)
        except OutOfMemoryError:
            self._exceed(_wants(self._segments, moment), alloc.category, alloc.nbytes, moment)
            return self._allocator.allocate(size)

    def _exceed(self, op: str, category: str, nbytes: int, moment: Moment | None) -> None:
        """Note the first request too many; from here on the device has no limit, to show how much it would take."""
        self._allocator.limit_bytes = math.inf
        self._excess = Excess(
            phase=self._phase,
            micro_batch=self._micro_batch,
            block=moment.call.block if moment is not None and moment.call.block >= 0 else None,
            segment=moment.call.key if moment is not None else self._phase,
            op=op,
            category=_category(category),
            requested_bytes=nbytes,
            live_bytes=_merged(self._now),
            reserved_bytes=self._held,
            limit_bytes=self._limit,
        )

    def _change(self, number: int, category: str, nbytes: int) -> None:
        self._now[category] += nbytes
        self._total += nbytes
        self._changes.append((number, category, nbytes))


def _wants(segments: Sequence[Segment], moment: Moment | None) -> str:
    """The op for which a storage comes: the next one that does something."""
    if moment is None:
        return "a message between stages"
    for op in segments[moment.call.segment][moment.position + 1 :]:
        match op:
            case Kernel():
                return op.name
            case Collective():
                return f"{op.kind} of {op.label}"
            case Copy():
                return f"copy of {op.label} {op.direction.replace('_', ' ')}"
    return f"what follows {moment.call.key}"


def _category(name: str) -> str:
    """The optimizer's counters count as optimizer."""
    return "optimizer" if name == "counters" else name


def _merged(by_category: Mapping[str, int]) -> dict[str, int]:
    merged = {name: by_category[name] for name in CATEGORIES}
    merged["optimizer"] += by_category["counters"]
    return merged
