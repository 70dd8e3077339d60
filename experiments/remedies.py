"""What makes a job fit that does not: options changed, each simulated, the fastest first."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..sim.hardware import Cluster, load_cluster
from ..sim.result import StepResult
from .layout import Layout, Options
from .models import ModelSpec
from .own_models import OwnModel
from .simulate import find_model, simulate

MOST_RUNS = 20
"""Simulations that a search may take."""

FLAGS = ("sequence_parallel", "expandable_segments")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A job that fits.

    Attributes:
        change: of the command line, e.g. "--recompute full --zero 2".
        options: the same as options by name.
        step_time_s: of a step.
        relative_step_time: to the job that does not fit, if memory were no limit.
        reserved_bytes: that the allocator holds at most.
    """

    change: str
    options: Mapping[str, Any]
    step_time_s: float
    relative_step_time: float
    reserved_bytes: int


def remedies(
    model: str | ModelSpec | OwnModel,
    cluster: str | Cluster,
    result: StepResult,
    *,
    most_runs: int = MOST_RUNS,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Remedy, ...]:
    """Changes of the job of `result` under which it fits, the fastest first; none if it fits or nothing was found.

    Each option is changed by itself. If no single change is enough, the one that saves most stays, and the others are
    tried beside it, and so on. The GPUs and the global batch stay as they are.

    Args:
        most_runs: how many simulations that may take.
        say: is told of each.
    """
    if result.fits:
        return ()
    spec = find_model(model)
    machine = cluster if isinstance(cluster, Cluster) else load_cluster(cluster)
    layout, chosen = Layout(**result.layout), dict[str, Any]()
    least = result.peak_memory_bytes["reserved"]
    runs = 0
    while True:
        round_: list[tuple[dict[str, Any], StepResult]] = []
        for change in changes(layout, machine):
            if runs == most_runs:
                break
            options = {**chosen, **change}
            say(f"does it fit with {flags(options)}?")
            tried = _simulated(spec, machine, layout, change)
            if tried is not None:
                round_.append((options, tried))
                runs += 1
        if found := [(options, tried) for options, tried in round_ if tried.fits]:
            made = (_remedy(options, tried, result) for options, tried in found)
            return tuple(sorted(made, key=lambda one: one.step_time_s))
        if not round_ or runs == most_runs:
            return ()
        chosen, best = min(round_, key=lambda pair: pair[1].peak_memory_bytes["reserved"])
        if best.peak_memory_bytes["reserved"] >= least:
            return ()
        least, layout = best.peak_memory_bytes["reserved"], Layout(**best.layout)


def changes(layout: Layout, machine: Cluster) -> Iterator[dict[str, Any]]:
    """One option, or two that go together, of each kind that saves memory."""
    if machine.processor.kind == "gpu" and not layout.expandable_segments:
        yield {"expandable_segments": True}
    levels = ("none", "selective", "full")
    if layout.recompute in levels:
        yield from ({"recompute": level} for level in levels[levels.index(layout.recompute) + 1 :])
    if layout.dp > 1:
        yield from ({"zero": stage} for stage in range(layout.zero + 1, 3 if layout.pp > 1 else 4))
    for micro_batch in sorted({layout.micro_batch // 2, 1} - {0, layout.micro_batch}, reverse=True):
        yield {"micro_batch": micro_batch}
    if layout.tp > 1 and not layout.sequence_parallel:
        yield {"sequence_parallel": True}
    if layout.dp % 2 == 0:
        if 2 * layout.tp <= machine.gpus_per_node:
            yield {"tp": 2 * layout.tp, "dp": layout.dp // 2}
        yield {"pp": 2 * layout.pp, "dp": layout.dp // 2}
    if machine.host is not None and layout.offload == "none":
        yield {"offload": "optimizer"}


def flags(options: Mapping[str, Any]) -> str:
    """Options as the command line has them."""
    words = (f"--{name.replace('_', '-')}" + ("" if name in FLAGS else f" {value}") for name, value in options.items())
    return " ".join(words)


def _simulated(
    spec: ModelSpec | OwnModel, machine: Cluster, layout: Layout, change: Mapping[str, Any]
) -> StepResult | None:
    """With a change; None if the job cannot be laid out so."""
    given = {field.name for field in fields(Options)}
    options = {name: value for name, value in asdict(layout).items() if name in given}
    try:
        return simulate(spec, machine, **{**options, **change})
    except ValueError:
        return None


def _remedy(options: Mapping[str, Any], tried: StepResult, result: StepResult) -> Remedy:
    return Remedy(
        change=flags(options),
        options=options,
        step_time_s=tried.step_time_s,
        relative_step_time=tried.step_time_s / result.step_time_s,
        reserved_bytes=tried.peak_memory_bytes["reserved"],
    )
