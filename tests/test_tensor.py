"""Tensor parallelism on Gloo ranks against one process."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from windtunnel.engine.engine import Engine, initialize
from windtunnel.engine.world import World
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights

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


@dataclass(frozen=True)
class Layout:
    """Of a run; only `model` and `clip` mean something to one process."""

    model: str
    tensor: int
    sequence: bool = False
    stage: int = 0
    clip: float = 0.5
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "train_batch_size": SAMPLES,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.stage},
            "optimizer": ADAMW,
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
def alone(name: str, clip: float) -> Outcome:
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW["params"])
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
    wanted = alone(layout.model, layout.clip)
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


@pytest.mark.parametrize(
    "layout",
    [
        Layout("gpt", 2),
        Layout("gpt", 2, sequence=True, keys=FULL),
        Layout("llama", 2, keys=SELECTIVE),
        Layout("llama", 2, sequence=True, keys=SELECTIVE),
        Layout("alibi", 2),
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
        Layout("gpt", 2, stage=3),
    ],
    ids=str,
)
def test_four_ranks_equal_one_process(four_ranks: World, layout: Layout) -> None:
    check(four_ranks, layout)
