"""A recorded replay op by op: which op made which span, what waits for what, and the memory in use meanwhile.

Streams take things in the order in which they were issued, so the n-th kernel of a trace made the n-th span of the
compute stream, the n-th collective of an axis the n-th span of that axis, and so on: the replay itself needs to keep
nothing but its spans.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from ..collectives.trace import CATEGORIES, Alloc, Collective, Copy, Free, HostWork, Kernel, Op, Trace, Wait
from .fusion import fuse
from .replay import MOST_PLAYED, Replay
from .runs import Runs
from .streams import Span

BEFORE = -1
"""Number of the phase of all that precedes training, which takes no time."""


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """An op as it was played.

    Attributes:
        phase: number of the played phase (an index of `Replay.phase_spans`), or BEFORE.
        key: of the segment that the op is in.
        span: when it ran; None of an op that takes no time on any stream, or that had not ended with the last step.
        target: the op that a Wait or a Free points to.
    """

    phase: int
    key: str
    op: Op
    span: Span | None = None
    target: "Played | None" = None


class Arrow(NamedTuple):
    """That one thing follows from another, maybe on another process of the timeline (by its number)."""

    name: str
    source: Span
    target: Span
    source_process: int = 0
    target_process: int = 0


class Change(NamedTuple):
    """Device memory that comes (or goes) at a time of the compute stream."""

    time_s: float
    phase: int
    category: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class MemoryTrack:
    """Bytes in use over time, by category, as the allocator hands them out.

    Attributes:
        times_s: never descending; where several are equal, memory changed more than once at that instant.
        nbytes: by category, one value for each time: in use from then on.
    """

    times_s: tuple[float, ...]
    nbytes: dict[str, tuple[int, ...]]

    @property
    def totals(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(*self.nbytes.values(), strict=True)))

    @property
    def peak_bytes(self) -> int:
        return max(self.totals, default=0)


def stream_of(op: Op) -> str | None:
    """The stream of a replay's span, or None of an op that runs on none."""
    match op:
        case Kernel():
            return "compute"
        case Collective():
            return f"communication {op.axis}"
        case Copy():
            return op.direction.replace("_", " ")
        case HostWork():
            return "host"
        case _:
            return None


def played(trace: Trace, replay: Replay, fusion: str = "none") -> list[Played]:
    """Every op in the order of the program, repeated phases as often as the replay played them.

    Args:
        replay: of this trace, with `record=True`.
        fusion: with which it was replayed; of a chain that was fused, the last kernel has the span.
    """
    by_stream: dict[str, list[Span]] = defaultdict(list)
    for span in replay.spans:
        by_stream[span.stream].append(span)
    spans = defaultdict(lambda: iter(list[Span]()), {stream: iter(found) for stream, found in by_stream.items()})
    standing = _standing(trace, fusion)
    runs = Runs()
    made: dict[int, list[Played]] = {}
    ops: list[Played] = []
    number = BEFORE
    for phase in trace.phases:
        for _ in range(min(phase.repeat, MOST_PLAYED)):
            number += phase.step > 0
            runs.play()
            for call in phase.calls:
                here = made[runs.begin(call.key, call.block)] = list[Played]()
                for position, op in enumerate(trace.segments[call.segment]):
                    target = None
                    if isinstance(op, Wait | Free):
                        meant = (made[run] for run in runs.back(op.ref, op.ref.block_from(call.block)))
                        target = next(found for each in meant if (found := _target(each, op)) is not None)
                    stream = stream_of(op) if number != BEFORE and position in standing[call.segment] else None
                    here.append(
                        Played(number, call.key, op, next(spans[stream], None) if stream is not None else None, target)
                    )
                ops += here
        runs.end()
    return ops


def _target(run: Sequence[Played], op: Wait | Free) -> Played | None:
    """What an op refers to in a run, if the run has it."""
    kinds = Alloc if isinstance(op, Free) else Collective | Copy | HostWork
    found = run[op.ref.op] if op.ref.op < len(run) else None
    return found if found is not None and isinstance(found.op, kinds) else None


def _standing(trace: Trace, fusion: str) -> list[Collection[int]]:
    """By segment, the positions of what was played: of kernels that were fused only the last."""
    if fusion == "none":
        return [range(len(segment)) for segment in trace.segments]
    keys: dict[int, set[str]] = defaultdict(set)
    for phase in trace.phases:
        for call in phase.calls:
            keys[call.segment].add(call.key)
    return [{position for position, _ in fuse(segment, keys[n])} for n, segment in enumerate(trace.segments)]


def steady_phase(trace: Trace) -> int:
    """Number of the played phase that begins the steady step."""
    return sum(min(phase.repeat, MOST_PLAYED) for phase in trace.phases if phase.step == 1)


def arrows(ops: Iterable[Played]) -> Iterator[tuple[str, Played, Played]]:
    """(name, op, op that follows from it): what starts a collective or a copy, and what waits for its end.

    A collective follows from the kernel issued before it, whose result it sends. The kernel that is issued next after
    a wait, or the next thing on the stream that waits, follows from what is waited for.
    """
    last: Played | None = None
    awaited: dict[str, list[Played]] = defaultdict(list)
    for one in ops:
        match one.op:
            case Wait():
                assert one.target is not None
                stream = "compute" if one.op.stream == "program" else one.op.stream.replace("_", " ")
                if one.target.span is not None:
                    awaited[stream].append(one.target)
            case Collective() | Copy() | HostWork() | Kernel() if one.span is not None:
                for source in awaited.pop(one.span.stream, []):
                    yield "wait", source, one
                if isinstance(one.op, Kernel):
                    last = one
                elif last is not None and one.span.stream not in ("host", "to nvme", "from nvme"):
                    yield "issue", last, one
            case _:
                pass


def changes(ops: Iterable[Played], phases: Sequence[Span], rounding: int) -> Iterator[Change]:
    """Device memory in the order of the program, at the time at which the compute stream gets there.

    The host may be far ahead of the device; what counts for a picture is which kernels run while memory is in use.

    Args:
        phases: of the replay.
        rounding: allocations are rounded up to a multiple of so many bytes.
    """
    now_s, phase = 0.0, BEFORE
    for one in ops:
        if one.phase != phase:
            phase = one.phase
            now_s = phases[phase].start_s
        if isinstance(one.op, Kernel) and one.span is not None:
            now_s = one.span.end_s
        alloc, sign = (one.target.op, -1) if isinstance(one.op, Free) and one.target else (one.op, +1)
        if isinstance(alloc, Alloc) and alloc.tier == "device":
            category = "optimizer" if alloc.category == "counters" else alloc.category
            yield Change(now_s, phase, category, sign * (-(-alloc.nbytes // rounding) * rounding))


def memory_track(found: Iterable[Change], base: dict[str, int] | None = None) -> MemoryTrack:
    """Changes added up.

    Args:
        found: in the order of time.
        base: bytes by category before them.
    """
    ordered = list(found)
    nbytes = {}
    for name in CATEGORIES:
        own = (change.nbytes if change.category == name else 0 for change in ordered)
        nbytes[name] = tuple(accumulate(own, initial=(base or {}).get(name, 0)))
    return MemoryTrack((ordered[0].time_s if ordered else 0.0, *(change.time_s for change in ordered)), nbytes)


def totals(found: Iterable[Change]) -> dict[str, int]:
    """Bytes by category after all changes."""
    sums = dict.fromkeys(CATEGORIES, 0)
    for change in found:
        sums[change.category] += change.nbytes
    return sums
