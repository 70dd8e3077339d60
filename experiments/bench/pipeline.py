"""A step of 1F1B on Gloo ranks: our engine and torch.distributed.pipelining, interleaved; writes results/pipeline.csv.

    python -m windtunnel.experiments.bench.pipeline [ranks ...]

Both train the same model, cut at the same layers, with torch's fused AdamW, in the same processes; they take turns step
by step. A rank has one thread, as it has one core.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional

from ...engine.engine import initialize
from ...engine.pipeline import PipelineEngine
from ...engine.stages import Layer, layers_of
from ...engine.world import World
from ..files import write_csv
from ..models import ModelSpec
from ..transformer import Transformer, initialize_weights

SPEC = ModelSpec(
    name="bench-13m",
    layers=8,
    hidden=384,
    heads=6,
    vocab=512,
    seq=128,
    mlp="gelu",
    norm="layernorm",
    positions="learned",
    attention="causal",
    tied=False,
    bias=True,
)
MICRO_BATCHES = 8
RESULTS = Path(__file__).parent / "results" / "pipeline.csv"
WARM_UP, ROUNDS = 3, 16

Step = Callable[[], None]


def compare(rank: int, world: int, spec: ModelSpec, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, by who did it: "windtunnel", "torch"."""
    engine = our_engine(spec, world)
    steps = {"windtunnel": our_step(engine, spec), "torch": their_step(engine, spec, rank, world)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + rounds):
        order = list(steps) if number % 2 else list(reversed(steps))
        for name in order:
            dist.barrier()
            began = time.perf_counter()
            steps[name]()
            dist.barrier()  # until the slowest rank is through
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - began)
    engine.close()
    return times


def new_model(spec: ModelSpec) -> Transformer:
    model = Transformer(spec)
    initialize_weights(model, seed=0)
    return model


def tokens_of(spec: ModelSpec) -> Tensor:
    """[micro-batches, S]"""
    return torch.randint(spec.vocab, (MICRO_BATCHES, spec.seq), generator=torch.Generator().manual_seed(0))


def our_engine(spec: ModelSpec, ranks: int) -> PipelineEngine:
    config = {
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "pipeline_size": ranks,
        "pipeline": {"schedule": "1f1b", "partition": "uniform"},
    }
    engine, *_ = initialize(new_model(spec), loss_of_logits, config)
    assert isinstance(engine, PipelineEngine)
    return engine


def loss_of_logits(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    return functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())


def our_step(engine: PipelineEngine, spec: ModelSpec) -> Step:
    batches = [(each, each) for each in tokens_of(spec).split(1)]

    def step() -> None:
        engine.train_batch(iter(batches))

    return step


class Stage(nn.Module):
    """Layers in a row, as torch's pipelines want them."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = layers
        self.parts = nn.ModuleList([model.get_submodule(part) for layer in layers for part in layer.parts])

    def forward(self, value: Tensor) -> Any:
        for layer in self.layers:
            value = layer.forward(value)
        return value


def their_step(engine: PipelineEngine, spec: ModelSpec, rank: int, world: int) -> Step:
    """torch's 1F1B with the loss on the last rank, cut where the engine cuts."""
    model = new_model(spec)
    bounds = engine.bounds
    stage_module = Stage(model, layers_of(model)[bounds[rank] : bounds[rank + 1]])
    stage = PipelineStage(stage_module, rank, world, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_of_logits)
    optimizer = torch.optim.AdamW(stage_module.parameters(), lr=1e-4, fused=True)
    tokens = tokens_of(spec)

    def step() -> None:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        given = (tokens,) if rank == 0 else ()
        last: dict[str, Any] = {"target": tokens, "losses": losses} if rank == world - 1 else {}
        schedule.step(*given, **last)
        optimizer.step()

    return step


def main() -> None:
    rows = []
    for ranks in [int(argument) for argument in sys.argv[1:]] or [2]:
        with World(ranks, threads=1) as world:
            times = world.run(compare, SPEC, ROUNDS)[0]
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        rows.append(
            {
                "date": date.today().isoformat(),
                "machine": f"{platform.machine()}, torch {torch.__version__}",
                "ranks": ranks,
                "parameters": sum(parameter.numel() for parameter in Transformer(SPEC).parameters()),
                "micro_batches": MICRO_BATCHES,
                "tokens_per_micro_batch": SPEC.seq,
                "windtunnel_s": f"{median['windtunnel']:.4f}",
                "torch_s": f"{median['torch']:.4f}",
                "windtunnel_over_torch": f"{median['windtunnel'] / median['torch']:.3f}",
            }
        )
        print(*rows[-1].values(), flush=True)
    write_csv(RESULTS, rows)


if __name__ == "__main__":
    main()
