"""A whole training step of torch's FSDP2 and DDP on our backend and on Gloo, interleaved; writes results/fsdp.csv.

    python -m windtunnel.experiments.bench.fsdp [ranks ...]

Both backends' groups live in the same processes, each with its own copy of the model; they take turns step by step.
The third in the row is the same step on each rank without any communication: what no backend can take away.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ...engine.backend import register_backend
from ...engine.world import World
from ..files import write_csv
from ..models import ModelSpec
from ..transformer import Transformer, initialize_weights

SPEC = ModelSpec(
    name="bench-19m",
    layers=6,
    hidden=512,
    heads=8,
    vocab=512,
    seq=128,
    mlp="gelu",
    norm="layernorm",
    positions="learned",
    attention="causal",
    tied=True,
    bias=True,
)
MICRO_BATCH = 1
RESULTS = Path(__file__).parent / "results" / "fsdp.csv"
WARM_UP, ROUNDS = 3, 16

Step = Callable[[], None]


def compare(rank: int, world: int, wrapper: str) -> dict[str, list[float]]:
    """Seconds of each step, by who did it: "windtunnel", "gloo", "alone"."""
    register_backend()
    groups = {name: dist.new_group(backend=name) for name in ("windtunnel", "gloo")}
    steps = {name: training_step(rank, wrapped(wrapper, group)) for name, group in groups.items()}
    steps["alone"] = training_step(rank, new_model())
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + ROUNDS):
        order = list(steps) if number % 2 else list(reversed(steps))
        for name in order:
            dist.barrier()
            began = time.perf_counter()
            steps[name]()
            dist.barrier()  # until the slowest rank is through
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - began)
    for group in groups.values():
        dist.destroy_process_group(group)
    return times


def new_model() -> Transformer:
    model = Transformer(SPEC)
    initialize_weights(model, seed=0)
    return model


def wrapped(wrapper: str, group: dist.ProcessGroup) -> nn.Module:
    """The model under DDP, or under FSDP2 with a unit per block."""
    model = new_model()
    if wrapper == "ddp":
        return DistributedDataParallel(model, process_group=group)
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def training_step(rank: int, model: nn.Module) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(SPEC.vocab, (MICRO_BATCH, SPEC.seq), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        model(tokens, tokens).backward()
        optimizer.step()

    return step


def main() -> None:
    rows = []
    for ranks in [int(argument) for argument in sys.argv[1:]] or [2, 4]:
        for wrapper in ("fsdp2", "ddp"):
            with World(ranks, threads=1) as world:
                times = world.run(compare, wrapper)[0]
            median = {name: statistics.median(seconds) for name, seconds in times.items()}
            rows.append(
                {
                    "date": date.today().isoformat(),
                    "machine": f"{platform.machine()}, torch {torch.__version__}",
                    "ranks": ranks,
                    "wrapper": wrapper,
                    "parameters": sum(parameter.numel() for parameter in Transformer(SPEC).parameters()),
                    "tokens_per_rank": MICRO_BATCH * SPEC.seq,
                    "windtunnel_s": f"{median['windtunnel']:.4f}",
                    "gloo_s": f"{median['gloo']:.4f}",
                    "alone_s": f"{median['alone']:.4f}",
                    "windtunnel_over_gloo": f"{median['windtunnel'] / median['gloo']:.3f}",
                }
            )
            print(*rows[-1].values(), flush=True)
    write_csv(RESULTS, rows)


if __name__ == "__main__":
    main()
