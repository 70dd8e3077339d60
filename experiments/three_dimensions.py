"""Training on a mesh of data, tensor and pipeline ranks beside one process: every schedule, in float64.

    python -m windtunnel.experiments.three_dimensions [--steps 20] [--out FILE]

Writes experiments/bench/results/three_dimensions.csv. Takes many minutes on few cores.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..collectives.pipeline_schedules import SCHEDULES
from ..engine.engine import Engine, initialize
from ..engine.inspection import Share
from ..engine.pipeline import PipelineEngine
from ..engine.world import World
from .comparison import PARAMETER, Gap, Key, Offs, Size, compare, gaps, overall
from .files import write_csv
from .models import ModelSpec
from .ranks import Task
from .reference import Known, reference
from .samples import Sample
from .transformer import Transformer, initialize_weights

RESULTS = Path(__file__).parent / "bench" / "results" / "three_dimensions.csv"

TOLERANCE = 1e-10
"""Of ||a - b|| / ||b|| per tensor in float64: sums are taken in another order, and Adam enlarges rounding."""

STEPS = 20
SAMPLES = 24
"""In a global batch: every layout below cuts it evenly into data-parallel ranks and micro-batches."""

TIMEOUT_S = 60.0

SPEC = ModelSpec(
    name="tiny", layers=6, hidden=16, heads=4, ffn=15, vocab=17, seq=8,
    mlp="gelu", norm="layernorm", positions="learned", attention="causal", tied=True, bias=True,
)  # fmt: skip
"""The tied embedding is on the first and the last stage; 17 tokens and 15 features are no multiple of the ranks."""

SETTINGS: dict[str, Any] = {
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
}
"""What means the same to one process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Ranks by axis and what they do; `schedule` means nothing without stages."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    schedule: str = "1f1b"
    zero: int = 0
    sequence_parallel: bool = False

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def sizes(self) -> str:
        """Data x tensor x pipeline."""
        return f"{self.data}x{self.tensor}x{self.pipeline}"

    @property
    def micro_batches(self) -> int:
        """Of a step: a multiple of the stages, which interleaved ones must have."""
        return {1: 2, 2: 4, 3: 6, 4: 4}[self.pipeline]

    @property
    def config(self) -> dict[str, Any]:
        return {
            **SETTINGS,
            "train_batch_size": SAMPLES,
            "gradient_accumulation_steps": self.micro_batches,
            "zero_optimization": {"stage": self.zero},
            "parallel": {
                "tensor": self.tensor,
                "pipeline": self.pipeline,
                "sequence_parallel": self.sequence_parallel,
            },
            "pipeline": {"schedule": self.schedule if self.pipeline > 1 else "1f1b"},
        }


def layouts() -> Iterator[Layout]:
    """All that the study trains, those of as many ranks together."""
    performed = [name for name, each in SCHEDULES.items() if each.performed]
    for schedule in performed:
        for zero, cut in ((0, False), (1, True), (2, False), (2, True)):
            yield Layout(data=2, tensor=2, pipeline=2, schedule=schedule, zero=zero, sequence_parallel=cut)
    for zero in (0, 1, 2, 3):
        for cut in (False, True):
            yield Layout(data=4, tensor=2, zero=zero, sequence_parallel=cut)
    for schedule in performed:
        yield Layout(data=2, pipeline=4, schedule=schedule, zero=2)
        for cut in (False, True):
            yield Layout(tensor=2, pipeline=4, schedule=schedule, sequence_parallel=cut)
    for schedule in performed:
        for cut in (False, True):
            yield Layout(tensor=2, pipeline=3, schedule=schedule, sequence_parallel=cut)


# Training #


