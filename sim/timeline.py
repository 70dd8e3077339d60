"""A replay as a timeline file for Perfetto (ui.perfetto.dev) or chrome://tracing."""

import json
from collections.abc import Iterable
from typing import Any

from .memory import Memory
from .streams import Span

MICROSECONDS = 1e6


def trace_events(spans: Iterable[Span], memory: Memory) -> dict[str, Any]:
    """The Trace Event Format: one thread per stream; memory as a counter over the ops of the program.

    The counter has its own process because memory follows the program, not the device's clock: its unit of "time" is
    one op per microsecond.
    """
    spans = list(spans)
    threads = {stream: number for number, stream in enumerate(dict.fromkeys(span.stream for span in spans))}
    events: list[dict[str, Any]] = [
        _name("process_name", 0, 0, "rank 0: streams"),
        _name("process_name", 1, 0, "rank 0: memory by op"),
    ]
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
    events += [
        {"ph": "C", "pid": 1, "tid": 0, "name": "bytes in use", "ts": number, "args": {"bytes": nbytes}}
        for number, nbytes in memory.events
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {"name": name}}


def to_json(spans: Iterable[Span], memory: Memory) -> str:
    return json.dumps(trace_events(spans, memory))
