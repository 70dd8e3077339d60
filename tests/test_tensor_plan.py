"""Plans by patterns of names: what does not fit, a model of one's own, dropout in it, and the loss of cut logits."""

import re
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from tensor_runs import ADAMW, LLAMA, started
from torch import Tensor, nn
from torch.nn import functional
from windtunnel.engine.gloo import GlooCommunicator
from windtunnel.engine.randomness import Randomness
from windtunnel.engine.tensor_functions import TensorRanks
from windtunnel.engine.tensor_layers import Rows, mean_loss
from windtunnel.engine.world import World
from windtunnel.experiments.transformer import Transformer

# Refusals #


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x))).square().mean()


def tied() -> Mlp:
    model = Mlp()
    model.fc3 = nn.Linear(3, 5)
    model.fc3.weight = model.fc1.weight
    return model


def refused(rank: int, world: int, model: nn.Module, parallel: dict[str, Any], stepped: bool = False) -> str:
    optimizer = torch.optim.AdamW(model.parameters())
    if stepped:
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
    try:
        engine = started(model, {"parallel": {"tensor": world, **parallel}}, optimizer=optimizer)
        if isinstance(model, Transformer):
            engine(torch.zeros(1, 7, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return ""


FC = {"*fc1": "column", "*fc2": "row"}


@pytest.mark.parametrize(
    ("model", "parallel", "words"),
    [
        (Mlp(), {}, r"mp_size .* = 2, but there is no tensor plan for a Mlp; .*tensor_plan\(\)"),
        (Mlp(), {"plan": {"*.fc3": "column"}}, r"'\*\.fc3' matches no module"),
        (Mlp(), {"plan": {"fc1": "columns"}}, r"style of 'fc1' is 'columns'; allowed: column"),
        (Mlp(), {"plan": {"fc1": "column of 3"}}, r"fc1: 5 features are .* heads of 3, which 2 tensor ranks"),
        (Mlp(), {"plan": FC, "sequence_parallel": True}, r"no module of the tensor plan has the style 'split'"),
        (tied(), {"plan": FC}, r"'fc3', a Linear, shares a weight with a module that the tensor plan cuts"),
        (Transformer(LLAMA), {"plan": {"embedding": "vocabulary"}}, r"Transformer, which has a tensor plan of its own"),
        (Transformer(LLAMA), {"sequence_parallel": True}, r"a sequence of 7 tokens cannot be cut among 2"),
        (Transformer(replace(LLAMA, kv_heads=1)), {}, r"attention.qkv: 4 features are 1 heads of 4, .* 2 tensor ranks"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    two_ranks: World, model: nn.Module, parallel: dict[str, Any], words: str
) -> None:
    for message in two_ranks.run(refused, model, parallel):
        assert re.search(words, message), message


def test_an_optimizer_that_has_stepped_is_refused(two_ranks: World) -> None:
    for message in two_ranks.run(refused, Mlp(), {"plan": FC}, True):
        assert "optimizer AdamW has stepped on the whole parameters" in message


# Plans of a user, on an optimizer that was made on the whole parameters #


def train_mlp(rank: int, world: int, tensor: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Mlp().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine = started(model, {"parallel": {"tensor": tensor, "plan": FC if tensor > 1 else {}}}, optimizer=optimizer)
    for step in range(3):
        engine.backward(engine(torch.full((2, 3), step + 1.0, dtype=torch.float64)))
        engine.step()
    assert model.fc1.weight.shape == ((3 - rank if tensor > 1 else 5), 3)  # 5 features: 3 and 2
    found = engine.full_parameters()
    engine.close()
    return found


def test_a_plan_of_ones_own_cuts_unevenly(two_ranks: World) -> None:
    wanted, *_ = two_ranks.run(train_mlp, 1)
    for found in two_ranks.run(train_mlp, 2):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


# Dropout #


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.inside, self.outside = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outside(self.fc2(self.inside(self.fc1(self.norm(x)))))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Branch(), Branch()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


DROPPING = {"*.fc1": "column", "*.fc2": "row", "*.norm": "norm", "blocks.0": "split"}


class Dropped(NamedTuple):
    """Masks of the first forward inside and outside of regions, and losses."""

    inside: list[Tensor]
    outside: list[Tensor]
    losses: list[float]
    parameters: dict[str, Tensor]


def drop(rank: int, world: int, tensor: int, sequence: bool, policy: str) -> Dropped:
    torch.manual_seed(rank)  # what a script draws does not matter
    config = {
        "parallel": {"tensor": tensor, "sequence_parallel": sequence, "plan": DROPPING},
        "activation_checkpointing": {"policy": policy},
        "optimizer": ADAMW,
    }
    engine = started(Dropping().double(), config)
    masks: dict[str, list[Tensor]] = {"inside": [], "outside": []}
    for name, module in engine.module.named_modules():
        if isinstance(module, nn.Dropout):
            kept = masks[name.rpartition(".")[2]]
            module.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output == 0))
    losses = []
    before = torch.get_rng_state()
    for step in range(3):
        loss = engine(torch.full((2, 4, 8), 0.5, dtype=torch.float64))
        if step == 0:
            first = {name: list(kept) for name, kept in masks.items()}
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert torch.equal(torch.get_rng_state(), before)
    outcome = Dropped(first["inside"], first["outside"], losses, engine.full_parameters())
    engine.close()
    return outcome


@pytest.mark.parametrize("sequence", [False, True])
def test_dropout_masks(two_ranks: World, sequence: bool) -> None:
    """Equal where ranks hold the same values, different where each has its own, and replayed by a recomputation."""
    first, second = two_ranks.run(drop, 2, sequence, "none")
    for mine, yours in zip(first.inside, second.inside, strict=True):
        assert not torch.equal(mine, yours)
    for mine, yours in zip(first.outside, second.outside, strict=True):
        assert torch.equal(mine, yours) != sequence
    assert not torch.equal(first.outside[0], first.outside[1])
    again, _ = two_ranks.run(drop, 2, sequence, "full")
    assert again.losses == first.losses
    for name, value in first.parameters.items():
        assert torch.equal(again.parameters[name], value), name


def test_dropout_masks_of_data_ranks_differ(four_ranks: World) -> None:
    ranks = four_ranks.run(drop, 2, False, "none")
    assert torch.equal(ranks[0].outside[0], ranks[1].outside[0])
    assert not torch.equal(ranks[0].outside[0], ranks[2].outside[0])


# The loss alone #


def losses(rank: int, world: int, vocab: int) -> tuple[Tensor, Tensor, int]:
    """Of tokens some of which do not count, with the gradient of these logits; and how many numbers were sent."""
    group = GlooCommunicator("tensor", dist.group.WORLD, dist.distributed_c10d._get_default_store(), 20.0)
    randomness = Randomness(torch.device("cpu"), 0, (0,), rank, drawn=False, shared=True)
    ranks = TensorRanks(group, randomness)
    logits, targets = tokens(vocab)
    padded = -(-vocab // world)
    first, last = rank * padded, min(vocab, (rank + 1) * padded)
    mine = functional.pad(logits[:, first:last], (0, padded - (last - first)), value=99.0).requires_grad_()
    mean_loss(mine, targets, Rows(first, last - first, vocab), ranks).backward()
    with torch.no_grad():
        loss = mean_loss(mine, targets, Rows(first, last - first, vocab), ranks)
    assert mine.grad is not None
    assert not mine.grad[:, last - first :].any()
    sent = max(entry.elements for entry in group.ledger)
    group.close()
    return loss, mine.grad[:, : last - first], sent


def tokens(vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    logits = 30 * torch.randn(9, vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (9,), generator=generator)
    targets[2] = -100
    return logits, targets


@pytest.mark.parametrize("vocab", [4, 7, 32])
def test_cross_entropy_of_cut_logits(four_ranks: World, vocab: int) -> None:
    logits, targets = tokens(vocab)
    wanted = functional.cross_entropy(logits.requires_grad_(), targets)
    wanted.backward()
    answers = four_ranks.run(losses, vocab)
    gradient = torch.cat([each for _, each, _ in answers], dim=1)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-12, atol=1e-14)
    for loss, _, sent in answers:
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-13, atol=0)
        assert sent == 2 * 9  # numbers per token: no rank gets another one's logits
