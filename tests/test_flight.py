"""Flights: what the simulated device records, against closed forms and against deeper flights."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hand_made import PROCESSOR
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.collectives.trace import Collective, Kernel, Trace, repeat_phase, stretch, walk
from windtunnel.collectives.zero import UnitSize, Zero, model_state_bytes, padded, sent_bytes_per_step
from windtunnel.engine.pilot import FlightError, Pilot, Plan, fly
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.ranks import Task
from windtunnel.sim.memory import replay_memory
from windtunnel.sim.replay import ATTENTION_BACKWARD_SHARE, sent_bytes_by_axis

SPEC = ModelSpec(
    name="small", layers=8, hidden=24, heads=3, ffn=50, vocab=101, seq=16,
    mlp="gelu", norm="layernorm", positions="learned", attention="causal", tied=True, bias=True,
)  # fmt: skip
SMALL = replace(SPEC, layers=2)
BATCH = 2


def flight(
    spec: ModelSpec = SPEC,
    *,
    stage: int = 3,
    world: int = 4,
    micro_steps: int = 1,
    recompute: str = "none",
    **config: Any,
) -> Trace:
    plan = Plan(
        factory="windtunnel.experiments.transformer:for_flight",
        arguments={"spec": spec, "batch": BATCH, "seq": spec.seq},
        config={
            "activation_checkpointing": {"policy": recompute},
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            **config,
        },
        world=world,
        micro_steps=micro_steps,
    )
    return fly(plan)


def units_of(spec: ModelSpec, world: int, element_bytes: int = 4) -> list[UnitSize]:
    """The root and the blocks, from the catalogue's parameter count alone."""
    block = replace(spec, layers=2).parameters - replace(spec, layers=1).parameters
    sizes = [spec.parameters - spec.layers * block] + [block] * spec.layers
    return [
        UnitSize(elements=padded(size, world), element_bytes=element_bytes, padding=padded(size, world) - size)
        for size in sizes
    ]


# Repetition #


CASES = [(stage, micro_steps, "none") for stage in range(4) for micro_steps in (1, 3)]
CASES += [(3, 1, "full"), (3, 1, "selective")]


@pytest.mark.parametrize(("stage", "micro_steps", "recompute"), CASES)
def test_a_stretched_flight_is_the_deep_flight_op_for_op(stage: int, micro_steps: int, recompute: str) -> None:
    shallow, deep = (
        flight(
            replace(SPEC, layers=layers),
            stage=stage,
            micro_steps=micro_steps,
            recompute=recompute,
            gradient_clipping=1.0,
        )
        for layers in (8, 12)
    )
    assert list(spelled_out(stretch(shallow, 12))) == list(spelled_out(deep))


def spelled_out(trace: Trace) -> Iterator[tuple]:
    for phase, call, position, op in walk(trace):
        yield phase.name, phase.step, call.key, call.block, position, op


def test_middle_micro_steps_are_alike() -> None:
    # Five micro-steps are flown as three; the middle one stands for three.
    trace = repeat_phase(flight(SMALL, stage=2, micro_steps=3), "micro-step middle", 3)
    assert sum(phase.repeat for phase in trace.phases if phase.step == 2 and "micro" in phase.name) == 5
    assert sum(sent_bytes_by_axis(trace, scalars=False).values()) == sent_bytes_per_step(
        units_of(SMALL, 4), Zero.of_stage(2), 4, 5
    )


def test_a_second_flight_is_equal_to_the_first() -> None:
    assert flight(SMALL) == flight(SMALL)


# Bytes #


@settings(max_examples=12, deadline=None)
@given(
    stage=st.integers(0, 3),
    micro_steps=st.integers(1, 3),
    world=st.sampled_from([1, 2, 3, 7, 8, 100, 1024, 4095, 100_000]),
    bf16=st.booleans(),
    clip=st.sampled_from([0.0, 1.0]),
)
def test_predicted_bytes_are_the_expected_ones(
    stage: int, micro_steps: int, world: int, bf16: bool, clip: float
) -> None:
    spec = SMALL
    trace = flight(
        spec,
        stage=stage,
        micro_steps=micro_steps,
        world=world,
        bf16={"enabled": bf16},
        gradient_clipping=clip,
    )
    units = units_of(spec, world, 2 if bf16 else 4)
    predicted = sum(sent_bytes_by_axis(trace, scalars=False).values())
    assert predicted == sent_bytes_per_step(units, Zero.of_stage(stage), world, micro_steps)
    scalars = sum(sent_bytes_by_axis(trace).values()) - predicted
    # Bookkeeping is a few elements per rank and step, whatever the model.
    assert 0 <= scalars < 1024
    if clip and 1 < world <= 4:  # the norm is summed over the ranks, unless each has all of it
        assert scalars > 0 or stage == 0


