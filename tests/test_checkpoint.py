"""Checkpoints: what is saved at one layout continues at any other, and nothing ever leaves less than a whole one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WorldOf
from small_models import Run, start_engine, train_step
from torch import Tensor

SAVED_AT, STEPS = 2, 4


def train_and_save(rank: int, world: int, run: Run, folder: str, asynchronous: bool = False) -> tuple[Any, ...]:
    """(losses of all steps, the parameters at the end), saving after SAVED_AT steps."""
    engine = start_engine(run, run.build())
    losses = []
    for step in range(STEPS):
        losses.append(train_step(engine, run, step, rank, world))
        if step + 1 == SAVED_AT:
            engine.save_checkpoint(folder, asynchronous=asynchronous)
    parameters = engine.full_parameters()
    engine.close()
    return losses, parameters


def load_and_train(rank: int, world: int, run: Run, folder: str) -> tuple[Any, ...]:
    """(the parameters as loaded, losses of the other steps, the parameters at the end)"""
    engine = start_engine(run, run.build())
    engine.load_checkpoint(folder)
    loaded = engine.full_parameters()
    losses = [train_step(engine, run, step, rank, world) for step in range(engine.global_steps, STEPS)]
    parameters = engine.full_parameters()
    engine.close()
    return loaded, losses, parameters


@pytest.mark.parametrize("stage", range(4))
def test_the_same_layout_continues_with_the_same_bits(world_of: WorldOf, tmp_path: Path, stage: int) -> None:
    run = Run("gpt", stage=stage, schedule=True, clip=0.3)
    saved = world_of(2).run(train_and_save, run, str(tmp_path))
    resumed = world_of(2).run(load_and_train, run, str(tmp_path))
    for (losses, parameters), (_, more, final) in zip(saved, resumed, strict=True):
        assert more == losses[SAVED_AT:]
        assert all(torch.equal(final[name], parameters[name]) for name in parameters)
