"""Pipelines whose stages are several ranks that share sequences or experts: the same training as one process."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from windtunnel.engine.engine import initialize
from windtunnel.engine.pipeline import PipelineEngine
from windtunnel.engine.world import World
from windtunnel.experiments import transformer
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights

TOLERANCE = 1e-10
"""float64; sums are taken in another order, and Adam enlarges rounding (tests/test_zero.py)."""

SAMPLES, SEQ, VOCAB, STEPS, MICRO_BATCHES = 4, 16, 19, 3, 2

LONG = ModelSpec(
    name="long", layers=3, hidden=16, heads=4, kv_heads=2, ffn=24, vocab=VOCAB, seq=SEQ,
    mlp="swiglu", norm="rmsnorm", positions="rope", attention="causal", tied=True, bias=False,
)  # fmt: skip

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Job:
    """How a model is cut."""

    parallel: tuple[tuple[str, Any], ...]
    schedule: str = "1f1b"
    stage: int = 0
    recompute: str = "none"
    model: str = "rope"

    def config(self, samples: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": SAMPLES // MICRO_BATCHES // samples,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": self.stage},
            "activation_checkpointing": {"policy": self.recompute},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "parallel": {"pipeline": 2, **dict(self.parallel)},
            "pipeline": {"schedule": self.schedule},
        }


MODELS = {
    "rope": LONG,
    "learned": replace(LONG, positions="learned"),
    "experts": replace(LONG, experts=4, top_k=2, capacity_factor=1.0),
}


def build(name: str) -> Transformer:
    model = Transformer(MODELS[name])
    initialize_weights(model, seed=3)
    return model.double()


def batch(step: int) -> Batch:
    x = torch.randint(VOCAB, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(step))
    return x, (x + x.roll(1, 1)) % VOCAB


@cache
def alone(name: str, parts: int) -> tuple[list[float], dict[str, Tensor]]:
    """One process, a global batch in so many parts: experts have room by the tokens of a part."""
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = torch.stack(
            [model(*part) for part in zip(*(each.chunk(parts) for each in batch(step)), strict=True)]
        ).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def micro_batches(step: int, rank: int, world: int) -> Iterator[Batch]:
    x, y = batch(step)
    parts = MICRO_BATCHES * world
    return zip(x.chunk(parts)[rank::world], y.chunk(parts)[rank::world], strict=True)


def samples_of(job: Job) -> int:
    """How many of four ranks have samples of their own at a stage."""
    sizes = dict(job.parallel)
    return 2 // (sizes.get("context", 1) * sizes.get("tensor", 1))


def train(rank: int, world: int, job: Job) -> tuple[list[float], dict[str, Tensor]]:
    engine, *_ = initialize(build(job.model), config=job.config(samples_of(job)), timeout_s=20.0)
    assert isinstance(engine, PipelineEngine)
    data = engine.groups.axis("data")
    losses = [engine.train_batch(micro_batches(step, data.rank, data.world)).item() for step in range(STEPS)]
    parameters = engine.full_parameters()
    engine.close()
    return losses, parameters


@pytest.mark.parametrize(
    "job",
    [
        Job((("context", 2), ("context_attention", "ulysses")), stage=1),
        Job((("context", 2), ("context_attention", "ring")), "zb-h1", stage=2, model="learned"),
        Job((("context", 2), ("context_attention", "all_gather")), recompute="full"),
        Job((("expert", 2),), stage=2, model="experts"),
        Job((("expert", 2),), "zb-h1", stage=0, model="experts", recompute="full"),
        Job((("tensor", 2),), stage=1, model="experts"),
    ],
    ids=str,
)
def test_stages_whose_ranks_share_sequences_or_experts(four_ranks: World, job: Job) -> None:
    losses, parameters = alone(job.model, MICRO_BATCHES * samples_of(job))
    for found_losses, found in four_ranks.run(train, job):
        assert found_losses == pytest.approx(losses, rel=TOLERANCE)
        for name, values in parameters.items():
            assert float((found[name] - values).norm()) <= TOLERANCE * float(values.norm()), name


def refused(rank: int, world: int) -> str:
    model = nn.Sequential(nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB))
    with pytest.raises(ValueError, match="position_ids") as error:
        initialize(model, nn.CrossEntropyLoss(), {"parallel": {"pipeline": 2, "context": 2}}, timeout_s=20.0)
    return str(error.value)


def test_layers_that_know_no_positions_are_refused(four_ranks: World) -> None:
    assert all("no layer of Sequential takes" in said for said in four_ranks.run(refused))


def drawn(rank: int, world: int, recompute: str) -> tuple[list[float], dict[str, Tensor], list[Tensor]]:
    """(losses, parameters, what the first dropouts of a rank's forwards leave) with dropout in stages."""
    masks: list[Tensor] = []
    dropped = transformer.dropped

    def seen(x: Tensor, rate: float) -> Tensor:
        made = dropped(x, rate)
        if rate:  # not when shapes are found, in evaluation mode
            masks.append(made.detach() != 0)
        return made

    model = Transformer(replace(LONG, dropout=0.3))
    initialize_weights(model, seed=3)
    job = Job((("tensor", 2), ("sequence_parallel", True)), recompute=recompute)
    engine, *_ = initialize(model.double(), config=job.config(1), timeout_s=20.0)
    assert isinstance(engine, PipelineEngine)
    with mock.patch.object(transformer, "dropped", seen):
        losses = [engine.train_batch(micro_batches(step, 0, 1)).item() for step in range(STEPS)]
    parameters = engine.full_parameters()
    engine.close()
    return losses, parameters, masks[:4]


def test_dropout_between_regions_is_drawn_apart_and_again(four_ranks: World) -> None:
    """Tensor ranks draw alike on whole sequences, apart on parts of them, in every stage; recomputation draws again."""
    kept, again = (four_ranks.run(drawn, policy) for policy in ("none", "full"))
    for (losses, parameters, _), (other_losses, others, _) in zip(kept, again, strict=True):
        assert losses == pytest.approx(other_losses, rel=TOLERANCE)
        for name, values in parameters.items():
            assert float((others[name] - values).norm()) <= TOLERANCE * float(values.norm()), name
    for one, other in ((0, 1), (2, 3)):  # the tensor ranks of a stage
        pairs = list(zip(kept[one][2], kept[other][2], strict=True))
        assert {a.shape[1] for a, _ in pairs} == ({SEQ, SEQ // 2} if one == 0 else {SEQ // 2})
        assert all(torch.equal(a, b) == (a.shape[1] == SEQ) for a, b in pairs)


def threads_left(rank: int, world: int, job: Job) -> int:
    """How many threads more there are after a second engine than after a first."""
    counts = []
    for _ in range(2):
        train(rank, world, job)
        counts.append(len(os.listdir("/proc/self/task")))
    return counts[1] - counts[0]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted as Linux lists them")
def test_an_engine_that_is_closed_leaves_no_threads(four_ranks: World) -> None:
    """The groups of its axes end, although hooks of its parameters are out of the collector's sight."""
    assert four_ranks.run(threads_left, Job((("tensor", 2),), stage=1, model="experts")) == [0] * 4
