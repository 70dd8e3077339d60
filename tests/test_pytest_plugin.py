"""The pytest plugin, as a user's suite meets it: in this one, and in one of its own in a process of its own."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from windtunnel.engine.world import World
from windtunnel.experiments.pytest_plugin import Worlds, assert_trains_alike

# On ranks #


@dataclass(frozen=True)
class Size:
    """A parameter of a type that ranks know from this file alone."""

    elements: int


@pytest.mark.ranks(2)
@pytest.mark.parametrize("size", [Size(1), Size(1000)])
def test_a_body_runs_on_every_rank(rank: int, world_size: int, size: Size, tmp_path: Path) -> None:
    assert (rank, world_size) == (dist.get_rank(), dist.get_world_size()) == (dist.get_rank(), 2)
    values = torch.full((size.elements,), float(rank + 1))
    dist.all_reduce(values)
    assert values.tolist() == [3.0] * size.elements
    (tmp_path / f"rank{rank}").write_text(str(size.elements))
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0", "rank1"]


class TestInAClass:
    @pytest.mark.ranks(4)
    def test_methods_run_there_too(self, rank: int) -> None:
        assert 0 <= rank < 4 == dist.get_world_size()


def answer(rank: int, world: int, number: int) -> int:
    return number * world + rank


def test_the_pool_gives_living_worlds(world: Worlds, two_ranks: World) -> None:
    assert world(2) is two_ranks
    assert world(2).run(answer, 10) == [20, 21]


# A suite of its own #

SUITE = """
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist


def right():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    return Loss(model), [torch.randn(4, 3) for _ in range(2)]


class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).square().mean()


def wrong():
    \"\"\"On ranks the loss is of the rank's own making.\"\"\"
    model, batches = right()
    if dist.is_initialized() and dist.get_rank() == 1:
        model.register_forward_hook(lambda module, x, loss: loss * 3 if module.training and ON_RANKS() else loss)
    return model, batches


def ON_RANKS():
    import inspect
    return any(frame.function == "train_share" for frame in inspect.stack())


@pytest.fixture
def numbers():
    return [1, 2, 3]


@pytest.fixture
def lock():
    return threading.Lock()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("expected", [6, 7])
def test_compares(numbers, expected, rank):
    assert sum(numbers) == expected + rank


@pytest.mark.ranks(2, timeout_s=2)
def test_hangs(rank):
    if rank == 1:
        threading.Event().wait()


@pytest.mark.ranks(2)
def test_dies(rank):
    if rank == 0:
        os._exit(5)


@pytest.mark.ranks(2)
def test_skips(rank):
    if rank == 1:
        pytest.skip("rank 1 has nothing to do")


@pytest.mark.ranks(2)
def test_cannot_send(lock):
    pass


@pytest.mark.ranks(0)
def test_no_ranks():
    pass


def test_without_the_marker(rank):
    pass


@pytest.mark.ranks(2)
def test_after_all_that(world_size):
    assert world_size == 2


def test_right(windtunnel_verify):
    result = windtunnel_verify(right, zero=(3,))
    assert result.ok


def test_wrong(windtunnel_verify):
    windtunnel_verify(wrong, zero=(1,), precision="fp64")
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run of SUITE says of each test in its JUnit file: "" for passed, else the message."""
    import subprocess

    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_user.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\nwindtunnel_timeout_s = 20\n")
    path = [entry for entry in sys.path if entry and Path(entry).name != "tests"]
    plugin = ["-p", "windtunnel.experiments.pytest_plugin", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugin, "--junitxml", "report.xml", "."],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    tests = ElementTree.parse(folder / "report.xml").getroot().iter("testcase")
    return {test.get("name", ""): "".join(f"{bad.get('message')}\n{bad.text}" for bad in test) for test in tests}


def test_what_passes_passes(report: dict[str, str]) -> None:
    for name in ("test_after_all_that", "test_right"):
        assert report[name] == ""


def test_a_skip_on_a_rank_is_a_skip(report: dict[str, str]) -> None:
    assert report["test_skips"].startswith("rank 1 has nothing to do")


def test_an_assertion_shows_its_values_and_its_rank(report: dict[str, str]) -> None:
    assert "rank 1 failed: AssertionError: assert 6 == (6 + 1)" in report["test_compares[6]"]
    assert "rank 0" not in report["test_compares[6]"]
    for rank in range(2):
        assert f"rank {rank} failed: AssertionError: assert 6 == (7 + {rank})" in report["test_compares[7]"]
    assert "test_user.py:" in report["test_compares[7]"]


def test_a_rank_that_hangs_or_dies_is_named(report: dict[str, str]) -> None:
    assert "rank 1 was still busy after 2 s" in report["test_hangs"]
    assert "rank 0 died: exit code 5" in report["test_dies"]


def test_wrong_use_is_explained(report: dict[str, str]) -> None:
    assert "fixture 'lock' is a lock, which cannot be sent to the ranks" in report["test_cannot_send"]
    assert "@pytest.mark.ranks(0); allowed: an integer >= 1" in report["test_no_ranks"]
    assert "fixture 'rank' is for tests marked" in report["test_without_the_marker"]


def test_a_model_that_trains_wrong_is_placed(report: dict[str, str]) -> None:
    assert "training on 2 ranks is not what one process does (fp64, accumulation 1" in report["test_wrong"]
    assert "ZeRO 1 is OFF: first in step 0, on rank 1: gradient of model.2.bias" in report["test_wrong"]


def test_only_functions_that_ranks_can_find() -> None:
    def here() -> None:
        """Nothing."""

    for function, name in ((here, "here"), (lambda: None, "<lambda>")):
        with pytest.raises(ValueError, match=rf"{name}; allowed: a function of a module"):
            assert_trains_alike(function)


def test_the_plugin_starts_light() -> None:
    import subprocess

    code = "import sys, windtunnel.experiments.pytest_plugin; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
