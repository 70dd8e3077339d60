"""`verify`: does ZeRO training of *your* model compute what one process would, and send and keep what it should?"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..collectives.zero import Zero
from ..engine.config import Config
from ..engine.world import World
from .judgement import Allowed, Inquiry, StageResult, judge, unwitnessed
from .ranks import Task
from .reference import reference
from .samples import check_sample

TOLERANCES = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Largest distance of the parameters from one process's, ||a - b|| / ||b||. float64: per tensor; summation order costs
about 1e-15 a step. Else over all parameters, because Adam turns a gradient that is truly zero into a step of either
sign; rounding makes about 1e-6 (fp32) and 4e-3 (bf16) in 20 steps, a missing collective more than 1e-2."""

GRADIENT_TOLERANCES = {"fp64": 1e-8, "fp32": 1e-3, "bf16": 2e-1, "fp16": 1e-1}
"""The same for reduced gradients and for what the optimizer keeps of them: they follow from parameters that are off
already, and squares double it. A missing reduction, or a wrong scale, makes them wrong by about their own size."""

LOSS_TOLERANCES = {"fp64": 1e-10, "fp32": 1e-5, "bf16": 2e-2, "fp16": 1e-2}
"""Largest relative difference of a step's mean loss: rounding of a sum over the batch, in the precision's unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All stages; `notes` says what could not be checked and why."""

    world: int
    results: tuple[StageResult, ...]
    notes: tuple[str, ...] = ()
    precision: str = "fp32"
    accumulation: int = 1

    @property
    def ok(self) -> bool:
        return all(result.ok for result in self.results)


def verify(
    target: str, *, ranks: World | None = None, say: Callable[[str], None] = lambda line: None, **options: Any
) -> Verification:
    """Train a user's model at each ZeRO stage on Gloo ranks and compare with a plain torch loop.

    Compared are the loss of every step, and the reduced gradients, the optimizer's state and the parameters of the last
    one, or of every one. Where something is off, the run is made again to find the first place.

    Args:
        target: "MODULE:FUNCTION" or "FILE.py:FUNCTION"; the function returns (model, batches): global batches that are
            split on dimension 0. It is called once per rank and run and must return the same every time (seed it). A
            third item, `micro_step(model, backward, batch)`, replaces forward and backward of a batch's loss.
        ranks: a running world to use; else one is started and ended.
        say: called with a line about what is under way.
        options: those of `prepare`.

    Raises:
        ValueError: a wrong option, function, config or batch.
        WorldError: a rank died, stalled or failed.
    """
    inquiry = prepare(target, **options)
    if ranks is not None:
        return _answer(inquiry, ranks, say)
    with World(inquiry.world) as started:
        return _answer(inquiry, started, say)


