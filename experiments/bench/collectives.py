"""Our ring programs against Gloo's own collectives, interleaved in one run; writes results/collectives.csv.

    python -m windtunnel.experiments.bench.collectives [ranks ...]

The crossover sets NATIVE_BELOW_BYTES of engine/gloo.py.
"""

import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ...engine.communicator import NativeCommunicator
from ...engine.gloo import GlooCommunicator
from ...engine.world import World
from ..files import write_csv

SIZES_BYTES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20]
KINDS = ("all_reduce", "reduce_scatter", "all_gather")
RESULTS = Path(__file__).parent / "results" / "collectives.csv"
SECONDS_PER_POINT = 1.0


def compare(rank: int, world: int, kind: str, nbytes: int) -> tuple[float, float]:
    """Median seconds of (our ring, Gloo's own call) on a buffer of fp32."""
    group = dist.group.WORLD
    assert group is not None
    ring = GlooCommunicator("data", group, _get_default_store(), 60.0)
    ring.native_below_bytes = {}
    native = NativeCommunicator("data", group)
    buffer = torch.zeros(nbytes // 4 // world * world)
    times: dict[str, list[float]] = {"ring": [], "native": []}
    deadline = time.perf_counter() + SECONDS_PER_POINT
    enough = torch.zeros(1)
    while enough.item() == 0:  # the ranks agree on when to stop
        for name, communicator in (("ring", ring), ("native", native)):
            dist.barrier()
            began = time.perf_counter()
            getattr(communicator, kind)(buffer, "bench").wait()
            times[name].append(time.perf_counter() - began)
        enough[0] = float(time.perf_counter() > deadline and len(times["ring"]) > 5)
        dist.broadcast(enough, 0)
    ring.close()
    return statistics.median(times["ring"][1:]), statistics.median(times["native"][1:])


def main() -> None:
    rows = []
    for ranks in [int(argument) for argument in sys.argv[1:]] or [2, 4]:
        with World(ranks, threads=1) as world:
            for kind in KINDS:
                for nbytes in SIZES_BYTES:
                    ours, theirs = (max(times) for times in zip(*world.run(compare, kind, nbytes), strict=True))
                    rows.append(
                        {
                            "date": date.today().isoformat(),
                            "machine": f"{platform.machine()}, torch {torch.__version__}",
                            "ranks": ranks,
                            "kind": kind,
                            "bytes": nbytes,
                            "ring_s": f"{ours:.3e}",
                            "gloo_s": f"{theirs:.3e}",
                            "gloo_over_ring": f"{theirs / ours:.2f}",
                        }
                    )
                    print(*rows[-1].values(), flush=True)
    write_csv(RESULTS, rows)


if __name__ == "__main__":
    main()
