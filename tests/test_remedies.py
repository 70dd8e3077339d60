"""Remedies of a job that does not fit: which are tried, and in which order they are told."""

from dataclasses import asdict, replace
from typing import Any

import pytest
from hand_made import CLUSTER, PROCESSOR
from windtunnel.experiments import remedies as module
from windtunnel.experiments.layout import Layout, Options, resolve
from windtunnel.experiments.models import ModelSpec, load_model
from windtunnel.experiments.remedies import changes, flags, remedies
from windtunnel.experiments.tables import overflow
from windtunnel.sim.hardware import Cluster, load_cluster
from windtunnel.sim.memory import Excess
from windtunnel.sim.result import StepResult

SPEC = replace(load_model("gpt-demo"), layers=8, heads=8, kv_heads=8)
MACHINE = replace(CLUSTER, gpus_per_node=8, nodes=1, processor=replace(PROCESSOR, peak_flops={"bf16": 1.0}))

EXCESS = Excess(
    phase="micro-step first",
    micro_batch=0,
    block=3,
    segment="forward",
    op="gelu",
    category="activations",
    requested_bytes=2_000_000_000,
    live_bytes={"parameters": 1_000_000_000, "activations": 5_500_000_000, "buffers": 0},
    reserved_bytes=7_000_000_000,
    limit_bytes=8_000_000_000,
)


def answer(layout: Layout, reserved: float, step_time_s: float = 1.0, limit: float = 8.0) -> StepResult:
    """A result that says only what remedies look at; bytes are small numbers."""
    return StepResult(
        step_time_s=step_time_s,
        tokens_per_s=0.0,
        tflops_per_gpu=0.0,
        hardware_tflops_per_gpu=0.0,
        mfu=0.0,
        breakdown_s={},
        communication_s={},
        peak_memory_bytes={"reserved": round(reserved)},
        fits=reserved <= limit,
        first_to_exceed=None if reserved <= limit else EXCESS,
        bytes_sent_per_gpu={},
        model_state_bytes=0,
        offloaded_bytes_per_node={},
        wall_s=0.0,
        events=0,
        layout=asdict(layout),
    )


def simulated(monkeypatch: pytest.MonkeyPatch, savings: dict[tuple[str, Any], tuple[float, float]]) -> list[Options]:
    """Replaces the simulation: each option that differs from none saves bytes and takes time. Returns what is asked."""
    asked: list[Options] = []

    def simulate(model: ModelSpec, cluster: Cluster, **options: Any) -> StepResult:
        asked.append(Options(**options))
        layout = resolve(asked[-1], model, cluster)
        reserved, seconds = 20.0, 1.0
        for (name, value), (saved, slower) in savings.items():
            if getattr(layout, name) == value:
                reserved, seconds = reserved - saved, seconds + slower
        return answer(layout, reserved, seconds)

    monkeypatch.setattr(module, "simulate", simulate)
    return asked


def job(**options: Any) -> StepResult:
    return answer(resolve(Options(gpus=8, global_batch=32, micro_batch=4, **options), SPEC, MACHINE), 20.0)


def test_single_changes_that_fit_are_told_the_fastest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    savings = {
        ("recompute", "full"): (13.0, 0.3),
        ("recompute", "selective"): (12.5, 0.1),
        ("zero", 3): (12.0, 0.2),
        ("micro_batch", 1): (12.0, 0.4),
        ("micro_batch", 2): (1.0, 0.1),
    }
    asked = simulated(monkeypatch, savings)
    said: list[str] = []
    found = remedies(SPEC, MACHINE, job(), say=said.append)
    assert [remedy.change for remedy in found] == [
        "--recompute selective", "--zero 3", "--recompute full", "--micro-batch 1",
    ]  # fmt: skip
    assert [remedy.relative_step_time for remedy in found] == pytest.approx([1.1, 1.2, 1.3, 1.4])
    assert found[0].options == {"recompute": "selective"}
    assert found[0].reserved_bytes == round(7.5)
    assert len(said) == len(asked) <= module.MOST_RUNS
    assert {(each.gpus, each.global_batch) for each in asked} == {(8, 32)}


def test_what_saves_most_stays_where_nothing_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    savings = {("recompute", "full"): (8.0, 0.3), ("zero", 3): (5.0, 0.2), ("zero", 2): (4.0, 0.1)}
    simulated(monkeypatch, savings)
    found = remedies(SPEC, MACHINE, job())
    assert [remedy.change for remedy in found] == ["--recompute full --zero 2", "--recompute full --zero 3"]


def test_a_search_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = simulated(monkeypatch, {})
    assert remedies(SPEC, MACHINE, job()) == ()  # nothing saves anything
    asked = simulated(monkeypatch, {("zero", stage): (float(stage), 0.0) for stage in (1, 2, 3)})
    assert remedies(SPEC, MACHINE, job(), most_runs=3) == ()
    assert len(asked) == 3


def test_a_job_that_fits_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = simulated(monkeypatch, {})
    fitting = answer(resolve(Options(gpus=8), SPEC, MACHINE), 1.0)
    assert remedies(SPEC, MACHINE, fitting) == ()
    assert asked == []


def test_what_can_be_changed() -> None:
    def names(**options: Any) -> list[str]:
        chosen = Options(**{"gpus": 8, "global_batch": 32, **options})
        return [flags(change) for change in changes(resolve(chosen, SPEC, MACHINE), MACHINE)]

    assert names() == [
        "--expandable-segments", "--recompute selective", "--recompute full", "--zero 1", "--zero 2", "--zero 3",
        "--tp 2 --dp 4", "--pp 2 --dp 4",
    ]  # fmt: skip
    assert names(zero=3, recompute="full", micro_batch=4, expandable_segments=True) == [
        "--micro-batch 2", "--micro-batch 1", "--tp 2 --dp 4", "--pp 2 --dp 4",
    ]  # fmt: skip
    assert names(tp=8, recompute="full", expandable_segments=True) == ["--sequence-parallel"]
    assert names(pp=2, zero=1, recompute="full", expandable_segments=True) == [
        "--zero 2", "--tp 2 --dp 2", "--pp 4 --dp 2",
    ]  # fmt: skip
    with_host = replace(MACHINE, host=load_cluster("dgx-a100").host)
    layout = resolve(Options(gpus=1, recompute="full", expandable_segments=True), SPEC, with_host)
    assert [flags(change) for change in changes(layout, with_host)] == ["--offload optimizer"]


def test_what_cannot_be_laid_out_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(monkeypatch, {("pp", 2): (20.0, 0.0), ("zero", 1): (13.0, 0.0)})
    found = remedies(replace(SPEC, layers=1), MACHINE, job())
    assert [remedy.change for remedy in found] == ["--zero 1"]


def test_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(monkeypatch, {("zero", 3): (13.0, 0.5)})
    result = job()
    lines = overflow(result, remedies(SPEC, MACHINE, result), searched=True)
    assert lines[0] == (
        "does not fit: gelu asks for 2.00 GB (activations) in micro-step first, micro-batch 0, block 3, where 7.0 of"
        " 8.0 GB are held"
    )
    assert lines[1] == "in use then, in GB: parameters 1.0, activations 5.5"
    assert lines[2].startswith("it fits with --zero 3: 1.5 s per step (1.50 times this one)")
    assert overflow(result, (), searched=True)[-1].startswith("no remedy was found")
    assert len(overflow(result, (), searched=False)) == 2
