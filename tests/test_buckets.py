"""Bounds on what a rank holds besides its shards: units of a largest size, persistent parameters, bounded gathers."""

from typing import Any
from unittest import mock

import pytest
import torch
from conftest import WorldOf
from hypothesis import given
from hypothesis import strategies as st
from small_models import Run, start_engine, token_batch, train_alone, train_step
from torch import Tensor, nn
from windtunnel.collectives.zero import Zero, model_state_bytes, sent_bytes_per_step
from windtunnel.engine.config import Config
from windtunnel.engine.engine import Engine, initialize
from windtunnel.engine.partition import partition
from windtunnel.engine.unit import FlatUnit, Residency
from windtunnel.engine.world import World

TOLERANCE = 1e-10
"""As in test_zero.py: float64, and sums in another order."""

Bounds = dict[str, float]


# Cutting #


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    bucket=st.integers(1, 60),
    persistent_below=st.integers(0, 30),
)
def test_parts_are_bounded_and_complete(sizes: list[int], bucket: int, persistent_below: int) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
    _, parts = partition(model, [{"params": list(model)}], bucket_elements=bucket, persistent_below=persistent_below)
    for part in parts:
        lengths = [slot.parameter.numel() for slot in part.slots]
        assert sum(lengths) <= bucket or len(lengths) == 1
        assert {length < persistent_below for length in lengths} == {part.persistent}
    for persistent in (False, True):
        names = [int(slot.name) for part in parts if part.persistent == persistent for slot in part.slots]
        assert names == sorted(number for number, size in enumerate(sizes) if (size < persistent_below) == persistent)
    assert [part.number for part in parts] == list(range(len(parts)))
    assert len({part.label for part in parts}) == len(parts)


# Against one process #


def train_bounded(rank: int, world: int, run: Run, bounds: Bounds) -> dict[str, Tensor]:
    engine = start_engine(run, run.build(), zero_optimization={"stage": run.stage, **bounds})
    for step in range(run.steps):
        train_step(engine, run, step, rank, world)
    parameters = engine.full_parameters()
    engine.close()
    return parameters


BOUNDS: dict[str, Bounds] = {
    "a unit per parameter": {"reduce_bucket_size": 1},
    "small units": {"reduce_bucket_size": 100},
    "persistent": {"stage3_param_persistence_threshold": 40},
    "all persistent": {"stage3_param_persistence_threshold": 1e9},
    "persistent in small units": {"reduce_bucket_size": 100, "stage3_param_persistence_threshold": 40},
    "nothing ahead": {"stage3_prefetch_bucket_size": 0},
    "a little ahead": {"stage3_max_live_parameters": 1100, "reduce_bucket_size": 100},
}


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("model", ["gpt", "tied", "recomputed", "used twice", "frozen"])
def test_every_bound_at_stage_3(two_ranks: World, model: str, bounds: str) -> None:
    check(two_ranks, Run(model, stage=3, clip=0.3, steps=8), BOUNDS[bounds])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", range(4))
def test_small_units_at_every_stage(two_ranks: World, stage: int, accumulation: int) -> None:
    run = Run("gpt", stage=stage, accumulation=accumulation, optimizer="grouped", clip=0.3, steps=8)
    check(two_ranks, run, {"reduce_bucket_size": 100})


@pytest.mark.parametrize("stage", range(3))
def test_ranks_that_miss_parameters_inside_blocks_of_several_units(two_ranks: World, stage: int) -> None:
    """The rank that misses one reduces its unit later than the other rank, and all in the same order."""
    check(two_ranks, Run("sometimes used in blocks", stage=stage), {"reduce_bucket_size": 1})


def check(world: World, run: Run, bounds: Bounds) -> None:
    expected = train_alone(run).parameters
    for parameters in world.run(train_bounded, run, bounds):
        for name, wanted in expected.items():
            assert torch.linalg.vector_norm(parameters[name] - wanted) <= TOLERANCE * max(1.0, float(wanted.norm()))


