"""What failures cost a job: interruptions, how often to save, what is left of its speed."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..sim.failures import SECONDS_PER_HOUR, Saving, best_saving, load_failures, play
from ..sim.hardware import Cluster
from ..sim.processor import require, require_positive
from ..sim.result import StepResult
from .prices import price_of
from .simulate import SECONDS_PER_DAY

DEFAULT = "llama3"

BYTES_PER_PARAMETER = {"fp32": 12}
MIXED_BYTES_PER_PARAMETER = 14
"""Of a checkpoint: Adam's two fp32 moments and the fp32 parameters; in mixed precision the 16-bit parameters too."""

MILLION = 1e6
SIZES_UP_TO = 131_072


def checkpoint_bytes(parameters: int, precision: str) -> int:
    """Bytes that a checkpoint of a model trained with Adam has, all ranks together."""
    return parameters * BYTES_PER_PARAMETER.get(precision, MIXED_BYTES_PER_PARAMETER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What a user says of failures; what is None comes from the profile.

    Attributes:
        failures: a catalogue name or TOML file of failure rates.
        mtbf_hours: between interruptions of the whole job, instead of adding up the rates of its parts.
        restart_s: from a failure to the first new step.
        checkpoint_s: for which training stands still, instead of bytes over the storage's bandwidth.
    """

    failures: str = DEFAULT
    mtbf_hours: float | None = None
    restart_s: float | None = None
    checkpoint_s: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, ("mtbf_hours", "checkpoint_s"))
        if self.restart_s is not None:
            require(0 <= self.restart_s < math.inf, "restart_s", self.restart_s, ">= 0 and finite")


def saving_of(gpus: int, saved_bytes: int, cluster: Cluster, faults: Faults) -> Saving:
    """A job of so many GPUs that saves at Daly's interval.

    Raises:
        ValueError: a profile that is not there, or a time that is not positive and finite.
    """
    profile = load_failures(faults.failures)
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    mtbf_s = profile.mean_time_between_s(gpus, cluster.gpus_per_node, _nics(cluster, nodes))
    if faults.mtbf_hours is not None:
        mtbf_s = faults.mtbf_hours * SECONDS_PER_HOUR
    checkpoint_s = saved_bytes / (profile.storage_bytes_per_s_per_node * nodes)
    return best_saving(
        mtbf_s=mtbf_s,
        checkpoint_s=checkpoint_s if faults.checkpoint_s is None else faults.checkpoint_s,
        restart_s=profile.restart_s if faults.restart_s is None else faults.restart_s,
    )


def goodput(
    result: StepResult, parameters: int, cluster: Cluster, faults: Faults, *, tokens: float | None = None
) -> dict[str, Any]:
    """The job of `result` with failures: expected in closed form, and one month played.

    Args:
        parameters: of the model; what a checkpoint holds.
        tokens: adds days and price.

    Raises:
        ValueError: as `saving_of`.
    """
    saved = checkpoint_bytes(parameters, str(result.layout["precision"]))
    saving = saving_of(int(result.layout["gpus"]), saved, cluster, faults)
    played = play(saving)
    return {
        "failures": faults.failures if faults.mtbf_hours is None else None,
        "checkpoint_bytes": saved,
        "mtbf_hours": saving.mtbf_s / SECONDS_PER_HOUR,
        "interval_s": saving.interval_s,
        "checkpoint_s": saving.checkpoint_s,
        "restart_s": saving.restart_s,
        "share": saving.share,
        "tokens_per_s": saving.share * result.tokens_per_s,
        "month": {**asdict(played), "share": played.share},
        **(_training(result, cluster, saving, tokens) if tokens is not None else {}),
    }


def savings_by_size(result: StepResult, parameters: int, cluster: Cluster, faults: Faults) -> dict[int, Saving]:
    """The job of `result` and the same model on 4, 16, ... times as many GPUs, up to SIZES_UP_TO.

    A given mtbf_hours is of the job of `result`: it falls as the job grows.
    """
    saved = checkpoint_bytes(parameters, str(result.layout["precision"]))
    first = int(result.layout["gpus"])
    savings = {}
    gpus = first
    while gpus <= max(first, SIZES_UP_TO):
        mtbf_hours = None if faults.mtbf_hours is None else faults.mtbf_hours * first / gpus
        savings[gpus] = saving_of(gpus, saved, cluster, replace(faults, mtbf_hours=mtbf_hours))
        gpus *= 4
    return savings


def _nics(cluster: Cluster, nodes: int) -> int:
    """NICs of each node that the job uses; none where it has one node."""
    if nodes == 1 or cluster.inter_node is None:
        return 0
    return cluster.inter_node.nics or 1


def _training(result: StepResult, cluster: Cluster, saving: Saving, tokens: float) -> dict[str, Any]:
    price = price_of(result, cluster)
    if not saving.share:
        return {"days": None, "price_usd": None}
    return {
        "days": tokens / (saving.share * result.tokens_per_s) / SECONDS_PER_DAY,
        "price_usd": price["per_million_tokens_usd"] * tokens / MILLION / saving.share if price else None,
    }


def lines(answer: Mapping[str, Any]) -> list[str]:
    """The `goodput` of an answer in words."""
    found = answer["goodput"]
    month = found["month"]
    hours = {part: month[part] / SECONDS_PER_HOUR for part in ("lost_s", "restart_s", "checkpoint_s")}
    return [
        f"{answer['layout']['gpus']:,} GPUs of {answer['layout']['cluster']} with failures"
        f" ({found['failures'] or 'as given'}): interrupted every {found['mtbf_hours']:,.1f} h;"
        f" a checkpoint of {found['checkpoint_bytes'] / 1e9:,.1f} GB takes {found['checkpoint_s']:,.1f} s,"
        f" best every {found['interval_s'] / 60:,.1f} min",
        f"goodput {found['share']:.1%}, {found['tokens_per_s']:,.0f} tokens/s; a month played:"
        f" {month['share']:.1%}, {month['interruptions']} interruptions,"
        f" {hours['lost_s']:,.1f} h lost, {hours['restart_s']:,.1f} h of restarts,"
        f" {hours['checkpoint_s']:,.1f} h of checkpoints",
    ]
