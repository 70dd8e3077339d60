"""A replay as a timeline file for Perfetto (ui.perfetto.dev) or chrome://tracing.

The format is Chrome's Trace Event Format: complete events ("X") on named threads, one thread per stream; flow events
("s" and "f", which binds to the slice around it) from what starts a collective to it and from it to what waits;
counters ("C") for memory by category.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..collectives.trace import Trace
from .processor import Processor
from .recording import Arrow, MemoryTrack, Played, arrows, changes, memory_track, played, steady_phase
from .replay import Replay
from .streams import Span

MICROSECONDS = 1e6

MOST_COUNTS = 5_000
"""Points of a rank's memory in the file."""


@dataclass(frozen=True, slots=True)
class Process:
    """A rank on the timeline: its spans, each stream's in order, and its memory."""

    name: str
    spans: Sequence[Span]
    memory: MemoryTrack | None = None


@dataclass(frozen=True, slots=True)
class Timeline:
    """What ran when on which ranks, and what followed from what."""

    processes: tuple[Process, ...]
    arrows: tuple[Arrow, ...] = ()


def rank_timeline(trace: Trace, replay: Replay, processor: Processor, fusion: str = "none") -> Timeline:
    """Both steps of a replay that was recorded, with kernels fused like that."""
    ops = played(trace, replay, fusion)
    memory = memory_track(changes(ops, replay.phase_spans, processor.allocation_bytes))
    spans = (*replay.phase_spans, *replay.spans)
    return Timeline((Process("rank 0", spans, memory),), tuple(_drawn(arrows(ops))))


def _drawn(found: Iterable[tuple[str, Played, Played]]) -> Iterator[Arrow]:
    for name, source, target in found:
        assert source.span is not None
        assert target.span is not None
        yield Arrow(name, source.span, target.span)


def steady_memory(
    trace: Trace, replay: Replay, processor: Processor, fusion: str = "none"
) -> tuple[MemoryTrack, float, float]:
    """Memory by category in the steady step of a recorded replay, and when that step begins and ends."""
    ops = played(trace, replay, fusion)
    steady = steady_phase(trace)
    begin, end = replay.phase_spans[steady].start_s, replay.phase_spans[-1].end_s
    track = memory_track(changes(ops, replay.phase_spans, processor.allocation_bytes))
    return track, begin, end


# The file #


def trace_events(timeline: Timeline) -> dict[str, Any]:
    """The Trace Event Format: a process per rank, a thread per stream, events in the order of time."""
    names: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    threads: list[dict[str, int]] = []
    for number, process in enumerate(timeline.processes):
        streams = {stream: index for index, stream in enumerate(dict.fromkeys(s.stream for s in process.spans))}
        threads.append(streams)
        names += _names(number, process.name, streams)
        events += (_slice(span, number, streams[span.stream]) for span in process.spans)
        if process.memory is not None:
            events += _counters(process.memory, number)
    for number, arrow in enumerate(timeline.arrows):
        events += _flow(number, arrow, threads)
    events.sort(key=lambda event: (event["ts"], _ORDER[event["ph"]]))
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}


_ORDER = {"X": 0, "C": 1, "s": 2, "f": 3}
"""At the same time a slice comes before the arrows that bind to it."""


def _names(process: int, name: str, threads: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    def about(kind: str, thread: int, args: dict[str, Any]) -> dict[str, Any]:
        return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": args}

    yield about("process_name", 0, {"name": name})
    yield about("process_sort_index", 0, {"sort_index": process})
    for stream, thread in threads.items():
        yield about("thread_name", thread, {"name": stream})
        yield about("thread_sort_index", thread, {"sort_index": thread})


def _slice(span: Span, process: int, thread: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "name": span.name,
        "ts": _micros(span.start_s),
        "dur": round(_micros(span.end_s) - _micros(span.start_s), 3),
    }


def _counters(memory: MemoryTrack, process: int) -> Iterator[dict[str, Any]]:
    """What is in use from an instant on: of several changes at one instant the last, of too many the highest."""
    used = [name for name, found in memory.nbytes.items() if any(found)]
    if not used:
        return
    values = zip(*(memory.nbytes[name] for name in used), strict=True)
    instants = list(dict(zip(memory.times_s, values, strict=True)).items())
    each = -(-len(instants) // MOST_COUNTS)
    for first in range(0, len(instants), each):
        time_s, now = max(instants[first : first + each], key=lambda instant: sum(instant[1]))
        args = dict(zip(used, now, strict=True))
        yield {"ph": "C", "pid": process, "name": "memory, bytes", "ts": _micros(time_s), "args": args}


def _micros(time_s: float) -> float:
    """As the format counts, to the nanosecond, which is as fine as viewers keep it."""
    return round(time_s * MICROSECONDS, 3)


def _flow(number: int, arrow: Arrow, threads: Sequence[Mapping[str, int]]) -> Iterator[dict[str, Any]]:
    """From inside the first slice to the beginning of the second one."""
    ends = (
        ("s", arrow.source, arrow.source_process, (arrow.source.start_s + arrow.source.end_s) / 2),
        ("f", arrow.target, arrow.target_process, arrow.target.start_s),
    )
    for kind, span, process, time_s in ends:
        event = {
            "ph": kind,
            "id": number,
            "pid": process,
            "tid": threads[process][span.stream],
            "cat": "dependency",
            "name": arrow.name,
            "ts": _micros(time_s),
        }
        yield event | ({"bp": "e"} if kind == "f" else {})


def to_json(timeline: Timeline) -> str:
    return json.dumps(trace_events(timeline), separators=(",", ":"))
