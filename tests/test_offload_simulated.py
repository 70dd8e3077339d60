"""Offload in traces and in replays: closed forms, plays by hand, and what a catalogue cluster makes of it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hand_made import CLUSTER, kernel, steps_of
from test_flight import SPEC, spelled_out, units_of
from windtunnel.collectives.trace import (
    DEEPER,
    MIDDLE,
    SHALLOWEST,
    Alloc,
    Copy,
    HostWork,
    Op,
    Ref,
    Trace,
    Wait,
    stretch,
)
from windtunnel.collectives.trace_file import dumps, loads
from windtunnel.collectives.zero import Zero, tier_bytes
from windtunnel.engine.nvme import PAGE, whole_pages
from windtunnel.engine.pilot import Plan, fly
from windtunnel.experiments.layout import offload_sections
from windtunnel.experiments.models import load_model
from windtunnel.experiments.simulate import simulate
from windtunnel.sim.hardware import cluster_names, load_cluster
from windtunnel.sim.host import Host, bandwidth
from windtunnel.sim.memory import replay_memory
from windtunnel.sim.replay import replay

HOST = Host(
    memory_bytes=1000, memory_bytes_per_s=4.0, memory_efficiency=0.5, link_bytes_per_s=2.0, gpus_per_link=2,
    nvme_bytes=1000, nvme_read_bytes_per_s=2.0, nvme_write_bytes_per_s=4.0,
)  # fmt: skip
"""Two ranks: a copy to or from the host takes a second per byte, a read too; a write half of it; host work one too."""

HAND_MADE = replace(CLUSTER, host=HOST)
DEPTH = SHALLOWEST + DEEPER


def flight(offload: str, to: str, *, stage: int = 3, layers: int = 2, micro_steps: int = 1, clip: float = 0.0) -> Trace:
    spec = replace(SPEC, layers=layers)
    plan = Plan(
        factory="windtunnel.experiments.transformer:for_flight",
        arguments={"spec": spec, "batch": 2, "seq": spec.seq},
        config={
            "zero_optimization": {**offload_sections(offload, to), "stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "bf16": {"enabled": True, "check_grad_overflow": False},
            "gradient_clipping": clip,
        },
        world=4,
        micro_steps=micro_steps,
    )
    return fly(plan)


# Traces #


def copied(trace: Trace, step: int) -> Counter[tuple[str, str]]:
    """Bytes by (direction, what) in a step."""
    total: Counter[tuple[str, str]] = Counter()
    for phase in trace.phases:
        for call in phase.calls if phase.step == step else ():
            for op in trace.segments[call.segment]:
                if isinstance(op, Copy):
                    total[op.direction, op.label] += op.nbytes * phase.repeat
    return total


@pytest.mark.parametrize("stage", range(4))
def test_two_bytes_down_and_two_up_per_parameter(stage: int) -> None:
    """ZeRO-Offload, section 4: what a 16-bit shard moves in a step."""
    units = units_of(replace(SPEC, layers=2), 4, element_bytes=2)
    shard = sum(unit.elements for unit in units) // (4 if stage else 1)
    moved = copied(flight("optimizer", "host", stage=stage), 2)
    assert moved == {("to_host", "gradients"): 2 * shard, ("to_device", "parameters"): 2 * shard}


def test_files_move_whole_and_parameters_come_up_for_each_pass() -> None:
    units = units_of(replace(SPEC, layers=2), 4, element_bytes=2)
    shards = [unit.elements // 4 for unit in units]
    state = sum(PAGE + 3 * whole_pages(4 * shard) for shard in shards)
    files = sum(PAGE + whole_pages(2 * shard) for shard in shards)
    moved = copied(flight("parameters", "nvme", micro_steps=3), 2)
    assert moved["from_nvme", "optimizer state"] == moved["to_nvme", "optimizer state"] == state
    assert moved["to_nvme", "parameters"] == files
    assert moved["from_nvme", "parameters"] >= 2 * 3 * files  # forward and backward; once more where it was too early
    assert moved["to_host", "gradients"] == 3 * 2 * sum(shards)


@pytest.mark.parametrize(("micro_steps", "clip"), [(1, 0.0), (2, 0.0), (2, 1.0)])
@pytest.mark.parametrize("to", ["host", "nvme"])
def test_a_unit_is_stepped_after_its_gradient_and_its_state_have_come(to: str, micro_steps: int, clip: float) -> None:
    """The wait for what was started last in that direction is among those that stand before the step."""
    trace = flight("optimizer", to, stage=2, micro_steps=micro_steps, clip=clip)
    runs: Counter[tuple[str, int]] = Counter()
    made: dict[tuple[str, int, int, int], Op] = {}
    before: list[Op] = []
    steps = 0
    for phase in trace.phases:
        for call in phase.calls:
            runs[call.key, call.block] += 1
            for position, op in enumerate(trace.segments[call.segment]):
                made[call.key, call.block, runs[call.key, call.block], position] = op
                if isinstance(op, Wait) and op.stream == "host":
                    block = op.ref.block_from(call.block)
                    before.append(made[op.ref.key, block, runs[op.ref.key, block] - op.ref.age, op.ref.op])
                if isinstance(op, HostWork):
                    waited = {one.direction if isinstance(one, Copy) else one.name for one in before}
                    if op.name == "step":
                        steps += 1
                        assert ("accumulate" if micro_steps > 1 else "to_host") in waited
                        assert ("from_nvme" in waited) == (to == "nvme")
                    before = []
    assert steps == 2 * 3  # two steps of three units


@pytest.mark.parametrize(
    ("stage", "offload", "to", "micro_steps"),
    [(stage, "optimizer", to, steps) for stage in range(4) for to, steps in (("host", 2), ("nvme", 1 + stage % 2))]
    + [(3, "parameters", "host", 2)],
)
def test_state_rests_where_the_formula_says(stage: int, offload: str, to: str, micro_steps: int) -> None:
    units = [
        replace(unit, optimizer_tier=to, parameter_tier=to if offload == "parameters" else "device")
        for unit in units_of(replace(SPEC, layers=2), 4, element_bytes=2)
    ]
    formula = tier_bytes(units, Zero.of_stage(stage), 4, moments=2, master_bytes=4)
    trace = flight(offload, to, stage=stage, micro_steps=micro_steps)
    memory = replay_memory(trace, CLUSTER.processor)
    assert memory.state == formula["device"]
    resting: Counter[tuple[str, str]] = Counter()
    for phase in trace.phases:
        for call in phase.calls:
            for op in trace.segments[call.segment]:
                if isinstance(op, Alloc) and op.tier != "device":
                    resting[op.tier, op.category] += op.nbytes
    for category, nbytes in formula["host"].items():
        assert resting["host", category] == nbytes
    assert resting["nvme", "optimizer"] >= formula["nvme"]["optimizer"]
    assert memory.elsewhere["host"] == sum(formula["host"].values()) + resting["host", "buffers"]
    assert (resting["host", "buffers"] > 0) == (to == "nvme" or (micro_steps > 1 and stage >= 2))


@pytest.mark.parametrize(
    ("offload", "to", "stage", "micro_steps", "clip"),
    [("optimizer", "nvme", 2, 3, 1.0), ("parameters", "nvme", 3, 2, 0.0)],
)
def test_a_stretched_flight_is_the_deep_flight(
    offload: str, to: str, stage: int, micro_steps: int, clip: float
) -> None:
    shallow, deep = (
        flight(offload, to, stage=stage, layers=layers, micro_steps=micro_steps, clip=clip)
        for layers in (DEPTH, DEPTH + 3)
    )
    assert list(spelled_out(stretch(shallow, DEPTH + 3, MIDDLE + DEEPER // 2))) == list(spelled_out(deep))


def test_a_trace_with_offload_comes_back_equal() -> None:
    trace = flight("parameters", "nvme", clip=1.0)
    assert loads(dumps(trace)) == trace
    first = json.loads(dumps(flight("none", "host")))
    for segment in first["segments"]:  # as version 1 wrote it
        for op in segment:
            op.pop("tier", None)
            op.pop("stream", None)
    assert loads(json.dumps({**first, "version": 1})) == flight("none", "host")


# Replays #


def down(nbytes: int) -> Copy:
    return Copy("to_host", nbytes, "gradients")


def up(nbytes: int) -> Copy:
    return Copy("to_device", nbytes, "parameters")


def work(nbytes: int) -> HostWork:
    return HostWork("step", nbytes, 0)


def wait(op: int, stream: str = "compute") -> Wait:
    return Wait(Ref("forward", 0, True, 0, op), stream)


READ, WRITE = Copy("from_nvme", 3, "state"), Copy("to_nvme", 8, "state")

BY_HAND = {
    "a copy beside computation": ([kernel(2), down(3), kernel(5), wait(1)], (7, 7, 0)),
    "a copy begins when what was computed before has ended": ([kernel(2), down(3), wait(1)], (5, 2, 3)),
    "copies down queue, those up do not": ([down(3), down(3), up(4), wait(2), kernel(1), wait(1)], (6, 1, 5)),
    "down, step, up": ([down(2), wait(0, "host"), work(3), wait(2, "to_device"), up(1), wait(4)], (6, 0, 6)),
    "the step of one beside the copy of the next": (
        [down(4), wait(0, "host"), work(4), down(4), wait(3, "host"), work(4), wait(5)], (12, 0, 12)
    ),
    # read 3, step 2, write 8 bytes in 4 s; nothing of it waits for what is computed
    "a file is read while the device computes": (
        [kernel(6), READ, wait(1, "host"), work(2), wait(3, "to_nvme"), WRITE, wait(5, "program")], (9, 6, 3)
    ),
    # A program that does not wait has read and stepped by then what it needs for the next step.
    "a file is read while the last step computes": (
        [kernel(6), READ, wait(1, "host"), work(2), wait(3, "to_nvme"), WRITE, wait(5)], (6, 6, 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("ops", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_by_hand(ops: list[Op], expected: tuple[float, float, float]) -> None:
    result = replay(steps_of(*ops), HAND_MADE, record=True)
    parts = result.breakdown_s
    assert (result.step_time_s, parts["compute"], parts["offload"]) == pytest.approx(expected)
    assert parts["exposed_communication"] == parts["host"] == 0.0
    streams = {"to host", "to device", "from nvme", "to nvme", "host"}
    assert {span.stream for span in result.spans} & streams


def test_what_a_node_shares_is_cut_in_equal_parts() -> None:
    for ranks in (1, 2, 8):
        assert bandwidth("to_device", HOST, ranks) == 2.0 / min(ranks, 2)
        assert bandwidth("from_nvme", HOST, ranks) * ranks == 2.0
        assert bandwidth("to_nvme", HOST, ranks) * ranks == 4.0
    with pytest.raises(ValueError, match="unknown direction 'sideways'"):
        bandwidth("sideways", HOST, 1)


def test_a_cluster_that_does_not_know_its_host() -> None:
    with pytest.raises(ValueError, match=r"cluster 'hand-made' has no \[host\]: give its memory"):
        replay(steps_of(down(1)), CLUSTER)
    cpu = replace(CLUSTER, processor=replace(CLUSTER.processor, kind="cpu"))
    # On a CPU a copy reads and writes the one memory: a second per byte.
    assert replay(steps_of(down(3), wait(0)), cpu).breakdown_s["offload"] == pytest.approx(6)


def test_every_catalogue_cluster_knows_its_host() -> None:
    for name in cluster_names():
        host = load_cluster(name).host
        assert host is not None
        assert host.nvme_write_bytes_per_s <= host.nvme_read_bytes_per_s < host.memory_bytes_per_s


def test_a_user_describes_a_host(tmp_path: Path) -> None:
    table = "\n".join(f"{name} = {getattr(HOST, name)}" for name in HOST.__dataclass_fields__)
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "dgx-a100"\n[host]\n{table}\n')
    assert load_cluster(path).host == HOST
    path.write_text('base = "dgx-a100"\n[host]\nmemory_efficiency = 2.0\n')
    with pytest.raises(ValueError, match="host"):
        load_cluster(path)


# The command #

JOB: dict[str, Any] = {"gpus": 8, "zero": 3, "micro_batch": 2}
MODEL = replace(load_model("gpt2"), layers=4)  # wide enough that a step is more than issuing its kernels


def test_offload_costs_time_and_frees_memory() -> None:
    without = simulate(MODEL, "dgx-a100", **JOB)
    assert without.offloaded_bytes_per_node == {"host": 0, "nvme": 0}
    assert without.breakdown_s["offload"] == 0.0
    before, freed = without.step_time_s, without.peak_memory_bytes["total"]
    for offload, to in (("optimizer", "host"), ("optimizer", "nvme"), ("parameters", "nvme")):
        result = simulate(MODEL, "dgx-a100", **JOB, offload=offload, offload_to=to)
        assert result.step_time_s > before  # the host is slower than the GPU, files are slower than the host
        assert result.breakdown_s["offload"] > 0
        assert sum(result.breakdown_s.values()) == pytest.approx(result.step_time_s)
        assert result.model_state_bytes < without.model_state_bytes
        assert result.peak_memory_bytes["total"] <= freed
        assert result.offloaded_bytes_per_node["host"] > 0
        assert (result.offloaded_bytes_per_node["nvme"] > 0) == (to == "nvme")
        before, freed = result.step_time_s, result.peak_memory_bytes["total"]


def test_parameters_stay_where_they_are_whole() -> None:
    with pytest.raises(ValueError, match=r"offload = parameters; allowed: optimizer, or zero = 3"):
        simulate("gpt-demo", "dgx-a100", gpus=8, zero=2, offload="parameters")


def test_a_deepspeed_file_says_where_state_rests(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    section = {"device": "cpu", "ratio": 0.5}
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": section}}))
    half = simulate("gpt-demo", "dgx-a100", gpus=8, config=path)
    assert (half.layout["offload"], half.layout["offload_to"], half.layout["zero"]) == ("optimizer", "host", 2)
    whole = simulate("gpt-demo", "dgx-a100", gpus=8, config=path, offload="optimizer")
    assert 0 < half.offloaded_bytes_per_node["host"] < whole.offloaded_bytes_per_node["host"]
    assert half.model_state_bytes > whole.model_state_bytes
