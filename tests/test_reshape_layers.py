"""Models that the engine cuts itself are saved, loaded and exported whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensor_runs import ADAMW, SAMPLES, SPECS, batch, build, started
from test_tensor import alone
from torch import Tensor
from windtunnel.engine.export import consolidate
from windtunnel.engine.world import World

TOLERANCE = 1e-10
"""float64, as in test_tensor.py."""


def go_on(rank: int, world: int, name: str, tensor: int, stage: int, folder: str, until: int) -> dict[str, Tensor]:
    """From the latest checkpoint to a number of steps, and save."""
    config = {
        "train_batch_size": SAMPLES,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "optimizer": ADAMW,
        "parallel": {"tensor": tensor, "sequence_parallel": tensor > 1},
    }
    engine = started(build(name), config)
    engine.load_checkpoint(folder)
    samples = engine.groups.axis("data")
    while engine.global_steps < until:
        x, y = (each.chunk(samples.world)[samples.rank] for each in batch(engine.global_steps))
        engine.backward(engine(x, y))
        engine.step()
    engine.save_checkpoint(folder)
    whole = engine.full_state_dict()
    engine.close()
    return whole


@pytest.mark.parametrize("name", SPECS)
def test_a_tensor_parallel_model_goes_on_at_any_layout(four_ranks: World, tmp_path: Path, name: str) -> None:
    widest = SPECS[name].kv_heads or 4
    for steps, (tensor, stage) in enumerate([(2, 3), (1, 1), (widest, 2), (2, 0)], 1):
        found = four_ranks.run(go_on, name, tensor, stage, str(tmp_path), steps)[0]
        if steps == 2:
            break_off = go_on(0, 1, name, 1, 0, str(tmp_path), 2)  # one process loads and saves what they have
            assert all(torch.equal(break_off[key], value) for key, value in found.items())
    found = go_on(0, 1, name, 1, 0, str(tmp_path), 5)
    for key, value in alone(name, 0.5, "AdamW").parameters.items():
        assert float((found[key] - value).norm() / value.norm()) <= TOLERANCE, key
    consolidate(tmp_path, tmp_path / "out", dtype=None)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == found.keys()
    assert all(torch.equal(exported[key], value) for key, value in found.items())
