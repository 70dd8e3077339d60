"""Metrics: files of whole lines, what the engine writes of its steps, and that nothing of it happens by default."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import Run, start_engine, train_alone, train_step
from torch import nn
from windtunnel.engine import metrics
from windtunnel.engine.config import Config
from windtunnel.engine.engine import initialize
from windtunnel.engine.metrics import CsvWriter, JsonlWriter, Lines, Monitoring, TensorBoardWriter
from windtunnel.engine.world import World


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Files #


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    for start in (0, 2):  # a run that is started again appends
        writer = JsonlWriter(path)
        writer.log(start, {"loss": 0.5, "norm": math.inf})
        assert len(rows(path)) == start // 2 + 1  # at once
        writer.close()
    assert rows(path) == [{"step": 0, "loss": 0.5, "norm": "inf"}, {"step": 2, "loss": 0.5, "norm": "inf"}]


def test_csv_files(tmp_path: Path) -> None:
    for start in (0, 2):
        writer = CsvWriter(tmp_path)
        writer.log(start, {"train/loss": 0.25})
        writer.log(start + 1, {"train/loss": 0.125, "x,y": math.nan})
        writer.close()
    with (tmp_path / "train_loss.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["step", "train_loss"], ["0", "0.25"], ["1", "0.125"], ["2", "0.25"], ["3", "0.125"],
        ]  # fmt: skip
    assert (tmp_path / "x_y.csv").read_text() == "step,x_y\n1,nan\n3,nan\n"


@given(st.text(alphabet="ab\n", max_size=12))
def test_a_torn_line_is_cut_off(content: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines"
        path.write_text(content)
        lines = Lines(path)
        lines.write("new")
        lines.close()
        assert path.read_text() == content[: content.rfind("\n") + 1] + "new\n"


FOREVER = """
import sys
from pathlib import Path
from windtunnel.engine.metrics import CsvWriter, JsonlWriter
writers = JsonlWriter(Path(sys.argv[1]) / "metrics.jsonl"), CsvWriter(Path(sys.argv[1]))
step = 0
while True:
    for writer in writers:
        writer.log(step, {"loss": step / 3, "a rather long name " * 10: step / 7})
    step += 1
    if step == 200:
        print("going", flush=True)
"""


def test_a_kill_leaves_whole_lines(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", FOREVER, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"going\n"
        process.send_signal(signal.SIGKILL)
    found = rows(tmp_path / "metrics.jsonl")
    assert len(found) >= 200
    assert [row["step"] for row in found] == list(range(len(found)))
    for path in tmp_path.glob("*.csv"):
        assert path.read_text().endswith("\n")
        with path.open() as file:
            assert {len(row) for row in csv.reader(file)} == {2}


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path)
    writer.log(3, {"train/loss": 0.5})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.5)]


class FakeWandb:
    """What we call of wandb."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def init(self, **arguments: Any) -> "FakeWandb":
        self.calls.append(arguments)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    fake.__dict__["__spec__"] = object()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    section = metrics.WandbSection(enabled=True, group="g", team="t")
    writer = section.writer()
    writer.log(1, {"loss": 2.0})
    writer.close()
    assert fake.calls == [{"project": "windtunnel", "group": "g", "entity": "t"}, (1, {"loss": 2.0}), "finish"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"{name} is not installed: pip install 'windtunnel\[{name}\]'"):
        initialize(nn.Linear(1, 1), {name: {"enabled": True}, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})


# The config #


def test_sections() -> None:
    config = {
        "jsonl_monitor": {"enabled": True, "output_path": "a", "job_name": "b"},
        "csv_monitor": {"enabled": False, "output_path": "c"},
        "wandb": {"enabled": True, "project": "p"},
        "steps_per_print": 7,
        "wall_clock_breakdown": True,
    }
    wishes = Config.read(config, 1).monitoring
    assert [type(section).__name__ for section in wishes.sections] == ["JsonlSection", "WandbSection"]
    assert (wishes.print_every, wishes.breakdown) == (7, True)
    assert wishes.sections[0].folder == Path("a/b")  # type: ignore[union-attr]
    assert not Config.read(None, 1).monitoring.active
    assert not Config.read({"steps_per_print": math.inf}, 1).monitoring.active  # as accelerate writes it


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps_per_print": 0}, "steps_per_print = 0.0; allowed: at least 1, or null"),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown = True, but nothing shows it; set steps_per_print"),
        ({"csv_monitor": {"path": "x"}}, r"unknown key 'csv_monitor.path'.*'output_path'"),
        ({"comet": {"enabled": True}}, "unknown key 'comet'"),
        ({"comms_logger": {"enabled": True}}, "comms_logger is not supported: engine.communicator.ledger"),
    ],
)
def test_what_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.read(config, 1)


