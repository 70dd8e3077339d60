"""Pipeline schedules performed on Gloo ranks: the same training as one process, in the order of the plan."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from small_models import SAMPLES, Batch, Outcome, Run, token_batch, regression_batch
from torch import Tensor, nn
from windtunnel.engine.engine import initialize
from windtunnel.engine.pipeline import PipelineEngine
from windtunnel.engine.world import World
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights
from torch.nn import functional

TOLERANCE = 1e-10
"""float64; sums are taken in another order, and Adam enlarges rounding (tests/test_zero.py)."""

MICRO_BATCHES = 4
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}


class Gpt(Transformer):
    """With the loss in the model's own precision."""

    def __init__(self, tied: bool) -> None:
        super().__init__(
            ModelSpec(
                name="tiny",
                layers=3,
                hidden=8,
                heads=2,
                ffn=12,
                vocab=17,
                seq=6,
                mlp="gelu",
                norm="layernorm",
                positions="learned",
                attention="causal",
                tied=tied,
                bias=True,
            )  # fmt: skip
        )
        initialize_weights(self, seed=1)


def uneven() -> list[Callable[..., Any]]:
    """Layers of different widths, functions among them; what passes between them has two tensors at one place."""
    torch.manual_seed(0)
    return [
        nn.Linear(7, 11),
        torch.tanh,
        nn.Linear(11, 5),
        lambda h: (h, torch.sin(h)),
        Added(),
        nn.Linear(5, 9),
        nn.ReLU(),
        nn.Linear(9, 3),
    ]


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((5,), 0.7))

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        return h * self.weight + s


@dataclass(frozen=True)
class Case:
    model: str = "gpt"
    pipeline: int = 2
    schedule: str = "1f1b"
    chunks: int | None = None
    stage: int = 0
    clip: float = 0.0
    recompute: str = "none"
    micro_batches: int = MICRO_BATCHES
    steps: int = 10
    extra: tuple[tuple[str, Any], ...] = ()

    def model_and_criterion(self) -> tuple[Any, Any, Callable[[int], Batch]]:
        torch.manual_seed(0)
        if self.model == "layers":
            return (
                [each.double() if isinstance(each, nn.Module) else each for each in uneven()],
                functional.mse_loss,
                regression_batch,
            )
        return Gpt(self.model == "tied").double(), None, token_batch

    def config(self) -> dict[str, Any]:
        return {
            "train_batch_size": SAMPLES,
            "gradient_accumulation_steps": self.micro_batches,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.stage},
            "activation_checkpointing": {"policy": self.recompute},
            "optimizer": ADAMW,
            "pipeline_size": self.pipeline,
            "pipeline": {"schedule": self.schedule, "chunks": self.chunks, **dict(self.extra)},
        }


@cache
def alone(model: str, clip: float, steps: int) -> Outcome:
    model_, criterion, batch_of = Case(model).model_and_criterion()
    if isinstance(model_, list):
        from windtunnel.engine.stages import LayerList

        model_ = LayerList(model_)
    optimizer = torch.optim.AdamW(model_.parameters(), lr=1e-2, weight_decay=0.1)
    losses, norms = [], []
    for step in range(steps):
        x, y = batch_of(step)
        loss = criterion(model_(x), y) if criterion else model_(x, y)
        loss.backward()
        if clip:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model_.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Outcome(losses, {name: p.detach() for name, p in model_.named_parameters()}, norms)


def train(rank: int, world: int, case: Case) -> tuple[Outcome, bool]:
    model, criterion, batch_of = case.model_and_criterion()
    engine, *_ = initialize(model, criterion, case.config(), timeout_s=20.0)
    assert isinstance(engine, PipelineEngine)
    data = engine.groups.axis("data")
    losses, norms = [], []
    for step in range(case.steps):
        x, y = batch_of(step)
        parts = case.micro_batches * data.world
        micro = zip(x.chunk(parts)[data.rank :: data.world], y.chunk(parts)[data.rank :: data.world], strict=True)
        losses.append(engine.train_batch(iter(micro)).item())
        if (norm := engine.get_global_grad_norm()) is not None:
            norms.append(norm)
    ordered = engine.actions == list(engine.plan.actions(engine.pipeline.rank))
    outcome = Outcome(losses, engine.full_parameters(), norms)
    engine.close()
    return outcome, ordered


def check(world: World, case: Case) -> None:
    wanted = alone(case.model, case.clip, case.steps)
    for outcome, ordered in world.run(train, case):
        assert ordered
        assert outcome.losses == pytest.approx(wanted.losses, rel=TOLERANCE)
        assert outcome.norms == pytest.approx(wanted.norms, rel=TOLERANCE)
        assert outcome.parameters.keys() == wanted.parameters.keys()
        for name, values in wanted.parameters.items():
            limit = TOLERANCE * (float(values.norm()) or 1.0)
            assert float((outcome.parameters[name] - values).norm()) <= limit, name


@pytest.mark.parametrize("schedule", ["sequential", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"])
def test_every_schedule_equals_one_process(two_ranks: World, schedule: str) -> None:
    check(two_ranks, Case("tied", schedule=schedule, clip=0.5))


def test_no_deferred_weights_are_left(two_ranks: World) -> None:
    pass


@pytest.mark.parametrize(
    "case",
    [
        Case("tied", pipeline=4, clip=0.5),
        Case("tied", stage=1, clip=0.5, micro_batches=3),
        Case("tied", stage=2, clip=0.5, micro_batches=3),
        Case("tied", schedule="zb-v", stage=2, clip=0.5, micro_batches=3),
        Case("gpt", schedule="zb-h1", stage=1, clip=0.5, micro_batches=3, recompute="full"),
        Case("layers", schedule="interleaved", stage=2, clip=0.5, micro_batches=2),
    ],
    ids=str,
)
def test_four_ranks(four_ranks: World, case: Case) -> None:
    check(four_ranks, case)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_three_uneven_stages(world_of: Callable[[int], World], schedule: str) -> None:
    check(world_of(3), Case("layers", pipeline=3, schedule=schedule, clip=0.5, extra=(("partition", "uniform"),)))
