"""What becomes of copies that step by themselves: the demo's GPT on four ranks that agree always, now and then, never.

    python -m windtunnel.experiments.redundancy [OUT]

"Every rank keeps a full copy, updates it from its own gradients and never communicates" trains as many models as there
are ranks, each on a share of the text: they drift apart, and no step brings them together. Local SGD and DiLoCo keep
nearly all of the saved traffic, and the ranks stay one model. Writes OUT/redundancy.csv (one row per run and
observation) and OUT/redundancy.png; OUT is out/redundancy if not given. Takes minutes.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Engine, initialize
from ..engine.world import World
from .compression import sent_bytes
from .corpus import batches, corpus_bytes
from .demo import BATCH, CORPUS_BYTES, MODEL
from .files import write_csv
from .models import load_model
from .reproduce import Item, Say
from .samples import share
from .transformer import Transformer, initialize_weights

RANKS = 4
STEPS = 120
EVERY = 20
"""Steps between agreements."""
LOOK_EVERY = 10
LEARNING_RATE = 1e-3
HELD_OUT = RANKS
"""Batches of windows of the text that training does not draw."""
NEVER = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run: its name in the plot, and what its config adds."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case(name="synchronous"),
    Case(name=f"Local SGD, every {EVERY}", config={"local_updates": {"every": EVERY}}),
    Case(name=f"DiLoCo, every {EVERY}", config={"local_updates": {"every": EVERY, "outer": "nesterov"}}),
    Case(name="never", config={"local_updates": {"every": NEVER}}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the ranks have after a number of steps, seen from all of them.

    Attributes:
        distance: root mean square over the ranks of ||own - mean|| / ||mean|| of all parameters.
        mean_loss: on held-out text, of the model whose parameters are the ranks' mean.
        own_loss: on the same text, of the ranks' own models, in the mean.
        bytes_per_step: payload that a rank has sent per step so far.
    """

    run: str
    step: int
    distance: float
    mean_loss: float
    own_loss: float
    bytes_per_step: float


def train(rank: int, world: int, case: Case, steps: int = STEPS, look_every: int = LOOK_EVERY) -> list[Look]:
    """The body of a rank: train on its share of the same batches, and look at all ranks now and then."""
    spec = load_model(MODEL)
    model, judge = Transformer(spec), Transformer(spec)
    initialize_weights(model, seed=1)
    text = corpus_bytes(CORPUS_BYTES)
    texts = batches(text, batch=BATCH, seq=spec.seq, steps=steps, seed=1)
    held_out = batches(text, batch=BATCH, seq=spec.seq, steps=HELD_OUT, seed=2)
    config = {"optimizer": {"type": "Adam", "params": {"lr": LEARNING_RATE}}, **case.config}
    engine, *_ = initialize(model, config, timeout_s=120.0)
    looks = [_look(case, engine, judge, held_out, 0)]
    for step, batch in enumerate(texts, start=1):
        engine.backward(engine(*share(batch, world, rank)))
        engine.step()
        if step % look_every == 0:
            looks.append(_look(case, engine, judge, held_out, step))
    engine.close()
    return looks


@torch.no_grad()
def _look(case: Case, engine: Engine, judge: Transformer, held_out: Sequence[Any], step: int) -> Look:
    sent = sent_bytes(engine.communicator.ledger, engine.communicator.world)
    own = engine.full_parameters()
    mean = {name: _mean(engine, values) for name, values in own.items()}
    off = sum((own[name] - mean[name]).double().square().sum() for name in own)
    size = sum(values.double().square().sum() for values in mean.values())
    assert isinstance(off, Tensor)
    assert isinstance(size, Tensor)
    distance = (_mean(engine, off) / size).sqrt()
    rank, world = engine.communicator.rank, engine.communicator.world
    mean_loss = _mean(engine, _loss(judge, mean, held_out[rank % len(held_out) :: world]))
    own_loss = _mean(engine, _loss(judge, own, held_out))
    return Look(
        run=case.name,
        step=step,
        distance=float(distance),
        mean_loss=float(mean_loss),
        own_loss=float(own_loss),
        bytes_per_step=sent / max(1, step),
    )


