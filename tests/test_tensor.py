"""Tensor parallelism on Gloo ranks against one process."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from windtunnel.collectives.ring import RING
from windtunnel.collectives.tensor import Sent, SharedLayers, sent_bytes
from windtunnel.engine.engine import Engine, initialize
from windtunnel.engine.gloo import GlooCommunicator
from windtunnel.engine.optim import Lamb
from windtunnel.engine.pilot import Plan, fly
from windtunnel.engine.randomness import Randomness
from windtunnel.engine.roles import Whole
from windtunnel.engine.sharding import cut, reassemble, sections, shard, unshard
from windtunnel.engine.tensor_functions import TensorRanks
from windtunnel.engine.tensor_layers import Rows, mean_loss
from windtunnel.engine.world import World
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights
from windtunnel.sim.replay import sent_bytes_by_axis

TOLERANCE = 1e-10
"""float64; sums are taken in another order, and Adam enlarges rounding (tests/test_zero.py)."""

SAMPLES, VOCAB, SEQ = 4, 17, 8

GPT = ModelSpec(
    name="tiny", layers=2, hidden=16, heads=4, ffn=15, vocab=VOCAB, seq=SEQ,
    mlp="gelu", norm="layernorm", positions="learned", attention="causal", tied=True, bias=True,
)  # fmt: skip

LLAMA = replace(GPT, kv_heads=2, ffn=13, mlp="swiglu", norm="rmsnorm", positions="rope", tied=False, bias=False)

SPECS = {"gpt": GPT, "llama": LLAMA, "alibi": replace(GPT, positions="alibi", tied=False)}

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Lamb": Lamb}


@dataclass(frozen=True)
class Layout:
    """Of a run; only `model`, `clip` and `optimizer` mean something to one process."""

    model: str
    tensor: int
    sequence: bool = False
    stage: int = 0
    clip: float = 0.5
    optimizer: str = "AdamW"
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "train_batch_size": SAMPLES,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.stage},
            "optimizer": {**ADAMW, "type": self.optimizer},
            "parallel": {"tensor": self.tensor, "sequence_parallel": self.sequence},
            **self.keys,
        }


STEPS = 5


def build(name: str, seed: int = 1) -> Transformer:
    model = Transformer(SPECS[name]).double()
    initialize_weights(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # a bias of zero or a norm of one would hide what is added twice
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(VOCAB, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(step))
    return x, (x + x.roll(1, 1)) % VOCAB


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    parameters: dict[str, Tensor]
    norms: list[float | None]
    logits: Tensor


@cache
def alone(name: str, clip: float, kind: str) -> Outcome:
    model = build(name)
    optimizer = OPTIMIZERS[kind](model.parameters(), **ADAMW["params"])
    losses, norms = [], []
    for step in range(STEPS):
        loss = model(*batch(step))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    logits = model(batch(0)[0]).detach()
    return Outcome(losses, {name: p.detach() for name, p in model.named_parameters()}, norms, logits)


def started(model: nn.Module, config: dict[str, Any], **arguments: Any) -> Engine:
    engine, *_ = initialize(model, config, timeout_s=20.0, **arguments)
    return engine


def train(rank: int, world: int, layout: Layout) -> Outcome:
    engine = started(build(layout.model, seed=1 + rank), layout.config)
    samples = engine.groups.axis("data")
    losses, norms = [], []
    for step in range(STEPS):
        x, y = (each.chunk(samples.world)[samples.rank] for each in batch(step))
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
    with torch.no_grad():
        logits = engine(batch(0)[0])
    outcome = Outcome(losses, engine.full_state_dict(), norms, logits)
    engine.close()
    return outcome


def check(world: World, layout: Layout) -> None:
    wanted = alone(layout.model, layout.clip, layout.optimizer)
    for outcome in world.run(train, layout):
        state = outcome.parameters
        assert set(wanted.parameters) <= set(state)
        for name, value in wanted.parameters.items():
            assert float((state[name] - value).norm() / value.norm()) <= TOLERANCE, name
        assert outcome.norms == pytest.approx(wanted.norms, rel=TOLERANCE)
        torch.testing.assert_close(outcome.logits, wanted.logits, rtol=1e-9, atol=1e-9)
        if layout.tensor == world.size:
            assert outcome.losses == pytest.approx(wanted.losses, rel=TOLERANCE)


FULL = {"activation_checkpointing": {"policy": "full"}}
SELECTIVE = {"activation_checkpointing": {"policy": "selective"}}
BUDGET = {"activation_checkpointing": {"policy": "budget", "budget_bytes": 100_000}}
IN_PARTS = {"activation_checkpointing": {"policy": "full", "partition_activations": True}}


@pytest.mark.parametrize(
    "layout",
    [
        Layout("gpt", 2),
        Layout("gpt", 2, sequence=True, keys=FULL),
        Layout("llama", 2, keys=SELECTIVE, optimizer="Lamb"),
        Layout("llama", 2, sequence=True, keys=SELECTIVE),
        Layout("alibi", 2, keys=BUDGET),
        Layout("gpt", 2, keys=IN_PARTS),
    ],
    ids=str,
)
def test_two_ranks_equal_one_process(two_ranks: World, layout: Layout) -> None:
    check(two_ranks, layout)


@pytest.mark.parametrize(
    "layout",
    [
        Layout("gpt", 4, sequence=True),
        Layout("alibi", 4, keys=FULL),
        Layout("gpt", 2, stage=1),
        Layout("llama", 2, sequence=True, stage=0),
        Layout("gpt", 2, sequence=True, stage=2),
        Layout("llama", 2, sequence=True, stage=3, keys=FULL),
        Layout("gpt", 2, stage=3, optimizer="Lamb"),
    ],
    ids=str,
)
def test_four_ranks_equal_one_process(four_ranks: World, layout: Layout) -> None:
    check(four_ranks, layout)


# What travels: the closed form, the ranks' ledger and the flight, all exact #


LETTERS = {"fp32": 4}


def flat_config(sequence: bool, policy: str) -> dict[str, Any]:
    return {
        "activation_checkpointing": {"policy": policy},
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": ADAMW,
        "parallel": {"tensor": 2, "sequence_parallel": sequence},
        "communication": {"algorithms": dict.fromkeys(RING, "ring")},
    }


def ledger(rank: int, world: int, name: str, sequence: bool, policy: str) -> tuple[Counter[Sent], list[int]]:
    """Of one step on the tensor axis, without few-element reductions, and the sizes of what is partial."""
    engine = started(build(name).float(), flat_config(sequence, policy))
    group = engine.groups.axis("tensor")
    group.ledger.clear()
    for step in range(2):
        engine.backward(engine(*batch(step)))
        engine.step()
    entries = group.ledger.items()
    found = {Sent(e.kind, e.elements, LETTERS[e.dtype]): 0 for e, _ in entries if not e.scalar}
    for entry, count in entries:
        if not entry.scalar:
            found[Sent(entry.kind, entry.elements, LETTERS[entry.dtype])] += count
    partial = [unit.elements for unit in engine.runtime.units if unit.part.role.partial]
    engine.close()
    return Counter(found), partial


@pytest.mark.parametrize(
    ("name", "sequence", "policy"),
    [("gpt", False, "none"), ("llama", True, "none"), ("gpt", True, "full"), ("llama", False, "full")],
)
def test_what_is_sent_is_the_closed_form(two_ranks: World, name: str, sequence: bool, policy: str) -> None:
    spec = SPECS[name]
    layers = SharedLayers(
        layers=spec.layers, batch=SAMPLES, seq=SEQ, hidden=spec.hidden, ranks=2, sequence_parallel=sequence,
        recomputed=policy == "full", element_bytes=4,
    )  # fmt: skip
    for found, partial in two_ranks.run(ledger, name, sequence, policy):
        assert bool(partial) == sequence
        assert found == layers.step(2, partial)
        arguments = {"spec": spec, "batch": SAMPLES, "seq": SEQ}
        factory = "windtunnel.experiments.transformer:for_flight"
        trace = fly(
            Plan(factory=factory, arguments=arguments, config=flat_config(sequence, policy), world=2, micro_steps=2)
        )
        assert sent_bytes_by_axis(trace, scalars=False)["tensor"] == sent_bytes(found, 2)


# Refusals #


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x))).square().mean()


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


# Shards #


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    data=st.data(),
    parts=st.integers(1, 5),
)
def test_shards_make_the_whole(shape: list[int], data: st.DataObject, parts: int) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    cut = shard(whole, dim, parts)
    sizes = [part.shape[dim] for part in cut]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(unshard(cut, dim), whole)


def test_shards_of_a_thousand_rows() -> None:
    assert [tuple(part.shape) for part in shard(torch.empty(1000, 10), 0, 4)] == [(250, 10)] * 4
    assert [part.shape[0] for part in shard(torch.empty(1003, 10), 0, 4)] == [251, 251, 251, 250]
    with pytest.raises(ValueError, match=r"dim = 2 of a tensor of shape \(3, 4\); allowed: 0 to 1"):
        shard(torch.empty(3, 4), 2, 2)
    with pytest.raises(ValueError, match="parts = 0"):
        shard(torch.empty(3, 4), 0, 0)


@given(widths=st.lists(st.integers(1, 6), min_size=1, max_size=3), parts=st.integers(1, 4), padding=st.integers(0, 2))
def test_fused_parts_are_reassembled(widths: list[int], parts: int, padding: int) -> None:
    """Each rank's share of several sections that lie side by side, padded at its end."""
    starts = [sum(widths[:number]) for number in range(len(widths))]
    values = torch.arange(3 * sum(widths)).view(3, -1)
    wholes = [
        Whole(
            tuple(values.shape),
            1,
            tuple((at + sections(width, parts)[rank][0], at + sections(width, parts)[rank][1])
                  for at, width in zip(starts, widths, strict=True)),
        )
        for rank in range(parts)
    ]  # fmt: skip
    cuts = [cut(values, whole, sum(b - a for a, b in whole.ranges) + padding) for whole in wholes]
    assert torch.equal(reassemble(cuts, wholes), values)
    if parts > 1 and sum(b - a for a, b in wholes[-1].ranges):
        with pytest.raises(ValueError, match="parts cover"):
            reassemble(cuts[:-1], wholes[:-1])
