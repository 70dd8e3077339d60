"""`verify`: does ZeRO training of *your* model compute what one process would, and send and keep what it should?"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..collectives.zero import Zero, model_state_bytes, sent_bytes_per_step
from ..engine.pilot import Plan, fly
from ..engine.world import World
from ..sim.hardware import Cluster, load_cluster
from ..sim.memory import replay_memory
from ..sim.replay import sent_bytes_by_axis
from .ranks import RankReport, Task, measure, reference
from .samples import check_sample

TOLERANCES = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 2e-2}
"""Largest distance of the parameters from one process's, ||a - b|| / ||b||. float64: per tensor; summation order costs
about 1e-15 a step. fp32 and bf16: over all parameters, because Adam turns a gradient that is truly zero into a step of
either sign; rounding makes about 1e-6 and 4e-3 in 20 steps, a missing collective more than 1e-2."""

LOSS_TOLERANCES = {"fp64": 1e-10, "fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference of a step's mean loss: rounding of a sum over the batch, in the precision's unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One ZeRO stage against one process. Bytes are per rank and step; None where a prediction could not be made."""

    zero: int
    max_rel_loss_diff: float
    max_tensor_rel_diff: float
    global_rel_param_diff: float
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All stages; `notes` says what could not be checked and why."""

    world: int
    results: tuple[StageResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(result.ok for result in self.results)


def verify(
    target: str,
    *,
    world: int = 2,
    zero: Sequence[int] = (0, 1, 2, 3),
    steps: int | None = None,
    precision: str = "fp32",
    accumulation: int = 1,
    tolerance: float | None = None,
    timeout_s: float = 60.0,
    ranks: World | None = None,
) -> Verification:
    """Train a user's model at each ZeRO stage on `world` Gloo ranks and compare with a plain torch loop.

    Args:
        target: "MODULE:FUNCTION"; the function returns (model, batches): global batches that are split on dimension 0.
            It is called once per rank and run and must return the same every time (seed it).
        steps: how many of the batches to use; all by default.
        precision: "fp32", "fp64" or "bf16" (bf16 parameters, fp32 masters).
        tolerance: largest distance of the parameters, else TOLERANCES.
        timeout_s: how long a rank waits for the others in one collective.
        ranks: a running world to use; else one is started and ended.

    Raises:
        ValueError: a wrong option, function or batch.
        WorldError: a rank died, stalled or failed.
    """
    _check(world, zero, steps, precision, accumulation, tolerance)
    if not timeout_s > 0:
        raise ValueError(f"timeout = {timeout_s}; allowed: seconds > 0")
    check_sample(target, steps, world * accumulation)
    with tempfile.TemporaryDirectory(prefix="windtunnel-") as folder:
        task = Task(target, steps, precision, accumulation, timeout_s, str(Path(folder) / "reference.pt"))
        group = ranks or World(world)
        try:
            group.run(reference, task)
            reports = {stage: group.run(measure, task, stage) for stage in zero}
            allowed = TOLERANCES[precision] if tolerance is None else tolerance
            notes: list[str] = []
            results = tuple(_judge(task, stage, reports[stage], allowed, group, notes) for stage in zero)
        finally:
            if ranks is None:
                group.close()
    return Verification(world=world, results=results, notes=tuple(notes))


def _check(
    world: int, zero: Sequence[int], steps: int | None, precision: str, accumulation: int, tolerance: float | None
) -> None:
    for name, value in (("world", world), ("accumulation", accumulation), ("steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}; allowed: an integer >= 1")
    if not zero:
        raise ValueError("zero is empty; allowed: some of 0, 1, 2, 3")
    for stage in zero:
        Zero.of_stage(stage)
    if precision not in TOLERANCES:
        raise ValueError(f"precision = {precision}; allowed: {', '.join(TOLERANCES)}")
    if tolerance is not None and tolerance < 0:
        raise ValueError(f"tolerance = {tolerance}; allowed: >= 0")


def _judge(
    task: Task, stage: int, reports: list[RankReport], tolerance: float, group: World, notes: list[str]
) -> StageResult:
    """The worst of all ranks, the three witnesses of bytes and memory, and where the first difference is."""
    first = reports[0]
    loss = max(report.max_rel_loss_diff for report in reports)
    tensor = max(report.max_tensor_rel_diff for report in reports)
    overall = max(report.global_rel_param_diff for report in reports)
    zero = Zero.of_stage(stage)
    expected = sent_bytes_per_step(first.units, zero, group.size, task.accumulation)
    state = model_state_bytes(first.units, zero, group.size, moments=2, master_bytes=first.master_bytes)
    predicted, predicted_state = _predict(task, stage, group.size, notes)
    measured = max(report.measured_bytes for report in reports)
    kept = max(report.model_state_bytes for report in reports)
    near = (tensor if task.precision == "fp64" else overall) <= tolerance and loss <= LOSS_TOLERANCES[task.precision]
    exact = all(report.measured_bytes == expected for report in reports) and predicted in (expected, None)
    total = sum(state.values())
    if any(report.unused for report in reports):
        notes.append(
            f"zero {stage}: some parameters were never used and have no optimizer state; memory is at most expected"
        )
        exact = exact and kept <= total
    else:
        exact = exact and kept == total and predicted_state in (total, None)
    return StageResult(
        zero=stage,
        max_rel_loss_diff=loss,
        max_tensor_rel_diff=tensor,
        global_rel_param_diff=overall,
        expected_bytes=expected,
        predicted_bytes=predicted,
        measured_bytes=measured,
        expected_model_state_bytes=total,
        predicted_model_state_bytes=predicted_state,
        measured_model_state_bytes=kept,
        first_difference=None if near else _first_difference(task, stage, tolerance, group),
        ok=near and exact,
        step_s=first.step_s,
        losses=first.losses,
    )


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
    from dataclasses import replace

    cluster = load_cluster("dgx-a100")
    return replace(cluster, processor=replace(cluster.processor, allocation_bytes=1))


def _first_difference(task: Task, stage: int, tolerance: float, group: World) -> dict[str, Any]:
    """Run again, comparing after every step: the first step, rank and parameter that are off."""
    group.run(reference, task, True)
    reports = group.run(measure, task, stage, tolerance)
    found = [report.first_difference for report in reports if report.first_difference is not None]
    return min(found, key=lambda place: (place["step"], place["rank"])) if found else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def to_dict(verification: Verification) -> dict[str, Any]:
    """The contract's JSON object; notes, losses and times are for Python callers."""
    results = [asdict(result) for result in verification.results]
    for result in results:
        del result["losses"], result["step_s"]
    return {"world": verification.world, "results": results}
