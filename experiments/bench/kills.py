"""Kills at random moments: is a checkpoint ever lost, and does a resumed run lose its way? Writes results/kills.csv.

    python -m windtunnel.experiments.bench.kills [kills [seed]]

Two ranks train a small model with dropout under ZeRO-3 and save after every step, in every other life in the
background. SIGKILL comes at a random moment, to both ranks or to one and to the other a little later. After each:

    unreadable    checkpoints under a tag that are damaged or not complete, or a `latest` that names none
    lost          steps whose save had returned, but which the next life did not find
    wrong losses  steps whose loss, on either rank, is not to the last bit that of one uninterrupted run
"""

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...engine.checkpoint_files import MANIFEST, CheckpointError, Manifest, check_files, latest_tag
from ...engine.engine import Engine, initialize
from ...engine.world import World, WorldError
from ..files import write_csv

RANKS, SAMPLES, WIDTH = 2, 4, 12

NOTES = 25
"""A life is killed after up to so many lines of its diary, two for a step and its save; on a slow machine too."""

SPAN_S = 0.15
"""And up to this later, about the time of a few saves."""

POLL_S = 0.002

APART_S = 0.3
"""Up to this later comes the second rank, where one is killed first."""

LIMIT_S = 60.0


class Small(nn.Module):
    """Dropout makes the losses depend on the random states too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + functional.dropout(torch.tanh(block(x)), 0.2, self.training)
        return (self.head(x) - 1).square().mean()


def engine_of() -> Engine:
    config = {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    engine, *_ = initialize(Small(), config, timeout_s=20.0)
    return engine


def steps(engine: Engine, rank: int) -> Iterator[tuple[int, float]]:
    """Train for ever: (step, loss). A step's batch depends on its number and the rank alone."""
    while True:
        step = engine.global_steps
        generator = torch.Generator().manual_seed(1000 * step + rank)
        loss = engine(torch.randn(SAMPLES, WIDTH, generator=generator))
        engine.backward(loss)
        engine.step()
        yield step, loss.item()


def live(rank: int, world: int, folder: str, diary: str, asynchronous: bool) -> None:
    """Resume, train and save until killed, with a diary: a line that is whole was written before the kill."""
    torch.manual_seed(rank)
    engine = engine_of()
    with Path(diary, f"rank{rank}").open("a") as lines:

        def note(text: str) -> None:
            lines.write(f"{text}\n")
            lines.flush()

        engine.load_checkpoint(folder)
        note(f"resumed {engine.global_steps}")
        for step, loss in steps(engine, rank):
            note(f"loss {step} {loss.hex()}")
            engine.save_checkpoint(folder, asynchronous=asynchronous, keep_last=3)
            # In the background, a save that returned says that the one before is complete.
            note(f"saved {step if asynchronous else step + 1}")


def uninterrupted(rank: int, world: int, count: int) -> list[str]:
    """The losses of the first steps of one run, as hexadecimal numbers."""
    torch.manual_seed(rank)
    engine = engine_of()
    losses = [loss.hex() for (_, loss), _ in zip(steps(engine, rank), range(count), strict=False)]
    engine.close()
    return losses


@dataclass(frozen=True, slots=True)
class Kill:
    """One life and its end.

    Attributes:
        notes: lines of its diary before the kill.
        moment_s: of the first kill, after those lines.
        apart_s: how much later the other rank was killed; 0 for both at once.
        during_a_save: whether files of a save that had not ended were left.
        resumed, reached: optimizer steps at the beginning of the life, and those whose loss was noted.
        unreadable: see the module.
    """

    number: int
    asynchronous: bool
    notes: int
    moment_s: float
    apart_s: float
    during_a_save: bool
    resumed: int
    reached: int
    unreadable: int


@dataclass(frozen=True, slots=True)
class Study:
    kills: tuple[Kill, ...]
    lost: int
    wrong_losses: int
    compared_losses: int

    @property
    def good(self) -> bool:
        return not (self.lost or self.wrong_losses or any(kill.unreadable for kill in self.kills))

    def __str__(self) -> str:
        saving = sum(kill.during_a_save for kill in self.kills)
        return (
            f"{len(self.kills)} kills ({saving} with a save under way): {sum(k.unreadable for k in self.kills)}"
            f" checkpoints unreadable, {self.lost} lost, {self.wrong_losses} wrong losses of {self.compared_losses}"
        )


