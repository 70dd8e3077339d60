"""The numbers of a simulated step and what ties them together."""

from dataclasses import replace

import pytest
from hand_made import CLUSTER, cluster_with, gather, kernel, wait
from hand_made import two_steps as steps
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.trace import Alloc, Free, Kernel, Ref, Trace
from windtunnel.experiments.simulate import to_dict, to_rows, training_days
from windtunnel.sim.result import StepResult, price

CONTRACT = {
    "step_time_s", "tokens_per_s", "tflops_per_gpu", "hardware_tflops_per_gpu", "mfu", "breakdown_s",
    "communication_s", "peak_memory_bytes", "fits", "first_to_exceed", "bytes_sent_per_gpu",
    "offloaded_bytes_per_node", "wall_s",
    "events", "layout",
}  # fmt: skip
"""Fields of `simulate --json` (docs/contract.md)."""


def matmul(flops: float) -> Kernel:
    """100 floating-point operations are a second on the hand-made processor."""
    return Kernel("mm", "matmul", flops, 0, 0, "fp32", (1, 1, 1, int(flops / 2)))


def trace(gathered: int = 6) -> Trace:
    """A step: 4 s forward, 12 s backward of which 4 s are recomputation, a collective of which 2 s are exposed."""
    forward = (Alloc(5000, "activations"), matmul(400), gather(gathered))
    backward = (matmul(1200), kernel(gathered - 2), Free(Ref("forward", 0, True, 0, 0)))
    return steps([("forward", forward, 1), ("backward", backward, 1)])


def result(cluster=CLUSTER, made: Trace | None = None, **options: object) -> StepResult:
    arguments = {"precision": "fp32", "tokens_per_step": 64, "layout": {"zero": 3}, **options}
    return price(made or trace(), cluster, **arguments)  # type: ignore[arg-type]


def test_every_number_by_hand() -> None:
    ops = (Alloc(5000, "activations"), matmul(400), gather(6), kernel(4), wait(2))
    backward = (matmul(1200), Free(Ref("forward", 0, True, 0, 0)))
    step = result(made=steps([("forward", ops, 1), ("backward", backward, 1)]))
    assert step.step_time_s == pytest.approx(4 + 6 + 12)
    assert step.breakdown_s == pytest.approx(
        {"compute": 20, "exposed_communication": 2, "bubble": 0, "host": 0, "offload": 0}
    )
    assert step.tokens_per_s == pytest.approx(64 / 22)
    assert step.tflops_per_gpu == pytest.approx(3 * 400 / 22 / 1e12)  # backward is twice forward
    assert step.hardware_tflops_per_gpu == pytest.approx((400 + 1200) / 22 / 1e12)
    assert step.mfu == pytest.approx(3 * 400 / 22 / 100)
    assert step.bytes_sent_per_gpu == {"total": 6, "max": 6, "by_axis": {"data": 6}}
    assert step.peak_memory_bytes["activations"] == step.peak_memory_bytes["total"] == 5000
    assert step.model_state_bytes == 0
    assert step.layout == {"zero": 3, "gpus": 2}
    assert step.events > 0
    assert step.wall_s > 0


@given(st.integers(2, 50), st.integers(1, 10**6), st.sampled_from(["fp32", "bf16"]))
def test_identities(gathered: int, tokens: int, precision: str) -> None:
    step = result(made=trace(gathered), tokens_per_step=tokens, precision=precision)
    peak = CLUSTER.processor.peak_flops[precision]
    assert step.mfu * peak == pytest.approx(step.tflops_per_gpu * 1e12)
    assert step.tokens_per_s * step.step_time_s == pytest.approx(tokens)
    assert sum(step.breakdown_s.values()) == pytest.approx(step.step_time_s)
    memory = dict(step.peak_memory_bytes)
    assert memory.pop("framework") == 0
    assert memory.pop("reserved") >= memory["total"]
    assert memory.pop("total") == sum(memory.values())
    assert list(memory) == ["parameters", "gradients", "optimizer", "activations", "buffers", "temporary"]
    days = training_days(step, 1e9)
    assert days["days"] * 24 * 2 == pytest.approx(days["gpu_hours"])  # two GPUs
    assert days["days"] * 86_400 * step.tokens_per_s == pytest.approx(1e9)


def test_it_fits_as_long_as_reserved_and_framework_do() -> None:
    reserved = result().peak_memory_bytes["reserved"]
    assert result(cluster_with(memory_bytes=reserved + 100, framework_bytes=100)).fits
    assert not result(cluster_with(memory_bytes=reserved + 100, framework_bytes=101)).fits
    assert not result(cluster_with(memory_bytes=reserved - 1)).fits


def test_events_say_the_same_as_the_closed_form() -> None:
    # One ring of two ranks is all there is: the same times, played or computed.
    played, computed = (result(fidelity=fidelity) for fidelity in ("events", "closed_form"))
    assert played.step_time_s == pytest.approx(computed.step_time_s, rel=1e-9)  # rounding


def test_the_contract_is_kept() -> None:
    answer = to_dict(result())
    assert set(answer) == CONTRACT
    assert type(answer["breakdown_s"]) is type(answer["layout"]) is dict
    assert set(answer["bytes_sent_per_gpu"]) == {"total", "max", "by_axis"}


def test_a_table_has_a_row_per_result() -> None:
    step = result()
    many = [replace(step, layout={"gpus": gpus, "global_batch": 8 * gpus}) for gpus in (1, 2, 4)]
    rows = to_rows(many)
    assert [(row["gpus"], row["global_batch"]) for row in rows] == [(1, 8), (2, 16), (4, 32)]
    for row in rows:
        assert row["peak_memory_bytes"] == step.peak_memory_bytes["total"]
        assert row["bytes_sent_per_gpu"] == step.bytes_sent_per_gpu["total"]
        assert sum(row[f"{cause}_s"] for cause in step.breakdown_s) == pytest.approx(row["step_time_s"])
