"""Our programs over sockets and through shared memory against Gloo's own calls, interleaved in one run.

    python -m windtunnel.experiments.bench.collectives [ranks ...] [--every-algorithm]

Writes results/collectives.csv, which sets default_selection of engine/gloo.py, and results/coalesced.csv, which sets
BUCKET_BYTES of engine/coalesce.py. With --every-algorithm each one of the catalogue is measured, not only the default.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ...collectives.algorithms import algorithms
from ...collectives.choice import Selection, choose, native
from ...collectives.coalesce import buckets
from ...engine.coalesce import Coalescer
from ...engine.communicator import Communicator, NativeCommunicator
from ...engine.gloo import GlooCommunicator
from ...engine.world import World
from ...sim.hardware import load_cluster
from ..files import write_csv

SIZES_BYTES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20]
KINDS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
RESULTS = Path(__file__).parent / "results"
SECONDS_PER_CONTENDER = 0.5
LEAST_ROUNDS = 8
LARGE_BYTES = 4 << 20

SMALL_BYTES = [1024 * (1 + number % 64) for number in range(200)]
"""Tensors of 1 to 64 KiB."""

PRICED_GPUS = 8

BUCKETS_BYTES = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]


class Contender(NamedTuple):
    """A transport and an algorithm; Gloo's own call is ("gloo", "native")."""

    transport: str
    algorithm: str


NATIVE = Contender("gloo", "native")


def seconds_of(runs: dict[Any, Callable[[], None]], at_least_s: float, calls: int) -> dict[Any, float]:
    """Median seconds of a call of each run.

    All ranks meet before each sample, and leave that meeting some 0.1 ms apart: a sample is several calls. The order
    turns, since what ran before leaves traces.
    """
    taken: dict[Any, list[float]] = {name: [] for name in runs}
    names = list(runs)
    deadline = time.perf_counter() + at_least_s
    rounds, enough = 0, torch.zeros(1)
    while enough.item() == 0:  # the ranks agree on when to stop
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            dist.barrier()
            began = time.perf_counter()
            for _ in range(calls):
                runs[name]()
            taken[name].append((time.perf_counter() - began) / calls)
        rounds += 1
        enough[0] = float(time.perf_counter() > deadline and rounds > LEAST_ROUNDS)
        dist.broadcast(enough, 0)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def compare(rank: int, world: int, kind: str, nbytes: int, every: bool) -> dict[Contender, float]:
    """Median seconds of each contender on a buffer of fp32 of its own."""
    group = dist.group.WORLD
    assert group is not None
    runs: dict[Contender, Callable[[], None]] = {NATIVE: _run(NativeCommunicator("data", group), kind, nbytes)}
    opened = []
    for shared in (False, True):
        default = GlooCommunicator("data", group, _get_default_store(), 60.0, shared_memory=shared)
        opened.append(default)
        chosen = default.algorithm(kind, nbytes, False)
        names = [chosen, *(a.name for a in algorithms(kind, world) if every and a.name != chosen)]
        for name in names:
            communicator = GlooCommunicator("data", group, _get_default_store(), 60.0, shared_memory=shared)
            communicator.selection = Selection({kind: ((0, name),)})
            opened.append(communicator)
            runs[Contender(default.transport.name, name)] = _run(communicator, kind, nbytes)
    medians = seconds_of(runs, SECONDS_PER_CONTENDER * len(runs), 2 if nbytes > LARGE_BYTES else 10)
    for communicator in opened:
        communicator.close()
    return medians


