"""Context parallelism: ranks that share each sequence train as one process does; bytes are those of the closed forms."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from windtunnel.collectives.context import AttentionSize, attention_bytes, attention_elements
from windtunnel.engine.communicator import SoloCommunicator
from windtunnel.engine.config import Config
from windtunnel.engine.context import ContextParallel, repeats
from windtunnel.engine.engine import initialize
from windtunnel.engine.world import World
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights
from windtunnel.kernels.attention import block, block_backward, merge, plain_block, plain_block_backward

TOLERANCE = 1e-10
"""float64; sums are taken in another order, and Adam enlarges rounding (tests/test_zero.py)."""

METHODS = ["ulysses", "all_gather", "ring"]
BATCH, SEQ, VOCAB, STEPS = 4, 16, 19, 3


class Case(NamedTuple):
    method: str
    heads: int = 4
    kv_heads: int = 4
    positions: str = "learned"
    attention: str = "causal"
    context: int = 2
    stage: int = 0
    policy: str = "none"

    def build(self) -> nn.Module:
        spec = ModelSpec(
            name="long", layers=2, hidden=16, heads=self.heads, kv_heads=self.kv_heads, ffn=24, vocab=VOCAB, seq=SEQ,
            mlp="swiglu", norm="rmsnorm", positions=self.positions, attention=self.attention, tied=True, bias=False,
        )  # fmt: skip
        model = Transformer(spec)
        initialize_weights(model, seed=3)
        return model.double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(step))
    return x, (x + x.roll(1, 1)) % VOCAB


@cache
def alone(case: Case) -> dict[str, Tensor]:
    model = case.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        model(*batch(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def config(case: Case, world: int, **keys: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH * case.context // world,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": case.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "parallel": {"context": case.context, "context_attention": case.method},
        "activation_checkpointing": {"policy": case.policy},
        **keys,
    }


def train(rank: int, world: int, case: Case) -> dict[str, Tensor]:
    engine, *_ = initialize(case.build(), config=config(case, world), timeout_s=20.0)
    samples = engine.groups.axis("data")
    for step in range(STEPS):
        engine.backward(engine(*(part.chunk(samples.world)[samples.rank] for part in batch(step))))
        engine.step()
    parameters = engine.full_parameters()
    engine.close()
    return parameters


def check(world: World, case: Case) -> None:
    wanted = alone(case._replace(method="", context=1, stage=0, policy="none"))
    for found in world.run(train, case):
        for name, values in wanted.items():
            assert float((found[name] - values).norm()) <= TOLERANCE * float(values.norm()), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kv_heads", "positions", "attention"), [(4, "learned", "causal"), (2, "rope", "causal"), (1, "rope", "full")]
)
def test_two_ranks_equal_one_process(
    two_ranks: World, method: str, kv_heads: int, positions: str, attention: str
) -> None:
    check(two_ranks, Case(method, kv_heads=kv_heads, positions=positions, attention=attention))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kv_heads", "positions", "attention", "context", "stage", "policy"),
    [
        (2, "rope", "causal", 4, 0, "none"),
        (4, "learned", "full", 4, 3, "full"),
        (1, "learned", "causal", 2, 2, "selective"),
    ],
)
def test_four_ranks_equal_one_process(
    four_ranks: World, method: str, kv_heads: int, positions: str, attention: str, context: int, stage: int, policy: str
) -> None:
    """Also with ZeRO over context and data, and where blocks are computed again in backward."""
    check(four_ranks, Case(method, 4, kv_heads, positions, attention, context, stage, policy))


# Bytes #


def ledger(rank: int, world: int, case: Case) -> dict[tuple[str, str], int]:
    """Elements by kind and dtype on the axis "context" in one micro-step."""
    engine, *_ = initialize(case.build(), config=config(case, world), timeout_s=20.0)
    group = engine.groups.axis("context")
    group.ledger.clear()
    engine.backward(engine(*batch(0)))
    found: dict[tuple[str, str], int] = {}
    for entry, count in group.ledger.items():
        key = (entry.kind, entry.dtype)
        found[key] = found.get(key, 0) + count * entry.elements
    engine.close()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_what_is_sent_is_the_closed_form(two_ranks: World, method: str) -> None:
    case = Case(method, kv_heads=1, positions="rope")
    repeated = 2 if method == "ulysses" else 1  # one key head cannot be cut in two
    size = AttentionSize(batch=BATCH, tokens=SEQ, heads=4, kv_heads=repeated, head_size=4, element_bytes=8)
    expected = {(kind, "fp64"): 2 * n for kind, n in attention_elements(size, 2, method).items()}  # two layers
    for found in two_ranks.run(ledger, case):
        assert {key: n for key, n in found.items() if key[0] != "recv"} == expected
