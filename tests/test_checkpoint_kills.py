"""A save that is killed, wherever that happens, leaves a checkpoint that `latest` names and that can be loaded."""

import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Mlp, regression_batch
from torch import Tensor
from windtunnel.engine.checkpoint_files import Manifest, check_files, folder_of, latest_tag
from windtunnel.engine.engine import Engine, initialize
from windtunnel.experiments.bench.kills import study

TOUCHING = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
"""Audit events of Python that come before the file system is changed."""

MOST = 200


def trained(steps: int) -> Engine:
    torch.manual_seed(0)
    engine, *_ = initialize(Mlp().double(), {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}})
    for step in range(steps):
        engine.backward(engine(*regression_batch(step)))
        engine.step()
    return engine


def die_at(number: int, folder: Path) -> None:
    """Kill this process just before it touches the folder for the number-th time."""
    left = number

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in TOUCHING and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def save_and_die_everywhere(workplace: str, tag: str) -> None:
    """Save over a copy of the first checkpoint, in a child for each place to die; the last one lives."""
    torch.set_num_threads(1)
    engine = trained(2)
    for number in range(1, MOST):
        folder = Path(workplace, str(number))
        shutil.copytree(Path(workplace, "first"), folder)
        child = os.fork()
        if child == 0:
            die_at(number, folder)
            engine.save_checkpoint(folder, tag, keep_last=1)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return
    raise AssertionError(f"the save touches the folder more than {MOST} times")


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize("tag", ["old", "new"])
def test_every_step_of_a_save_is_a_place_to_die(tmp_path: Path, tag: str) -> None:
    """Both for a new tag, after which the old one is pruned, and for one that replaces a checkpoint of its name."""
    before, after = trained(1), trained(2)
    before.save_checkpoint(tmp_path / "first", "old")
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=save_and_die_everywhere, args=(str(tmp_path), tag))
    process.start()
    process.join(120.0)
    assert process.exitcode == 0
    folders = sorted((path for path in tmp_path.iterdir() if path.name != "first"), key=lambda path: int(path.name))
    assert len(folders) > 15  # files are made, synced and renamed, folders too
    loaded_new = []
    for folder in folders:
        latest = latest_tag(folder)
        assert latest is not None
        place = folder_of(folder, latest)
        manifest = Manifest.read(place)
        check_files(place, manifest, manifest.files)
        resumed = trained(0)
        resumed.load_checkpoint(folder)
        loaded_new.append(resumed.global_steps == 2)
        assert equal(resumed.full_parameters(), (after if loaded_new[-1] else before).full_parameters())
        if len(loaded_new) % 3 == 0:
            resumed.save_checkpoint(folder, "next", keep_last=1)
            assert {path.name for path in folder.iterdir()} == {"latest", "next"}
    assert loaded_new == sorted(loaded_new)  # from one moment on it is the new one
    assert not loaded_new[0]
    assert loaded_new[-1]


def test_random_kills(tmp_path: Path) -> None:
    """The study of experiments/bench/kills.py, small: one kill of each kind of save."""
    result = study(kills=2, seed=3, workplace=tmp_path)
    assert result.good, str(result)
    assert result.compared_losses > 0
    assert [kill.asynchronous for kill in result.kills] == [False, True]


def save_and_end(folder: str) -> None:
    engine = trained(1)
    engine.save_checkpoint(folder, asynchronous=True)


def test_the_end_of_python_waits_for_a_save(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=save_and_end, args=(str(tmp_path),))
    process.start()
    process.join(60.0)
    assert process.exitcode == 0
    assert latest_tag(tmp_path) == "global_step1"
    assert trained(0).load_checkpoint(tmp_path)[0] is not None