def _mean(engine: Engine, values: Tensor) -> Tensor:
    """Over the ranks; listed as a scalar, because it is no part of training."""
    total = values.reshape(-1).clone()
    engine.communicator.all_reduce(total, "what ranks have", scalar=True).wait()
    return total.view(values.shape) / engine.communicator.world


def _loss(judge: Transformer, parameters: Mapping[str, Tensor], held_out: Sequence[Any]) -> Tensor:
    judge.load_state_dict(parameters, strict=False)
    return torch.stack([judge(*batch) for batch in held_out]).mean()


def study(say: Say, ranks: World | None = None, steps: int = STEPS, look_every: int = LOOK_EVERY) -> list[Look]:
    """All cases, one after the other.

    Args:
        ranks: a running world to use; else one is started and ended.
    """
    world = ranks or World(RANKS, timeout_s=120.0, threads=1)
    looks: list[Look] = []
    try:
        for case in CASES:
            looks += world.run(train, case, steps, look_every)[0]
            say(f"{case.name}: loss of the mean {looks[-1].mean_loss:.3f}, distance {looks[-1].distance:.3g}")
    finally:
        if ranks is None:
            world.close()
    return looks


def sentence(looks: Sequence[Look]) -> str:
    """What the study shows, with its figures."""
    last = {look.run: look for look in looks}
    synchronous, *others = last.values()
    return f"after {synchronous.step} steps on {RANKS} ranks the mean model's held-out loss is " + "; ".join(
        f"{look.mean_loss:.2f} {look.run} (ranks {look.distance:.1%} from their mean, own loss {look.own_loss:.2f},"
        f" {look.bytes_per_step / synchronous.bytes_per_step:.1%} of the bytes)"
        for look in (synchronous, *others)
    )


def reproduce(folder: Path, say: Say) -> Item:
    """The study as a picture, a table and a sentence."""
    looks = study(say)
    rows = [asdict(look) for look in looks]
    return Item(
        name="redundancy",
        plot=plot_looks(looks, folder / "redundancy.png"),
        csv=write_csv(folder / "redundancy.csv", rows),
        rows=rows,
        sentence=sentence(looks),
    )


COLOURS = ("#1f2933", "#2b6f8f", "#3f8f5f", "#c8553d")


def plot_looks(looks: Sequence[Look], path: Path) -> Path:
    """How far ranks are from their mean, and the loss of that mean (solid) and of their own models (dotted)."""
    from matplotlib import pyplot

    from .plots import STYLE, save  # matplotlib loads slowly

    runs = dict.fromkeys(look.run for look in looks)
    with pyplot.rc_context(STYLE):
        figure, (apart, loss) = pyplot.subplots(1, 2, figsize=(12.4, 4.8))
        for run, colour in zip(runs, COLOURS, strict=False):
            mine = [look for look in looks if look.run == run]
            steps = [look.step for look in mine]
            apart.plot(steps, [100 * look.distance for look in mine], color=colour, lw=2, label=run)
            # Without the first look, whose loss is that of no training at all.
            loss.plot(steps[1:], [look.mean_loss for look in mine[1:]], color=colour, lw=2, label=run)
            loss.plot(steps[1:], [look.own_loss for look in mine[1:]], ":", color=colour, lw=1.6)
        apart.set(xlabel="step", ylabel="distance of a rank from the mean, %", title="How far the copies drift apart")
        apart.legend(frameon=False)
        loss.set(xlabel="step", ylabel="held-out loss", title="The mean model (solid), a rank's own (dotted)")
        return save(figure, path)


if __name__ == "__main__":
    item = reproduce(Path(sys.argv[1] if len(sys.argv) > 1 else "out/redundancy"), partial(print, flush=True))
    print(item.sentence)
    print(item.plot)
