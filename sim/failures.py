"""Failures: how often a job of many GPUs is interrupted, how often it should save, how much of its time is progress.

A job stops when any of its parts fails, starts again from the last checkpoint and repeats what it did since. Times
between failures are exponential, failures may hit a checkpoint or a restart, and training stands still while a
checkpoint is written. J. W. Young 1974, "A first order approximation to the optimum checkpoint interval" (CACM 17-9);
J. T. Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps" (FGCS 22-3).
"""

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..reading import STRICT, read_into, read_toml
from .entries import entries, find, where
from .processor import check_sources, require, require_positive

HOURS_PER_DAY = 24
SECONDS_PER_HOUR = 3_600
MONTH_S = 30 * HOURS_PER_DAY * SECONDS_PER_HOUR

LARGEST_EXPONENT = 700.0
"""exp() of more has no float: the share of progress is then zero for all purposes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Table [observed] of a profile: the machine and the time in which its interruptions were counted."""

    __pydantic_config__ = STRICT

    days: float
    gpus: int
    gpus_per_node: int
    nics_per_node: int

    def __post_init__(self) -> None:
        require_positive(self, ("days", "gpus", "gpus_per_node", "nics_per_node"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """What failed.

    Attributes:
        per: of what a job has more the larger it is: "gpu", "node" or "nic".
        interruptions: how many of it were counted.
        source: where the count is from.
    """

    __pydantic_config__ = STRICT

    name: str
    per: Literal["gpu", "node", "nic"]
    interruptions: float
    source: str

    def __post_init__(self) -> None:
        require_positive(self, ("interruptions",))
        if not self.source.strip():
            raise ValueError(f"component {self.name!r} has no source: say where the count is from")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """A published count of interruptions, and what an interruption costs besides the work that is lost.

    Attributes:
        restart_s: from a failure to the first new step: noticing it, replacing the node, starting, loading.
        storage_bytes_per_s_per_node: at which a node writes its share of a checkpoint.
        sources: where each other figure is from.
    """

    __pydantic_config__ = STRICT

    name: str
    observed: Observed
    components: tuple[Component, ...]
    restart_s: float
    storage_bytes_per_s_per_node: float
    sources: dict[str, str] = field(hash=False)

    def __post_init__(self) -> None:
        require_positive(self, ("storage_bytes_per_s_per_node",))
        require(0 <= self.restart_s < math.inf, "restart_s", self.restart_s, ">= 0 and finite")
        require(bool(self.components), "components", self.components, "at least one")
        check_sources(self.sources, required=_SOURCED, known=_SOURCED)

    def mtbf_hours(self) -> dict[str, float]:
        """Hours between failures of one GPU, node or NIC, by component."""
        seen = self.observed
        machine = _parts(seen.gpus, seen.gpus_per_node, seen.nics_per_node)
        hours = seen.days * HOURS_PER_DAY
        return {each.name: machine[each.per] * hours / each.interruptions for each in self.components}

    def mean_time_between_s(self, gpus: int, gpus_per_node: int, nics_per_node: int) -> float:
        """Seconds between interruptions of a job: the rates of all its parts add up.

        Args:
            nics_per_node: 0 for a job that uses no network between nodes.
        """
        job = _parts(gpus, gpus_per_node, nics_per_node)
        lone = self.mtbf_hours()
        per_hour = sum(job[each.per] / lone[each.name] for each in self.components)
        return SECONDS_PER_HOUR / per_hour if per_hour else math.inf


_SOURCED = ("observed", "restart_s", "storage_bytes_per_s_per_node")


def _parts(gpus: int, gpus_per_node: int, nics_per_node: int) -> dict[str, int]:
    nodes = math.ceil(gpus / gpus_per_node)
    return {"gpu": gpus, "node": nodes, "nic": nodes * nics_per_node}


def failure_names() -> tuple[str, ...]:
    """Names of the failure profiles in the catalogue."""
    return entries("failures")


def load_failures(name_or_path: str | Path) -> Failures:
    """A profile of the catalogue, or of a TOML file with the fields of Failures (the name may be left out).

    Raises:
        ValueError: one line: an unknown name, a file that cannot be read, or a field that is wrong or has no source.
    """
    path = find(name_or_path, "failures", "failure profile")
    return read_into(Failures, {"name": path.stem, **read_toml(path)}, where(path))


def young_interval_s(checkpoint_s: float, mtbf_s: float) -> float:
    """Work between checkpoints that loses least, to first order (Young 1974): sqrt(2 d M)."""
    return math.sqrt(2 * checkpoint_s * mtbf_s)


def daly_interval_s(checkpoint_s: float, mtbf_s: float) -> float:
    """The same to higher order (Daly 2006, equation 37): for d < 2 M
    sqrt(2 d M) (1 + sqrt(d / 2 M) / 3 + (d / 2 M) / 9) - d, else M.
    """
    ratio = checkpoint_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return young_interval_s(checkpoint_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """How a job saves, and what hits it.

    Attributes:
        mtbf_s: seconds between interruptions of the whole job.
        interval_s: of work between checkpoints.
        checkpoint_s: for which training stands still at each checkpoint.
        restart_s: from a failure to the first new step.
    """

    mtbf_s: float
    interval_s: float
    checkpoint_s: float
    restart_s: float

    def __post_init__(self) -> None:
        require_positive(self, ("mtbf_s", "interval_s", "checkpoint_s"))
        require(0 <= self.restart_s < math.inf, "restart_s", self.restart_s, ">= 0 and finite")

    @property
    def share(self) -> float:
        """Share of the time that is lasting progress: work over its expected time (Daly 2006, equation 20).

        An interval of work t with its checkpoint d is expected to take M e^(R / M) (e^((t + d) / M) - 1).
        """
        exponent = (self.interval_s + self.checkpoint_s) / self.mtbf_s
        if self.restart_s / self.mtbf_s + exponent > LARGEST_EXPONENT:
            return 0.0
        expected_s = self.mtbf_s * math.exp(self.restart_s / self.mtbf_s) * math.expm1(exponent)
        return self.interval_s / expected_s


def best_saving(*, mtbf_s: float, checkpoint_s: float, restart_s: float) -> Saving:
    """Saving at Daly's interval.

    Raises:
        ValueError: a time that is not positive and finite.
    """
    for name, seconds in (("mtbf_s", mtbf_s), ("checkpoint_s", checkpoint_s)):
        require(0 < seconds < math.inf, name, seconds, "> 0 and finite")
    interval_s = daly_interval_s(checkpoint_s, mtbf_s)
    return Saving(mtbf_s=mtbf_s, interval_s=interval_s, checkpoint_s=checkpoint_s, restart_s=restart_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """Where the time of a simulated job went; the four parts sum to it.

    Attributes:
        work_s: that a checkpoint kept, or that was under way at the end.
        lost_s: work, and checkpoints under way, that a failure undid.
    """

    interruptions: int
    work_s: float
    checkpoint_s: float
    restart_s: float
    lost_s: float

    @property
    def share(self) -> float:
        return self.work_s / (self.work_s + self.checkpoint_s + self.restart_s + self.lost_s)


def play(saving: Saving, *, seconds: float = MONTH_S, seed: int = 0) -> Played:
    """Train for so long, failure by failure, at random times that the seed decides."""
    chance = random.Random(seed)
    segment_s = saving.interval_s + saving.checkpoint_s
    clock_s = restarting_s = work_s = checkpoint_s = restart_s = lost_s = 0.0
    interruptions = 0
    while clock_s < seconds:
        until_failure_s = chance.expovariate(1 / saving.mtbf_s)
        fails = until_failure_s < seconds - clock_s
        up_s = until_failure_s if fails else seconds - clock_s
        starting_s = min(up_s, restarting_s)
        kept = int((up_s - starting_s) // segment_s)
        rest_s = up_s - starting_s - kept * segment_s
        work_s += kept * saving.interval_s
        checkpoint_s += kept * saving.checkpoint_s
        restart_s += starting_s
        if fails:
            interruptions += 1
            lost_s += rest_s
        else:
            work_s += min(rest_s, saving.interval_s)
            checkpoint_s += max(0.0, rest_s - saving.interval_s)
        clock_s = clock_s + up_s if fails else seconds
        restarting_s = saving.restart_s
    return Played(
        interruptions=interruptions, work_s=work_s, checkpoint_s=checkpoint_s, restart_s=restart_s, lost_s=lost_s
    )
