"""Simulations of catalogue models: orders and identities that hold whatever the hardware's figures are."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from windtunnel.collectives.job_file import loads
from windtunnel.collectives.trace import walk
from windtunnel.engine import pilot
from windtunnel.experiments.layout import Layout, Options, resolve
from windtunnel.experiments.models import load_model
from windtunnel.experiments.simulate import (
    flight,
    saved_trace,
    scaling,
    simulate,
    simulate_trace,
    timeline,
    to_dict,
)
from windtunnel.sim.hardware import load_cluster
from windtunnel.sim.result import StepResult

GPT2 = replace(load_model("gpt2"), layers=4)  # its widths; deeper ones cost the tests more and show no more
DEMO = load_model("gpt-demo")

_CLUSTER = load_cluster("dgx-a100")
UNROUNDED = replace(_CLUSTER, processor=replace(_CLUSTER.processor, allocation_bytes=1))
"""Bytes can be counted exactly where the allocator does not round them up."""

ROUNDING = 1e-9
"""Relative: a step is a sum of thousands of floats, each rounded to 1e-16."""


def same_step(one: StepResult, other: StepResult) -> bool:
    """All but how long the simulation took."""
    return replace(one, wall_s=0.0) == replace(other, wall_s=0.0)


def test_every_option_is_in_the_layout_as_resolved() -> None:
    result = simulate("gpt-demo", "dgx-a100", gpus=16, zero=2, global_batch=64, micro_batch=2, recompute="full")
    assert result.layout == {
        "model": "gpt-demo", "cluster": "dgx-a100", "gpus": 16, "dp": 16, "tp": 1, "pp": 1, "cp": 1, "ep": 1,
        "interleave": 1,
        "schedule": "1f1b", "zero": 2, "micro_batch": 2, "global_batch": 64, "accumulation": 2, "seq": DEMO.seq,
        "sequence_parallel": False, "recompute": "full", "recompute_budget": None, "offload": "none",
        "offload_to": "host", "precision": "bf16", "fidelity": "closed_form", "fusion": "none", "clip": 0.0,
        "slow_ranks": 0.0, "slow_factor": 1.0, "slow_seed": 0, "engine": "{}",
        "attention": "fused", "overlap": True,
        "counts": "tokens", "expandable_segments": False,
    }  # fmt: skip
    assert set(result.layout) == set(Layout.__dataclass_fields__)
    assert result.tokens_per_s * result.step_time_s == pytest.approx(64 * DEMO.seq)
    # Model FLOPs do not count recomputation: three forwards over two micro-steps.
    model_flops = 3 * 2 * DEMO.forward_flops(2, DEMO.seq)
    assert result.tflops_per_gpu * 1e12 * result.step_time_s == pytest.approx(model_flops)
    assert result.hardware_tflops_per_gpu > result.tflops_per_gpu


REPRESENTATIVE = {"gpt2-xl": 64, "gpt3-175b": 512, "llama3-405b": 2048, "bert-large": 8, "megatron-1t": 4096}
"""Learned and rotary positions, full attention, tied or not, 0.3 to 1000 B parameters, in as many GPUs as it takes."""


@pytest.mark.parametrize(("model", "gpus"), REPRESENTATIVE.items())
def test_catalogue_models_fly_under_zero_3(model: str, gpus: int) -> None:
    spec = load_model(model)
    result = simulate(spec, UNROUNDED, gpus=gpus, zero=3, recompute="full")
    assert 0 < result.mfu < 1
    assert sum(result.breakdown_s.values()) == pytest.approx(result.step_time_s)
    [data] = result.communication_s.values()
    assert data["exposed_s"] == pytest.approx(result.breakdown_s["exposed_communication"])
    assert data["hidden_s"] >= 0
    # 16 bytes per parameter in bf16 with fp32 masters and moments, a share of each. Padding is below one element per
    # unit and rank; blocks of more than 5e8 parameters are several units, of a matrix at least but for the first.
    units = 6 * (spec.layers + 1)
    assert 0 <= result.model_state_bytes - 16 * spec.parameters / gpus <= 16 * units
    # Gathered twice and reduced once, 2 bytes each, and a few bytes of bookkeeping.
    sent = 3 * 2 * spec.parameters * (gpus - 1) / gpus
    assert 0 <= result.bytes_sent_per_gpu["total"] - sent <= 3 * 2 * gpus * units + 1024


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_tables_of_positions_are_no_model_state(precision: str) -> None:
    spec = replace(DEMO, positions="alibi", heads=8, kv_heads=8)  # one table of 8 seq^2 values
    result = simulate(spec, UNROUNDED, gpus=2, zero=1, precision=precision)
    width, optimizer = (2, 12) if precision == "bf16" else (4, 8)
    state = spec.parameters * (2 * width + optimizer / 2)
    assert 0 <= result.model_state_bytes - state <= (spec.layers + 1) * (2 * width + optimizer)  # padding


def test_each_stage_keeps_less_than_the_one_before() -> None:
    stages = [simulate(GPT2, "dgx-a100", gpus=64, zero=zero) for zero in range(4)]
    peaks = [result.peak_memory_bytes["total"] for result in stages]
    states = [result.model_state_bytes for result in stages]
    assert peaks == sorted(peaks, reverse=True)
    assert states == sorted(states, reverse=True)
    assert len(set(states)) == 4
    sent = [result.bytes_sent_per_gpu["total"] for result in stages]
    assert sent[0] == sent[1] == sent[2]  # one micro-step: a reduction and a gather, as one all-reduce
    # Stage 3 gathers once more: 3 instead of 2 rounds; bookkeeping is below a part in 10,000.
    assert sent[3] / sent[0] == pytest.approx(1.5, rel=1e-4)


def test_micro_steps_cost_stage_2_a_reduction_each() -> None:
    two, four = (simulate(DEMO, "dgx-a100", gpus=8, zero=2, global_batch=8 * steps) for steps in (2, 4))
    # (k + 1) rounds (collectives/zero.py); bookkeeping is below a part in 1,000 of this small model.
    assert four.bytes_sent_per_gpu["total"] / two.bytes_sent_per_gpu["total"] == pytest.approx(5 / 3, rel=1e-3)
    once, many = (simulate(DEMO, "dgx-a100", gpus=8, zero=0, global_batch=8 * steps) for steps in (1, 9))
    assert once.bytes_sent_per_gpu == many.bytes_sent_per_gpu  # gradients are summed up here and reduced once
    assert many.breakdown_s["compute"] > 5 * once.breakdown_s["compute"]
    assert many.peak_memory_bytes["total"] < 1.2 * once.peak_memory_bytes["total"]


def test_weak_scaling_costs_communication_only() -> None:
    sizes = (1, 8, 16, 1024)
    results = scaling(GPT2, "dgx-a100", sizes, zero=0, micro_batch=4)
    assert [result.layout["gpus"] for result in results] == list(sizes)
    assert [result.layout["global_batch"] for result in results] == [4 * size for size in sizes]
    steps = [result.step_time_s for result in results]
    # One GPU reduces nothing, and each larger ring has more hops, slower ones between nodes.
    assert steps == sorted(steps)
    compute = [result.breakdown_s["compute"] for result in results]
    # Units are padded to a multiple of the ranks: some elements more, and a small kernel that clears them. What runs
    # beside a collective is slower.
    slower = 1 / load_cluster("dgx-a100").processor.compute_rate_under_communication
    assert all(compute[0] * (1 - 1e-3) <= seconds <= compute[0] * slower for seconds in compute)
    assert results[0].breakdown_s["exposed_communication"] == 0.0
    assert results[0].bytes_sent_per_gpu["total"] == 0


def test_strong_scaling_does_the_same_work_with_more_gpus() -> None:
    results = scaling(GPT2, "dgx-a100", (1, 2, 8), zero=1, global_batch=32, micro_batch=4)
    assert [result.layout["accumulation"] for result in results] == [8, 4, 1]
    work = [r.tflops_per_gpu * r.step_time_s * r.layout["gpus"] for r in results]
    assert work == pytest.approx([work[0]] * 3, rel=ROUNDING)
    steps = [result.step_time_s for result in results]
    assert steps == sorted(steps, reverse=True)
    for result in results:  # never faster than the ideal
        assert result.step_time_s * result.layout["gpus"] >= steps[0] * 0.99  # the optimizer's share is not repeated


def write(folder: Path, data: Mapping[str, object]) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(data))
    return path


def test_a_deepspeed_file_is_the_same_as_the_options(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": True},
        },
    )
    from_file = simulate(DEMO, "dgx-a100", config=path, gpus=8)
    options = {"zero": 3, "micro_batch": 2, "global_batch": 32, "precision": "bf16", "clip": 1.0}
    assert same_step(from_file, simulate(DEMO, "dgx-a100", gpus=8, **options))
    assert not same_step(from_file, simulate(DEMO, "dgx-a100", gpus=8, **{**options, "clip": 0.0}))


def test_175_billion_parameters_on_1024_gpus_and_then_on_others() -> None:
    first = simulate("gpt3-175b", "dgx-a100", gpus=1024, zero=3, recompute="full")
    assert first.fits
    (pid,) = {each._child.pid for each in pilot._pilots}
    second = simulate("gpt3-175b", "dgx-a100", gpus=512, zero=3, recompute="full")
    assert {each._child.pid for each in pilot._pilots} == {pid}
    assert second.model_state_bytes == pytest.approx(2 * first.model_state_bytes, rel=5e-4)  # padding
    assert not simulate("gpt3-175b", "dgx-a100", gpus=8, zero=3, recompute="full").fits


def test_asked_again_it_answers_the_same() -> None:
    once, again = (simulate(DEMO, "dgx-a100", gpus=8, zero=3) for _ in range(2))
    assert same_step(once, again)


def test_messages_played_one_by_one_agree_with_the_closed_form() -> None:
    # Eight GPUs of one node: one tier, where both are the same but for the few-element sums, which are double binary
    # trees: their closed form is an upper bound, microseconds in a step of 2 ms.
    played, computed = (simulate(DEMO, "dgx-a100", gpus=8, zero=3, fidelity=f) for f in ("events", "closed_form"))
    assert computed.step_time_s * (1 - 1e-3) < played.step_time_s <= computed.step_time_s * (1 + ROUNDING)


def test_a_faster_gpu_is_faster() -> None:
    a100, h100 = (simulate(GPT2, cluster, gpus=8, zero=1).step_time_s for cluster in ("dgx-a100", "dgx-h100"))
    assert h100 < a100


def test_recomputation_trades_time_for_memory() -> None:
    none, selective, full = (
        simulate(GPT2, "dgx-a100", gpus=8, zero=1, micro_batch=8, recompute=recompute)
        for recompute in ("none", "selective", "full")
    )
    for result in (none, selective, full):
        assert result.tflops_per_gpu * result.step_time_s == pytest.approx(none.tflops_per_gpu * none.step_time_s)
    memory = [result.peak_memory_bytes["activations"] for result in (none, selective, full)]
    assert memory == sorted(memory, reverse=True)
    assert len(set(memory)) == 3
    compute = [result.breakdown_s["compute"] for result in (none, selective, full)]
    assert compute == sorted(compute)
    assert len(set(compute)) == 3


def test_v100_computes_in_fp16() -> None:
    result = simulate(DEMO, "dgx-2", gpus=16, zero=1)
    assert result.layout["precision"] == "fp16"
    layout = resolve(Options(gpus=16, zero=1), DEMO, load_cluster("dgx-2"))
    dtypes = {op.dtype for *_, op in walk(flight(DEMO, layout)) if getattr(op, "family", "") == "matmul"}
    assert dtypes == {"fp16"}


def test_files_of_a_result() -> None:
    result = simulate(DEMO, "dgx-a100", gpus=8, zero=3)
    job = loads(saved_trace(DEMO, result))
    (trace,) = job.traces
    assert trace == flight(DEMO, Layout(**result.layout))
    assert trace.blocks == DEMO.layers
    again = simulate_trace(job, "dgx-a100")
    assert same_step(again, result)
    assert simulate_trace(job, "dgx-h100").step_time_s < result.step_time_s
    spans = [e for e in json.loads(timeline(DEMO, "dgx-a100", result))["traceEvents"] if e["ph"] == "X"]
    assert {span["name"] for span in spans} > {"all_gather parameters", "reduce_scatter gradients", "addmm"}


def test_a_result_is_plain_data() -> None:
    result = simulate(DEMO, "dgx-a100", gpus=8)
    assert json.loads(json.dumps(to_dict(result)))["step_time_s"] == result.step_time_s


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt5"}, "model = 'gpt5' is neither a catalogue name"),
        ({"cluster": "dgx-z"}, "unknown cluster 'dgx-z'; the catalogue has .*did you mean 'dgx-"),
        ({"gpus": 0}, "gpus = 0; allowed: an integer >= 1"),
        ({"global_batch": 3, "gpus": 2}, r"global-batch = 3; allowed: a multiple of micro-batch \* dp"),
        ({"gpus": 100_000, "fidelity": "events"}, "fidelity = 'events' .* allowed: 2,000,000: use 'closed_form'"),
    ],
)
def test_bad_input_is_a_value_error_of_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        simulate(**{"model": "gpt-demo", "cluster": "dgx-a100", **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_config_says_how_ranks_communicate(tmp_path: Path) -> None:
    """Fewer bytes where it compresses, another price where it forces an algorithm."""

    def flown(**keys: Any) -> StepResult:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, **keys}))
        return simulate(DEMO, "dgx-a100", gpus=16, config=path, precision="fp32")

    plain = flown()
    packed = flown(communication_compression={"gradients": "int8"})
    forced = flown(communication={"algorithms": {"reduce_scatter": "binomial_tree"}})
    # Of reduce-scatter and all-gather in fp32 the first shrinks to int8 and a scale per block.
    ratio = packed.bytes_sent_per_gpu["total"] / plain.bytes_sent_per_gpu["total"]
    assert 0.5 < ratio < 0.7
    assert forced.step_time_s > plain.step_time_s  # the whole buffer, log2 n times