def verify_all(
    target: str,
    *,
    worlds: Sequence[int] = (2,),
    precisions: Sequence[str | None] = (None,),
    accumulations: Sequence[int | None] = (None,),
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> list[Verification]:
    """`verify` for every combination of world, precision and accumulation; each is checked before the first starts."""
    cases = {
        world: [
            prepare(target, world=world, precision=precision, accumulation=accumulation, **options)
            for precision, accumulation in product(precisions, accumulations)
        ]
        for world in worlds
    }
    results = []
    for world, inquiries in cases.items():
        with World(world) as ranks:
            results += [_answer(inquiry, ranks, say) for inquiry in inquiries]
    return results


def prepare(
    target: str,
    *,
    world: int = 2,
    zero: Sequence[int] = (0, 1, 2, 3),
    steps: int | None = None,
    precision: str | None = None,
    accumulation: int | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    tolerance: float | None = None,
    gradient_tolerance: float | None = None,
    loss_tolerance: float | None = None,
    every_step: bool = False,
    timeout_s: float = 60.0,
) -> Inquiry:
    """What is to be verified, checked as far as that goes without ranks.

    Args:
        world: Gloo ranks.
        zero: stages.
        steps: how many of the batches to use; all by default.
        precision: "fp32", "fp64", "bf16" or "fp16" (16-bit parameters, fp32 masters); else the config's, else "fp32".
        accumulation: micro-steps per step; else the config's, else 1.
        config: DeepSpeed JSON whose keys every run takes, its optimizer and clipping in one process too.
        tolerance: largest distance of the parameters, else TOLERANCES.
        gradient_tolerance: of gradients and optimizer state, else GRADIENT_TOLERANCES.
        loss_tolerance: of a step's loss, else LOSS_TOLERANCES.
        every_step: compare the tensors of all steps, not of the last one only.
        timeout_s: how long a rank waits for the others in one collective.

    Raises:
        ValueError: naming what is wrong.
    """
    settings = _settings(config)
    precision = precision or next((name for name in ("bf16", "fp16") if _enabled(settings, name)), "fp32")
    accumulation = settings.get("gradient_accumulation_steps", 1) if accumulation is None else accumulation
    _check(world, zero, steps, precision, accumulation, (tolerance, gradient_tolerance, loss_tolerance))
    if not timeout_s > 0:
        raise ValueError(f"timeout = {timeout_s}; allowed: seconds > 0")
    facts = check_sample(target, steps, world * accumulation)
    task = Task(target, steps, precision, accumulation, timeout_s, "", settings)
    read = [Config.read(task.config(stage), world) for stage in zero]
    cast = read[0].formats.autocast  # whose rounding it is, whatever the parameters are kept in
    rounding = precision if cast == "off" else cast
    return Inquiry(
        task=task,
        world=world,
        stages=tuple(zero),
        batches=facts.batches,
        watch=tuple(range(facts.batches)) if every_step else (facts.batches - 1,),
        allowed=Allowed(
            TOLERANCES[rounding] if tolerance is None else tolerance,
            GRADIENT_TOLERANCES[rounding] if gradient_tolerance is None else gradient_tolerance,
            LOSS_TOLERANCES[rounding] if loss_tolerance is None else loss_tolerance,
        ),
        unwitnessed=unwitnessed(settings, facts.own_micro_step),
    )


def _answer(inquiry: Inquiry, ranks: World, say: Callable[[str], None]) -> Verification:
    task, results = inquiry.task, []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="windtunnel-") as folder:
        inquiry = replace(inquiry, task=replace(task, folder=folder))
        say(f"{task.target}: {inquiry.batches} steps in one process, {task.precision}")
        known = ranks.run(reference, inquiry.task, inquiry.watch)[0]
        for stage in inquiry.stages:
            say(f"{task.target}: ZeRO {stage} on {ranks.size} ranks, accumulation {task.accumulation}")
            results.append(judge(inquiry, stage, known, ranks, notes))
    return Verification(
        world=ranks.size,
        results=tuple(results),
        notes=tuple(notes),
        precision=task.precision,
        accumulation=task.accumulation,
    )


def _settings(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return dict(config or {})
    try:
        found = json.loads(Path(config).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"config = {str(config)!r}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"config = {str(config)!r} is a {type(found).__name__}; allowed: a JSON object")
    return found


def _enabled(settings: Mapping[str, Any], section: str) -> bool:
    value = settings.get(section, {})
    return isinstance(value, Mapping) and bool(value.get("enabled", False))


def _check(
    world: int,
    zero: Sequence[int],
    steps: int | None,
    precision: str,
    accumulation: int,
    tolerances: tuple[float | None, float | None, float | None],
) -> None:
    for name, value in (("world", world), ("accumulation", accumulation), ("steps", steps)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} = {value}; allowed: an integer >= 1")
    if not zero:
        raise ValueError("zero is empty; allowed: some of 0, 1, 2, 3")
    for stage in zero:
        Zero.of_stage(stage)
    if precision not in TOLERANCES:
        raise ValueError(f"precision = {precision}; allowed: {', '.join(TOLERANCES)}")
    for name, tolerance in zip(("tolerance", "gradient_tolerance", "loss_tolerance"), tolerances, strict=True):
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"{name} = {tolerance}; allowed: >= 0")


def to_dict(verification: Verification) -> dict[str, Any]:
    """The contract's JSON object; notes, losses and times are for Python callers."""
    results = [asdict(result) for result in verification.results]
    for result in results:
        del result["losses"], result["step_s"]
    return {
        "world": verification.world,
        "precision": verification.precision,
        "accumulation": verification.accumulation,
        "results": results,
    }
