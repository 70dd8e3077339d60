"""Predictions beside Gloo ranks of this machine: step time, peak memory, and bytes by their witnesses.

What is trained is the demo's model on its text, ZeRO 0 to 3 on two and on four ranks; the machine's profile is measured
from primitives alone (experiments/calibrate.py), never from a training step.
"""

from collections.abc import Callable

from ..engine.world import World
from .calibrate import calibrate
from .demo import BATCH, MODEL, predict_step_s
from .demo import __name__ as demo_module
from .models import load_model
from .published_figures import BYTES, MEMORY, TIME
from .validate import Case
from .validate_sources import LIVE
from .verify import verify
from .witness import compare_peak

RANKS = (2, 4)
STAGES = (0, 1, 2, 3)


def live_cases(say: Callable[[str], None]) -> list[Case]:
    """Of each number of ranks and stage: seconds of a step, bytes sent and kept, and the peak of memory."""
    cases: list[Case] = []
    for ranks in RANKS:
        say(f"measuring this machine's primitives for {ranks} ranks (kept for the next time)")
        machine = calibrate(ranks=ranks, progress=say)
        with World(ranks) as world:
            say(f"training {MODEL} on {ranks} ranks at ZeRO 0 to 3, beside one process")
            for result in verify(f"{demo_module}:sample", world=ranks, ranks=world, say=say).results:
                name = f"ZeRO {result.zero} on {ranks} ranks"
                cases.append(_case(name, TIME, result.step_s, predict_step_s(result.zero, machine, ranks), "s"))
                cases += _witnessed(
                    f"{name}, sent", result.measured_bytes, result.expected_bytes, result.predicted_bytes
                )
                cases += _witnessed(
                    f"{name}, model state",
                    result.measured_model_state_bytes,
                    result.expected_model_state_bytes,
                    result.predicted_model_state_bytes,
                )
            cases += _peaks(ranks, world, say)
    return cases


def _peaks(ranks: int, world: World, say: Callable[[str], None]) -> list[Case]:
    """The most memory of a step; the witness are the allocator's events."""
    cases = []
    for zero in STAGES:
        for policy in ("none", "full"):
            say(f"peak memory of ZeRO {zero} on {ranks} ranks, recompute {policy}")
            config = {"zero_optimization": {"stage": zero}, "activation_checkpointing": {"policy": policy}}
            peak = compare_peak(load_model(MODEL), config, batch=BATCH // ranks, world=world)
            name = f"ZeRO {zero} on {ranks} ranks, recompute {policy}, peak"
            cases.append(_case(name, MEMORY, peak.measured_bytes, peak.predicted.total_bytes, "B"))
    return cases


def _witnessed(name: str, measured: int, expected: int, predicted: int | None) -> list[Case]:
    """Bytes as the transport or a walk over storages counted them, beside the closed form and the simulation."""
    found = [_case(f"{name}, closed form", BYTES, measured, expected, "B")]
    return found if predicted is None else [*found, _case(f"{name}, simulated", BYTES, measured, predicted, "B")]


def _case(name: str, kind: str, measured: float, predicted: float, unit: str) -> Case:
    return Case(name=name, source=LIVE, kind=kind, published=measured, predicted=predicted, unit=unit)
