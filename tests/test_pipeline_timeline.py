"""Timelines of pipelined steps: what is inside actions, messages, memory by rank."""

import json
from dataclasses import replace

import pytest
from chrome_trace import check
from hand_made import CLUSTER
from hand_made_pipeline import ACTIVATIONS, MESSAGE, PARAMETERS, pipelined
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.pipeline import peak_in_flight
from windtunnel.sim import pipeline_timeline
from windtunnel.sim.job import price_job, record_job
from windtunnel.sim.timeline import to_json

US = 1e6
WIDE = replace(CLUSTER, gpus_per_node=8)

ranks_and_batches = given(st.integers(2, 4), st.integers(1, 5))


@ranks_and_batches
def test_ranks_have_their_actions_and_what_is_inside(ranks: int, micro_batches: int) -> None:
    record = record_job(pipelined(ranks, micro_batches), WIDE)
    seen = check(json.loads(to_json(record.timeline)))
    assert record.plan is not None
    for rank in range(ranks):
        process = f"pipeline rank {rank}"
        actions = [span["name"] for span in seen.spans[process, "actions"]]
        assert actions == [*map(str, record.plan.actions(rank)), "update"]
        compute = seen.spans[process, "compute"]
        assert [span["name"] for span in compute].count("c") == micro_batches
        # Kernels fill their actions: nothing is late in these flights.
        assert sum(span["dur"] for span in compute) == pytest.approx((5 * micro_batches + 1) * US)
        for kernel in compute:
            around = [a for a in seen.spans[process, "actions"] if a["ts"] <= kernel["ts"] < a["ts"] + a["dur"]]
            assert [span["name"][0] for span in around] == [
                {"a": "F", "b": "F", "c": "B", "update": "u"}[kernel["name"]]
            ]
    step = price_job(pipelined(ranks, micro_batches), WIDE)
    last = max(span["ts"] + span["dur"] for found in seen.spans.values() for span in found)
    assert last == pytest.approx(step.step_time_s * US)


@ranks_and_batches
def test_arrows_lead_from_sends_to_receives(ranks: int, micro_batches: int) -> None:
    seen = check(json.loads(to_json(record_job(pipelined(ranks, micro_batches), WIDE).timeline)))
    told = [(name, source, target) for name, source, target in seen.flows if name in ("send", "receive")]
    assert len(told) == 2 * 2 * (ranks - 1) * micro_batches
    for name, source, target in told:
        message, action = (target, source) if name == "send" else (source, target)
        what, number = message["name"].split()
        assert action["name"] == ("F" if what == "activation" else "B") + number
        assert message["dur"] == pytest.approx(MESSAGE * US)
        if name == "receive":
            assert abs(source["pid"] - target["pid"]) == 1
            assert (source["pid"] < target["pid"]) == (what == "activation")
        # What a rank has been sent, it begins with later.
        assert source["ts"] + source["dur"] <= target["ts"] + 1e-3
    # Inside of each forward, from the gather to the kernel that needs it.
    waits = [(source["name"], target["name"]) for name, source, target in seen.flows if name == "wait"]
    assert waits == [("all_gather parameters", "b")] * (ranks * micro_batches)


@ranks_and_batches
def test_memory_holds_what_is_in_flight(ranks: int, micro_batches: int) -> None:
    job = pipelined(ranks, micro_batches)
    record = record_job(job, WIDE)
    assert record.plan is not None
    most = peak_in_flight(record.plan)
    for rank, process in enumerate(record.timeline.processes):
        assert process.memory is not None
        kept = ACTIVATIONS + MESSAGE * (rank > 0)
        assert process.memory.peak_bytes == PARAMETERS + most[rank] * kept
        assert process.memory.totals[0] == process.memory.totals[-1] == PARAMETERS
    assert record.memory.peak_bytes == max(p.memory.peak_bytes for p in record.timeline.processes if p.memory)
    # The sum that prices a layout may leave out what the micro-batch at work has received.
    assert abs(record.memory.peak_bytes - price_job(job, WIDE).peak_memory_bytes["total"]) <= MESSAGE


def test_what_is_too_much_to_draw_is_left_out_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_timeline, "MOST_SPANS", 30)
    seen = check(json.loads(to_json(record_job(pipelined(2, 4), WIDE).timeline)))
    assert ("pipeline rank 0", "compute") in seen.spans
    assert ("pipeline rank 1 (actions alone)", "compute") not in seen.spans
    assert len(seen.spans["pipeline rank 1 (actions alone)", "actions"]) == 9
