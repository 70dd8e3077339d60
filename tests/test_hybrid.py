"""Hybrid sharding and second shards on Gloo ranks: against one process, and byte for byte against the closed forms."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from small_models import Outcome, Run, start_engine, train_alone, train_rank, train_step
from windtunnel.engine.world import World

TOLERANCE = 1e-10
"""float64; sums are taken in another order, and Adam enlarges rounding where a gradient is zero (tests/test_zero.py)."""


@cache
def alone(run: Run) -> Outcome:
    return train_alone(replace(run, stage=0, accumulation=1))


def train_with(rank: int, world: int, run: Run, zero: dict[str, Any]) -> Outcome:
    engine = start_engine(run, run.build(), zero_optimization={"stage": run.stage, **zero})
    losses, norms = [], []
    for step in range(run.steps):
        losses.append(train_step(engine, run, step, rank, world))
        if (norm := engine.get_global_grad_norm()) is not None:
            norms.append(norm)
    outcome = Outcome(losses, engine.full_parameters(), norms)
    engine.close()
    return outcome


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shard_groups_of_two_equal_one_process(four_ranks: World, stage: int, accumulation: int) -> None:
    run = Run("tied", stage=stage, accumulation=accumulation, clip=0.5, steps=6)
    for outcome in four_ranks.run(train_with, run, {"mics_shard_size": 2}):
        for name, wanted in alone(run).parameters.items():
            assert float((outcome.parameters[name] - wanted).norm()) <= TOLERANCE * float(wanted.norm())
        assert outcome.norms == pytest.approx(alone(run).norms, rel=TOLERANCE)
