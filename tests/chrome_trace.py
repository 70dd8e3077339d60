"""What Chrome's Trace Event Format asks of a timeline, checked on the file."""

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

ROUNDING_US = 1e-3
"""A nanosecond: what viewers round times to, and far more than floats lose."""


class Seen(NamedTuple):
    """A timeline as its viewer has it: spans by (process, thread), flows as pairs of the spans that they join."""

    spans: dict[tuple[str, str], list[dict[str, Any]]]
    flows: list[tuple[str, dict[str, Any], dict[str, Any]]]
    counters: dict[str, list[dict[str, Any]]]


def check(file: Mapping[str, Any]) -> Seen:
    """Names for all, times that ascend, spans of a thread that do not overlap, flows from inside a span to another."""
    assert set(file) == {"traceEvents", "displayTimeUnit"}
    events = file["traceEvents"]
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    assert all(time >= 0 for time in times)
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(set(processes.values())) == len(processes)
    assert len({(pid, name) for (pid, _), name in threads.items()}) == len(threads)
    by_thread: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            by_thread[event["pid"], event["tid"]].append(event)
    for found in by_thread.values():
        for before, after in pairwise(found):
            assert before["ts"] + before["dur"] <= after["ts"] + ROUNDING_US
    spans = {(processes[pid], threads[pid, tid]): found for (pid, tid), found in by_thread.items()}
    counters: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            counters[processes[event["pid"]]].append(event)
    return Seen(spans, _flows(events, by_thread), counters)


def _flows(events: list[Any], by_thread: Mapping[tuple[int, int], list[dict[str, Any]]]) -> list[Any]:
    ends: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for event in events:
        if event["ph"] in "sf":
            assert event["ph"] not in ends[event["id"]]
            ends[event["id"]][event["ph"]] = event
    found = []
    for pair in ends.values():
        assert set(pair) == {"s", "f"}
        assert pair["f"]["bp"] == "e"
        assert pair["s"]["ts"] <= pair["f"]["ts"]
        assert pair["s"]["name"] == pair["f"]["name"]
        source, target = (_around(pair[end], by_thread[pair[end]["pid"], pair[end]["tid"]]) for end in "sf")
        found.append((pair["s"]["name"], source, target))
    return found


def _around(event: Mapping[str, Any], spans: list[dict[str, Any]]) -> dict[str, Any]:
    """The last span that an end of a flow lies in."""
    holding = [
        span for span in spans if span["ts"] - ROUNDING_US <= event["ts"] <= span["ts"] + span["dur"] + ROUNDING_US
    ]
    assert holding, event
    return holding[-1]
