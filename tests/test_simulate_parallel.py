"""Simulated jobs whose model is divided among ranks: what follows from the sizes must come out of the flights."""

import json
from dataclasses import replace
from typing import Any

import pytest
from chrome_trace import check
from windtunnel.collectives.job_file import loads
from windtunnel.collectives.pipeline_schedules import SCHEDULES
from windtunnel.experiments import pipeline
from windtunnel.experiments.models import ModelSpec, load_model
from windtunnel.experiments.pipeline import parts_of
from windtunnel.experiments.simulate import saved_trace, simulate, simulate_trace, timeline
from windtunnel.sim.hardware import load_cluster
from windtunnel.sim.job import record_job
from windtunnel.sim.result import StepResult

DEMO = replace(load_model("gpt-demo"), layers=8, hidden=512, heads=8, kv_heads=8, ffn=2048, tied=False)
CLUSTER = "dgx-a100"
LOCAL_BYTES = DEMO.seq * DEMO.hidden * 2
"""Hidden states of a sequence in bf16."""


def step(spec: ModelSpec = DEMO, **options: Any) -> StepResult:
    result = simulate(spec, CLUSTER, **options)
    assert sum(result.breakdown_s.values()) == pytest.approx(result.step_time_s, rel=1e-12)
    exposed_s = sum(parts["exposed_s"] for parts in result.communication_s.values())
    assert exposed_s == pytest.approx(result.breakdown_s["exposed_communication"], rel=1e-9, abs=1e-12)
    peak = dict(result.peak_memory_bytes)
    assert sum(peak.pop(name) for name in list(peak)[:6]) == peak["total"]
    return result


def test_tensor_ranks_share_the_work_and_the_parameters() -> None:
    alone, shared = step(gpus=1), step(gpus=4, tp=4)
    # Norms are whole on every rank, and so are the learned positions.
    assert shared.peak_memory_bytes["parameters"] < 0.3 * alone.peak_memory_bytes["parameters"]
    assert shared.tflops_per_gpu * shared.step_time_s == pytest.approx(alone.tflops_per_gpu * alone.step_time_s / 4)
    # Two all-reduces of the hidden states per layer in forward and two in backward, each 2 (t-1)/t of its buffer; one
    # for the embedding and one for the head; the few numbers per token of the loss come on top.
    expected = 2 * 3 / 4 * LOCAL_BYTES * (4 * DEMO.layers + 2)
    assert expected < shared.bytes_sent_per_gpu["by_axis"]["tensor"] < 1.02 * expected