@pytest.mark.parametrize("stage", range(4))
def test_every_collective_is_of_the_data_axis_and_waited_for(stage: int) -> None:
    trace = flight(SMALL, stage=stage, micro_steps=2)
    assert trace.world == {"data": 4}
    started = [op for *_, op in walk(trace) if isinstance(op, Collective)]
    waited = [op for *_, op in walk(trace) if type(op).__name__ == "Wait"]
    assert started
    assert all(op.axis == "data" and op.algorithm is None for op in started)
    assert (
        0 <= len(started) - len(waited) <= len(units_of(SMALL, 4))
    )  # the last gathers are waited for in the next step


# FLOPs #


VARIANTS = {
    "gpt": SPEC,
    "llama": replace(SPEC, kv_heads=1, mlp="swiglu", norm="rmsnorm", positions="rope", tied=False, bias=False),
    "bloom": replace(SPEC, positions="alibi"),
    "bert": replace(SPEC, attention="full"),
}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_flops_are_those_of_the_formula(variant: str, recompute: str) -> None:
    spec = replace(VARIANTS[variant], layers=2)
    trace = flight(spec, stage=1, micro_steps=2, recompute=recompute)
    forward, backward = flops(trace, "forward"), flops(trace, "backward")
    once = spec.forward_flops(BATCH, spec.seq)
    assert forward == 2 * once  # two micro-steps
    # "full" computes the blocks again but for the product that leaves each: backward needs its inputs, not its result.
    # The logits are in no block.
    left_out = spec.hidden * (spec.vocab + spec.layers * spec.ffn)
    again = once - 2 * BATCH * spec.seq * left_out if recompute == "full" else 0
    assert backward == pytest.approx(2 * (2 * once + again))
    assert forward + backward == flops(trace, "")


def flops(trace: Trace, key: str) -> float:
    """Of the second step, attention's backward as four products."""
    return sum(
        op.flops * (ATTENTION_BACKWARD_SHARE if op.name == "attention_backward" else 1.0)
        for phase, call, _, op in walk(trace)
        if phase.step == 2 and call.key.startswith(key) and isinstance(op, Kernel)
    )


def test_attention_is_one_kernel_forward_and_one_backward() -> None:
    kernels = [op for phase, *_, op in walk(flight(SMALL)) if phase.step == 2 and isinstance(op, Kernel)]
    forward = [op for op in kernels if op.name == "attention"]
    backward = [op for op in kernels if op.name == "attention_backward"]
    assert len(forward) == len(backward) == SMALL.layers
    B, S, H, E = BATCH, SPEC.seq, SPEC.heads, SPEC.head_size
    assert {op.shape for op in forward + backward} == {(B, H, S, S, E)}
    assert {op.flops for op in forward} == {2 * 2 * B * H * S * S * E}
    assert {op.flops for op in backward} == {5 * 2 * B * H * S * S * E}


# Memory #


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("world", [4, 1000])
def test_state_is_what_the_formula_says(stage: int, precision: str, world: int) -> None:
    bf16 = precision == "bf16"
    spec = SMALL
    trace = flight(spec, stage=stage, world=world, bf16={"enabled": bf16})
    memory = replay_memory(trace, PROCESSOR)
    expected = model_state_bytes(
        units_of(spec, world, 2 if bf16 else 4), Zero.of_stage(stage), world, moments=2, master_bytes=4
    )
    assert memory.state == expected
    assert memory.total_bytes >= sum(expected.values())
    assert memory.peak["activations"] > 0
    # Two equal steps: what the second one leaves behind is what the first one left.
    deeper = replay_memory(replace(trace, phases=(*trace.phases, *only_step_2(trace))), PROCESSOR)
    assert deeper.state == expected
    assert deeper.total_bytes == memory.total_bytes


