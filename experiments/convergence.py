"""Every precision, ZeRO stage and compression beside fp32 on toy tasks: do they all learn, and as well?

    python -m windtunnel.experiments.convergence [OUT]

Writes OUT/convergence.csv (loss, perplexity and accuracy on held-out samples), OUT/convergence_losses.csv (the loss of
every step) and OUT/convergence.png. OUT is out/convergence if not given. Takes minutes.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engine.compression import SCHEMES
from ..engine.engine import Engine, initialize
from ..engine.evaluation import evaluating
from ..engine.world import World
from .files import write_csv
from .tasks import Characters, Kind, Sequences, Task, accuracy, stacked, tiny_gpt

RANKS = 2
BATCH = 32
LEARNING_RATE = 1e-2
WARM_UP_STEPS = 20
HELD_OUT = 256
HELD_OUT_FROM_BYTES = 1 << 20
STEPS = 200

OPTIONS: dict[str, dict[str, Any]] = {
    "one_bit": {"block": 32},
    "top_k": {"fraction": 0.1},
    "power_sgd": {"rank": 4, "columns": 32},
}
"""What schemes need on models as small as these; the others keep their defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run: its panel in the plot, its name, and what its config adds to fp32 at stage 0."""

    panel: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)


def compressed_gradients(scheme: str) -> dict[str, Any]:
    """The config of a scheme that compresses everything, however small."""
    return {
        "communication_compression": {
            "gradients": scheme,
            "gradient_options": OPTIONS.get(scheme, {}),
            "min_elements": 0,
        }
    }


QUANTIZED = {"zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True}}

CASES = (
    Case(panel="precision", name="fp32"),
    Case(panel="precision", name="bf16", config={"bf16": {"enabled": True}}),
    Case(panel="precision", name="fp16, static scale", config={"fp16": {"enabled": True, "loss_scale": 1024.0}}),
    Case(panel="precision", name="fp16, dynamic scale", config={"fp16": {"enabled": True, "initial_scale_power": 12}}),
    Case(panel="precision", name="autocast to bf16", config={"torch_autocast": {"enabled": True, "dtype": "bf16"}}),
    Case(panel="precision", name="autocast to fp16", config={"torch_autocast": {"enabled": True, "dtype": "fp16"}}),
    *(Case(panel="ZeRO", name=f"stage {n}", config={"zero_optimization": {"stage": n}}) for n in (1, 2, 3)),
    Case(panel="ZeRO", name="stage 3, ZeRO++", config=QUANTIZED),
    *(Case(panel="compression", name=f"{name} gradients", config=compressed_gradients(name)) for name in SCHEMES),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """A task, one global batch of it per step, and a part of it that is held out."""

    task: Task
    held_out: Task

    @property
    def steps(self) -> int:
        return len(self.task) // BATCH


def toys(steps: int) -> dict[str, Toy]:
    """By name; `steps` of training each."""
    samples = steps * BATCH
    kinds: tuple[Kind, ...] = ("copy", "sort")
    sequences: dict[str, Toy] = {
        kind: Toy(task=Sequences(kind, samples=samples), held_out=Sequences(kind, samples=HELD_OUT, seed=1))
        for kind in kinds
    }
    characters = Toy(
        task=Characters(samples=samples), held_out=Characters(samples=HELD_OUT, skipped_bytes=HELD_OUT_FROM_BYTES)
    )
    return {**sequences, "characters": characters}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of a run: the loss of each step, mean over ranks; and what it can do on held-out samples."""

    losses: tuple[float, ...]
    loss: float
    perplexity: float
    accuracy: float


def train(rank: int, world: int, toy: Toy, config: Mapping[str, Any]) -> Outcome:
    """The body of a rank."""
    engine, _, loader, _ = initialize(
        tiny_gpt(toy.task),
        {
            "train_batch_size": BATCH,
            "optimizer": {"type": "Adam", "params": {"lr": LEARNING_RATE}},
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {"warmup_num_steps": WARM_UP_STEPS, "total_num_steps": max(WARM_UP_STEPS, toy.steps)},
            },
            **config,
        },
        training_data=toy.task,
        timeout_s=60.0,
    )
    assert loader is not None
    losses = [learn(engine, batch) for batch in loader]
    mean = torch.tensor(losses, dtype=torch.float64)
    engine.communicator.all_reduce(mean, "losses", scalar=True).wait()
    held_out = engine.evaluate(toy.held_out)
    with evaluating(engine):
        right = accuracy(engine, *stacked(toy.held_out, 0, len(toy.held_out)))
    engine.close()
    return Outcome(
        losses=tuple((mean / world).tolist()), loss=held_out.loss, perplexity=held_out.perplexity, accuracy=right
    )


def learn(engine: Engine, batch: Any) -> float:
    """One step; its loss on this rank."""
    loss = engine(*batch)
    engine.backward(loss)
    engine.step()
    return loss.item()


def study(out: Path, steps: int = STEPS, cases: Sequence[Case] = CASES) -> Path:
    """Run all cases on all tasks and write what they gave; the path of the picture."""
    from .plots import plot_convergence

    found: dict[str, dict[str, Outcome]] = {}
    rows = []
    with World(RANKS, timeout_s=120.0, threads=1) as world:
        for name, toy in toys(steps).items():
            found[name] = {case.name: world.run(train, toy, case.config)[0] for case in cases}
            for case in cases:
                rows.append(_row(name, case, found[name][case.name], found[name][cases[0].name]))
                print(*rows[-1].values(), flush=True)
    write_csv(out / "convergence.csv", rows)
    curves = {
        f"{task}: {name}": outcome.losses for task, outcomes in found.items() for name, outcome in outcomes.items()
    }
    write_csv(
        out / "convergence_losses.csv",
        [{"step": step, **{name: f"{losses[step]:.4f}" for name, losses in curves.items()}} for step in range(steps)],
    )
    return plot_convergence(found, {case.name: case.panel for case in cases}, out / "convergence.png")


def _row(task: str, case: Case, outcome: Outcome, plain: Outcome) -> dict[str, Any]:
    return {
        "task": task,
        "panel": case.panel,
        "case": case.name,
        "steps": len(outcome.losses),
        "held_out_loss": round(outcome.loss, 4),
        "over_fp32": round(outcome.loss - plain.loss, 4),
        "perplexity": round(outcome.perplexity, 3),
        "accuracy": round(outcome.accuracy, 4),
    }


if __name__ == "__main__":
    print(study(Path(sys.argv[1] if len(sys.argv) > 1 else "out/convergence")))
