"""Redundancy on the simulated device: what it does to the step on slow links, to traffic and to memory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from windtunnel.collectives.job_file import loads
from windtunnel.collectives.zero import UnitSize, agreement_bytes, padded
from windtunnel.experiments.layout import Layout
from windtunnel.experiments.models import load_model
from windtunnel.experiments.simulate import flight, saved_trace, simulate
from windtunnel.sim.hardware import Cluster, Fabric, load_cluster
from windtunnel.sim.replay import replay
from windtunnel.sim.result import StepResult

DEMO = load_model("gpt-demo")
ROUNDING = 1e-9

INSIDE = Fabric(bytes_per_s=100e9, latency_s=1e-6)
BETWEEN = Fabric(bytes_per_s=1e9, latency_s=10e-6)
"""A node's link to the others is a hundredth of each GPU's inside."""


def slow_links() -> Cluster:
    base = load_cluster("dgx-a100")
    processor = replace(base.processor, allocation_bytes=1)
    return replace(base, processor=processor, nodes=None, intra_node=INSIDE, inter_node=BETWEEN, fabric=None)


def simulated(folder: Path, gpus: int = 16, *, stage: int = 3, **keys: Any) -> StepResult:
    """A step of the demo's model on nodes of 8, with these keys of the config, those of zero_optimization included."""
    local = {name: keys.pop(name) for name in list(keys) if name == "local_updates"}
    path = folder / "config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **keys}, **local}))
    return simulate(DEMO, slow_links(), gpus=gpus, config=path)


def units(gpus: int) -> list[UnitSize]:
    block = replace(DEMO, layers=2).parameters - replace(DEMO, layers=1).parameters
    sizes = [DEMO.parameters - DEMO.layers * block] + [block] * DEMO.layers
    return [UnitSize(elements=padded(size, gpus), padding=padded(size, gpus) - size, element_bytes=4) for size in sizes]


def test_shard_groups_keep_gathers_inside_the_node(tmp_path: Path) -> None:
    """By hand: a gather of P bytes takes 7 hops of P / 8. Of three rounds of P between the nodes one is left."""
    zero, mics = simulated(tmp_path), simulated(tmp_path, mics_shard_size=8)
    assert mics.step_time_s < zero.step_time_s / 2
    trace = flight(DEMO, Layout(**mics.layout))
    spans = replay(trace, slow_links(), record=True).spans
    block = 4 * units(16)[1].elements
    by_hand = 7 * (1e-6 + block / 8 / 100e9)
    taken = [span.end_s - span.start_s for span in spans if span.name == "all_gather parameters"]
    assert {span.stream for span in spans if span.name == "all_gather parameters"} == {"communication shard"}
    assert len([seconds for seconds in taken if seconds == pytest.approx(by_hand, rel=1e-6)]) >= 2 * 2 * DEMO.layers - 2
    # Between the nodes: an all-reduce of two ranks for each of eight shards, which share the node's link.
    across = [span.end_s - span.start_s for span in spans if span.stream == "communication replica"]
    pair = 2 * (10e-6 + block / 8 / 2 / (1e9 / 8))
    assert len([seconds for seconds in across if seconds == pytest.approx(pair, rel=1e-6)]) == 2 * DEMO.layers


def test_second_shards_gather_for_backward_inside_the_node(tmp_path: Path) -> None:
    zero, hpz = simulated(tmp_path), simulated(tmp_path, zero_hpz_partition_size=8)
    assert hpz.step_time_s < 0.75 * zero.step_time_s  # two of three rounds between nodes are left
    sent = hpz.bytes_sent_per_gpu["by_axis"]
    assert sent["across"] == 0
    whole = sum(unit.elements for unit in units(16)) * 4
    assert sent["inside"] == whole * 7 // 8
    assert 0 <= sent["inside*across"] - 2 * whole * 15 // 16 < 64  # and the flag for missed parameters
    assert hpz.model_state_bytes - zero.model_state_bytes == whole // 8


def test_each_choice_trades_memory_for_traffic_between_nodes(tmp_path: Path) -> None:
    zero, hpz = simulated(tmp_path), simulated(tmp_path, zero_hpz_partition_size=8)
    mics, copies = simulated(tmp_path, mics_shard_size=8), simulated(tmp_path, stage=0)
    states = [result.model_state_bytes for result in (zero, hpz, mics, copies)]
    assert states == sorted(states)
    times = [result.step_time_s for result in (zero, hpz, mics)]
    assert times == sorted(times, reverse=True)


# Local updates #


def test_an_agreement_is_paid_for_once_in_so_many_steps(tmp_path: Path) -> None:
    results = {
        every: simulated(tmp_path, stage=0, local_updates={"every": every, "outer": "nesterov"})
        for every in (1, 4, 500)
    }
    once = agreement_bytes(units(16), 16, 4)
    for every, result in results.items():
        assert result.bytes_sent_per_gpu["total"] == round(once / every)
        assert sum(result.breakdown_s.values()) == pytest.approx(result.step_time_s)
    # The step's time is linear in how often: t = compute + agreement / H.
    steps = {every: result.step_time_s for every, result in results.items()}
    agreement = (steps[1] - steps[4]) / (1 - 1 / 4)
    assert steps[500] == pytest.approx(steps[1] - agreement * (1 - 1 / 500), rel=1e-6)
    assert steps[500] < simulated(tmp_path, stage=0).step_time_s / 5  # which sends as much in every step


def test_outer_momentum_and_last_values_are_optimizer_state(tmp_path: Path) -> None:
    local, diloco = (
        simulated(tmp_path, stage=0, local_updates={"every": 100, "outer": outer}) for outer in ("average", "nesterov")
    )
    assert diloco.model_state_bytes - local.model_state_bytes == 2 * 4 * sum(unit.elements for unit in units(16))


def test_a_saved_trace_remembers_how_rare_an_agreement_is(tmp_path: Path) -> None:
    result = simulated(tmp_path, stage=0, local_updates={"every": 7})
    (trace,) = loads(saved_trace(DEMO, result)).traces
    assert {phase.every for phase in trace.phases if phase.name == "agree"} == {7}
    assert trace == flight(DEMO, Layout(**result.layout))