def only_step_2(trace: Trace) -> list:
    return [phase for phase in trace.phases if phase.step == 2]


@pytest.mark.parametrize("stage", [0, 3])
def test_recomputation_keeps_fewer_activations(stage: int) -> None:
    none, selective, full = (
        replay_memory(flight(SMALL, stage=stage, recompute=recompute), PROCESSOR).peak["activations"]
        for recompute in ("none", "selective", "full")
    )
    assert none > selective > full


# Any model #


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    "target", ["mlp", "cnn", "lstm", "tied", "never_used", "used_twice", "frozen", "with_keywords"]
)
def test_models_of_all_kinds_fly(target: str, stage: int) -> None:
    task = Task(f"verify_targets:{target}", None, "fp64", 1, 20.0, "")
    plan = Plan(
        factory="windtunnel.experiments.ranks:for_flight",
        arguments={"task": task, "world": 2},
        config=task.config(stage),
        world=2,
    )
    trace = fly(plan)
    kernels = [op for phase, *_, op in walk(trace) if phase.step == 2 and isinstance(op, Kernel)]
    assert any(op.family != "memory" for op in kernels)
    sizes = parameters_of(target)
    memory = replay_memory(trace, PROCESSOR)
    share = 2 if stage == 3 else 1
    # Padding is below a word per unit and rank; a model has at most a dozen units.
    assert memory.state["parameters"] == pytest.approx(8 * sum(sizes) / share, abs=8 * 12)
    assert sent_bytes_by_axis(trace, scalars=False)["data"] > 0


def parameters_of(target: str) -> list[int]:
    import verify_targets

    model, _ = getattr(verify_targets, target)()
    return [parameter.numel() for parameter in model.parameters()]


# What goes wrong #


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no.such.module:function", "'no.such.module:function': no such MODULE:FUNCTION: No module named 'no'"),
        ("verify_targets:no_such_function", "no such MODULE:FUNCTION: .* has no attribute 'no_such_function'"),
        ("verify_targets", "'verify_targets': no such MODULE:FUNCTION"),
        ("", "no such MODULE:FUNCTION"),
    ],
)
def test_a_factory_that_is_not_there_is_bad_input(factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fly(Plan(factory=factory, world=2))


def test_a_wrong_config_is_bad_input() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'zero_optimisation'.*did you mean 'zero_optimization'"):
        fly(Plan(factory="verify_targets:linear", arguments={"width": 3}, config={"zero_optimisation": {}}, world=2))


@pytest.mark.parametrize(("field", "value"), [("world", 0), ("micro_steps", 0)])
def test_a_plan_checks_its_numbers(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} = 0; allowed: at least 1"):
        Plan(**{"factory": "verify_targets:linear", "world": 2, field: value})


def test_what_fails_in_the_air_says_what_it_was() -> None:
    with pytest.raises(FlightError, match="RuntimeError: the engine is on fire"):
        fly(Plan(factory="verify_targets:raises_in_the_air", world=2))
    assert flight(SMALL).blocks == SMALL.layers  # the pilot lives


def test_after_a_crash_the_next_flight_has_a_new_pilot() -> None:
    with pytest.raises(FlightError, match="died with exit code 7"):
        fly(Plan(factory="verify_targets:dies", world=2))
    assert flight(SMALL).blocks == SMALL.layers


def test_a_flight_that_does_not_end_is_given_up() -> None:
    pilot = Pilot()
    with pytest.raises(FlightError, match="did not end within 0 s"):
        pilot.fly(Plan(factory="verify_targets:linear", arguments={"width": 3}, world=2), limit_s=0.0)
    assert not pilot.alive


# The device is one for the process #


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_importing_registers_nothing_and_a_foreign_device_is_left_alone() -> None:
    done = python(
        """
import torch, windtunnel
import windtunnel.engine.engine, windtunnel.engine.flight, windtunnel.experiments.verify
print(torch._C._get_privateuse1_backend_name())
torch.utils.rename_privateuse1_backend("abacus")
from windtunnel.engine.sim_device import register
try:
    register()
except RuntimeError as error:
    print(error)
print(torch._C._get_privateuse1_backend_name())
"""
    )
    assert done.returncode == 0, done.stderr
    before, refusal, after = done.stdout.splitlines()
    assert before == "privateuseone"
    assert "'abacus'" in refusal
    assert after == "abacus"