def test_sequence_parallelism_keeps_less_and_sends_less_between_stages() -> None:
    whole, cut = (step(gpus=4, tp=2, pp=2, global_batch=4, sequence_parallel=sequence) for sequence in (False, True))
    assert cut.bytes_sent_per_gpu["by_axis"]["pipeline"] == whole.bytes_sent_per_gpu["by_axis"]["pipeline"] / 2
    assert cut.peak_memory_bytes["activations"] < whole.peak_memory_bytes["activations"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_simulated(schedule: str) -> None:
    chunks = SCHEDULES[schedule].chunks[0]
    result = step(gpus=4, pp=4, global_batch=8, schedule=schedule, interleave=chunks)
    # Every micro-batch crosses each of the boundaries between ranks twice.
    boundaries = 4 * chunks - 1 - (schedule == "zb-v")
    assert result.bytes_sent_per_gpu["by_axis"]["pipeline"] == round(2 * boundaries * 8 * LOCAL_BYTES / 4)
    assert result.layout["schedule"] == schedule
    alone = step(gpus=1, global_batch=8)
    assert result.tflops_per_gpu * result.step_time_s * 4 == pytest.approx(alone.tflops_per_gpu * alone.step_time_s)


def test_schedules_differ_as_they_promise() -> None:
    sequential, gpipe, plain, interleaved, zero_bubble = (
        step(gpus=4, pp=4, global_batch=16, schedule=name, interleave=chunks)
        for name, chunks in (("sequential", 1), ("gpipe", 1), ("1f1b", 1), ("1f1b", 2), ("zb-h1", 1))
    )
    assert interleaved.layout["schedule"] == "interleaved"
    bubbles = [result.breakdown_s["bubble"] for result in (sequential, gpipe, plain, interleaved)]
    assert bubbles[0] > 3 * bubbles[1]
    assert bubbles[2] == pytest.approx(bubbles[1], rel=0.1)  # equal, but for stages that are not
    assert bubbles[3] < 0.8 * bubbles[2]
    assert zero_bubble.breakdown_s["bubble"] < 0.8 * bubbles[2]
    activations = [result.peak_memory_bytes["activations"] for result in (gpipe, plain)]
    assert activations[0] > 3 * activations[1]  # 16 micro-batches in flight against 4


@pytest.mark.parametrize("options", [{"gpus": 2}, {"gpus": 4, "pp": 2, "global_batch": 8}])
@pytest.mark.parametrize("how", [{"slow_ranks": 0.5, "slow_factor": 1.5}, {"fusion": "elementwise"}])
def test_a_saved_job_remembers_how_it_is_priced(options: dict[str, Any], how: dict[str, Any]) -> None:
    result = step(**options, **how)
    again = simulate_trace(loads(saved_trace(DEMO, result)), CLUSTER)
    assert replace(again, wall_s=0.0) == replace(result, wall_s=0.0)
    check(json.loads(timeline(DEMO, CLUSTER, result)))


def test_a_pipelined_job_as_files() -> None:
    result = step(gpus=4, pp=4, global_batch=8)
    job = loads(saved_trace(DEMO, result))
    assert (len(job.traces), job.stages) == (3, (0, 1, 1, 2))  # the ends have the embedding and the head
    again = simulate_trace(job, CLUSTER)
    assert replace(again, wall_s=0.0) == replace(result, wall_s=0.0)
    seen = check(json.loads(timeline(DEMO, CLUSTER, result)))
    for rank in range(4):
        process = f"pipeline rank {rank}"
        actions = seen.spans[process, "actions"]
        assert len(actions) == 8 * 2 + 1
        assert actions[-1]["ts"] + actions[-1]["dur"] <= result.step_time_s * 1.000001e6
        assert {"addmm", "attention"} <= {span["name"] for span in seen.spans[process, "compute"]}
    assert [name for name, *_ in seen.flows].count("receive") == 3 * 8 * 2
    # Flights are placed where the composition has them; its memory is an upper bound, and tight where chunks are alike.
    record = record_job(job, load_cluster(CLUSTER))
    total = result.peak_memory_bytes["total"]
    assert 0.9 * total <= record.memory.peak_bytes <= total


@pytest.mark.parametrize(("layers", "stages", "expected"), [(8, 4, [2, 2, 2, 2]), (70, 12, [5, *[6] * 10, 5])])
def test_blocks_are_spread_evenly(layers: int, stages: int, expected: list[int]) -> None:
    parts = parts_of(layers, SCHEDULES["1f1b"].plan(stages, stages))
    assert [blocks for ((blocks, _, _),) in parts] == expected
    assert [ends for ((_, *ends),) in parts] == [[r == 0, r == stages - 1] for r in range(stages)]


def test_a_deep_stage_is_flown_shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine blocks per stage, of which eight are flown, cost what nine cost that all are."""
    deep = replace(DEMO, layers=18)
    stretched = step(deep, gpus=2, pp=2)
    monkeypatch.setattr(pipeline, "counts_blocks", lambda config: True)  # which must all be flown then
    whole = step(deep, gpus=2, pp=2)
    assert whole.step_time_s == pytest.approx(stretched.step_time_s, rel=1e-12)
    assert whole.peak_memory_bytes == stretched.peak_memory_bytes
    assert whole.bytes_sent_per_gpu == stretched.bytes_sent_per_gpu


def test_tied_embeddings_are_summed_over_the_two_ends() -> None:
    apart, tied = (step(replace(DEMO, tied=tied), gpus=4, pp=4, global_batch=8) for tied in (False, True))
    assert "tied" not in apart.bytes_sent_per_gpu["by_axis"]
    # In the mean over 4 ranks, of which 2 send the whole matrix once in an all-reduce of two.
    assert tied.bytes_sent_per_gpu["by_axis"]["tied"] == DEMO.vocab * DEMO.hidden * 2 * 2 / 4


def test_long_sequences_are_shared() -> None:
    spec = replace(DEMO, layers=2, seq=4096)  # of which half still fills a GPU
    alone, shared = step(spec, gpus=1), step(spec, gpus=2, cp=2)
    assert shared.breakdown_s["compute"] < 0.7 * alone.breakdown_s["compute"]
    assert shared.peak_memory_bytes["activations"] < 0.6 * alone.peak_memory_bytes["activations"]
    assert shared.bytes_sent_per_gpu["by_axis"]["context"] > 0


@pytest.mark.parametrize("axis", ["context", "expert"])
def test_stages_are_ranks_that_share_sequences_or_experts(axis: str) -> None:
    """In the mean over ranks a micro-batch is sent once: by the first stage forward, by the second one backward."""
    shared: dict[str, Any] = {"cp": 2} if axis == "context" else {"ep": 2}
    spec = replace(DEMO, layers=2) if axis == "context" else replace(DEMO, layers=2, experts=4, top_k=2)
    found = step(spec, gpus=4, pp=2, global_batch=4, **shared)
    hidden_bytes = 2 * DEMO.seq * DEMO.hidden
    sent = {"context": 4 * hidden_bytes // 2, "expert": 2 * (hidden_bytes + 4)}[axis]
    assert found.bytes_sent_per_gpu["by_axis"]["pipeline"] == sent
    assert found.bytes_sent_per_gpu["by_axis"][axis] > 0


def test_experts_are_spread() -> None:
    spec = replace(DEMO, layers=2, experts=4, top_k=2)
    here, spread = step(spec, gpus=4, global_batch=4), step(spec, gpus=4, ep=4, global_batch=4)
    assert spread.peak_memory_bytes["parameters"] < 0.5 * here.peak_memory_bytes["parameters"]
    assert spread.bytes_sent_per_gpu["by_axis"]["expert"] > 0