def study(kills: int, seed: int, workplace: Path) -> Study:
    """Kill so many lives of one run, then compare all that they noted with an uninterrupted run."""
    chance = random.Random(seed)
    folder, diary = workplace / "checkpoints", workplace / "diary"
    folder.mkdir()
    diary.mkdir()
    ended = []
    for number in range(kills):
        ended.append(_life(number, folder, diary, chance))
        print(ended[-1], file=sys.stderr)
    lost, losses = 0, []
    for rank in range(RANKS):
        rank_lost, rank_losses = _read_diary(diary / f"rank{rank}")
        lost += rank_lost
        losses.append(rank_losses)
    count = 1 + max((step for noted in losses for step, _ in noted), default=-1)
    with World(RANKS, threads=1) as world:
        expected = world.run(uninterrupted, count, limit_s=600.0)
    wrong = sum(expected[rank][step] != loss for rank in range(RANKS) for step, loss in losses[rank])
    return Study(tuple(ended), lost, wrong, sum(map(len, losses)))


def _life(number: int, folder: Path, diary: Path, chance: random.Random) -> Kill:
    asynchronous = number % 2 == 1
    notes, moment_s = chance.randrange(NOTES + 1), chance.uniform(0.0, SPAN_S)
    apart_s = chance.choice((0.0, chance.uniform(0.0, APART_S)))
    victims = list(range(RANKS))
    chance.shuffle(victims)
    lines_before = len(_lines(diary / "rank0"))
    world = World(RANKS, threads=1, preload=("windtunnel.engine.checkpoint",))

    def kill() -> None:
        deadline = time.monotonic() + LIMIT_S
        while len(_lines(diary / "rank0")) < lines_before + notes and time.monotonic() < deadline:
            time.sleep(POLL_S)
        time.sleep(moment_s)
        for position, victim in enumerate(victims):
            if position and apart_s:
                time.sleep(apart_s)
            with suppress(ProcessLookupError):
                os.kill(world.pids[victim], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        world.run(live, str(folder), str(diary), asynchronous, limit_s=LIMIT_S)
    except WorldError as error:
        if "SIGKILL" not in str(error):
            raise  # a rank failed by itself, before it was killed
    killer.join(LIMIT_S)
    lines = _lines(diary / "rank0")
    found = [int(line.split()[1]) for line in lines if line.startswith("resumed")]
    reached = [int(line.split()[1]) + 1 for line in lines if line.startswith("loss")]
    return Kill(
        number=number,
        asynchronous=asynchronous,
        notes=notes,
        moment_s=round(moment_s, 3),
        apart_s=round(apart_s, 3),
        during_a_save=any(folder.glob(".*.partial-*")),
        resumed=found[-1] if found else 0,
        reached=reached[-1] if reached else 0,
        unreadable=_unreadable(folder),
    )


def _unreadable(folder: Path) -> int:
    """Checkpoints under a tag that cannot be read, and a `latest` that names nothing."""
    bad = 0
    tags = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for path in tags:
        try:
            manifest = Manifest.read(path)
            check_files(path, manifest, manifest.files)
        except CheckpointError as error:
            print(error, file=sys.stderr)
            bad += 1
    latest = latest_tag(folder)
    return bad + (latest is not None and not (folder / latest / MANIFEST).exists())


def _lines(path: Path) -> list[str]:
    """The whole lines of a diary."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _read_diary(path: Path) -> tuple[int, list[tuple[int, str]]]:
    """(steps that were saved and not found by the next life, all noted losses)"""
    lost, saved, losses = 0, 0, []
    for line in _lines(path):
        what, number, *rest = line.split()
        if what == "resumed":
            lost += max(0, saved - int(number))
            saved = int(number)
        elif what == "saved":
            saved = max(saved, int(number))
        else:
            losses.append((int(number), rest[0]))
    return lost, losses


def main() -> int:
    given = [int(text) for text in sys.argv[1:]]
    kills, seed = (*given, *(200, 0)[len(given) :])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as workplace:
        result = study(kills, seed, Path(workplace))
    print(f"{result}; {time.monotonic() - began:.0f} s")
    write_csv(Path(__file__).parent / "results" / "kills.csv", [asdict(kill) for kill in result.kills])
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(main())
