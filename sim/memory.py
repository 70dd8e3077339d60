"""Bytes in use through a step, by category, in the order of the program.

A caching allocator hands out and takes back memory when the program says so, whatever the device is doing then, so
memory needs no clock: one walk over the trace gives the peak.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ..collectives.trace import CATEGORIES, TIERS, Alloc, Free, Trace
from .hardware import Processor

SMALL_BYTES = 1 << 20
SEGMENT_BYTES = 2 << 20
"""The CUDA caching allocator serves requests up to 1 MiB from segments of 2 MiB and rounds large segments to 2 MiB
(c10/cuda/CUDACachingAllocator.h: kSmallSize, kSmallBuffer, kRoundLarge)."""

MOST_REPEATS = 2
"""A phase that repeats leaves behind what it found, so twice shows its peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What one rank uses.

    Attributes:
        peak: bytes by category at the instant of the largest total.
        reserved_bytes: what the allocator holds at most; fragmentation is not in it.
        state: bytes of parameters, gradients and optimizer values when the last step has ended.
        left: bytes of everything then, by category.
        events: (number of the op in program order, bytes in use) at each change, for timelines.
        elsewhere: bytes by tier that rest off the device, buffers for their sake included.
    """

    peak: dict[str, int]
    reserved_bytes: int
    state: dict[str, int]
    left: dict[str, int]
    events: tuple[tuple[int, int], ...]
    elsewhere: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.peak.values())


def replay_memory(trace: Trace, processor: Processor) -> Memory:
    """Walk the trace with the allocator of `processor`.

    Raises:
        ValueError: the trace frees what it never allocated.
    """
    allocator = _Allocator(processor)
    built = sum(len(trace.segments[call.segment]) for phase in trace.phases if phase.step == 0 for call in phase.calls)
    for number, alloc, sign in _changes(trace):
        if number > built:
            allocator.begin()
        if alloc.tier == "device":
            allocator.change(number, alloc, sign)
    now = allocator.now
    return Memory(
        peak=_merged(allocator.peak),
        reserved_bytes=allocator.reserved if processor.kind == "gpu" else sum(allocator.peak.values()),
        state={name: now[name] for name in ("parameters", "gradients", "optimizer")},
        left=_merged(now),
        events=tuple(allocator.events),
        elsewhere=_elsewhere(trace),
    )


def _elsewhere(trace: Trace) -> dict[str, int]:
    """Bytes of the tiers below the device, at most."""
    now = {tier: 0 for tier in TIERS if tier != "device"}
    most = dict(now)
    for _, alloc, sign in _changes(trace):
        if alloc.tier in now:
            now[alloc.tier] += sign * alloc.nbytes
            most[alloc.tier] = max(most[alloc.tier], now[alloc.tier])
    return most


def _changes(trace: Trace) -> Iterator[tuple[int, Alloc, int]]:
    """(number of the op, storage, +1 or -1) for every storage that comes or goes, in program order."""
    live: dict[tuple[str, int, int, int], Alloc] = {}
    runs: Counter[tuple[str, int]] = Counter()
    number = 0
    calls = (call for phase in trace.phases for _ in range(min(phase.repeat, MOST_REPEATS)) for call in phase.calls)
    for call in calls:
        runs[call.key, call.block] += 1
        for position, op in enumerate(trace.segments[call.segment]):
            number += 1
            if isinstance(op, Alloc):
                live[call.key, call.block, runs[call.key, call.block], position] = op
                yield number, op, +1
            elif isinstance(op, Free):
                block = op.ref.block_from(call.block)
                made = (op.ref.key, block, runs[op.ref.key, block] - op.ref.age, op.ref.op)
                if made not in live:
                    raise ValueError(f"segment {call.key!r} of block {call.block} frees {op.ref}, which is not live")
                yield number, live.pop(made), -1


class _Allocator:
    """Counts bytes as the allocator would hand them out."""

    def __init__(self, processor: Processor) -> None:
        self.rounding = processor.allocation_bytes
        self.now = dict.fromkeys((*CATEGORIES, "counters"), 0)
        self.peak = dict(self.now)
        self.total = self.peak_total = self.small = self.large = self.reserved = 0
        self.events: list[tuple[int, int]] = []
        self.training = False

    def begin(self) -> None:
        """Training begins: how the model was built, whole or in parts, is no part of a step."""
        if not self.training:
            self.training = True
            self.peak, self.peak_total = dict(self.now), self.total
            self.reserved = self.large + _round_up(self.small, SEGMENT_BYTES)

    def change(self, number: int, alloc: Alloc, sign: int) -> None:
        size = _round_up(alloc.nbytes, self.rounding)
        self.now[alloc.category] += sign * size
        self.total += sign * size
        if size <= SMALL_BYTES:
            self.small += sign * size
        else:
            self.large += sign * _round_up(size, SEGMENT_BYTES)
        self.reserved = max(self.reserved, self.large + _round_up(self.small, SEGMENT_BYTES))
        self.events.append((number, self.total))
        if self.total > self.peak_total:
            self.peak, self.peak_total = dict(self.now), self.total


def _round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


def _merged(by_category: dict[str, int]) -> dict[str, int]:
    """The optimizer's counters count as optimizer."""
    merged = {name: by_category[name] for name in CATEGORIES}
    merged["optimizer"] += by_category["counters"]
    return merged
