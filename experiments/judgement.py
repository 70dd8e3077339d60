"""One ZeRO stage judged: distances from one process, the witnesses of bytes and memory, the first place that is off."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..collectives.zero import Zero, model_state_bytes, sent_bytes_per_step
from ..engine.pilot import Plan, fly
from ..engine.world import World
from ..sim.hardware import Cluster, load_cluster
from ..sim.memory import replay_memory
from ..sim.replay import sent_bytes_by_axis
from .comparison import GRADIENT, LOSS, PARAMETER, STATE, Gap, first_difference, gaps, overall, worst
from .ranks import RankReport, Task, measure
from .reference import Known, reference

WITNESSED = {
    "optimizer", "scheduler", "gradient_clipping", "bf16", "fp16", "zero_optimization", "communication", "seed",
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
}  # fmt: skip
"""Keys of a config under which the closed forms of bytes and memory hold; of `zero_optimization` the stage alone."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """Tolerances by what is compared."""

    parameter: float
    gradient: float
    loss: float

    def __call__(self, what: str) -> float:
        if what in (PARAMETER, STATE + "master"):
            return self.parameter
        return self.loss if what == LOSS else self.gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One ZeRO stage against one process. Bytes are per rank and step; None where a prediction could not be made.

    Of gradients and state the distance that is judged: in float64 the worst tensor's, else over all.
    """

    zero: int
    max_rel_loss_diff: float
    max_tensor_rel_diff: float
    global_rel_param_diff: float
    rel_gradient_diff: float
    rel_state_diff: float
    expected_bytes: int
    predicted_bytes: int | None
    measured_bytes: int
    expected_model_state_bytes: int
    predicted_model_state_bytes: int | None
    measured_model_state_bytes: int
    first_difference: dict[str, Any] | None
    ok: bool
    step_s: float
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What is asked about each stage.

    Attributes:
        world: ranks.
        stages: of ZeRO.
        batches: how many steps there are.
        watch: the steps whose tensors are compared.
        unwitnessed: what the closed forms and the flight do not know: bytes and memory are not judged then.
    """

    task: Task
    world: int
    stages: tuple[int, ...]
    batches: int
    watch: tuple[int, ...]
    allowed: Allowed
    unwitnessed: tuple[str, ...]


Step = tuple[int, list[Gap], float]
"""(number, gaps, relative difference of the loss)."""


def _steps(reports: Sequence[RankReport], known: Known) -> list[Step]:
    """The steps that were watched, in order."""
    return [
        (
            number,
            gaps([report.compared[number] for report in reports], sizes),
            max(_relative(report.losses[number], known.losses[number]) for report in reports),
        )
        for number, sizes in sorted(known.sizes.items())
    ]


def _relative(value: float, wanted: float) -> float:
    difference = abs(value - wanted) / max(abs(wanted), 1e-30)
    return float("inf") if difference != difference else difference


def judge(inquiry: Inquiry, stage: int, known: Known, group: World, notes: list[str]) -> StageResult:
    """The worst of all ranks at a stage, the three witnesses of bytes and memory, and where the first difference is.

    Args:
        known: what one process found at the steps that are watched.
        notes: gets a line for what cannot be checked.
    """
    task, allowed = inquiry.task, inquiry.allowed
    reports: list[RankReport] = group.run(measure, task, stage, inquiry.watch)
    off = _distances(_steps(reports, known), worst if task.precision == "fp64" else overall)
    parameters, tensor, loss = distances(reports, known)
    near = loss <= allowed.loss and all(ratio <= allowed(what) for what, ratio in off.items())
    witnesses, exact = _witnesses(inquiry, stage, reports, known, group.size, notes)
    return StageResult(
        zero=stage,
        max_rel_loss_diff=loss,
        max_tensor_rel_diff=tensor,
        global_rel_param_diff=parameters,
        rel_gradient_diff=off.get(GRADIENT, 0.0),
        rel_state_diff=max((ratio for what, ratio in off.items() if what.startswith(STATE)), default=0.0),
        **witnesses,
        first_difference=None if near else first_difference(_every_step(inquiry, stage, group), allowed),
        ok=near and exact,
        step_s=reports[0].step_s,
        losses=reports[0].losses,
    )


def distances(reports: Sequence[RankReport], known: Known) -> tuple[float, float, float]:
    """(parameters' distance over all, the worst tensor's, the worst loss's) at the end."""
    parameters = [gap for gap in _steps(reports, known)[-1][1] if gap.what == PARAMETER]
    loss = max(_relative(a, b) for report in reports for a, b in zip(report.losses, known.losses, strict=True))
    return overall(parameters), worst(parameters), loss


def _distances(steps: Sequence[Step], distance: Callable[[list[Gap]], float]) -> dict[str, float]:
    """The largest distance of each kind of tensor at any of the steps."""
    kinds = dict.fromkeys(gap.what for _, found, _ in steps for gap in found)
    return {what: max(distance([gap for gap in found if gap.what == what]) for _, found, _ in steps) for what in kinds}


def _every_step(inquiry: Inquiry, stage: int, group: World) -> list[Step]:
    """The same run once more, with all steps watched."""
    watch = tuple(range(inquiry.batches))
    known = group.run(reference, inquiry.task, watch)[0]
    return _steps(group.run(measure, inquiry.task, stage, watch), known)


def _witnesses(
    inquiry: Inquiry, stage: int, reports: Sequence[RankReport], known: Known, world: int, notes: list[str]
) -> tuple[dict[str, Any], bool]:
    """Bytes sent and kept by formula, flight and measurement; and whether they agree."""
    task, first, zero = inquiry.task, reports[0], Zero.of_stage(stage)
    expected = sent_bytes_per_step(first.units, zero, world, task.accumulation)
    state = model_state_bytes(first.units, zero, world, moments=known.moments, master_bytes=first.master_bytes)
    predicted, predicted_state = (None, None) if inquiry.unwitnessed else _predict(task, stage, world, notes)
    kept, total = max(report.model_state_bytes for report in reports), sum(state.values())
    exact = all(report.measured_bytes == expected for report in reports) and predicted in (expected, None)
    if any(report.unused for report in reports):
        notes.append(
            f"zero {stage}: some parameters were never used and have no optimizer state; memory is at most expected"
        )
        exact = exact and kept <= total
    else:
        exact = exact and kept == total and predicted_state in (total, None)
    if inquiry.unwitnessed:
        notes.append(f"zero {stage}: bytes and memory are not judged, because of {', '.join(inquiry.unwitnessed)}")
    return {
        "expected_bytes": expected,
        "predicted_bytes": predicted,
        "measured_bytes": max(report.measured_bytes for report in reports),
        "expected_model_state_bytes": total,
        "predicted_model_state_bytes": predicted_state,
        "measured_model_state_bytes": kept,
    }, exact or bool(inquiry.unwitnessed)


def unwitnessed(settings: Mapping[str, Any], own_micro_step: bool) -> tuple[str, ...]:
    """What of a config and a target changes bytes or memory in ways that the closed forms do not know."""
    others = [key for key in settings if key not in WITNESSED]
    others += [f"zero_optimization.{key}" for key in settings.get("zero_optimization", {}) if key != "stage"]
    return (*others, *(["a micro_step of the target's own"] if own_micro_step else []))


def _predict(task: Task, stage: int, world: int, notes: list[str]) -> tuple[int | None, int | None]:
    """(bytes sent per step, model-state bytes) from a flight of the same model on the simulated device."""
    plan = Plan(
        factory="windtunnel.experiments.ranks:for_flight",
        arguments={"task": task, "world": world},
        config=task.config(stage),
        world=world,
        micro_steps=task.accumulation,
    )
    if task.accumulation > 3:
        notes.append(f"zero {stage}: predicted for 3 micro-steps at most, so accumulation {task.accumulation} has none")
        return None, None
    try:
        trace = fly(plan)
    except Exception as error:
        notes.append(f"zero {stage}: the model does not fly on the simulated device ({_first_line(error)})")
        return None, None
    memory = replay_memory(trace, exact_cluster().processor)
    return sum(sent_bytes_by_axis(trace, scalars=False).values()), sum(memory.state.values())


def exact_cluster() -> Cluster:
    """Any cluster will do where only bytes are asked for; a CPU's allocator does not round them."""
    cluster = load_cluster("dgx-a100")
    return replace(cluster, processor=replace(cluster.processor, allocation_bytes=1))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
