"""Fits the network profile of a node to published all-reduces, and says how far off it is: one profile for all sizes.

NCCL runs a ring inside a node, so a time is linear in what is unknown: seconds of start, of a hop, and per byte that
passes through local memory. What a link's packets leave of its bandwidth is known and not fitted. Least squares on
relative errors, no constant below zero. `python -m windtunnel.experiments.fit_network` prints the constants of the
catalogue's clusters beside those fitted now, and the errors.
"""

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from ..collectives.choice import choose
from ..collectives.costs import seconds
from ..collectives.tiers import Tier
from ..sim.hardware import load_cluster
from .tables import show, table

PUBLISHED = Path(__file__).parent / "published"

NVLINK_EFFICIENCY = 256 / 272
"""Share of NVLink's bandwidth that is payload: a header and up to 16 flits of it, 16 bytes each (WikiChip, NVLink)."""

V100_LINKS = {2: 1, 4: 4, 8: 6}
"""NVLinks per GPU that rings over the first 2, 4 and 8 GPUs of a DGX-1 find in its hybrid cube mesh."""

MIB = 1 << 20
RANGES = ((0, MIB), (MIB, 8 * MIB), (8 * MIB, 128 * MIB), (128 * MIB, 1 << 40))
"""Sizes that errors are told apart by: from, up to below, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One published all-reduce.

    Attributes:
        curve: what it is part of ("a100", "h100_1x8_p5").
    """

    curve: str
    gpus: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What is fitted of a node; the fields as in Tier."""

    start_s: float
    latency_s: float
    local_bytes_per_s: float

    def tier(self, gpus: int, bytes_per_s: float) -> Tier:
        """The node under a ring over some of its GPUs."""
        return Tier(
            name="intra_node",
            ranks=gpus,
            bytes_per_s=bytes_per_s,
            start_s=self.start_s,
            latency_s=self.latency_s,
            local_bytes_per_s=self.local_bytes_per_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A kind of node that was measured.

    Attributes:
        cluster: its name in the catalogue.
        gpus: numbers of GPUs that were measured.
        link_bytes_per_s: of a GPU in a ring over so many GPUs, nominal, per direction.
    """

    cluster: str
    gpus: tuple[int, ...]
    link_bytes_per_s: Callable[[int], float]


NODES = {
    "a100": Node(cluster="dgx-a100", gpus=(2, 4, 8), link_bytes_per_s=lambda gpus: 12 * 25e9),
    "v100": Node(cluster="dgx-1", gpus=(2, 4, 8), link_bytes_per_s=lambda gpus: V100_LINKS[gpus] * 25e9),
}
"""By GPU, as allreduce_single_node.csv calls it."""


def single_node() -> list[Measured]:
    """The all-reduces inside one node, in place and out of place in the mean."""
    with (PUBLISHED / "allreduce_single_node.csv").open(newline="") as file:
        return [
            Measured(
                curve=row["gpu"],
                gpus=int(row["gpus"]),
                nbytes=int(row["bytes"]),
                seconds=(float(row["out_of_place_ns"]) + float(row["in_place_ns"])) / 2e9,
            )
            for row in csv.DictReader(file)
        ]


