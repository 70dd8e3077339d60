"""Hybrid sharding and second shards on Gloo ranks: against one process, and byte for byte against the closed forms."""

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hand_made import PROCESSOR
from small_models import Outcome, Run, start_engine, train_alone, train_rank, train_step
from windtunnel.collectives.ring import RING
from windtunnel.collectives.trace import Trace
from windtunnel.collectives.zero import (
    UnitSize,
    Zero,
    model_state_bytes,
    secondary_bytes_per_step,
    shard_group_bytes_per_step,
)
from windtunnel.engine.config import Config
from windtunnel.engine.engine import initialize
from windtunnel.engine.gloo import GlooCommunicator
from windtunnel.engine.pilot import Plan, fly
from windtunnel.engine.sockets import framing_bytes
from windtunnel.engine.wire import written_bytes
from windtunnel.engine.world import World
from windtunnel.experiments.ranks import Task, live_bytes, train_share
from windtunnel.experiments.samples import one_backward
from windtunnel.sim.memory import replay_memory
from windtunnel.sim.replay import sent_bytes_by_axis

TOLERANCE = 1e-10
"""float64; sums are taken in another order, and Adam enlarges rounding (tests/test_zero.py)."""


@cache
def alone(run: Run) -> Outcome:
    return train_alone(replace(run, stage=0, accumulation=1))


def check(world: World, run: Run, zero: dict[str, Any]) -> None:
    for outcome in world.run(train_rank, run, zero):
        for name, wanted in alone(run).parameters.items():
            limit = TOLERANCE * (float(wanted.norm()) or 1.0)
            assert float((outcome.parameters[name] - wanted).norm()) <= limit, name
        assert outcome.norms == pytest.approx(alone(run).norms, rel=TOLERANCE)


# Shard groups #


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shard_groups_of_two_equal_one_process(four_ranks: World, stage: int, accumulation: int) -> None:
    check(four_ranks, Run("tied", stage=stage, accumulation=accumulation, clip=0.5, steps=4), {"mics_shard_size": 2})


@pytest.mark.parametrize("model", ["frozen", "one element", "used twice", "sometimes used"])
def test_shard_groups_of_special_models(four_ranks: World, model: str) -> None:
    check(four_ranks, Run(model, stage=3, accumulation=3, clip=0.5, steps=4), {"mics_shard_size": 2})


# Second shards #


@pytest.mark.parametrize(
    ("model", "accumulation"), [("tied", 1), ("tied", 3), ("recomputed", 3), ("used twice", 1), ("never used", 3)]
)
def test_second_shards_equal_one_process(four_ranks: World, model: str, accumulation: int) -> None:
    run = Run(model, stage=3, accumulation=accumulation, clip=0.5, steps=4)
    check(four_ranks, run, {"zero_hpz_partition_size": 2})


def gathers(rank: int, world: int, run: Run, zero: dict[str, Any]) -> tuple[int, int, bool]:
    """One step: gathers over all ranks and inside the node, and whether both passes computed with the same bits."""
    engine = start_engine(run, run.build(), zero_optimization={"stage": 3, **zero}, communication_compression=SMALL)
    before = dict(run.build().named_parameters())  # float64: any rounding on the way would show
    assert all(torch.equal(values, before[name]) for name, values in engine.full_parameters().items())
    engine.groups.everyone.ledger.clear()
    engine.groups.secondary.ledger.clear()
    unit = engine.runtime.units[1]
    seen, arrive = [], unit.arrive

    def look() -> None:
        under_way = unit.arriving is not None
        arrive()
        if under_way:
            seen.append(unit.full.clone())

    unit.arrive = look  # type: ignore[method-assign]
    train_step(engine, run, 0, rank, world)
    counts = [
        sum(count for entry, count in group.ledger.items() if entry.kind == "all_gather")
        for group in (engine.groups.everyone, engine.groups.secondary)
    ]
    engine.close()
    forward, backward = seen
    return counts[0], counts[1], torch.equal(forward, backward)


SMALL = {"min_elements": 0}


def test_backward_gathers_inside_the_node(four_ranks: World) -> None:
    run = Run("gpt", steps=1)
    units = 4  # the root and three blocks
    for answer in four_ranks.run(gathers, run, {"zero_hpz_partition_size": 2}):
        assert answer == (units, units, True)


