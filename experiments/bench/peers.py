"""Our engine against DDP, ZeroRedundancyOptimizer, FSDP2 and DeepSpeed: step time, memory, start, loss.

    python -m windtunnel.experiments.bench.peers [--ranks 2] [--model 17m] [--rounds 12] [contender ...]

Step times are interleaved: all contenders live in the same ranks, each with its own copy of the model, and take turns
step by step, so that a disturbance of the machine meets them all. Memory and the time to the first step need a process
of one's own: each contender runs in fresh ones. Writes results/peers_MODEL.csv. All get torch's fused AdamW;
DeepSpeed (extra "peers") is left out, and said so, where it is not installed.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..files import write_csv
from ..models import ModelSpec
from ..transformer import Transformer, initialize_weights

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3
LOSS_STEPS = 10
LEARNING_RATE = 1e-4
LIMIT_S = 300.0


class Job(NamedTuple):
    """What every contender trains."""

    spec: ModelSpec
    micro_batch: int


def gpt(name: str, layers: int, hidden: int, heads: int, vocab: int, seq: int) -> ModelSpec:
    return ModelSpec(
        name=name, layers=layers, hidden=hidden, heads=heads, vocab=vocab, seq=seq, mlp="gelu", norm="layernorm",
        positions="learned", attention="causal", tied=False, bias=True,
    )  # fmt: skip


JOBS = {
    "17m": Job(gpt("17m", layers=6, hidden=384, heads=6, vocab=8192, seq=128), micro_batch=4),
    "3m": Job(gpt("3m", layers=12, hidden=128, heads=4, vocab=2048, seq=64), micro_batch=1),
}
"""A model whose arithmetic weighs, and one whose host overhead shows."""


# Contenders: each makes a function that trains on one batch and returns its loss #

Train = Callable[[Tensor, Tensor], Tensor]


def new_model(job: Job) -> Transformer:
    model = Transformer(job.spec)
    initialize_weights(model, seed=0)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Train:
    def train(tokens: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        return loss

    return train


def engine_loop(engine: Any) -> Train:
    def train(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        return loss

    return train


def alone(job: Job) -> Train:
    """No communication at all: the limit."""
    model = new_model(job)
    return plain_loop(model, adamw(model))


def ddp(job: Job) -> Train:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(new_model(job))
    return plain_loop(model, adamw(model))


def ddp_zero(job: Job) -> Train:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(new_model(job))
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.AdamW, lr=LEARNING_RATE, fused=True
    )
    return plain_loop(model, optimizer)


def fsdp2(reshard: bool) -> Callable[[Job], Train]:
    """A unit per block; parameters are freed after forward (ZeRO 3) or kept until the step (ZeRO 2)."""

    def make(job: Job) -> Train:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = new_model(job)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        return plain_loop(model, adamw(model))

    return make


def deepspeed(stage: int) -> Callable[[Job], Train]:
    def make(job: Job) -> Train:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
        import deepspeed as theirs

        theirs.logger.setLevel("ERROR")
        config = {
            "train_micro_batch_size_per_gpu": job.micro_batch,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        model = new_model(job)
        engine, *_ = theirs.initialize(model=model, optimizer=adamw(model), config=config, dist_init_required=False)
        return engine_loop(engine)

    return make


def ours(stage: int, transport: str) -> Callable[[Job], Train]:
    def make(job: Job) -> Train:
        from ...engine.engine import initialize

        config = {
            "train_micro_batch_size_per_gpu": job.micro_batch,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 1e-2}},
            "communication": {"transport": transport},
        }
        engine, *_ = initialize(new_model(job), config)
        return engine_loop(engine)

    return make


CONTENDERS: dict[str, Callable[[Job], Train]] = {
    "alone": alone,
    "ddp": ddp,
    "ddp + ZeroRedundancyOptimizer": ddp_zero,
    "fsdp2 zero 2": fsdp2(reshard=False),
    "fsdp2 zero 3": fsdp2(reshard=True),
    **{f"deepspeed zero {stage}": deepspeed(stage) for stage in range(4)},
    **{f"windtunnel sockets zero {stage}": ours(stage, "sockets") for stage in range(4)},
    **{f"windtunnel shared memory zero {stage}": ours(stage, "shared_memory") for stage in range(4)},
}


def available(names: Sequence[str]) -> list[str]:
    """Those of the contenders that can run here."""
    if importlib.util.find_spec("deepspeed") is not None:
        return list(names)
    print("deepspeed is not installed (pip install 'windtunnel[peers]'): left out", file=sys.stderr)
    return [name for name in names if not name.startswith("deepspeed")]


# Step time and loss: all in one world, taking turns #


def batch(job: Job, rank: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    tokens = torch.randint(job.spec.vocab, (job.micro_batch, job.spec.seq + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def compete(rank: int, world: int, model: str, names: list[str], rounds: int) -> dict[str, tuple[list[float], float]]:
    """(seconds of each step after the warm-up, largest distance of a loss from one process's) by contender."""
    warnings.simplefilter("ignore")  # the peers call what torch deprecates
    job = JOBS[model]
    expected = one_process(job, world)
    trains = {name: CONTENDERS[name](job) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    off = dict.fromkeys(names, 0.0)
    for number in range(max(WARM_UP + rounds, LOSS_STEPS)):
        tokens, targets = batch(job, rank, number)
        for name in names if number % 2 else names[::-1]:
            dist.barrier()
            began = time.perf_counter()
            loss = trains[name](tokens, targets)
            dist.barrier()  # until the slowest rank is through
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
            if number < LOSS_STEPS:
                mean = loss.detach().clone()
                dist.all_reduce(mean)
                off[name] = max(off[name], abs(mean.item() / world - expected[number]))
    return {name: (seconds[name], off[name]) for name in names}


def one_process(job: Job, world: int) -> list[float]:
    """Losses of the same training on the whole batch."""
    train = alone(job)
    losses = []
    for number in range(LOSS_STEPS):
        shares = [batch(job, rank, number) for rank in range(world)]
        tokens, targets = (torch.cat(parts) for parts in zip(*shares, strict=True))
        losses.append(train(tokens, targets).item())
    return losses


# Memory and start: fresh processes #


class Footprint(NamedTuple):
    """Of the worst rank: largest resident set, and seconds from the start of the process to the end of a first step."""

    peak_bytes: int
    start_s: float


def footprint(name: str, model: str, world: int) -> Footprint:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "windtunnel.experiments.bench.peers", "--model", model, "--alone", name]
    ranks = []
    for rank in range(world):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "BEGAN": str(time.time()),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }  # fmt: skip
        ranks.append(
            subprocess.Popen(
                command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        )
    answers = [json.loads(process.communicate(timeout=LIMIT_S)[0].splitlines()[-1]) for process in ranks]
    return Footprint(max(answer["peak_bytes"] for answer in answers), max(answer["start_s"] for answer in answers))


def be_measured(name: str, model: str) -> None:
    """A rank of `footprint`: prints what it took as its last line."""
    torch.set_num_threads(1)
    job, rank = JOBS[model], int(os.environ["RANK"])
    dist.init_process_group("gloo")
    train = CONTENDERS[name](job)
    train(*batch(job, rank, 0))
    start_s = time.time() - float(os.environ["BEGAN"])
    for number in range(1, 5):
        train(*batch(job, rank, number))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak_bytes, "start_s": start_s}), flush=True)
    os._exit(0)  # without waiting for peers or threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", help=f"some of: {', '.join(CONTENDERS)}")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", choices=JOBS, default="17m")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--no-footprint", action="store_true", help="step times only; writes nothing")
    parser.add_argument("--alone", metavar="CONTENDER", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.alone:
        be_measured(said.alone, said.model)
    names = available(said.contenders or list(CONTENDERS))
    from ...engine.world import World

    with World(said.ranks, threads=1, timeout_s=LIMIT_S) as world:
        outcome = world.run(compete, said.model, names, said.rounds, limit_s=3600.0)[0]
    base = statistics.median(outcome.get("ddp", outcome[names[0]])[0])
    rows = []
    for name in names:
        seconds, off = outcome[name]
        took = None if said.no_footprint else footprint(name, said.model, said.ranks)
        rows.append(
            {
                "date": date.today().isoformat(),
                "machine": f"{platform.machine()}, torch {torch.__version__}",
                "ranks": said.ranks,
                "model": said.model,
                "contender": name,
                "step_s": f"{statistics.median(seconds):.4f}",
                "over_ddp": f"{statistics.median(seconds) / base:.3f}",
                "loss_off": f"{off:.1e}",
                "peak_resident_bytes": took.peak_bytes if took else "",
                "start_s": f"{took.start_s:.2f}" if took else "",
            }
        )
        print(*list(rows[-1].values())[2:], sep="\t", flush=True)
    if not said.no_footprint:
        write_csv(RESULTS / f"peers_{said.model}.csv", rows)


if __name__ == "__main__":
    main()
