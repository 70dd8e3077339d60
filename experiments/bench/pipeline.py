"""A step of 1F1B on Gloo ranks: our engine and torch.distributed.pipelining, interleaved; writes results/pipeline.csv.

Two models: in one computation takes nearly all of the time, in the other messages and the host's work count. Beside
them our zero-bubble schedule ZB-H1, which needs no more memory than 1F1B, and the least that 1F1B can take: the
seconds that torch's ranks compute, and its bubble.

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
from typing import Any, NamedTuple

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


def gpt(name: str, layers: int, hidden: int, heads: int) -> ModelSpec:
    return ModelSpec(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        vocab=512,
        seq=128,
        mlp="gelu",
        norm="layernorm",
        positions="learned",
        attention="causal",
        tied=False,
        bias=True,
    )


LARGE = gpt("bench-14m", layers=8, hidden=384, heads=6)
SMALL = gpt("bench-1m", layers=6, hidden=96, heads=3)
MODELS = (LARGE, SMALL)
MICRO_BATCHES = 8
RESULTS = Path(__file__).parent / "results" / "pipeline.csv"
WARM_UP, ROUNDS = 3, 16

Step = Callable[[], None]


class Times(NamedTuple):
    """Seconds of each step by the clock, and those that this process computed."""

    wall_s: list[float]
    cpu_s: list[float]


def compare(rank: int, world: int, spec: ModelSpec, rounds: int) -> dict[str, Times]:
    """By who did the steps: "windtunnel", "windtunnel zb-h1", "torch"."""
    engines = {"windtunnel": our_engine(spec, world, "1f1b"), "windtunnel zb-h1": our_engine(spec, world, "zb-h1")}
    steps = {name: our_step(engine, spec) for name, engine in engines.items()}
    steps["torch"] = their_step(engines["windtunnel"], spec, rank, world)
    times = {name: Times([], []) for name in steps}
    for number in range(WARM_UP + rounds):
        order = list(steps) if number % 2 else list(reversed(steps))
        for name in order:
            dist.barrier()
            began, busy = time.perf_counter(), time.process_time()
            steps[name]()
            busy = time.process_time() - busy
            dist.barrier()  # until the slowest rank is through
            if number >= WARM_UP:
                times[name].wall_s.append(time.perf_counter() - began)
                times[name].cpu_s.append(busy)
    for engine in engines.values():
        engine.close()
    return times


def new_model(spec: ModelSpec) -> Transformer:
    model = Transformer(spec)
    initialize_weights(model, seed=0)
    return model


def tokens_of(spec: ModelSpec) -> Tensor:
    """[micro-batches, S]"""
    return torch.randint(spec.vocab, (MICRO_BATCHES, spec.seq), generator=torch.Generator().manual_seed(0))


def our_engine(spec: ModelSpec, ranks: int, schedule: str) -> PipelineEngine:
    config = {
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "pipeline_size": ranks,
        "pipeline": {"schedule": schedule, "partition": "uniform"},
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


def row(spec: ModelSpec, ranks: int, found: Sequence[dict[str, Times]]) -> dict[str, object]:
    """A line of the results, from what each rank found; CPU seconds are of all ranks together."""
    wall = {name: statistics.median(times.wall_s) for name, times in found[0].items()}
    cpu = {name: sum(statistics.median(rank[name].cpu_s) for rank in found) for name in wall}
    limit_s = cpu["torch"] / ranks * (1 + (ranks - 1) / MICRO_BATCHES)  # stages alike, messages free
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "model": spec.name,
        "ranks": ranks,
        "parameters": sum(parameter.numel() for parameter in Transformer(spec).parameters()),
        "micro_batches": MICRO_BATCHES,
        "tokens_per_micro_batch": spec.seq,
        "windtunnel_s": f"{wall['windtunnel']:.4f}",
        "torch_s": f"{wall['torch']:.4f}",
        "windtunnel_over_torch": f"{wall['windtunnel'] / wall['torch']:.3f}",
        "zb_h1_over_torch": f"{wall['windtunnel zb-h1'] / wall['torch']:.3f}",
        "limit_over_torch": f"{limit_s / wall['torch']:.3f}",
        "windtunnel_cpu_s": f"{cpu['windtunnel']:.4f}",
        "torch_cpu_s": f"{cpu['torch']:.4f}",
    }


def main() -> None:
    rows = []
    for ranks in [int(argument) for argument in sys.argv[1:]] or [2]:
        with World(ranks, threads=1) as world:
            for spec in MODELS:
                rows.append(row(spec, ranks, world.run(compare, spec, ROUNDS)))
                print(*rows[-1].values(), flush=True)
    write_csv(RESULTS, rows)


if __name__ == "__main__":
    main()
