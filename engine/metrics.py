"""Writers of metrics, and the sections of the config that ask for them. Rank 0 writes.

[Note: whole lines]
A line is one `write` to a file opened for appending, so a process that is killed leaves whole lines. What a machine
that lost its power left of a line is cut off before the next one is written. A run that is started again appends: of
two lines for one step the later one counts.
"""

import importlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..reading import STRICT


class Writer(Protocol):
    """Takes values, by name, of a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _FolderSection:
    """Files in the folder `output_path`/`job_name`."""

    __pydantic_config__ = STRICT
    package: ClassVar[str | None] = None
    enabled: bool = False
    output_path: str = ""
    job_name: str = "windtunnel"

    @property
    def folder(self) -> Path:
        return Path(self.output_path) / self.job_name


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonlSection(_FolderSection):
    """`jsonl_monitor`: ours; metrics.jsonl, an object with "step" and the values for each step.

    Attributes:
        enabled: metrics of every step as a line of JSON.
        output_path, job_name: the folder of the file, `output_path`/`job_name`.
    """

    __pydantic_config__ = STRICT

    def writer(self) -> Writer:
        return JsonlWriter(self.folder / "metrics.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class CsvSection(_FolderSection):
    """`csv_monitor`: a file for each metric, with the columns `step` and the metric's name.

    Attributes:
        enabled: metrics of every step as CSV files, one for each metric.
        output_path, job_name: the folder of the files, `output_path`/`job_name`.
    """

    __pydantic_config__ = STRICT

    def writer(self) -> Writer:
        return CsvWriter(self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBoardSection(_FolderSection):
    """`tensorboard`: event files.

    Attributes:
        enabled: metrics of every step for TensorBoard, which must be installed.
        output_path, job_name: the folder of the event files, `output_path`/`job_name`.
    """

    __pydantic_config__ = STRICT
    package: ClassVar[str | None] = "tensorboard"

    def writer(self) -> Writer:
        return TensorBoardWriter(self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbSection:
    """`wandb`: a run at Weights & Biases.

    Attributes:
        enabled: metrics of every step to Weights & Biases, whose package must be installed.
        group, project: of the run.
        team: the entity of the run.
    """

    __pydantic_config__ = STRICT
    package: ClassVar[str | None] = "wandb"
    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "windtunnel"

    def writer(self) -> Writer:
        return WandbWriter(project=self.project, group=self.group, team=self.team)


@dataclass(frozen=True, slots=True, kw_only=True)
class Monitoring:
    """What is told of each optimizer step, and to whom.

    Attributes:
        sections: those that are enabled.
        print_every: steps between two printed lines; 0 or inf prints none.
        breakdown: whether forward, backward and step are timed, which makes the host wait for the device.
    """

    sections: tuple[JsonlSection | CsvSection | TensorBoardSection | WandbSection, ...] = ()
    print_every: float = 0
    breakdown: bool = False

    @classmethod
    def of(cls, keys: Any, where: str) -> "Monitoring":
        """From the keys of the JSON.

        Raises:
            ValueError: `steps_per_print` below 1, or a breakdown that nobody would see.
        """
        sections = tuple(
            section
            for section in (keys.jsonl_monitor, keys.csv_monitor, keys.tensorboard, keys.wandb)
            if section.enabled
        )
        if keys.steps_per_print is not None and keys.steps_per_print < 1:
            raise ValueError(f"{where}: steps_per_print = {keys.steps_per_print}; allowed: at least 1, or null")
        if keys.wall_clock_breakdown and not sections and keys.steps_per_print is None:
            raise ValueError(
                f"{where}: wall_clock_breakdown = True, but nothing shows it; set steps_per_print, or enable"
                " jsonl_monitor, csv_monitor, tensorboard or wandb"
            )
        return cls(sections=sections, print_every=keys.steps_per_print or 0, breakdown=keys.wall_clock_breakdown)

    @property
    def active(self) -> bool:
        return bool(self.sections) or 0 < self.print_every < math.inf

    def due(self, step: int) -> bool:
        """Whether anybody is told of this step."""
        return bool(self.sections) or (self.print_every > 0 and step % self.print_every == 0)


class Lines:
    """A file of lines that is appended to: see [Note: whole lines]."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_torn_line(path)

    def _cut_torn_line(self, path: Path) -> None:
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)

    @property
    def empty(self) -> bool:
        return os.fstat(self._file).st_size == 0

    def write(self, line: str) -> None:
        os.write(self._file, f"{line}\n".encode())

    def close(self) -> None:
        os.close(self._file)


class JsonlWriter:
    """One JSON object per step; nan and the infinities, which JSON has not, are the strings "nan", "inf", "-inf"."""

    def __init__(self, path: Path) -> None:
        self.lines = Lines(path)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        shown = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self.lines.write(json.dumps({"step": step, **shown}, allow_nan=False))

    def close(self) -> None:
        self.lines.close()


class CsvWriter:
    """A file per metric, so that a metric may appear at any step: "train/loss" is in train_loss.csv."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Lines] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name not in self.files:
                # What is not safe in a file's name, nor in a header, becomes an underscore.
                plain = re.sub(r"[^\w.-]", "_", name)
                self.files[name] = Lines(self.folder / f"{plain}.csv")
                if self.files[name].empty:
                    self.files[name].write(f"step,{plain}")
            self.files[name].write(f"{step},{value}")

    def close(self) -> None:
        for lines in self.files.values():
            lines.close()


class TensorBoardWriter:
    """TensorBoard's event files.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()

    def close(self) -> None:
        self.events.close()


class WandbWriter:
    """A run at Weights & Biases.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, *, project: str, group: str | None, team: str | None) -> None:
        require("wandb")
        # By name, because it is not a package that the engine depends on.
        self.run = importlib.import_module("wandb").init(project=project, group=group, entity=team)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def require(package: str) -> None:
    """
    Raises:
        ValueError: the package of a monitor is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{package}.enabled = True, but {package} is not installed: pip install 'windtunnel[{package}]', or set it"
            " to false"
        )
