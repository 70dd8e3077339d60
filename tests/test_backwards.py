"""Several backwards between two steps: their gradients add, as in torch, or the engine says what it needs to know."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import WorldOf
from small_models import ZOO, Batch, Run, micro_batches, start_engine
from torch import Tensor, nn
from windtunnel.engine.engine import Engine, initialize

STEPS = 4
TENSOR_TOLERANCE = 1e-10
"""Sums in another order cost 1e-16 per operation in float64, which Adam enlarges in places (see tests/test_zero.py)."""

Backward = Callable[..., None]
Losses = Callable[[Callable[..., Tensor], Backward, Batch], None]


def two_pairs(model: Callable[..., Tensor], backward: Backward, batch: Batch) -> None:
    """Two forwards, each with its backward."""
    x, y = batch
    backward(model(x, y), more=True)
    backward(model(x.roll(1, 0), y) ** 2)


def two_forwards_first(model: Callable[..., Tensor], backward: Backward, batch: Batch) -> None:
    x, y = batch
    first, second = model(x, y), model(x.roll(1, 0), y)
    backward(first, more=True)
    backward(second * 3)


def a_graph_kept(model: Callable[..., Tensor], backward: Backward, batch: Batch) -> None:
    """Two losses of one forward."""
    loss = model(*batch)
    backward(loss * 2, more=True, retain_graph=True)
    backward(loss**2)


def three(model: Callable[..., Tensor], backward: Backward, batch: Batch) -> None:
    two_pairs(model, lambda loss, more=False: backward(loss, more=True), batch)
    backward(model(*batch))


PATTERNS = {function.__name__: function for function in (two_pairs, two_forwards_first, a_graph_kept, three)}


@dataclass(frozen=True)
class Case:
    """`announce`: whether the engine is told that another backward follows."""

    pattern: str
    run: Run
    announce: bool
    shard_ranks: int = -1


def alone(case: Case, parts: int) -> dict[str, Tensor]:
    """Plain torch: a backward for each loss of each part of the batch, of which a step takes the mean."""

    def backward(loss: Tensor, more: bool = False, retain_graph: bool = False) -> None:
        (loss / parts).backward(retain_graph=retain_graph)

    model = case.run.build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(STEPS):
        x, y = case.run.batch(step)
        for part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            PATTERNS[case.pattern](model, backward, part)
        torch.nn.utils.clip_grad_norm_(model.parameters(), case.run.clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def on_ranks(rank: int, world: int, case: Case) -> dict[str, Tensor]:
    zero = {"stage": case.run.stage, "mics_shard_size": case.shard_ranks}
    engine = start_engine(case.run, case.run.build(), zero_optimization=zero)

    def backward(loss: Tensor, more: bool = False, retain_graph: bool = False) -> None:
        engine.backward(loss, more=more and case.announce, retain_graph=retain_graph)

    for step in range(STEPS):
        for batch in micro_batches(case.run, step, rank, world):
            PATTERNS[case.pattern](engine, backward, batch)
            engine.step()
    parameters = engine.full_parameters()
    engine.close()
    return parameters


def check(world_of: WorldOf, case: Case, size: int = 2) -> None:
    wanted = alone(case, size * case.run.accumulation)
    for found in world_of(size).run(on_ranks, case):
        for name, value in wanted.items():
            assert float((found[name] - value).norm()) <= TENSOR_TOLERANCE * float(value.norm()), name


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_several_backwards_add(world_of: WorldOf, pattern: str, stage: int) -> None:
    check(world_of, Case(pattern, Run("gpt", stage=stage, clip=0.3), announce=False))


@pytest.mark.parametrize("announce", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_they_add_where_shards_are_replicated(world_of: WorldOf, stage: int, announce: bool) -> None:
    """What is summed over replicas already must not be summed again."""
    check(world_of, Case("three", Run("gpt", stage=stage, clip=0.3), announce, shard_ranks=2), size=4)


def test_offload_wants_one_backward() -> None:
    model = nn.Linear(2, 1)
    config = {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    engine, *_ = initialize(model, config)
    engine.backward(engine(torch.ones(1, 2)).sum())
    with pytest.raises(RuntimeError, match="add the losses and call backward once"):
        engine.backward(engine(torch.ones(1, 2)).sum())
    engine.close()


@pytest.mark.parametrize("stage", range(4))
def test_announced_they_add_under_accumulation(world_of: WorldOf, stage: int) -> None:
    for pattern in ("two_pairs", "a_graph_kept"):
        check(world_of, Case(pattern, Run("tied", stage=stage, accumulation=3, clip=0.3), announce=True))


@pytest.mark.parametrize("model", ["used twice", "recomputed", "never used", "sometimes used"])
def test_special_models(world_of: WorldOf, model: str) -> None:
    for stage in (0, 1, 3):
        check(world_of, Case("two_pairs", Run(model, stage=stage, clip=0.3), announce=stage == 1))


def test_units_that_do_not_divide(world_of: WorldOf) -> None:
    for stage in range(4):
        check(world_of, Case("three", Run("mlp", stage=stage, clip=0.3), announce=False), size=4)


def sent(rank: int, world: int, case: Case) -> int:
    """How many reductions of gradients a step started."""
    zero = {"stage": case.run.stage, "mics_shard_size": case.shard_ranks}
    engine = start_engine(case.run, case.run.build(), zero_optimization=zero)

    def backward(loss: Tensor, more: bool = False, retain_graph: bool = False) -> None:
        engine.backward(loss, more=more and case.announce, retain_graph=retain_graph)

    PATTERNS[case.pattern](engine, backward, micro_batches(case.run, 0, rank, world)[0])
    kinds = ("all_reduce", "reduce_scatter")
    count = sum(n for entry, n in engine.communicator.ledger.items() if entry.kind in kinds and not entry.scalar)
    engine.step()
    engine.close()
    return count


@pytest.mark.parametrize("stage", [0, 1])
def test_what_is_announced_is_reduced_once(world_of: WorldOf, stage: int) -> None:
    run = Run("gpt", stage=stage)
    once, twice = (world_of(2).run(sent, Case("two_pairs", run, announce))[0] for announce in (True, False))
    assert twice == 2 * once > 0


def engine_of_one(accumulation: int = 1) -> tuple[Engine, Batch]:
    run = Run("mlp")
    config = {"gradient_accumulation_steps": accumulation, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, *_ = initialize(run.build(), config)
    return engine, ZOO["mlp"].batch(0)


def test_with_accumulation_a_second_backward_must_be_announced() -> None:
    engine, batch = engine_of_one(accumulation=2)
    engine.backward(engine(*batch))
    with pytest.raises(RuntimeError, match=r"backward number 2 since the last engine\.step\(\).*more=True"):
        engine.backward(engine(*batch))


def test_an_announcement_serves_one_backward() -> None:
    engine, batch = engine_of_one(accumulation=2)
    engine.backward(engine(*batch), more=True)
    engine.backward(engine(*batch))
    with pytest.raises(RuntimeError, match="backward number 3"):
        engine.backward(engine(*batch))


def test_a_backward_that_was_announced_must_come() -> None:
    engine, batch = engine_of_one()
    engine.backward(engine(*batch), more=True)
    with pytest.raises(RuntimeError, match="leave out more=True for the last loss"):
        engine.step()


def test_a_step_ends_one_micro_step_only() -> None:
    engine, batch = engine_of_one(accumulation=2)
    engine.backward(engine(*batch))
    engine.step()
    with pytest.raises(RuntimeError, match="without a backward before it"):
        engine.step()


def test_a_loss_in_pieces() -> None:
    """The head's backward by itself, the body's from the gradient that it left: as losses over long rows are done."""
    engine, (x, y) = engine_of_one()
    twin = Run("mlp").build()
    for model in (engine, twin):
        layers = model.module.layers if isinstance(model, Engine) else model.layers
        assert isinstance(layers, nn.Sequential)
        body = layers[:4](x)
        cut = body.detach().requires_grad_()
        nn.functional.mse_loss(layers[4](cut), y).backward()
        body.backward(cut.grad)
    engine.step()
    with torch.no_grad():
        for parameter in twin.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    for mine, theirs in zip(engine.module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