def test_with_quantized_weights_and_gradients(four_ranks: World) -> None:
    """Gathers over all ranks are int8 and go through the node grid; backward computes with the same rounded bits."""
    run = Run("gpt", steps=1)
    zero = {"zero_hpz_partition_size": 2, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    for everywhere, inside, same in four_ranks.run(gathers, run, zero):
        assert same
        assert everywhere == 0  # of the flat group: the grid's groups take its place
        assert inside == 4 + 4  # the grid's inner half of a gather, and the gather for backward


def quantized_losses(rank: int, world: int, run: Run, zero: dict[str, Any]) -> list[float]:
    engine = start_engine(run, run.build(), zero_optimization={"stage": 3, **zero}, communication_compression=SMALL)
    losses = [train_step(engine, run, step, rank, world) for step in range(run.steps)]
    engine.close()
    return losses


@pytest.mark.parametrize("redundancy", [{"zero_hpz_partition_size": 2}, {"mics_shard_size": 2}])
def test_quantized_training_stays_near(four_ranks: World, redundancy: dict[str, int]) -> None:
    """int8 weights and int4 gradients move the loss by a few per cent; gradients of the wrong ranks by much more."""
    run = Run("gpt", stage=3, steps=8)
    zero = {**redundancy, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    ranks = four_ranks.run(quantized_losses, run, zero)
    losses = [sum(each) / 4 for each in zip(*ranks, strict=True)]
    assert losses == pytest.approx(alone(run).losses, rel=0.05)
    assert losses != pytest.approx(alone(run).losses, rel=1e-6)


# Bytes and memory: the formula, the kernel's counter and the flight, all exact #


class Found(NamedTuple):
    """Of one rank and step. `by_axis` is what the programs of the listed collectives send, `measured` what the kernel
    counted on all axes together, headers and few-element reductions taken off."""

    by_axis: dict[str, int]
    measured: int
    state_bytes: int
    units: tuple[UnitSize, ...]


def config(stage: int, accumulation: int, zero: dict[str, Any]) -> dict[str, Any]:
    return {
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, **zero},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "communication": {"transport": "sockets", "algorithms": dict.fromkeys(RING, "ring")},
    }


def account(rank: int, world: int, stage: int, accumulation: int, zero: dict[str, Any]) -> Found:
    task = Task(TARGET, 2, "fp32", accumulation, 20.0, "")
    before = live_bytes()
    model, batches = task.sample()
    others = live_bytes() - before - sum(p.numel() * p.element_size() for p in set(model.parameters()))
    engine, *_ = initialize(model, config(stage, accumulation, zero), timeout_s=20.0)
    train_share(engine, one_backward, batches[0], rank, world, accumulation, None)
    engine.settle()
    groups = [group for group in engine.groups.each() if isinstance(group, GlooCommunicator)]
    for group in groups:
        group.ledger.clear()
    written = written_bytes()
    train_share(engine, one_backward, batches[1], rank, world, accumulation, None)
    engine.settle()
    written = written_bytes() - written
    for group in groups:
        group.release_buffers()
    by_axis: Counter[str] = Counter()
    for group in groups:
        for entry, count in group.ledger.items():
            steps = group.steps(entry)
            payload = 4 * sum(message.stop - message.start for step in steps for message in step.sends)
            written -= count * (framing_bytes(steps) + entry.scalar * payload)
            by_axis[group.axis] += count * payload * (not entry.scalar)
    state_bytes = live_bytes() - before - others
    units = tuple(unit.size for unit in engine.runtime.units)
    engine.close()
    return Found(dict(by_axis), written, state_bytes, units)


TARGET = "verify_targets:tied"


def flown(stage: int, accumulation: int, zero: dict[str, Any]) -> Trace:
    task = Task(TARGET, 1, "fp32", accumulation, 20.0, "")
    return fly(
        Plan(
            factory="windtunnel.experiments.ranks:for_flight",
            arguments={"task": task, "world": 4},
            config=config(stage, accumulation, zero),
            world=4,
            micro_steps=accumulation,
        )
    )


def check_figures(world: World, stage: int, accumulation: int, zero: dict[str, Any], **secondary: int) -> None:
    """`secondary`: for the memory formula."""
    reports = world.run(account, stage, accumulation, zero)
    units, level = reports[0].units, Zero.of_stage(stage)
    if secondary:
        expected = secondary_bytes_per_step(units, 4, 2, accumulation)
        shared = 4
    else:
        expected = shard_group_bytes_per_step(units, level, 2, 2, accumulation)
        shared = 2
    state = model_state_bytes(units, level, shared, moments=2, master_bytes=4, **secondary)
    for report in reports:
        assert {axis: nbytes for axis, nbytes in report.by_axis.items() if nbytes} == expected
        assert report.measured == sum(expected.values())
    assert max(report.state_bytes for report in reports) == sum(state.values())
    trace = flown(stage, accumulation, zero)
    predicted = sent_bytes_by_axis(trace, scalars=False)
    assert {axis: nbytes for axis, nbytes in predicted.items() if nbytes} == expected
    assert replay_memory(trace, PROCESSOR).state == state


@pytest.mark.parametrize(("stage", "accumulation"), [(1, 3), (2, 3), (3, 1), (3, 3)])
def test_bytes_and_memory_of_shard_groups(four_ranks: World, stage: int, accumulation: int) -> None:
    check_figures(four_ranks, stage, accumulation, {"mics_shard_size": 2})


def test_bytes_and_memory_of_second_shards(four_ranks: World) -> None:
    check_figures(four_ranks, 3, 3, {"zero_hpz_partition_size": 2}, secondary_ranks=2)


# Edges #


@pytest.mark.parametrize("size", [1, 4])
def test_the_smallest_and_the_largest_group(four_ranks: World, size: int) -> None:
    """Shards of one rank are whole copies; a group of all ranks is plain ZeRO."""
    check(four_ranks, Run("mlp", stage=2, steps=3, accumulation=3, clip=0.5), {"mics_shard_size": size})


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"stage": 3, "mics_shard_size": 3}, r"mics_shard_size = 3 .*3 \* 1 = 3, but there are 4 ranks.*1, 2, 4"),
        ({"stage": 3, "mics_shard_size": 8}, r"mics_shard_size = 8 .*8 \* 1 = 8, but there are 4 ranks"),
        ({"stage": 3, "mics_shard_size": 0}, r"mics_shard_size = 0"),
        ({"stage": 0, "mics_shard_size": 2}, r"stage = 0, which shards nothing"),
        ({"stage": 3, "mics_shard_size": 2, "zero_hpz_partition_size": 2}, r"both set"),
        ({"stage": 2, "zero_hpz_partition_size": 2}, r"stage = 2, which gathers nothing for backward"),
        ({"stage": 3, "zero_hpz_partition_size": 3}, r"zero_hpz_partition_size = 3 .*3 \* 1 = 3"),
        ({"stage": 3, "mics_hierarchical_params_gather": True}, r"mics_hierarchical_params_gather.*false"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(zero: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config.read({"zero_optimization": zero}, 4)


# Checkpoints #


def save_and_load(rank: int, world: int, folder: str, saved: dict[str, Any], loaded: dict[str, Any]) -> float:
    """Go on for two steps from a checkpoint under other sharding: the largest difference from having gone on."""
    run = Run("tied", steps=4)
    engine = start_engine(run, run.build(), zero_optimization=saved)
    for step in range(2):
        train_step(engine, run, step, rank, world)
    engine.save_checkpoint(folder)
    again = start_engine(run, run.build(), zero_optimization=loaded)
    again.load_checkpoint(folder)
    for step in (2, 3):
        train_step(engine, run, step, rank, world)
        train_step(again, run, step, rank, world)
    ours, theirs = engine.full_parameters(), again.full_parameters()
    engine.close()
    again.close()
    return max(float((ours[name] - theirs[name]).norm() / ours[name].norm()) for name in ours)


MICS, HPZ = {"stage": 3, "mics_shard_size": 2}, {"stage": 3, "zero_hpz_partition_size": 2}


@pytest.mark.parametrize(("saved", "loaded"), [(MICS, MICS), (MICS, HPZ), (HPZ, {"stage": 1})])
def test_checkpoints_load_under_other_sharding(
    four_ranks: World, tmp_path: Path, saved: dict[str, Any], loaded: dict[str, Any]
) -> None:
    for difference in four_ranks.run(save_and_load, str(tmp_path), saved, loaded):
        assert difference <= (0.0 if saved == loaded else TOLERANCE)
