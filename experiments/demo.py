"""`demo`: the whole idea in about a minute.

A small byte-level GPT trains on real text on two Gloo ranks at ZeRO 0 to 3; each stage is checked against one process;
the same runs are flown on a simulated copy of this machine; then the same program flies on 1 to 1,024 GPUs.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.pilot import Plan, fly
from ..sim.hardware import Cluster
from ..sim.replay import replay
from .models import load_model
from .simulate import scaling
from .verify import Verification, verify
from .verify import to_dict as verification_to_dict

RANKS = 2
MODEL = "gpt-demo"
BATCH = 8
STEPS = 24
CORPUS_BYTES = 1 << 20

FLOWN_MODEL = "gpt3-2.7b"
FLOWN_CLUSTER = "dgx-a100"
FLOWN_GPUS = tuple(2**power for power in range(11))
FLOWN_OPTIONS: dict[str, Any] = {"zero": 3, "micro_batch": 4, "recompute": "full"}


def sample() -> tuple[Any, list[Any]]:
    """The demo's model and batches, as `verify` wants them."""
    from .corpus import batches, corpus_bytes
    from .transformer import Transformer, initialize_weights

    spec = load_model(MODEL)
    model = Transformer(spec)
    initialize_weights(model, seed=1)
    return model, batches(corpus_bytes(CORPUS_BYTES), batch=BATCH, seq=spec.seq, steps=STEPS, seed=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One ZeRO stage, measured and predicted."""

    zero: int
    measured_step_s: float
    predicted_step_s: float
    expected_bytes: int
    predicted_bytes: int | None
    measured_bytes: int
    expected_model_state_bytes: int
    predicted_model_state_bytes: int | None
    measured_model_state_bytes: int

    @property
    def step_error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_step_s / self.measured_step_s - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPoint:
    gpus: int
    step_time_s: float
    tflops_per_gpu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What `demo` found; `plot` is where the picture is."""

    verification: Verification
    runs: tuple[Run, ...]
    scaling: tuple[ScalingPoint, ...]
    plot: Path

    @property
    def ok(self) -> bool:
        return self.verification.ok


def demo(out: str | Path = "out/demo", say: Callable[[str], None] = lambda line: None) -> Demo:
    """Train, check, predict and fly; the plot goes to `out`.

    Args:
        say: called with a line about what is under way.

    Raises:
        WorldError: a rank failed.
    """
    from .calibrate import calibrate
    from .plots import plot_demo

    say("measuring this machine's primitives (kept for the next time)")
    machine = calibrate(ranks=RANKS)
    say(f"training {MODEL} on {RANKS} ranks at ZeRO 0 to 3, beside one process")
    verification = verify(f"{__name__}:sample", world=RANKS)
    say("flying the same steps on the simulated machine")
    runs = tuple(_run(result, machine) for result in verification.results)
    say(f"flying {FLOWN_MODEL} on {FLOWN_GPUS[0]} to {FLOWN_GPUS[-1]} simulated GPUs")
    points = tuple(
        ScalingPoint(gpus=count, step_time_s=result.step_time_s, tflops_per_gpu=result.tflops_per_gpu)
        for count, result in zip(
            FLOWN_GPUS, scaling(FLOWN_MODEL, FLOWN_CLUSTER, FLOWN_GPUS, **FLOWN_OPTIONS), strict=True
        )
    )
    plot = plot_demo(runs, points, Path(out) / "demo.png")
    return Demo(verification=verification, runs=runs, scaling=points, plot=plot)


def _run(result: Any, machine: Cluster) -> Run:
    """A verified stage with the step time that the simulator predicts for this machine."""
    return Run(
        zero=result.zero,
        measured_step_s=result.step_s,
        predicted_step_s=predict_step_s(result.zero, machine),
        expected_bytes=result.expected_bytes,
        predicted_bytes=result.predicted_bytes,
        measured_bytes=result.measured_bytes,
        expected_model_state_bytes=result.expected_model_state_bytes,
        predicted_model_state_bytes=result.predicted_model_state_bytes,
        measured_model_state_bytes=result.measured_model_state_bytes,
    )


def predict_step_s(zero: int, machine: Cluster, ranks: int = RANKS) -> float:
    """Seconds of the demo's training step at a ZeRO stage, flown and replayed; nothing of it is measured."""
    from .ranks import Task

    task = Task(f"{__name__}:sample", STEPS, "fp32", 1, 60.0, "")
    plan = Plan(
        factory="windtunnel.experiments.ranks:for_flight",
        arguments={"task": task, "world": ranks},
        config=task.config(zero),
        world=ranks,
    )
    return replay(fly(plan), machine).step_time_s


def to_dict(result: Demo) -> dict[str, Any]:
    """The contract's JSON object."""
    return {
        "verify": verification_to_dict(result.verification),
        "runs": [asdict(run) for run in result.runs],
        "scaling": [asdict(point) for point in result.scaling],
        "plot": str(result.plot),
    }
