"""Timelines as Perfetto reads them."""

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
from hand_made import cluster_with, gather, kernel, steps_of, wait
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.trace import Alloc, Free, Ref
from windtunnel.sim.memory import replay_memory
from windtunnel.sim.replay import Replay, replay
from windtunnel.sim.timeline import to_json

US = 1e6


def timeline(lengths: list[int], launch_s: float, rate: float) -> tuple[Replay, list[dict[str, Any]]]:
    """Two steps of kernels of these lengths beside a collective; (what the replay says, what the file says)."""
    ops = [Alloc(64, "activations"), gather(5), *[kernel(seconds, f"k{seconds}") for seconds in lengths]]
    trace = steps_of(*ops, wait(1), kernel(1), Free(Ref("forward", 0, True, 0, 0)))
    cluster = cluster_with(
        launch_s=launch_s, compute_rate_under_communication=rate, communication_rate_under_compute=rate
    )
    result = replay(trace, cluster, record=True)
    file = json.loads(to_json(result.spans, replay_memory(trace, cluster.processor)))
    assert set(file) == {"traceEvents", "displayTimeUnit"}
    return result, file["traceEvents"]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([0.0, 2.0]), st.sampled_from([0.5, 1.0]))
def test_streams_are_threads_with_spans_one_after_the_other(lengths: list[int], launch_s: float, rate: float) -> None:
    result, events = timeline(lengths, launch_s, rate)
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(names.values()) == ["communication data", "compute"]
    assert len(names) == 2
    threads: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["pid"] == 0
            threads[names[event["tid"]]].append(event)
    for spans in threads.values():
        assert spans == sorted(spans, key=lambda span: span["ts"])
        for before, after in pairwise(spans):
            # Times in microseconds, rounded to about 1e-9 of them.
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
    # Both steps have the same kernels; the second step's add up to its compute.
    kernels = threads["compute"]
    half = len(kernels) // 2
    assert [span["name"] for span in kernels[:half]] == [*(f"k{seconds}" for seconds in lengths), "kernel"]
    assert [span["name"] for span in kernels[half:]] == [span["name"] for span in kernels[:half]]
    assert sum(span["dur"] for span in kernels[half:]) == pytest.approx(result.breakdown_s["compute"] * US)
    assert [span["name"] for span in threads["communication data"]] == ["all_gather parameters"] * 2


def test_memory_is_a_counter_over_the_ops() -> None:
    _, events = timeline([3], 0.0, 1.0)
    counts = [(event["ts"], event["args"]["bytes"]) for event in events if event["ph"] == "C"]
    assert counts == [(1, 64), (6, 0), (7, 64), (12, 0)]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {0: "rank 0: streams", 1: "rank 0: memory by op"}


def test_without_record_there_are_no_spans() -> None:
    assert replay(steps_of(kernel(1)), cluster_with()).spans == ()
