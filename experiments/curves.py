"""Bus bandwidth of all-reduce against size: priced beside what was published, and beside what this machine does.

Bus bandwidth is what nccl-tests prints: the buffer over the time, times 2 (n - 1) / n, the share of the buffer that a
bandwidth-optimal all-reduce sends; it is comparable between numbers of ranks.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..collectives.choice import candidates, choose, native
from ..collectives.tiers import Tier
from ..sim.hardware import load_cluster
from .files import write_csv
from .fit_network import NODES, single_node
from .reproduce import Item, Say

NODE_GPUS = 8

RANKS = 4
TRANSPORTS = {"sockets": False, "shared memory": True}
HERE = ("ring", "bidirectional_ring", "halving_doubling", "recursive_doubling", "double_binary_tree/4", "native")
HERE_BYTES = tuple(4**power << 12 for power in range(7))
ROUNDS = 7
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One all-reduce.

    Attributes:
        network: what it ran on, the title of its panel.
        witness: "published", "measured", or "priced".
    """

    network: str
    witness: str
    algorithm: str
    ranks: int
    nbytes: int
    seconds: float

    @property
    def bus_bytes_per_s(self) -> float:
        return 2 * (self.ranks - 1) / self.ranks * self.nbytes / self.seconds


def reproduce(folder: Path, say: Say) -> Item:
    """Both comparisons, in one picture."""
    from .plots import plot_curves

    published = published_points()
    say(f"measuring all-reduce on {RANKS} ranks of this machine, over sockets and through shared memory")
    measured = measured_points()
    priced = [*priced_nodes(published), *priced_here(measured)]
    points = [*published, *measured, *priced]
    rows = [{**asdict(point), "bus_bytes_per_s": point.bus_bytes_per_s} for point in points]
    errors = {gpu: mean_error(published, priced, network(gpu)) for gpu in NODES}
    said = ", ".join(f"{gpu.upper()} x{NODE_GPUS} {error:.1%}" for gpu, error in errors.items())
    return Item(
        name="collectives",
        plot=plot_curves(points, folder / "collectives.png"),
        csv=write_csv(folder / "collectives.csv", rows),
        rows=rows,
        sentence=f"mean error of the priced all-reduce, 1 MiB to 1 GiB, against the published: {said}; {_here(points)}",
    )


def network(gpu: str) -> str:
    return f"{NODES[gpu].cluster}, {NODE_GPUS} GPUs"


def published_points() -> list[Point]:
    """nccl-tests on nodes of 8 GPUs."""
    return [
        Point(
            network=network(point.curve),
            witness="published",
            algorithm="NCCL",
            ranks=NODE_GPUS,
            nbytes=point.nbytes,
            seconds=point.seconds,
        )
        for point in single_node()
        if point.gpus == NODE_GPUS
    ]


def priced_nodes(published: Sequence[Point]) -> list[Point]:
    """Every family of algorithms, in its best number of pieces, and what NCCL would choose of its own."""
    points = []
    for gpu, node in NODES.items():
        tiers = load_cluster(node.cluster).tiers(NODE_GPUS)
        sizes = sorted({point.nbytes for point in published if point.network == network(gpu)})
        contenders = {"NCCL": native("all_reduce", NODE_GPUS, tiers)}
        for name in candidates("all_reduce", NODE_GPUS, tiers):
            family = name.partition("/")[0]
            contenders[family] = (*contenders.get(family, ()), name)
        points += priced(network(gpu), NODE_GPUS, tiers, contenders, sizes)
    return points


def priced(
    where: str, ranks: int, tiers: Sequence[Tier], contenders: Mapping[str, Sequence[str]], sizes: Sequence[int]
) -> list[Point]:
    """Each contender's price at each size: that of the best of its algorithms."""
    return [
        Point(
            network=where,
            witness="priced",
            algorithm=contender,
            ranks=ranks,
            nbytes=nbytes,
            seconds=choose("all_reduce", nbytes, ranks, tiers, names).seconds,
        )
        for contender, names in contenders.items()
        for nbytes in sizes
    ]


def measured_points() -> list[Point]:
    """Every algorithm and Gloo's own, over both transports, on ranks of this machine."""
    from ..engine.world import World

    points = []
    with World(RANKS, threads=1) as world:
        for transport, shared in TRANSPORTS.items():
            for nbytes in HERE_BYTES:
                times = world.run(_time_algorithms, shared, nbytes)
                for algorithm, by_rank in zip(HERE, zip(*times, strict=True), strict=True):
                    points.append(
                        Point(
                            network=here(transport),
                            witness="measured",
                            algorithm=algorithm,
                            ranks=RANKS,
                            nbytes=nbytes,
                            seconds=max(by_rank),
                        )
                    )
    return points


def here(transport: str) -> str:
    return f"this machine, {RANKS} ranks, {transport}"


def _time_algorithms(rank: int, world: int, shared: bool, nbytes: int) -> list[float]:
    """Median seconds of an fp32 all-reduce by each algorithm of HERE, interleaved."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    from ..engine.gloo import GlooCommunicator

    assert dist.group.WORLD is not None
    communicator = GlooCommunicator("data", dist.group.WORLD, _get_default_store(), TIMEOUT_S, shared_memory=shared)
    buffer = torch.zeros(nbytes // 4)
    samples: list[list[float]] = [[] for _ in HERE]
    for _ in range(ROUNDS + 1):
        for name, taken in zip(HERE, samples, strict=True):
            communicator.force(name)
            dist.barrier()
            began = time.perf_counter()
            communicator.all_reduce(buffer, "bandwidth").wait()
            taken.append(time.perf_counter() - began)
    communicator.close()
    return [statistics.median(taken[1:]) for taken in samples]  # the first one warms up


def priced_here(measured: Sequence[Point]) -> list[Point]:
    """Prices of the algorithms on a hop fitted to the measured ring alone: the others are predictions."""
    from .calibrate import fit_ring
    from .timing import RingTime

    points = []
    for transport in TRANSPORTS:
        ring = [point for point in measured if point.network == here(transport) and point.algorithm == "ring"]
        latency_s, bytes_per_s = fit_ring([RingTime("all_reduce", p.nbytes, p.seconds) for p in ring], RANKS)
        tier = Tier(name=transport, ranks=RANKS, latency_s=latency_s, bytes_per_s=bytes_per_s)
        ours = {name: (name,) for name in HERE if name != "native"}
        points += priced(here(transport), RANKS, [tier], ours, HERE_BYTES)
    return points


def mean_error(witnesses: Sequence[Point], priced: Sequence[Point], where: str) -> float:
    """Mean |priced / witness - 1| of what NCCL is priced at, over the sizes of one network's witnesses."""
    prices = {p.nbytes: p.seconds for p in priced if p.network == where and p.algorithm == "NCCL"}
    return statistics.fmean(abs(prices[p.nbytes] / p.seconds - 1) for p in witnesses if p.network == where)


def _here(points: Sequence[Point]) -> str:
    """How the best of our programs does against Gloo's own call at the largest size."""
    parts: list[str] = []
    for transport in TRANSPORTS:
        times: dict[str, Any] = {
            p.algorithm: p.seconds
            for p in points
            if p.network == here(transport) and p.witness == "measured" and p.nbytes == HERE_BYTES[-1]
        }
        native = times.pop("native")
        best = min(times, key=lambda name: times[name])
        parts.append(f"{native / times[best]:.1f}x by {best} over {transport}")
    return f"here, {HERE_BYTES[-1] >> 20} MiB on {RANKS} ranks against Gloo's own: {', '.join(parts)}"