def build() -> Transformer:
    model = Transformer(SPEC).double()
    initialize_weights(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # a bias of zero or a norm of one would hide what is added twice
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets [SAMPLES, SEQ] of a global batch: each token follows from the two before."""
    x = torch.randint(SPEC.vocab, (SAMPLES, SPEC.seq), generator=torch.Generator().manual_seed(step))
    return x, (x + x.roll(1, 1)) % SPEC.vocab


def sample() -> Sample:
    """The model and its batches for one process (experiments/reference.py)."""
    return build(), [batch(step) for step in range(STEPS)]


def alone(steps: int, folder: Path) -> tuple[Task, Known]:
    """One process, plain torch; its tensors after the last step are in the folder."""
    task = Task(f"{__name__}:sample", steps, "fp64", 1, TIMEOUT_S, str(folder), SETTINGS)
    known = reference(0, 1, task, watch=(steps - 1,))
    assert known is not None
    return task, known


def start(layout: Layout) -> Engine:
    engine, *_ = initialize(build(), layout.config, timeout_s=TIMEOUT_S)
    return engine


def step(engine: Engine, layout: Layout, number: int) -> float:
    """One step on this rank's share of a global batch; its loss."""
    samples = engine.groups.axis("data")
    x, y = (each.chunk(samples.world)[samples.rank].chunk(layout.micro_batches) for each in batch(number))
    micro_batches = list(zip(x, y, strict=True))
    if isinstance(engine, PipelineEngine):
        return engine.train_batch(iter(micro_batches)).item()
    losses = []
    for inputs, targets in micro_batches:
        loss = engine(inputs, targets)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def train(rank: int, world: int, layout: Layout, task: Task, steps: int) -> tuple[list[float], Offs]:
    """The body of a rank: its losses, and how far the whole model's parameters are from one process's at the end."""
    engine = start(layout)
    losses = [step(engine, layout, number) for number in range(steps)]
    known = torch.load(task.snapshot_path(steps - 1))
    whole = engine.full_parameters()
    engine.close()
    shares = [Share(name, PARAMETER, 0, values.numel(), values.flatten()) for name, values in whole.items()]
    return losses, dict(compare(PARAMETER, shares, known))


# The study #


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How far a layout is from one process.

    Attributes:
        worst_tensor: ||a - b|| / ||b|| of the tensor that is off the most, `tensor`.
        all_parameters: the same over all of them.
        loss: the largest relative difference of a step's loss.
    """

    layout: Layout
    worst_tensor: float
    tensor: str
    all_parameters: float
    loss: float
    seconds: float

    @property
    def ok(self) -> bool:
        return max(self.worst_tensor, self.all_parameters, self.loss) <= TOLERANCE

    def cells(self) -> dict[str, object]:
        """As a line of the table."""
        layout = self.layout
        return {
            "data x tensor x pipeline": layout.sizes,
            "schedule": layout.schedule if layout.pipeline > 1 else "no stages",
            "zero": layout.zero,
            "sequence_parallel": layout.sequence_parallel,
            "worst_tensor_difference": f"{self.worst_tensor:.1e}",
            "tensor": self.tensor,
            "all_parameters_difference": f"{self.all_parameters:.1e}",
            "loss_difference": f"{self.loss:.1e}",
            "seconds": f"{self.seconds:.1f}",
            "ok": self.ok,
        }


def compared(world: World, layout: Layout, task: Task, known: Known) -> Row:
    """Train on the ranks of a world, and hold them against one process."""
    began = time.perf_counter()
    steps = len(known.losses)
    found: list[tuple[list[float], Offs]] = world.run(train, layout, task, steps)
    (sizes,) = known.sizes.values()
    wanted: dict[Key, Size] = {key: size for key, size in sizes.items() if key[0] == PARAMETER}
    off: list[Gap] = gaps([offs for _, offs in found], wanted)
    farthest = max(off, key=lambda gap: gap.relative)
    means = [sum(each) / len(found) for each in zip(*(losses for losses, _ in found), strict=True)]
    return Row(
        layout=layout,
        worst_tensor=farthest.relative,
        tensor=farthest.parameter,
        all_parameters=overall(off),
        loss=max(abs(a - b) / abs(b) for a, b in zip(means, known.losses, strict=True)),
        seconds=time.perf_counter() - began,
    )


def study(steps: int = STEPS, wanted: Sequence[Layout] | None = None) -> Iterator[Row]:
    """A row for each layout, as it comes."""
    everything = list(layouts()) if wanted is None else wanted
    with tempfile.TemporaryDirectory() as folder:
        task, known = alone(steps, Path(folder))
        for ranks, some in groupby(everything, key=lambda layout: layout.world):
            with World(ranks, timeout_s=2 * TIMEOUT_S, threads=1) as world:
                for layout in some:
                    yield compared(world, layout, task, known)


def main() -> int:
    """Exit code 1 where a layout is further off than TOLERANCE."""
    parser = argparse.ArgumentParser(prog="python -m windtunnel.experiments.three_dimensions", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, choices=range(1, STEPS + 1), metavar=f"1..{STEPS}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for row in study(arguments.steps):
        rows.append(row)
        print(*row.cells().values(), flush=True)
        write_csv(arguments.out, [each.cells() for each in rows])  # what is there survives an end before the end
    print(arguments.out)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