def test_when_somebody_is_told() -> None:
    assert [Monitoring(print_every=3).due(step) for step in range(1, 7)] == [False, False, True] * 2
    assert not Monitoring().active


# The engine #


def train(rank: int, world: int, run: Run, config: dict[str, Any]) -> tuple[int, float]:
    """(scalar all-reduces, norm of the last step) of a run, with an evaluation and a value of one's own at its end."""
    engine = start_engine(run, run.build(), **config)
    for step in range(run.steps):
        train_step(engine, run, step, rank, world)
    scalars = sum(count for entry, count in engine.communicator.ledger.items() if entry.kind == "all_reduce")
    norm = engine.get_global_grad_norm()
    engine.log({"mine": 4.0})
    engine.evaluate([run.batch(0)], name="held out")
    engine.close()
    return scalars, norm or 0.0


def test_what_is_written_of_a_step(two_ranks: World, tmp_path: Path) -> None:
    run = Run("gpt", stage=1, accumulation=3, clip=0.3, steps=4)
    plain = two_ranks.run(train, run, {})
    config = {
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_type": "linear"}},
        "jsonl_monitor": {"enabled": True, "output_path": str(tmp_path)},
        "wall_clock_breakdown": True,
    }
    watched = two_ranks.run(train, run, config)
    assert watched[0][0] == plain[0][0] + run.steps  # one more for each step, and only if asked for
    *found, mine, held_out = rows(tmp_path / "windtunnel" / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row["train/lr"] for row in found] == pytest.approx([0.0, 0.0, 0.01 / 3, 0.02 / 3])
    assert found[-1]["train/gradient_norm"] == pytest.approx(watched[0][1])
    for row in found:
        assert row["train/samples_per_s"] * 6 == pytest.approx(row["train/tokens_per_s"])  # six tokens per sample
        passed_s = 12 / row["train/samples_per_s"]  # twelve samples per step, of all ranks
        phases_s = [row[f"train/{phase}_s"] for phase in ("forward", "backward", "step")]
        assert all(phase_s > 0 for phase_s in phases_s)
        assert sum(phases_s) <= passed_s
    assert mine == {"step": 4, "mine": 4.0}
    assert set(held_out) == {"step", "held out/loss", "held out/perplexity"}


def test_the_loss_is_the_mean_over_micro_steps_and_ranks(two_ranks: World, tmp_path: Path) -> None:
    run = Run("mlp", stage=2, accumulation=3, steps=4)
    two_ranks.run(train, run, {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}})
    with (tmp_path / "job" / "train_loss.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses == pytest.approx(train_alone(Run("mlp", steps=4)).losses, rel=1e-12)


def test_lines_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run("mlp", steps=5)
    scalars, _ = train(0, 1, run, {"steps_per_print": 2})
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["step 2", "step 4"]
    assert "loss " in printed.err
    assert "tokens_per_s" not in printed.err  # its batches are no tokens
    assert scalars == 0


def test_a_users_own_backward_has_no_loss(tmp_path: Path) -> None:
    config = {
        "jsonl_monitor": {"enabled": True, "output_path": str(tmp_path)},
        "fp16": {"enabled": True, "loss_scale": 8.0},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    engine, *_ = initialize(nn.Linear(2, 1), config)
    engine.scale_loss(engine(torch.ones(3, 2, dtype=torch.float16)).sum()).backward()
    engine.step()
    engine.close()
    (row,) = rows(tmp_path / "windtunnel" / "metrics.jsonl")
    assert "train/loss" not in row
    assert row["train/loss_scale"] == 8.0
    assert row["train/skipped_steps"] == 0


def test_a_flight_is_told_nothing(tmp_path: Path) -> None:
    """A config with all of it is simulated as one without: shapes have no loss to write."""
    from windtunnel import simulate

    loop = {
        "steps_per_print": 1,
        "wall_clock_breakdown": True,
        "jsonl_monitor": {"enabled": True, "output_path": str(tmp_path)},
        "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.0, "cycle_max_lr": 1e-3}},
        "data_loader": {"num_workers": 2},
    }
    plain, full = (simulate("gpt-demo", "dgx-a100", gpus=2, config={"seed": 1, **keys}) for keys in ({}, loop))
    assert full.step_time_s == plain.step_time_s
    assert full.bytes_sent_per_gpu == plain.bytes_sent_per_gpu
    assert list(tmp_path.iterdir()) == []
