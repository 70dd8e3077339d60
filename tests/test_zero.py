"""ZeRO on Gloo ranks against one process that trains on the same global batches in plain torch."""

import gc
import math
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import WorldOf
from small_models import (
    ZOO,
    Mlp,
    Outcome,
    Run,
    micro_batches,
    regression_batch,
    start_engine,
    train_alone,
    train_rank,
    train_step,
)
from torch import nn
from windtunnel.collectives.zero import Zero, model_state_bytes
from windtunnel.engine import gloo
from windtunnel.engine.communicator import DONE, Handle
from windtunnel.engine.engine import initialize
from windtunnel.engine.unit import FlatUnit, Residency
from windtunnel.engine.world import World

TENSOR_TOLERANCE = 1e-10
"""Sums over ranks and micro-steps are taken in another order: some 1e-16 per operation in float64. Adam enlarges that
where a gradient is zero but for rounding (the key biases of attention), up to its eps: 4e-13 was seen in 20 steps."""

LOSS_TOLERANCE = 1e-5
"""fp32 has 6e-8 per operation; some hundred operations lie between a batch and its loss."""


@cache
def alone(run: Run) -> Outcome:
    return train_alone(run)


def reference(run: Run) -> Outcome:
    """What one process does; stage and accumulation mean nothing to it."""
    return alone(replace(run, stage=0, accumulation=1))


def largest_difference(outcomes: list[Outcome], expected: Outcome) -> float:
    """max over ranks and tensors of ||a - b|| / ||b||, of ||a|| where b is zero (an untouched bias)."""
    ratios = []
    for outcome in outcomes:
        for name, wanted in expected.parameters.items():
            norm = float(wanted.double().norm())
            ratios.append(float((outcome.parameters[name].double() - wanted.double()).norm()) / (norm or 1.0))
    return math.inf if any(map(math.isnan, ratios)) else max(ratios)  # max() would overlook a NaN


def check(world: World, run: Run) -> None:
    outcomes, expected = world.run(train_rank, run), reference(run)
    assert all(outcome.parameters.keys() == expected.parameters.keys() for outcome in outcomes)
    assert largest_difference(outcomes, expected) <= TENSOR_TOLERANCE
    losses = [sum(rank_losses) / world.size for rank_losses in zip(*(o.losses for o in outcomes), strict=True)]
    assert losses == pytest.approx(expected.losses, rel=TENSOR_TOLERANCE)
    for outcome in outcomes:
        assert outcome.norms == pytest.approx(expected.norms, rel=TENSOR_TOLERANCE)


# Against one process #


@pytest.mark.parametrize("model", [name for name in ZOO if name != "sometimes used in blocks"])
def test_every_model_at_stage_3(two_ranks: World, model: str) -> None:
    check(two_ranks, Run(model, stage=3))


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(
    ("size", "accumulation", "clip"), [(2, 1, 0.0), (2, 1, 0.3), (2, 3, 0.0), (2, 3, 0.3), (4, 1, 0.3), (4, 3, 0.0)]
)
def test_gpt_at_every_stage(world_of: WorldOf, size: int, stage: int, accumulation: int, clip: float) -> None:
    check(world_of(size), Run("gpt", stage=stage, accumulation=accumulation, clip=clip))


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "momentum", "grouped"])
@pytest.mark.parametrize("stage", [1, 3])
def test_optimizers(two_ranks: World, optimizer: str, stage: int) -> None:
    check(two_ranks, Run("one element", stage=stage, optimizer=optimizer, clip=0.5))


@pytest.mark.parametrize("optimizer", ["AdamW", "grouped"])
def test_lr_schedule(two_ranks: World, optimizer: str) -> None:
    check(two_ranks, Run("tied", stage=2, optimizer=optimizer, schedule=True))


@pytest.mark.parametrize("model", ["frozen", "used twice", "tied"])
def test_accumulation_over_special_parameters(two_ranks: World, model: str) -> None:
    check(two_ranks, Run(model, stage=3, accumulation=3, clip=0.3))


@pytest.mark.parametrize("stage", range(4))
def test_fp32_losses(two_ranks: World, stage: int) -> None:
    run = Run("gpt", stage=stage, dtype=torch.float32)
    outcomes = two_ranks.run(train_rank, run)
    losses = [sum(rank_losses) / 2 for rank_losses in zip(*(o.losses for o in outcomes), strict=True)]
    assert losses == pytest.approx(reference(run).losses, rel=LOSS_TOLERANCE)


# Unused parameters #


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("model", ["sometimes used", "never used"])
def test_unused_parameters(two_ranks: World, stage: int, accumulation: int, model: str) -> None:
    check(two_ranks, Run(model, stage=stage, accumulation=accumulation, clip=0.3))


@pytest.mark.parametrize("stage", range(3))
def test_ranks_that_miss_parameters_inside_blocks(two_ranks: World, stage: int) -> None:
    check(two_ranks, Run("sometimes used in blocks", stage=stage))


def two_quick_steps(rank: int, world: int, run: Run) -> list[float]:
    engine = start_engine(run, run.build(), timeout_s=1.0)
    with mock.patch.object(gloo, "ANSWER_S", 1.0):
        return [train_step(engine, run, step, rank, world) for step in range(2)]


def test_ranks_that_miss_parameters_inside_blocks_at_stage_3(two_ranks: World) -> None:
    run = Run("sometimes used in blocks", stage=3)
    losses = two_ranks.run(two_quick_steps, run)
    assert [sum(pair) / 2 for pair in zip(*losses, strict=True)] == pytest.approx(reference(run).losses[:2])


