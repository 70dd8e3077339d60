"""What a user does with an engine besides training: evaluate, look, load data, launch with torchrun."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from windtunnel.engine.engine import initialize
from windtunnel.engine.world import World

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2}}


class Blocks(nn.Module):
    """Three repeated blocks of odd sizes between an input and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(3, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(3))
        self.last = nn.Linear(5, 1)
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return (self.last(h) * self.scale).square().mean()


def inputs(seed: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def evaluate_and_look(rank: int, world: int, stage: int) -> tuple[float, float, dict[str, Tensor], str]:
    """(evaluation before, after a step, whole state, how a parameter prints between steps)."""
    model = Blocks()
    engine, *_ = initialize(model, {"zero_optimization": {"stage": stage}, "optimizer": ADAMW}, timeout_s=20.0)
    with torch.no_grad():
        before = float(engine(inputs(0)))
    engine.backward(engine(inputs(1)))
    engine.step()
    engine.eval()
    with torch.no_grad():
        after = float(engine(inputs(0)))
    state, shown = engine.full_state_dict(), repr(model.last.weight)
    engine.close()
    return before, after, state, shown


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_evaluation_and_state_between_steps(two_ranks: World, stage: int) -> None:
    twin = Blocks()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    with torch.no_grad():
        before = float(twin(inputs(0)))
    twin(inputs(1)).backward()
    optimizer.step()
    with torch.no_grad():
        after = float(twin(inputs(0)))
    for found_before, found_after, state, _ in two_ranks.run(evaluate_and_look, stage):
        # Both ranks see the same batch, so only the mean of two equal gradients is rounded.
        assert found_before == pytest.approx(before, rel=1e-6)
        assert found_after == pytest.approx(after, rel=1e-5)
        assert state.keys() == twin.state_dict().keys()
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_a_parameter_that_is_not_here_prints_as_nan(two_ranks: World) -> None:
    *_, shown = two_ranks.run(evaluate_and_look, 3)[0]
    assert "nan" in shown
    assert "nan" not in two_ranks.run(evaluate_and_look, 2)[0][-1]


def read_after_a_step(rank: int, world: int, stage: int) -> tuple[bool, bool]:
    """Whether `state_dict` and `settle` wait for parameters that are on their way."""
    engine, *_ = initialize(Blocks(), {"zero_optimization": {"stage": stage}, "optimizer": ADAMW}, timeout_s=20.0)
    waited = []
    for read in (engine.module.state_dict, engine.settle):
        engine.backward(engine(inputs(1)))
        engine.step()
        under_way = [unit for unit in engine.runtime.units if unit.arriving is not None]
        read()
        waited.append(bool(under_way) and not any(unit.arriving for unit in under_way))
    engine.close()
    return waited[0], waited[1]


@pytest.mark.parametrize("stage", [1, 2])
def test_reading_waits_for_what_is_on_its_way(two_ranks: World, stage: int) -> None:
    assert two_ranks.run(read_after_a_step, stage) == [(True, True)] * 2


def test_a_backward_that_failed_is_not_forgotten() -> None:
    engine, *_ = initialize(Blocks(), {"optimizer": ADAMW})
    loss = engine(inputs(0))

    def fail(gradient: Tensor) -> None:
        raise ArithmeticError("on purpose")

    engine.module.last.weight.register_hook(fail)
    with pytest.raises(ArithmeticError):
        engine.backward(loss)
    with pytest.raises(RuntimeError, match="the last backward did not end"):
        engine(inputs(0))


def load(rank: int, world: int, path: str) -> list[list[float]]:
    data = TensorDataset(torch.arange(12.0))
    arguments = SimpleNamespace(deepspeed_config=path)
    engine, _, loader, _ = initialize(Blocks(), args=arguments, training_data=data, timeout_s=20.0)
    assert loader is not None
    seen = [batch[0].tolist() for batch in loader]
    engine.close()
    return seen


def test_the_loader_gives_each_rank_its_own_micro_batches(two_ranks: World, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_micro_batch_size_per_gpu": 3, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}')
    shares = two_ranks.run(load, str(path))
    assert [len(batch) for share in shares for batch in share] == [3] * 4
    assert sorted(value for share in shares for batch in share for value in batch) == list(range(12))


SCRIPT = """
import pathlib
import sys
import torch
from windtunnel import initialize
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
engine, optimizer, _, _ = initialize(
    model, {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
)
for _ in range(20):
    loss = (engine(torch.ones(4, 3)) - 2).square().mean()
    engine.backward(loss)
    engine.step()
# A file for each rank: two ranks that print share one pipe, and their lines mix.
(pathlib.Path(sys.argv[1]) / f"rank{engine.communicator.rank}").write_text(
    f"world {engine.communicator.world} loss {loss.item():.3f}"
)
engine.close()
"""


def test_torchrun_starts_a_script(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text().startswith("world 2 loss 0.")


def test_a_model_that_ends_with_a_block() -> None:
    """The model's output is its last block's, so backward reaches both at once and has computed neither."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    twin = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    twin.load_state_dict(model.state_dict())
    engine, *_ = initialize(model, {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    engine.backward(engine(inputs(0)).square().sum())
    engine.step()
    twin(inputs(0)).square().sum().backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    for name, value in engine.full_parameters().items():
        torch.testing.assert_close(value, twin.get_parameter(name).detach())
