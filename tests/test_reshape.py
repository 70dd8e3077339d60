"""Cut models equal one process: gradient norm, clipping, checkpoints between any two layouts, export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_models import Layout, start, step, train_alone, whole_model
from safetensors.torch import load_file
from torch import Tensor
from windtunnel.engine.checkpoint_files import Manifest
from windtunnel.engine.export import consolidate, export
from windtunnel.engine.world import World

TOLERANCE = 1e-12
"""Per tensor, in float64: sums of a few terms are taken in another order, some ten times."""


def train(rank: int, world: int, layout: Layout, steps: int) -> tuple[dict[str, Tensor], list[float]]:
    engine = start(rank, layout)
    norms = [step(engine, layout, rank) for _ in range(steps)]
    whole = engine.full_parameters()
    engine.close()
    return whole, norms


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||a - b|| / ||b|| of a tensor; names must be the same."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (1, 2), (2, 2), (3, 1)])
def test_norm_and_clipping_equal_one_process(four_ranks: World, stage: int, accumulation: int) -> None:
    expected, norms = train_alone(3)
    layout = Layout(data=2, tensor=2, stage=stage, accumulation=accumulation)
    for found, seen in four_ranks.run(train, layout, 3):
        assert seen == pytest.approx(norms, rel=TOLERANCE)
        assert far(found, expected) < TOLERANCE
    assert max(norms) > 2.0  # else nothing was clipped