def test_a_parameter_that_nobody_uses_stays_as_it_is(two_ranks: World) -> None:
    """Neither weight decay nor momentum moves it; that torch does the same is in the comparisons above."""
    run = Run("never used", stage=3)
    before = dict(run.build().named_parameters())
    for outcome in two_ranks.run(train_rank, run):
        for name in ("spare.weight", "blocks.0.spare", "blocks.1.1.weight"):
            assert torch.equal(outcome.parameters[name], before[name].detach())
        assert not torch.equal(outcome.parameters["blocks.0.1.weight"], before["blocks.0.1.weight"].detach())


# The comparison sees what is broken #


def reduce_nothing(unit: FlatUnit) -> Handle:
    unit.fill_unseen()
    return DONE


def publish_nothing(unit: FlatUnit) -> None:
    pass


def gather_nothing(unit: FlatUnit, *, again: bool = False) -> None:
    """Only the own shard arrives; zeros stand for what the others should have sent."""
    if unit.residency is Residency.SHARDED:
        start, stop = unit.bounds
        unit.full.untyped_storage().resize_(unit.full.numel() * unit.full.element_size())
        unit.full.detach().zero_()[start:stop].copy_(unit.shard)
        unit.residency = Residency.GATHERED


BREAKS = {"reduce": reduce_nothing, "publish": publish_nothing, "gather": gather_nothing}


def train_broken(rank: int, world: int, run: Run, method: str) -> Outcome:
    with mock.patch.object(FlatUnit, method, BREAKS[method]):
        return train_rank(rank, world, run)


@pytest.mark.parametrize(
    ("method", "stage"),
    [("reduce", 0), ("reduce", 1), ("reduce", 2), ("reduce", 3), ("publish", 1), ("publish", 2), ("gather", 3)],
)
def test_a_missing_collective_is_seen(two_ranks: World, method: str, stage: int) -> None:
    run = Run("gpt", stage=stage, steps=3)
    outcomes = two_ranks.run(train_broken, run, method)
    assert largest_difference(outcomes, reference(run)) > 1000 * TENSOR_TOLERANCE


# Memory #


def live_storages() -> dict[int, torch.UntypedStorage]:
    """Every storage that a tensor of this process holds, but those of scalars (an optimizer's step numbers)."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and any(thing.stride())]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}


def hold_model_states(rank: int, world: int, run: Run, precision: str) -> tuple[int, int]:
    """(bytes of live storages after a step, the formula's for rank 0)."""
    before = live_storages()  # kept, so that no storage below takes over the number of one of these
    # Channels of shared memory stay as long as the communicator; sockets keep nothing.
    engine = start_engine(
        run, run.build(), bf16={"enabled": precision == "bf16"}, communication={"transport": "sockets"}
    )
    for step in range(2):
        batch = [
            tuple(t.bfloat16() if precision == "bf16" and t.is_floating_point() else t for t in b)
            for b in micro_batches(run, step, rank, world)
        ]
        for x, y in batch:
            engine.backward(engine(x, y))
            engine.step()
    del batch, x, y
    engine.communicator.release_buffers()
    held = sum(storage.nbytes() for number, storage in live_storages().items() if number not in before)
    sizes = [unit.size for unit in engine.runtime.units]
    wide = 4 if precision == "bf16" else run.dtype.itemsize
    moments = 2 if run.optimizer == "AdamW" else 1
    formula = model_state_bytes(sizes, Zero.of_stage(run.stage), world, moments=moments, master_bytes=wide)
    engine.close()
    return held, sum(formula.values())


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(
    ("size", "model", "optimizer", "precision"),
    [
        (2, "gpt", "AdamW", "as is"),
        (2, "mlp", "SGD", "as is"),
        (2, "frozen", "AdamW", "as is"),
        (2, "gpt", "AdamW", "bf16"),
        (4, "gpt", "AdamW", "as is"),
    ],
)
def test_model_state_memory(
    world_of: WorldOf, size: int, stage: int, model: str, optimizer: str, precision: str
) -> None:
    """Exact on rank 0; the last ranks' shards may hold padding, fewer than n elements of a unit, without moments."""
    run = Run(model, stage=stage, optimizer=optimizer, dtype=torch.float32)
    (held, expected), *others = world_of(size).run(hold_model_states, run, precision)
    assert held == expected
    for held, expected in others:
        assert 0.95 * expected < held <= expected


# The contract of one process #


def mlp_engine(accumulation: int = 1) -> Any:
    config = {"gradient_accumulation_steps": accumulation, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
    engine, *_ = initialize(Mlp().double(), config)
    return engine


def test_a_step_without_backward() -> None:
    with pytest.raises(RuntimeError, match="without a backward before it"):
        mlp_engine().step()


def test_step_counts_optimizer_steps() -> None:
    engine = mlp_engine(accumulation=2)
    batch, boundaries = regression_batch(0), []
    for _ in range(4):
        boundaries.append(engine.is_gradient_accumulation_boundary())
        engine.backward(engine(*batch))
        engine.step()
    assert boundaries == [False, True, False, True]
    assert engine.global_steps == 2


def test_optimizers_that_need_a_whole_parameter_are_refused() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"optimizer LBFGS cannot step shards: .*closure.*; allowed: .*AdamW"):
        initialize(model, optimizer=torch.optim.LBFGS(model.parameters()))


def test_without_an_optimizer_it_is_adamw_as_torch_sets_it_up() -> None:
    engine, optimizer, *_ = initialize(nn.Linear(3, 3))
    whole = torch.optim.AdamW(engine.module.parameters())
    assert optimizer.defaults == whole.defaults
    assert [type(stepper) for stepper in optimizer._steppers.values()] == [torch.optim.AdamW]


def test_closure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step\(closure\) is not supported"):
        mlp_engine().optimizer.step(lambda: 0.0)
