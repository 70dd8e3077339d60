"""Models that the engine cuts into stages are saved, loaded and exported whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import SAMPLES
from test_pipeline_performed import MODELS, Case, alone
from torch import Tensor, nn
from windtunnel.engine.engine import initialize
from windtunnel.engine.export import export
from windtunnel.engine.world import World


def go_on(rank: int, world: int, case: Case, folder: str, until: int) -> dict[str, Tensor]:
    """From the latest checkpoint to a number of steps, and save."""
    recipe = MODELS[case.model]
    config = case.config() | {"gradient_accumulation_steps": 1 if case.pipeline == 1 else 3}
    engine, *_ = initialize(recipe.make(), recipe.criterion, config, timeout_s=20.0)
    engine.load_checkpoint(folder)
    samples = engine.groups.axis("data")
    while engine.global_steps < until:
        x, y = (each.chunk(samples.world)[samples.rank] for each in recipe.batch(engine.global_steps))
        if case.pipeline > 1:
            engine.train_batch(iter(list(zip(x.chunk(3), y.chunk(3), strict=True))))
        else:
            engine.backward(engine(x, y) if recipe.criterion is None else recipe.criterion(engine(x), y))
            engine.step()
    engine.save_checkpoint(folder)
    export(engine, Path(folder, "weights"))
    whole = engine.full_state_dict()
    engine.close()
    return whole


class Counts(nn.Module):
    """Statistics that only the stage has that computes it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((7,), factor, dtype=torch.float64))
        self.register_buffer("sum", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.sum += x.detach().sum()
        return x * self.weight


def count(rank: int, world: int, folder: str, pipeline: int) -> dict[str, Tensor]:
    model = [Counts(0.5), Counts(2.0)]
    config = {"train_batch_size": SAMPLES, "pipeline_size": pipeline, "optimizer": {"type": "SGD", "params": {"lr": 0}}}
    engine, *_ = initialize(model, lambda h, y: h.square().mean(), config, timeout_s=20.0)
    engine.load_checkpoint(folder)
    x, y = torch.ones(SAMPLES, 7, dtype=torch.float64), torch.ones(SAMPLES)
    if pipeline > 1:
        engine.train_batch(iter([(x, y)]))
    engine.save_checkpoint(folder)
    whole = engine.full_state_dict()
    engine.close()
    return whole


def test_buffers_are_those_of_their_stage(two_ranks: World, tmp_path: Path) -> None:
    results = [*two_ranks.run(count, str(tmp_path), 2), *two_ranks.run(count, str(tmp_path), 1)]
    for found in results:
        assert (found["0.sum"].item(), found["1.sum"].item()) == (SAMPLES * 7.0, SAMPLES * 3.5)


@pytest.mark.parametrize("name", ["tied", "rope"])
def test_stages_go_on_at_any_layout(four_ranks: World, tmp_path: Path, name: str) -> None:
    layouts = [(2, 2, "1f1b"), (1, 3, "1f1b"), (4, 0, "gpipe"), (2, 1, "1f1b")]
    for steps, (pipeline, stage, schedule) in enumerate(layouts, 1):
        case = Case(name, schedule, pipeline, stage)
        everyones = four_ranks.run(go_on, case, str(tmp_path), steps)
    found = everyones[0]
    for each in everyones:
        assert all(torch.equal(each[key], value) for key, value in found.items())
    lone = go_on(0, 1, Case(name, pipeline=1), str(tmp_path), 5)
    for key, value in alone(name, 0.5, 5).parameters.items():
        assert float((lone[key] - value).norm() / value.norm()) <= 1e-10, key
    exported = load_file(tmp_path / "weights" / "model.safetensors")
    assert exported.keys() == lone.keys()


def go_on_shared(
    rank: int, world: int, sizes: tuple[int, int], stage: int, folder: str, until: int
) -> dict[str, Tensor]:
    """The same with layers that ranks share, besides."""
    tensor, pipeline = sizes
    case = Case("tied", "1f1b", pipeline, stage)
    config = case.config() | {"gradient_accumulation_steps": 3, "parallel": {"tensor": tensor}}
    engine, *_ = initialize(MODELS["tied"].make(), config, timeout_s=20.0)
    engine.load_checkpoint(folder)
    samples = engine.groups.axis("data")
    while engine.global_steps < until:
        x, y = (each.chunk(samples.world)[samples.rank] for each in MODELS["tied"].batch(engine.global_steps))
        micro_batches = list(zip(x.chunk(3), y.chunk(3), strict=True))
        if pipeline > 1:
            engine.train_batch(iter(micro_batches))
        else:
            for batch in micro_batches:
                engine.backward(engine(*batch))
                engine.step()
    engine.save_checkpoint(folder)
    whole = engine.full_state_dict()
    engine.close()
    return whole


def test_three_axes_go_on_at_any_layout(four_ranks: World, tmp_path: Path) -> None:
    for steps, (sizes, stage) in enumerate([((2, 2), 1), ((1, 4), 0), ((2, 1), 3), ((1, 2), 2), ((2, 2), 2)], 1):
        found = four_ranks.run(go_on_shared, sizes, stage, str(tmp_path), steps)[0]
    for key, value in alone("tied", 0.5, 5).parameters.items():
        assert float((found[key] - value).norm() / value.norm()) <= 1e-10, key
