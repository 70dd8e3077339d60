"""Evaluation on ranks against one process over the whole set, and training that goes on as if nothing had been."""

import math
from typing import Any

import pytest
import torch
from conftest import WorldOf
from small_models import Run, micro_batches, start_engine, train_step
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from windtunnel.engine.batch import call, count_of, map_tensors, samples_in, tensors, tokens_in
from windtunnel.engine.engine import initialize
from windtunnel.engine.evaluation import Evaluation, evaluating
from windtunnel.engine.world import World

TOLERANCE = 1e-12
"""float64: sums of some tens of losses in another order."""

VOCAB = 11


class Words(nn.Module):
    """Blocks with dropout and a batch norm; the loss is a mean over tokens that are not -100, beside their number."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.counts = counts
        self.embedding = nn.Embedding(VOCAB, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh()) for _ in range(3)])
        self.norm = nn.BatchNorm1d(6)
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        h = self.embedding(x)
        for block in self.blocks:
            h = h + block(h)
        logits = self.norm(h.flatten(0, 1)) @ self.embedding.weight.T
        loss = functional.cross_entropy(logits, y.flatten())
        return (loss, (y != -100).sum()) if self.counts else loss


def words(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(samples)
    x = torch.randint(VOCAB, (samples, 5), generator=generator)
    hidden = torch.rand(samples, 5, generator=generator) < 0.4
    hidden[:, 0] = False
    return TensorDataset(x, ((x + 1) % VOCAB).masked_fill(hidden, -100))


def batches_of(data: TensorDataset, cuts: list[int]) -> list[tuple[Tensor, ...]]:
    """Batches of the given sizes."""
    return list(zip(*(tensor.split(cuts) for tensor in data.tensors), strict=True))


CUTS = {2: [[3, 2, 4], [5]], 4: [[3], [2, 4], [], [1, 1, 2, 1]]}
"""Sizes of each rank's batches; with four ranks one has none."""


def expected(counts: bool, total: int) -> Evaluation:
    """One process, one sample at a time."""
    model = Words(counts).eval()
    losses, weights = [], []
    with torch.no_grad():
        for x, y in zip(*words(total).tensors, strict=True):
            output = model(x[None], y[None])
            losses.append(float(output[0] if counts else output))
            weights.append(int(output[1]) if counts else 1)
    mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    return Evaluation(loss=mean, weight=float(sum(weights)), batches=total)