def curve(name: str) -> list[Measured]:
    """A curve of nccl_curves.csv: the rows that have a size; those without a time by their bus bandwidth."""
    points = []
    with (PUBLISHED / "nccl_curves.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["curve_id"] == name and row["size_bytes"]:
                gpus, nbytes = int(row["n_gpus"]), int(row["size_bytes"])
                bus_bytes = 2 * (gpus - 1) / gpus * nbytes
                taken_s = float(row["time_us"]) / 1e6 if row["time_us"] else bus_bytes / float(row["busbw_GBps"]) / 1e9
                points.append(Measured(curve=name, gpus=gpus, nbytes=nbytes, seconds=taken_s))
    if not points:
        raise ValueError(f"curve = {name!r} has no row with a size in nccl_curves.csv")
    return points


def fit(measured: Sequence[Measured], node: Node) -> Profile:
    """The profile of a node that prices rings best: the least sum of squared relative errors.

    The price is linear in the three constants, so its coefficients are prices with one of them being 1.
    """
    nothing = Profile(start_s=0.0, latency_s=0.0, local_bytes_per_s=math.inf)
    ones = (
        replace(nothing, start_s=1.0),
        replace(nothing, latency_s=1.0),
        replace(nothing, local_bytes_per_s=1.0),
    )
    rows = [
        [ring_seconds(point, unit.tier(point.gpus, math.inf)) / point.seconds for unit in ones] for point in measured
    ]
    links = [
        ring_seconds(point, nothing.tier(point.gpus, NVLINK_EFFICIENCY * node.link_bytes_per_s(point.gpus)))
        / point.seconds
        for point in measured
    ]
    start_s, latency_s, local_s_per_byte = non_negative_least_squares(np.array(rows), 1 - np.array(links))
    rate = 1 / local_s_per_byte if local_s_per_byte > 0 else math.inf
    return Profile(start_s=start_s, latency_s=latency_s, local_bytes_per_s=rate)


def ring_seconds(point: Measured, tier: Tier) -> float:
    return seconds("all_reduce", "ring", point.nbytes, point.gpus, [tier])


def non_negative_least_squares(columns: NDArray[np.float64], target: NDArray[np.float64]) -> list[float]:
    """x >= 0 of the least |columns x - target|, by trying which of a few unknowns are zero.

    Args:
        columns: [equations, unknowns]
        target: [equations]
    """
    unknowns = columns.shape[1]
    scale = np.abs(columns).max(axis=0)
    best, least = np.zeros(unknowns), float(target @ target)
    for number in range(1, unknowns + 1):
        for chosen in map(list, combinations(range(unknowns), number)):
            solution, *_ = np.linalg.lstsq((columns / scale)[:, chosen], target, rcond=None)
            rest = (columns / scale)[:, chosen] @ solution - target
            if (solution >= 0).all() and rest @ rest < least:
                best, least = np.zeros(unknowns), float(rest @ rest)
                best[chosen] = solution
    return [float(value) for value in best / scale]


def catalogue_seconds(point: Measured, gpu: str) -> float:
    """A ring on the catalogue's cluster; its links scaled to those that so few GPUs find."""
    node = NODES[gpu]
    intra, *_ = load_cluster(node.cluster).tiers(max(node.gpus))
    share = node.link_bytes_per_s(point.gpus) / node.link_bytes_per_s(max(node.gpus))
    return ring_seconds(point, replace(intra, bytes_per_s=intra.bytes_per_s * share))


def relative_errors(points: Iterable[Measured], price: Callable[[Measured], float]) -> list[float]:
    return [price(point) / point.seconds - 1 for point in points]


def mean_error(points: Iterable[Measured], price: Callable[[Measured], float]) -> float:
    """Mean absolute relative error."""
    return fmean(map(abs, relative_errors(points, price)))


def left_out_error(gpu: str, gpus: int) -> float:
    """Mean error on one number of GPUs of a profile that was fitted to the others."""
    node = NODES[gpu]
    points = [point for point in single_node() if point.curve == gpu]
    profile = fit([point for point in points if point.gpus != gpus], node)
    tier = profile.tier(gpus, NVLINK_EFFICIENCY * node.link_bytes_per_s(gpus))
    return mean_error([point for point in points if point.gpus == gpus], lambda point: ring_seconds(point, tier))


CURVES = {
    "a100_1x8_mleng": "dgx-a100",
    "a100_1x8_azure": "dgx-a100",
    "h100_1x8_p5": "dgx-h100",
    "h100_1x8_azure": "dgx-h100",
    "a100_2x8_p4de": "aws-p4de",
}
"""Curves that nothing inside a node was fitted to, by the cluster that prices them."""

BETWEEN_NODES = ("ring", "halving_doubling", "hierarchical/8x2", "hierarchical/8x2/8")
"""What stands for NCCL's rings and trees on two nodes."""


def curve_seconds(point: Measured) -> float:
    """A point of a curve on the catalogue's cluster: a ring inside a node, the fastest of a few on two."""
    tiers = load_cluster(CURVES[point.curve]).tiers(point.gpus)
    allowed = ("ring",) if point.gpus <= tiers[0].ranks else BETWEEN_NODES
    return choose("all_reduce", point.nbytes, point.gpus, tiers, allowed).seconds


LATENCIES_S = tuple(round(5e-6 * 1.05**step, 7) for step in range(60))
EFFICIENCIES = tuple(percent / 100 for percent in range(70, 101, 2))


def fit_between(points: Sequence[Measured], intra: Tier, bytes_per_s: float) -> tuple[float, float]:
    """(latency_s, efficiency) of the links between two nodes that price a curve best, from a grid of both."""

    def squares(latency_s: float, efficiency: float) -> float:
        inter = Tier(
            name="inter_node", ranks=2 * intra.ranks, latency_s=latency_s, bytes_per_s=bytes_per_s * efficiency
        )
        prices = [
            choose("all_reduce", point.nbytes, point.gpus, (intra, inter), BETWEEN_NODES).seconds for point in points
        ]
        return sum((price / point.seconds - 1) ** 2 for price, point in zip(prices, points, strict=True))

    return min(((latency, share) for latency in LATENCIES_S for share in EFFICIENCIES), key=lambda pair: squares(*pair))


def main() -> None:
    """Print what is in the catalogue beside what is fitted now, and the errors of the catalogue."""
    points = single_node()
    constants, errors = [], []
    for gpu, node in NODES.items():
        mine = [point for point in points if point.curve == gpu]
        fitted, given = fit(mine, node), load_cluster(node.cluster).intra_node
        for name in ("start_s", "latency_s", "local_bytes_per_s"):
            constants.append((f"{node.cluster} {name}", f"{getattr(given, name):.4g}", f"{getattr(fitted, name):.4g}"))
        for gpus in node.gpus:
            some = [point for point in mine if point.gpus == gpus]
            row = _by_range(f"{gpu} x{gpus}", some, partial(catalogue_seconds, gpu=gpu))
            errors.append((*row, f"{left_out_error(gpu, gpus):.1%}"))
    two_nodes = curve("a100_2x8_p4de")
    intra, _ = load_cluster("aws-p4de").tiers(16)
    given_between = load_cluster("aws-p4de").inter_node
    assert given_between is not None
    latency_s, efficiency = fit_between(two_nodes, intra, given_between.bytes_per_s)
    constants.append(("aws-p4de inter_node.latency_s", f"{given_between.latency_s:.4g}", f"{latency_s:.4g}"))
    constants.append(("aws-p4de inter_node.efficiency", f"{given_between.efficiency:.4g}", f"{efficiency:.4g}"))
    for name in CURVES:
        errors.append((*_by_range(name, curve(name), curve_seconds), "-"))
    show(table("network profiles", ("", "catalogue", "fitted"), constants))
    columns = ("", "below 1 MiB", "1 to 8 MiB", "to 128 MiB", "above", "from 1 MiB", "if left out")
    note = "Mean absolute relative error of the catalogue's price; last: of a profile fitted to the other GPU counts."
    show(table("all-reduce, priced against published", columns, errors, note))


def _by_range(name: str, points: Sequence[Measured], price: Callable[[Measured], float]) -> tuple[str, ...]:
    cells = []
    for low, high in (*RANGES, (MIB, 1 << 40)):
        some = [point for point in points if low <= point.nbytes < high]
        cells.append(f"{mean_error(some, price):.1%}" if some else "-")
    return name, *cells


if __name__ == "__main__":
    main()
