"""Offload where a model is cut, in stages or among tensor ranks: bit for bit the run without it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import SAMPLES, Batch, token_batch
from torch import Tensor
from windtunnel.engine.engine import Engine, initialize
from windtunnel.engine.pipeline import PipelineEngine
from windtunnel.engine.world import World
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights

TINY = ModelSpec(
    name="tiny", layers=3, hidden=8, heads=2, ffn=12, vocab=17, seq=6,
    mlp="gelu", norm="layernorm", positions="learned", attention="causal", tied=True, bias=True,
)  # fmt: skip

MICRO_BATCHES = 2
STEPS = 4

HOST: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}


@dataclass(frozen=True)
class Job:
    """How a model is cut, and where its state rests."""

    stage: int
    parallel: dict[str, Any]
    schedule: str = "1f1b"
    offload: dict[str, Any] = field(default_factory=dict)
    clip: float = 0.3

    def config(self) -> dict[str, Any]:
        staged = self.parallel.get("pipeline", 1) > 1
        return {
            "train_batch_size": SAMPLES,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": self.clip,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": self.stage, **self.offload},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
            "parallel": self.parallel,
            **({"pipeline": {"schedule": self.schedule}} if staged else {}),
        }


def micro_batches(step: int, rank: int, world: int) -> list[Batch]:
    x, y = token_batch(step)
    parts = MICRO_BATCHES * world
    return list(zip(x.chunk(parts)[rank::world], y.chunk(parts)[rank::world], strict=True))


def step_of(engine: Engine, step: int) -> float:
    data = engine.groups.axis("data")
    batches = micro_batches(step, data.rank, data.world)
    if isinstance(engine, PipelineEngine):
        return engine.train_batch(iter(batches)).item()
    total = 0.0
    for batch in batches:
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        total += loss.item()
    return total


def train(job: Job) -> tuple[list[float], dict[str, Tensor], int]:
    """(losses, parameters, bytes moved between tiers)."""
    model = Transformer(TINY)
    initialize_weights(model, seed=1)
    engine, *_ = initialize(model, job.config(), timeout_s=20.0)
    losses = [step_of(engine, step) for step in range(STEPS)]
    parameters = engine.full_parameters()
    if engine.tiers is not None:
        engine.tiers.transfers.drain()
    moved = sum(each.nbytes for each in engine.offload_report().values())
    engine.close()
    return losses, parameters, moved


def differing(rank: int, world: int, job: Job, ways: list[dict[str, Any]]) -> list[int]:
    """The numbers of the ways whose run is another one than that without offload."""
    losses, parameters, moved = train(job)
    assert moved == 0
    different = []
    for number, offload in enumerate(ways):
        other_losses, other, moved = train(replace(job, offload=offload))
        assert moved > 0
        if losses != other_losses or not all(torch.equal(values, other[name]) for name, values in parameters.items()):
            different.append(number)
    return different


@pytest.mark.parametrize(
    "job",
    [
        Job(0, {"pipeline": 2}),
        Job(1, {"pipeline": 2}, "zb-h1", clip=0.0),
        Job(2, {"pipeline": 2}, "zb-v"),
    ],
    ids=str,
)
def test_stages_offload_as_they_would_not(two_ranks: World, job: Job, tmp_path: Path) -> None:
    ways = [
        HOST,
        {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 2}},
        {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    ]
    assert two_ranks.run(differing, job, ways) == [[], []]


@pytest.mark.parametrize(
    "job",
    [
        Job(1, {"tensor": 2}),
        Job(3, {"tensor": 2, "sequence_parallel": True}),
        Job(2, {"context": 2}),
    ],
    ids=str,
)
def test_tensor_and_context_ranks_offload_as_they_would_not(two_ranks: World, job: Job) -> None:
    ways = [HOST, {**HOST, "offload_param": {"device": "cpu"}}] if job.stage == 3 else [HOST]
    assert two_ranks.run(differing, job, ways) == [[], []]


def test_stages_with_data_parallel_ranks(four_ranks: World) -> None:
    job = Job(2, {"pipeline": 2})
    assert four_ranks.run(differing, job, [HOST]) == [[]] * 4
