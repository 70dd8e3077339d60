"""A replay as a timeline file for Perfetto (ui.perfetto.dev) or chrome://tracing."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from .memory import Memory
from .pipeline import PipelineStep
from .streams import Span

MICROSECONDS = 1e6


def trace_events(spans: Iterable[Span], memory: Memory | None = None) -> dict[str, Any]:
    """The Trace Event Format: one thread per stream; memory as a counter over the ops of the program, if it is given.

    The counter has its own process because memory follows the program, not the device's clock: its unit of "time" is
    one op per microsecond.
    """
    spans = list(spans)
    threads = {stream: number for number, stream in enumerate(dict.fromkeys(span.stream for span in spans))}
    events: list[dict[str, Any]] = [_name("process_name", 0, 0, "pipeline" if memory is None else "rank 0: streams")]
    events += [_name("thread_name", 0, thread, stream) for stream, thread in threads.items()]
    events += [
        {
            "ph": "X",
            "pid": 0,
            "tid": threads[span.stream],
            "name": span.name,
            "ts": span.start_s * MICROSECONDS,
            "dur": (span.end_s - span.start_s) * MICROSECONDS,
        }
        for span in spans
    ]
    if memory is not None:
        events.append(_name("process_name", 1, 0, "rank 0: memory by op"))
        events += [
            {"ph": "C", "pid": 1, "tid": 0, "name": "bytes in use", "ts": number, "args": {"bytes": nbytes}}
            for number, nbytes in memory.events
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": name}}


def pipeline_spans(step: PipelineStep) -> Iterator[Span]:
    """The actions of a composed step; a stream for each pipeline rank."""
    for rank, lived in enumerate(step.ranks):
        for action, start_s, end_s in lived.spans:
            yield Span(f"pipeline rank {rank}", str(action), start_s, end_s)


def to_json(spans: Iterable[Span], memory: Memory | None = None) -> str:
    return json.dumps(trace_events(spans, memory))
