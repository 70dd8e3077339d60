"""Convergence under compressed communication: the demo's GPT on two ranks, each scheme beside the uncompressed run.

    python -m windtunnel.experiments.compression [OUT]

Writes OUT/compression.csv (bytes per step and final loss of each scheme), OUT/compression_losses.csv (the loss of
every step) and OUT/compression.png. OUT is out/compression if not given. Takes minutes.
"""

import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.communicator import DTYPE_NAMES, Communicator, Entry
from ..engine.device import communicator_for
from ..engine.engine import Engine, initialize
from ..engine.one_bit_adam import OneBitAdam
from ..engine.world import World
from .corpus import batches, corpus_bytes
from .demo import BATCH, CORPUS_BYTES, MODEL, RANKS
from .files import write_csv
from .models import load_model
from .plots import plot_losses
from .samples import share
from .transformer import Transformer, initialize_weights

STEPS = 100
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 25
"""Of 1-bit Adam: a quarter of the run, as Tang et al. 2021 (section 7) take 15 to 25 % of theirs."""
FINAL_STEPS = 10
"""The final loss is the mean over this many last steps: each batch is another text."""
WIDTH_BYTES = {name: torch.empty(0, dtype=dtype).element_size() for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run: its name in the plot, what its config adds, and whether 1-bit Adam takes the engine's place.

    `loss_factor` multiplies the loss (a power of two) and Adam's eps, which changes no update: gradients as small as
    those that a mean over very many samples has, where fp16 needs a scale.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    one_bit_adam: bool = False
    loss_factor: float = 1.0


def _gradients(name: str, **options: Any) -> dict[str, Any]:
    return {"communication_compression": {"gradients": name, "gradient_options": options}}


CASES = (
    Case(name="uncompressed"),
    Case(name="fp16", config={"communication_data_type": "fp16"}),
    Case(name="fp16, gradients x 2^-16", config={"communication_data_type": "fp16"}, loss_factor=2.0**-16),
    Case(
        name="fp16, scale 2^16, gradients x 2^-16",
        config=_gradients("fp16_scaled", scale=2.0**16),
        loss_factor=2.0**-16,
    ),
    Case(
        name="fp16, scale 2^24, gradients x 2^-24",
        config=_gradients("fp16_scaled", scale=2.0**24),
        loss_factor=2.0**-24,
    ),
    Case(name="fp16, dynamic scale", config=_gradients("fp16_scaled")),
    Case(name="bf16", config={"communication_data_type": "bf16"}),
    Case(name="int8", config=_gradients("int8")),
    Case(name="int4, stochastic", config=_gradients("int4", rounding="stochastic")),
    Case(
        name="ZeRO++: int8 weights, int4 gradients",
        config={
            "zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True},
        },
    ),
    Case(name="1 bit, error feedback", config=_gradients("one_bit")),
    Case(name="1-bit Adam", one_bit_adam=True),
    Case(name="top 1 %, error feedback", config=_gradients("top_k", fraction=0.01)),
    Case(name="PowerSGD, rank 4", config=_gradients("power_sgd", rank=4, columns=256)),
)


@dataclass(frozen=True, slots=True)
class Curve:
    """The mean loss over ranks of every step, and the payload that a rank sent in the last one, scalars left out."""

    losses: tuple[float, ...]
    bytes_per_step: float


def sent_bytes(ledger: Mapping[Entry, int], world: int) -> float:
    """Payload per rank of all collectives in a ledger but scalars: r (N-1)/N of each buffer, r = 2 for all-reduce."""
    return sum(
        (2 if entry.kind == "all_reduce" else 1)
        * count
        * entry.elements
        * WIDTH_BYTES[entry.dtype]
        * (world - 1)
        / world
        for entry, count in ledger.items()
        if not entry.scalar
    )


def train(rank: int, world: int, case: Case, steps: int = STEPS) -> Curve:
    """The body of a rank: `steps` optimizer steps on its share of the same batches."""
    model = Transformer(spec := load_model(MODEL))
    initialize_weights(model, seed=1)
    texts = batches(corpus_bytes(CORPUS_BYTES), batch=BATCH, seq=spec.seq, steps=steps, seed=1)
    shares = [share(batch, world, rank) for batch in texts]
    if case.one_bit_adam:
        communicator = communicator_for(torch.device("cpu"), 60.0)
        run = _run_one_bit_adam(model, shares, communicator)
    else:
        adam = {"lr": LEARNING_RATE, "eps": 1e-8 * case.loss_factor}
        engine, *_ = initialize(model, {"optimizer": {"type": "Adam", "params": adam}, **case.config}, timeout_s=60.0)
        communicator = engine.communicator
        run = _run_engine(engine, shares, case.loss_factor)
    losses, sent = run
    mean = torch.tensor(losses, dtype=torch.float64)
    communicator.all_reduce(mean, "losses", scalar=True).wait()
    communicator.close()
    return Curve(tuple((mean / world).tolist()), sent)


def _run_engine(engine: Engine, shares: list[Any], loss_factor: float) -> tuple[list[float], float]:
    losses, sent = [], 0.0
    for part in shares:
        engine.communicator.ledger.clear()
        loss = engine(*part)
        engine.backward(loss * loss_factor)
        engine.step()
        losses.append(loss.item())
        sent = sent_bytes(engine.communicator.ledger, engine.communicator.world)
    engine.settle()
    return losses, sent


def _run_one_bit_adam(model: Transformer, shares: list[Any], communicator: Communicator) -> tuple[list[float], float]:
    optimizer = OneBitAdam(model.parameters(), communicator, lr=LEARNING_RATE, warm_up_steps=WARM_UP_STEPS)
    losses, sent = [], 0.0
    for part in shares:
        communicator.ledger.clear()
        loss: Tensor = model(*part)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        sent = sent_bytes(communicator.ledger, communicator.world)
    return losses, sent


def study(out: Path) -> Path:
    """Run all cases and write what they gave; the path of the picture."""
    curves: dict[str, Curve] = {}
    rows = []
    with World(RANKS, timeout_s=60.0, threads=1) as world:
        for case in CASES:
            curves[case.name] = world.run(train, case)[0]
            rows.append(_row(case, curves[case.name], curves[CASES[0].name]))
            print(*rows[-1].values(), flush=True)
    write_csv(out / "compression.csv", rows)
    steps = [{"step": step, **{n: f"{c.losses[step]:.4f}" for n, c in curves.items()}} for step in range(STEPS)]
    write_csv(out / "compression_losses.csv", steps)
    ratios = {row["scheme"]: row["uncompressed_over_sent"] for row in rows}
    return plot_losses({name: curve.losses for name, curve in curves.items()}, ratios, out / "compression.png")


def _row(case: Case, curve: Curve, plain: Curve) -> dict[str, Any]:
    stage = case.config.get("zero_optimization", {}).get("stage", 0)
    without = plain.bytes_per_step * (1.5 if stage == 3 else 1)  # two gathers and a reduce-scatter for an all-reduce
    final = statistics.fmean(curve.losses[-FINAL_STEPS:])
    return {
        "date": date.today().isoformat(),
        "model": MODEL,
        "ranks": RANKS,
        "zero": stage,
        "scheme": case.name,
        "steps": STEPS,
        "bytes_per_step": round(curve.bytes_per_step),
        "uncompressed_over_sent": round(without / curve.bytes_per_step, 2),
        "final_loss": round(final, 4),
        "over_uncompressed": round(final - statistics.fmean(plain.losses[-FINAL_STEPS:]), 4),
    }


if __name__ == "__main__":
    print(study(Path(sys.argv[1] if len(sys.argv) > 1 else "out/compression")))