def _run(communicator: Communicator, kind: str, nbytes: int) -> Callable[[], None]:
    start = getattr(communicator, kind)
    buffer = torch.zeros(nbytes // 4 // communicator.world * communicator.world)
    return lambda: start(buffer, "bench").wait()


def compare_coalesced(rank: int, world: int, shared: bool) -> dict[int, float]:
    """Median seconds of an all-reduce of many small tensors: alone (bucket 0), and by bucket size."""
    group = dist.group.WORLD
    assert group is not None
    communicator = GlooCommunicator("data", group, _get_default_store(), 60.0, shared_memory=shared)
    tensors = [torch.zeros(nbytes // 4) for nbytes in SMALL_BYTES]

    def alone() -> None:
        for handle in [communicator.all_reduce(tensor, "bench") for tensor in tensors]:
            handle.wait()

    def by_bucket(bucket_bytes: int) -> Callable[[], None]:
        coalescer = Coalescer(communicator, bucket_bytes)
        return lambda: coalescer.all_reduce(tensors, "bench").wait()

    runs = {0: alone, **{nbytes: by_bucket(nbytes) for nbytes in BUCKETS_BYTES}}
    medians = seconds_of(runs, SECONDS_PER_CONTENDER * len(runs), 1)
    communicator.close()
    return medians


def slowest(by_rank: list[dict[Any, float]]) -> dict[Any, float]:
    """Of each contender the time of its slowest rank."""
    return {name: max(times[name] for times in by_rank) for name in by_rank[0]}


def rows_of(world: World, kind: str, nbytes: int, every: bool) -> list[dict[str, Any]]:
    times = slowest(world.run(compare, kind, nbytes, every))
    rows = []
    for contender, seconds in times.items():
        if contender != NATIVE:
            rows.append(
                {
                    **_where(world.size),
                    "kind": kind,
                    "bytes": nbytes,
                    "transport": contender.transport,
                    "algorithm": contender.algorithm,
                    "ours_s": f"{seconds:.3e}",
                    "gloo_s": f"{times[NATIVE]:.3e}",
                    "gloo_over_ours": f"{times[NATIVE] / seconds:.2f}",
                }
            )
            print(*rows[-1].values(), flush=True)
    return rows


def priced_gain(bucket_bytes: int) -> float:
    """How many times longer the same tensors would take alone than in buckets, priced on a DGX A100."""
    tiers = load_cluster("dgx-a100").tiers(PRICED_GPUS)
    allowed = native("all_reduce", PRICED_GPUS, tiers)

    def seconds(sizes_bytes: Iterable[int]) -> float:
        return sum(choose("all_reduce", nbytes, PRICED_GPUS, tiers, allowed).seconds for nbytes in sizes_bytes)

    parts = buckets(SMALL_BYTES, bucket_bytes)
    return seconds(SMALL_BYTES) / seconds(sum(SMALL_BYTES[first:last]) for first, last in parts)


def coalesced_rows(world: World) -> list[dict[str, Any]]:
    rows = []
    for transport, shared in (("sockets", False), ("shared memory", True)):
        times = slowest(world.run(compare_coalesced, shared))
        for bucket_bytes in BUCKETS_BYTES:
            rows.append(
                {
                    **_where(world.size),
                    "tensors": len(SMALL_BYTES),
                    "bytes": sum(SMALL_BYTES),
                    "transport": transport,
                    "bucket_bytes": bucket_bytes,
                    "alone_s": f"{times[0]:.3e}",
                    "coalesced_s": f"{times[bucket_bytes]:.3e}",
                    "alone_over_coalesced": f"{times[0] / times[bucket_bytes]:.2f}",
                    "priced_on_dgx_a100": f"{priced_gain(bucket_bytes):.2f}",
                }
            )
            print(*rows[-1].values(), flush=True)
    return rows


def _where(ranks: int) -> dict[str, Any]:
    machine = f"{platform.machine()}, torch {torch.__version__}"
    return {"date": date.today().isoformat(), "machine": machine, "ranks": ranks}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("ranks", nargs="*", type=int, default=[2, 4])
    options.add_argument("--every-algorithm", action="store_true")
    asked = options.parse_args()
    rows, coalesced = [], []
    for ranks in asked.ranks:
        with World(ranks, threads=1) as world:
            for kind in KINDS:
                for nbytes in SIZES_BYTES:
                    rows += rows_of(world, kind, nbytes, asked.every_algorithm)
            coalesced += coalesced_rows(world)
    write_csv(RESULTS / "collectives.csv", rows)
    write_csv(RESULTS / "coalesced.csv", coalesced)


if __name__ == "__main__":
    main()
