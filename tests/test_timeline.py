"""Timelines as Perfetto reads them."""

import json

import pytest
from chrome_trace import Seen, check
from hand_made import CLUSTER, cluster_with, gather, kernel, steps_of, two_steps, wait
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.trace import Alloc, Free, Kernel, Ref, Trace, Wait
from windtunnel.sim.hardware import Cluster
from windtunnel.sim.memory import replay_memory
from windtunnel.sim.recording import played
from windtunnel.sim.replay import Replay, replay
from windtunnel.sim.timeline import rank_timeline, steady_memory, to_json

US = 1e6


def timeline(trace: Trace, cluster: Cluster) -> tuple[Replay, Seen]:
    """(what the replay says, what the file says)."""
    result = replay(trace, cluster, record=True)
    return result, check(json.loads(to_json(rank_timeline(trace, result, cluster.processor))))


def overlapping(lengths: list[int]) -> Trace:
    """A collective beside kernels of these lengths, then one more that waits for it."""
    ops = [Alloc(64, "activations"), kernel(1, "makes"), gather(5), *[kernel(s, f"k{s}") for s in lengths]]
    return steps_of(*ops, wait(2), kernel(1, "needs"), Free(Ref("forward", 0, True, 0, 0)))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([0.0, 2.0]), st.sampled_from([0.5, 1.0]))
def test_streams_are_threads_with_spans_one_after_the_other(lengths: list[int], launch_s: float, rate: float) -> None:
    cluster = cluster_with(
        launch_s=launch_s, compute_rate_under_communication=rate, communication_rate_under_compute=rate
    )
    result, seen = timeline(overlapping(lengths), cluster)
    assert {thread for _, thread in seen.spans} == {"phases", "communication data", "compute"}
    kernels = seen.spans["rank 0", "compute"]
    half = len(kernels) // 2
    assert [span["name"] for span in kernels[:half]] == ["makes", *(f"k{seconds}" for seconds in lengths), "needs"]
    assert [span["name"] for span in kernels[half:]] == [span["name"] for span in kernels[:half]]
    # Both steps have the same kernels; the second step's add up to its compute.
    assert sum(span["dur"] for span in kernels[half:]) == pytest.approx(result.breakdown_s["compute"] * US)
    assert [span["name"] for span in seen.spans["rank 0", "communication data"]] == ["all_gather parameters"] * 2
    phases = seen.spans["rank 0", "phases"]
    assert [span["dur"] for span in phases[1:]] == pytest.approx([result.step_time_s * US])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_arrows_lead_from_the_issue_to_the_collective_and_from_it_to_what_waits(lengths: list[int]) -> None:
    _, seen = timeline(overlapping(lengths), CLUSTER)
    told = [(name, source["name"], target["name"]) for name, source, target in seen.flows]
    assert sorted(told) == sorted(
        [("issue", "makes", "all_gather parameters"), ("wait", "all_gather parameters", "needs")] * 2
    )


def test_a_collective_that_nothing_waits_for_has_one_arrow() -> None:
    _, seen = timeline(steps_of(kernel(1), gather(1), kernel(3)), CLUSTER)
    assert [name for name, *_ in seen.flows] == ["issue"] * 2


def test_a_wait_may_be_for_an_earlier_run() -> None:
    forward, backward = (kernel(1), gather(9)), (Wait(Ref("forward", 0, True, 1, 1)), kernel(1, "needs"))
    phases = [("forward", forward, 1), ("forward", forward, 1), ("backward", backward, 1)]
    result, seen = timeline(two_steps(phases), CLUSTER)
    gathers = seen.spans["rank 0", "communication data"]
    waited = [source["ts"] for name, source, _ in seen.flows if name == "wait"]
    assert waited == [gathers[0]["ts"], gathers[2]["ts"]]
    assert result.step_time_s > 9


@given(st.integers(1, 6), st.integers(0, 3))
def test_repeated_phases_are_there_as_often_as_they_were_played(repeat: int, extra: int) -> None:
    trace = two_steps([("forward", (kernel(2),), repeat), ("update", (kernel(1),) * (extra + 1), 1)])
    result, seen = timeline(trace, CLUSTER)
    shown = min(repeat, 3)
    assert len(seen.spans["rank 0", "compute"]) == 2 * (shown + extra + 1)
    assert [span.name for span in result.phase_spans] == ([*["phase 0"] * shown, "phase 1"]) * 2
    assert [one.phase for one in played(trace, result)] == [
        number for number, ops in enumerate(([1] * shown + [extra + 1]) * 2) for _ in range(ops)
    ]


sizes = st.lists(st.tuples(st.sampled_from(["activations", "gradients"]), st.integers(1, 999)), min_size=1, max_size=6)


@given(sizes, st.sampled_from([1, 512]))
def test_memory_is_what_the_allocator_says(storages: list[tuple[str, int]], rounding: int) -> None:
    cluster = cluster_with(allocation_bytes=rounding)
    ops: list = []
    for category, nbytes in storages:
        ops += [Alloc(nbytes, category), kernel(1)]
    ops += [Free(Ref("forward", 0, True, 0, 2 * number)) for number in range(len(storages))]
    trace = steps_of(*ops)
    result, seen = timeline(trace, cluster)
    known = replay_memory(trace, cluster.processor)
    track, begin_s, end_s = steady_memory(trace, result, cluster.processor)
    assert track.peak_bytes == known.total_bytes
    assert end_s - begin_s == pytest.approx(result.step_time_s)
    counted = [sum(event["args"].values()) for event in seen.counters["rank 0"]]
    assert max(counted) == known.total_bytes
    assert counted[-1] == 0
    # The n-th storage comes when the kernel before it has ended.
    first = [event["ts"] for event in seen.counters["rank 0"]][: len(storages)]
    assert first == pytest.approx([number * US for number in range(len(storages))])


def test_of_fused_kernels_the_last_has_the_span() -> None:
    chain = [Kernel(name, "memory", 0.0, 0, 1, "uint8", (4,)) for name in ("add", "mul", "gelu")]
    trace = steps_of(kernel(2, "before"), Alloc(8, "activations"), *chain, kernel(3, "after"))
    result = replay(trace, CLUSTER, fusion="elementwise", record=True)
    names = [(one.op.name, one.span and one.span.name) for one in played(trace, result, "elementwise")
             if isinstance(one.op, Kernel)]  # fmt: skip
    assert names == [("before", "before"), ("add", None), ("mul", None), ("gelu", "fused"), ("after", "after")] * 2
    seen = check(json.loads(to_json(rank_timeline(trace, result, CLUSTER.processor, "elementwise"))))
    assert len(seen.spans["rank 0", "compute"]) == 6


def test_without_record_there_are_no_spans() -> None:
    result = replay(steps_of(kernel(1)), cluster_with())
    assert result.spans == ()
    assert result.phase_spans == ()