def evaluate_shares(rank: int, world: int, stage: int, endless: bool) -> tuple[Evaluation, list[str], int]:
    """(evaluation, units that are left gathered, gathers) with unequal numbers of batches."""
    cuts = CUTS[world]
    data = words(sum(map(sum, cuts)))
    batches = batches_of(data, [size for share in cuts for size in share])
    start = sum(map(len, cuts[:rank]))
    mine = batches[start : start + len(cuts[rank])]
    config = {"zero_optimization": {"stage": stage}, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine, *_ = initialize(Words(True), config, timeout_s=20.0)
    engine.communicator.ledger.clear()
    found = engine.evaluate(iter(mine) if endless else mine)
    left = [unit.label for unit in engine.runtime.units if stage == 3 and unit.residency.name != "SHARDED"]
    gathers = sum(count for entry, count in engine.communicator.ledger.items() if entry.kind == "all_gather")
    scalars = sum(count for entry, count in engine.communicator.ledger.items() if entry.kind == "all_reduce")
    assert scalars == (1 if stage == 0 else 2 + max(map(len, cuts)))
    engine.close()
    return found, left, gathers


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_unequal_shares_equal_one_process(world_of: WorldOf, size: int, stage: int) -> None:
    wanted = expected(True, sum(map(sum, CUTS[size])))
    for found, left, gathers in world_of(size).run(evaluate_shares, stage, size == 4):
        assert found.loss == pytest.approx(wanted.loss, rel=TOLERANCE)
        assert found.weight == wanted.weight
        assert found.batches == sum(map(len, CUTS[size]))
        assert found.perplexity == math.exp(found.loss)
        assert left == []
        assert gathers == (0 if stage == 0 else 4 * max(map(len, CUTS[size])))


def evaluate_dataset(rank: int, world: int, stage: int) -> list[Evaluation]:
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    engine, *_ = initialize(Words(False), config, timeout_s=20.0)
    found = [
        engine.evaluate(words(13)),
        engine.evaluate(words(1)),  # one rank has nothing
        engine.evaluate(words(13), weight=lambda batch, output: (batch[1] != -100).sum()),
    ]
    engine.close()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_a_dataset_is_shared_by_the_ranks(two_ranks: World, stage: int) -> None:
    by_token, one = expected(True, 13), expected(False, 1)
    # A mean of tokens of a batch counts its samples, so batches of the same sizes are what it is compared with.
    model, total = Words(False).eval(), 0.0
    x, y = words(13).tensors
    with torch.no_grad():
        for rank in range(2):
            for part in torch.arange(rank, 13, 2).split(3):
                total += float(model(x[part], y[part])) * len(part)
    for all_samples, single, tokens in two_ranks.run(evaluate_dataset, stage):
        assert all_samples.loss == pytest.approx(total / 13, rel=TOLERANCE)
        assert (all_samples.weight, all_samples.batches) == (13, 5)
        assert single.loss == pytest.approx(one.loss, rel=TOLERANCE)
        assert tokens.loss == pytest.approx(by_token.loss, rel=TOLERANCE)
        assert tokens.weight == by_token.weight


# Training goes on #


def train(rank: int, world: int, stage: int, evaluates: bool) -> tuple[list[float], dict[str, Tensor], bool]:
    """Six micro-steps with dropout, and an evaluation after each, within accumulation too."""
    engine, *_ = initialize(
        Words(True),
        {
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        },
        timeout_s=20.0,
    )
    frozen = engine.module.blocks[1].eval()  # a mode of its own, which is kept
    torch.manual_seed(rank)
    batches = batches_of(words(24), [4] * 6)
    losses = []
    for number, batch in enumerate(batches):
        loss, _ = engine(*batch)
        engine.backward(loss)
        if evaluates:
            engine.evaluate(batches[rank : number + 1])  # first, rank 1 has none
        engine.step()
        losses.append(loss.item())
        if evaluates:
            engine.evaluate(batches[:2])
    modes = {module.training for module in engine.modules()} == {True, False} and not frozen.training
    outcome = losses, engine.full_parameters(), modes and engine.training
    engine.close()
    return outcome


@pytest.mark.parametrize("stage", range(4))
def test_training_is_bit_for_bit_the_same(two_ranks: World, stage: int) -> None:
    """Dropout draws the same numbers, nothing is left gathered, accumulated gradients stay."""
    plain = two_ranks.run(train, stage, False)
    for (losses, parameters, modes), (wanted, wanted_parameters, _) in zip(
        two_ranks.run(train, stage, True), plain, strict=True
    ):
        assert losses == wanted
        assert modes
        assert all(torch.equal(value, wanted_parameters[name]) for name, value in parameters.items())


def test_nothing_to_evaluate() -> None:
    engine, *_ = initialize(Words(True), {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    with pytest.raises(ValueError, match="evaluate: no rank has a batch"):
        engine.evaluate([])


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]


# Numbers #


@pytest.mark.parametrize(("loss", "perplexity"), [(0.0, 1.0), (2.0, math.exp(2.0)), (710.0, math.inf)])
def test_perplexity(loss: float, perplexity: float) -> None:
    assert Evaluation(loss=loss, weight=1.0, batches=1).perplexity == perplexity


def test_perplexity_of_what_is_no_number() -> None:
    assert math.isnan(Evaluation(loss=math.nan, weight=1.0, batches=1).perplexity)


def test_a_batch_that_counts_nothing_counts_nothing() -> None:
    engine, *_ = initialize(Words(True), {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    (batch,) = batches_of(words(3), [3])
    nothing = batch[0], torch.full_like(batch[1], -100)
    assert engine.evaluate([nothing, batch]).loss == engine.evaluate([batch]).loss
    assert math.isnan(engine.evaluate([nothing]).loss)


# Batches and outputs #


class Output:
    def __init__(self, loss: Any, num_tokens: int) -> None:
        self.loss, self.num_tokens = loss, num_tokens


def test_where_the_count_is() -> None:
    loss = torch.tensor(3.0)
    counts = [count_of(output) for output in (loss, (loss, 5), (loss, torch.tensor(6)), Output(loss, 7))]
    assert counts == [None, 5, 6, 7]
    assert count_of((loss, torch.zeros(2, 3))) is None
    assert count_of((loss, True)) is None
    assert count_of({"loss": loss, "num_tokens": 4}) == 4


def test_a_loss_of_many_numbers_is_refused() -> None:
    model = nn.Linear(2, 1)
    engine, *_ = initialize(model, {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    with pytest.raises(ValueError, match=r"the model's loss has shape \(3, 1\); allowed: a scalar"):
        engine.evaluate([torch.ones(3, 2)])


def test_a_nest_of_tensors() -> None:
    batch = {"x": torch.zeros(4, 3), "more": [torch.ones(2, 6, dtype=torch.int64), ("name", 5)]}
    assert (samples_in(batch), tokens_in(batch), len(list(tensors(batch)))) == (4, 12, 2)
    assert (samples_in("name"), samples_in(torch.tensor(1)), tokens_in(torch.zeros(3, 3))) == (1, 1, 0)
    moved = map_tensors(batch, lambda tensor: tensor + 1)
    assert float(moved["x"].sum()) == 12
    assert moved["more"][1] == ("name", 5)
    assert call(lambda x, more: (x, more), {"x": 1, "more": 2}) == call(lambda *both: both, (1, 2)) == (1, 2)


# Accumulation, and whose backward it is #


def accumulate(rank: int, world: int, run: Run, users_own: bool) -> dict[str, Tensor]:
    engine = start_engine(run, run.build())
    for step in range(run.steps):
        if not users_own:
            train_step(engine, run, step, rank, world)
            continue
        for batch in micro_batches(run, step, rank, world):
            engine(*batch).backward()
            engine.step()
    found = engine.full_parameters()
    engine.close()
    return found


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("model", ["mlp", "used twice"])
def test_micro_batches_make_the_big_batch(two_ranks: World, stage: int, model: str) -> None:
    """1, 2 and 3 micro-steps of the same twelve samples, by the engine's backward and by the user's."""
    whole = two_ranks.run(accumulate, Run(model, stage=stage, steps=3), False)[0]
    for accumulation in (1, 2, 3):
        run = Run(model, stage=stage, accumulation=accumulation, steps=3)
        ours, theirs = (two_ranks.run(accumulate, run, users_own)[0] for users_own in (False, True))
        for name, value in whole.items():
            # Sums of the same terms in another order, in float64; Adam enlarges it to 4e-13 in 20 steps.
            torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-12)
            assert torch.equal(ours[name], theirs[name])


class TwoLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.mean(), x.square().mean()


def two_backwards(rank: int, world: int, stage: int, accumulation: int, together: bool) -> list[str]:
    engine, *_ = initialize(
        TwoLosses(),
        {
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        },
        timeout_s=20.0,
    )
    first, second = engine(torch.ones(2, 3))
    said = []
    if together:
        engine.backward(first + second)
    else:
        first.backward(retain_graph=True)
        try:
            second.backward()
        except RuntimeError as error:
            said.append(str(error))
    engine.step()
    engine.backward(engine(torch.zeros(2, 3))[0])  # the engine is still usable
    engine.close()
    return said


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_backwards_add_up_or_are_a_clear_error(two_ranks: World, stage: int, accumulation: int) -> None:
    for said in two_ranks.run(two_backwards, stage, accumulation, False):
        assert len(said) == accumulation - 1
        assert all(line.startswith("backward number 2 since the last engine.step()") for line in said)
    assert two_ranks.run(two_backwards, stage, 2, True) == [[], []]