class Detached(nn.Module):
    """Its second layer's backward reads the weight of the first, whose gradient is complete by then."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.ones(7)), nn.Parameter(torch.eye(7))

    def forward(self, x: Tensor) -> Tensor:
        early = (x * self.scale) @ self.weight.detach()
        return early + torch.tanh(early.detach() @ self.weight)


class DetachedBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Detached() for _ in range(3)])
        self.head = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


def train_detached(rank: int, world: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    engine, *_ = initialize(DetachedBlocks().double(), config, timeout_s=10.0)
    engine.backward(engine(torch.linspace(-1, 1, 28, dtype=torch.float64).view(4, 7)))
    engine.step()
    parameters = engine.full_parameters()
    engine.close()
    return parameters


def test_a_complete_gradient_does_not_free_what_backward_still_reads(two_ranks: World) -> None:
    expected = train_detached(0, 1)  # a world of one keeps everything
    for parameters in two_ranks.run(train_detached):
        for name, wanted in expected.items():
            torch.testing.assert_close(parameters[name], wanted, rtol=TOLERANCE, atol=TOLERANCE)


# What the bounds are for #


def gradients_in_full(rank: int, world: int, bucket: int) -> int:
    """The most elements of gradients in full that were there at once at stage 2."""
    run = Run("gpt", stage=2)
    engine = start_engine(run, run.build(), zero_optimization={"stage": 2, "reduce_bucket_size": bucket})
    most = 0

    def accept(unit: FlatUnit, *arguments: Any) -> None:
        nonlocal most
        kept(unit, *arguments)
        full = [unit.gradient.untyped_storage().nbytes() for unit in engine.runtime.units if unit.owner is not model]
        most = max(most, sum(full) // 8)

    kept, model = FlatUnit.accept, engine.module
    with mock.patch.object(FlatUnit, "accept", accept):
        train_step(engine, run, 0, rank, world)
    engine.close()
    return most


def test_gradients_in_full_are_bounded_by_the_unit(two_ranks: World) -> None:
    """Two reductions under way and one buffer being filled: more than a block if that is a unit, else less."""
    block = sum(parameter.numel() for parameter in Run("gpt").build().blocks[0].parameters())
    assert max(two_ranks.run(gradients_in_full, 1)) < block < max(two_ranks.run(gradients_in_full, 100_000))


def gathered(rank: int, world: int, bounds: Bounds) -> list[int]:
    """Gathered elements besides those of the module itself, at each forward of a block at stage 3."""
    run = Run("gpt", stage=3)
    engine = start_engine(run, run.build(), zero_optimization={"stage": 3, **bounds})
    units, ahead = engine.runtime.units, []
    for block in engine.module.blocks:
        block.register_forward_pre_hook(
            lambda module, _: ahead.append(
                sum(u.elements for u in units if u.residency is not Residency.SHARDED and u.block > number(module))
            )
        )
    blocks = list(engine.module.blocks)

    def number(module: nn.Module) -> int:
        return blocks.index(module)

    engine(*token_batch(0))
    engine.close()
    return ahead


def test_gathers_ahead_are_bounded(two_ranks: World) -> None:
    for (*whole, last), (*nothing, _), (*some, _) in zip(
        two_ranks.run(gathered, {}),
        two_ranks.run(gathered, {"stage3_prefetch_bucket_size": 0}),
        two_ranks.run(gathered, {"stage3_prefetch_bucket_size": 300, "reduce_bucket_size": 100}),
        strict=True,
    ):
        assert all(elements > 300 for elements in whole)
        assert last == 0
        assert not any(nothing)
        assert all(0 < elements <= 300 for elements in some)


def gathered_in_backward(rank: int, world: int) -> int:
    """The most blocks that were gathered, in part or whole, when a gradient came at stage 3."""
    run = Run("gpt", stage=3)
    engine = start_engine(run, run.build(), zero_optimization={"stage": 3, "reduce_bucket_size": 1})
    most = 0

    def accept(unit: FlatUnit, *arguments: Any) -> None:
        nonlocal most
        kept(unit, *arguments)
        most = max(most, len({u.block for u in engine.runtime.units if u.residency is not Residency.SHARDED} - {-1}))

    kept = FlatUnit.accept
    with mock.patch.object(FlatUnit, "accept", accept):
        train_step(engine, run, 0, rank, world)
    engine.close()
    return most


def test_backward_gathers_a_block_and_the_next(two_ranks: World) -> None:
    assert two_ranks.run(gathered_in_backward) == [2, 2]


def test_live_parameters_are_bounded(two_ranks: World) -> None:
    [[*free, _], _] = two_ranks.run(gathered, {})
    [[*bound, _], _] = two_ranks.run(gathered, {"stage3_max_live_parameters": 1})
    assert all(free)
    assert not any(bound)


# Bytes and memory #


def payload(rank: int, world: int, stage: int, micro_steps: int) -> tuple[int, int, dict[str, int]]:
    """(bytes of unit collectives that rings send in a step, the formula's, the formula's model states)."""
    run = Run("gpt", stage=stage, accumulation=micro_steps)
    engine = start_engine(run, run.build(), zero_optimization=bounded(stage))
    train_step(engine, run, 0, rank, world)
    ring = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
    sent = sum(
        count * ring[entry.kind] * (world - 1) * entry.elements * 8 // world
        for entry, count in engine.communicator.ledger.items()
        if not entry.scalar
    )
    sizes = [unit.size for unit in engine.runtime.units]
    engine.close()
    zero = Zero.of_stage(stage)
    states = model_state_bytes(sizes, zero, world, moments=2, master_bytes=8)
    return sent, sent_bytes_per_step(sizes, zero, world, micro_steps), states


def bounded(stage: int) -> dict[str, float]:
    return {"stage": stage, "reduce_bucket_size": 100, "stage3_param_persistence_threshold": 40}


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("stage", range(4))
def test_payload_is_the_formula(world_of: WorldOf, stage: int, micro_steps: int) -> None:
    for sent, formula, _ in world_of(4).run(payload, stage, micro_steps):
        assert sent == formula


def test_persistent_parameters_are_kept_whole(two_ranks: World) -> None:
    """Their share of the parameters' bytes is not divided by the ranks; that of the others is."""
    [(_, _, states), _] = two_ranks.run(payload, 3, 1)
    model = Run("gpt").build()
    small = sum(p.numel() for p in model.parameters() if p.numel() < 40)
    large = sum(p.numel() for p in model.parameters()) - small
    assert 8 * (small + large // 2) <= states["parameters"] <= 8 * (small + large // 2 + 40)  # and padding


# Config #


@pytest.mark.parametrize("key", ["reduce_bucket_size", "stage3_max_live_parameters", "stage3_prefetch_bucket_size"])
@pytest.mark.parametrize("value", [-1, 0.5])
def test_sizes_are_counts(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{key} = {value:g}; allowed: an integer >= [01], in elements"):
        Config.read({"zero_optimization": {key: value}}, 1)


def test_sizes_may_be_written_as_floats() -> None:
    buffers = Config.read({"zero_optimization": {"reduce_bucket_size": 5e8}}, 1).buffers
    assert buffers.bucket_elements == 500_000_000
    assert Config.read({}, 1).buffers == buffers


def test_an_engine_without_bounds_cuts_nothing() -> None:
    engine: Engine = start_engine(Run("gpt"), Run("gpt").build())
    assert [unit.part.number for unit in engine.runtime.units] == [0] * len(engine.runtime.units)
