"""Measures this machine's primitives into a cluster profile: one node whose "GPUs" are CPU ranks.

Operators, ring collectives and how much they disturb each other; never a training step. Ranks share memory and cores,
so all of them measure the same thing at the same time (experiments/primitives.py says what, experiments/timing.py how).
A profile is kept in the user's cache and is measured once for a CPU, a number of ranks and a torch.
"""

import datetime
import json
import os
import platform
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Any

from ..collectives.tiers import RING_STEPS
from ..collectives.trace import Kernel
from ..sim.hardware import FIGURES, Cluster, Fabric, KernelCurve, MatmulPoint, Processor, load_cluster
from ..sim.kernel import kernel_seconds

if TYPE_CHECKING:
    from .timing import KernelTime, ModuleTime, Overlap, RingTime, Timings

METHOD = 1
"""Number of the way of measuring; profiles of another number are not used."""

SAME_SIZE = 1.6
"""Points of a curve whose bytes differ by less than this factor are one point."""

SMALLEST_RATE = 0.01
"""Rates under overlap that noise would make zero or negative."""

FABRIC = ("bytes_per_s", "latency_s", "efficiency")

Progress = Callable[[str], None]


def calibrate(
    ranks: int = 2, *, redo: bool = False, path: Path | None = None, progress: Progress | None = None
) -> Cluster:
    """The profile of this machine with `ranks` CPU ranks of one thread, measured unless it has been.

    Args:
        redo: measure even if there is a profile.
        path: the cluster file, a TOML file that every command takes; its processor lies beside it. By default in
            the user's cache folder.
        progress: told what is being measured.

    Raises:
        ValueError: fewer than 2 ranks (there would be no ring to measure), or a place that cannot be written.
        WorldError: a rank failed.
    """
    if ranks < 2:
        raise ValueError(f"ranks = {ranks}; allowed: at least 2, since a ring of one rank cannot be measured")
    path = path or profile_path(ranks)
    if not redo and (known := _load(path, ranks)) is not None:
        return known
    _check_writable(path.parent)
    write(measure(ranks, progress or (lambda _: None)), path)
    return load_cluster(path)


def _check_writable(folder: Path) -> None:
    """Better to know before twenty seconds of measuring than after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write a profile in {str(folder)!r}: {error}; set XDG_CACHE_HOME or give a path"
        ) from None


def profile(cluster: Cluster) -> dict[str, Any]:
    """A profile as one JSON-able value; every figure's source is in the two tables `sources`."""
    return asdict(cluster)


def profile_path(ranks: int) -> Path:
    """Where the profile of this CPU, this torch and that many ranks is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{cpu_model()} {ranks} ranks torch {version('torch')} method {METHOD}".lower()
    return cache / "windtunnel" / f"{re.sub(r'[^a-z0-9.]+', '-', name).strip('-')}.toml"


def cpu_model() -> str:
    """The CPU's name as its maker writes it, as far as the system tells."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


# From timings to figures #


def measure(ranks: int, progress: Progress) -> Cluster:
    """Time everything on `ranks` ranks at once and make figures of it."""
    from ..engine.world import World
    from .timing import time_everything

    progress(f"starting {ranks} ranks")
    with World(ranks, threads=1) as world:
        timings = time_everything(world, progress)
    return as_cluster(timings, ranks)


def as_cluster(timings: "Timings", ranks: int) -> Cluster:
    """The profile that the timings of `ranks` ranks amount to."""
    source = f"measured by windtunnel calibrate on {datetime.date.today()}, {cpu_model()}, torch {version('torch')}"
    points = matmul_points(timings.products)
    peaks = {dtype: max(p.flops_per_s for p in points if p.dtype == dtype) for dtype in {p.dtype for p in points}}
    compute_rate, communication_rate = overlap_rates(timings.overlap)
    latency_s, bytes_per_s = fit_ring(timings.rings, ranks)
    processor = Processor(
        name="cpu-rank",
        kind="cpu",
        asynchronous=False,
        memory_bytes=machine_memory_bytes() // ranks,
        memory_bytes_per_s=memory_bytes_per_s(timings.operators),
        memory_efficiency=1.0,
        peak_flops=peaks,
        matmul_efficiency=1.0,
        attention_efficiency=min(1.0, attention_flops_per_s(timings.operators) / peaks["fp32"]),
        multiprocessors=1,
        tile=(1, 1),
        launch_s=0.0,
        kernel_floor_s=0.0,
        framework_bytes=timings.framework_bytes,
        allocation_bytes=1,
        compute_rate_under_communication=compute_rate,
        communication_rate_under_compute=communication_rate,
        matmul_points=tuple(point for point in points if point.dtype == "fp32"),
        kernel_curves=kernel_curves(timings.operators),
        sources=dict.fromkeys(FIGURES, source),
    )
    return Cluster(
        name=f"{ranks} CPU ranks",
        processor=replace(processor, launch_s=launch_seconds(timings.module, processor)),
        gpus_per_node=ranks,
        nodes=1,
        intra_node=Fabric(bytes_per_s=bytes_per_s, latency_s=latency_s),
        inter_node=None,
        sources=dict.fromkeys(("gpus_per_node", "nodes", *(f"intra_node.{key}" for key in FABRIC)), source),
    )


def matmul_points(timed: "Iterable[KernelTime]") -> tuple[MatmulPoint, ...]:
    """One point per shape: a trace does not say in which layout a product's operands lie, so layouts are averaged."""
    by_shape: dict[tuple[str, tuple[int, ...]], list[float]] = defaultdict(list)
    for kernel, seconds in timed:
        by_shape[kernel.dtype, kernel.shape].append(seconds)
    return tuple(
        MatmulPoint(dtype=dtype, batch=b, m=m, n=n, k=k, flops_per_s=2.0 * b * m * n * k / fmean(seconds))
        for (dtype, (b, m, n, k)), seconds in sorted(by_shape.items())
    )


def kernel_curves(timed: "Iterable[KernelTime]") -> tuple[KernelCurve, ...]:
    """A curve per operator and data type; that of `add` also stands for operators that have none."""
    by_name: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for kernel, seconds in timed:
        by_name[kernel.name, kernel.dtype].append((float(_bytes(kernel)), seconds))
        if kernel.name == "add":
            by_name["default", kernel.dtype].append((float(_bytes(kernel)), seconds))
    return tuple(
        KernelCurve(name=name, dtype=dtype, points=merge_points(points))
        for (name, dtype), points in sorted(by_name.items())
    )


def merge_points(points: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Points (bytes, seconds) by size, those of almost equal bytes as one: variants of an operator share a curve."""
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        if groups and point[0] < SAME_SIZE * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return tuple((geometric_mean(b for b, _ in group), geometric_mean(s for _, s in group)) for group in groups)


def memory_bytes_per_s(timed: "Iterable[KernelTime]") -> float:
    """Of the largest copy, which no cache holds."""
    nbytes, seconds = max((_bytes(kernel), seconds) for kernel, seconds in timed if kernel.name == "copy_")
    return nbytes / seconds


def attention_flops_per_s(timed: "Iterable[KernelTime]") -> float:
    """The best rate of a forward with its backward, over the sizes measured."""
    passes: dict[tuple[int, ...], list[KernelTime]] = defaultdict(list)
    for one in timed:
        if one.kernel.family == "attention":
            passes[one.kernel.shape].append(one)
    return max(sum(k.flops for k, _ in both) / sum(s for _, s in both) for both in passes.values())


def launch_seconds(module: "ModuleTime", processor: Processor) -> float:
    """What a kernel costs in a module under autograd beyond the kernel itself, which `processor` prices."""
    kernels_s = sum(kernel_seconds(kernel, processor) for kernel in module.kernels)
    return max(0.0, module.seconds - kernels_s) / len(module.kernels)


def fit_ring(timed: "Sequence[RingTime]", ranks: int) -> tuple[float, float]:
    """(latency_s, bytes_per_s) of a hop, for `ring_seconds` of collectives/tiers.py on one tier of `ranks` ranks.

    With x steps a collective takes x latency + x (nbytes / ranks) / bandwidth. Least squares on relative errors:
    each equation is divided by its measured time, and the normal equations are solved for latency and 1 / bandwidth.
    """
    rows = []
    for kind, nbytes, seconds in timed:
        steps = RING_STEPS[kind] * (ranks - 1)
        rows.append((steps / seconds, steps * nbytes / ranks / seconds))
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = aa * bb - ab * ab
    latency_s, s_per_byte = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if latency_s < 0 or s_per_byte <= 0:  # noise: what is left is the best line through the origin
        latency_s, s_per_byte = 0.0, b / bb
    return latency_s, 1.0 / s_per_byte


def overlap_rates(overlap: "Overlap") -> tuple[float, float]:
    """(compute rate under communication, communication rate under compute), each in (0, 1].

    Both kinds start at once, and the first to end, after t seconds, was disturbed all along: its rate is its time
    alone over t. The other one did rate * t of its work until then and the rest at full speed, so that
    rate = (time alone - (its end - t)) / t. See Interference in sim/streams.py.
    """
    both_s = min(overlap.compute_together_s, overlap.communication_together_s)
    compute_rate = (overlap.compute_alone_s - (overlap.compute_together_s - both_s)) / both_s
    communication_rate = (overlap.communication_alone_s - (overlap.communication_together_s - both_s)) / both_s
    return _share(compute_rate), _share(communication_rate)


def _share(rate: float) -> float:
    return min(1.0, max(SMALLEST_RATE, rate))


def _bytes(kernel: Kernel) -> int:
    return kernel.read_bytes + kernel.write_bytes


def machine_memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# The files #


def write(cluster: Cluster, path: Path) -> None:
    """The cluster to `path` and its processor beside it. Each file is complete from the moment that it has its name.

    Raises:
        OSError: the folder cannot be written.
    """
    gpu = path.with_name(f"{path.stem}.processor.toml")
    _replace(gpu, to_toml(asdict(cluster.processor)))
    fabric = {key: getattr(cluster.intra_node, key) for key in FABRIC}
    _replace(
        path,
        to_toml(
            {
                "gpu": gpu.name,
                "gpus_per_node": cluster.gpus_per_node,
                "nodes": cluster.nodes,
                "intra_node": fabric,
                "sources": cluster.sources,
            }
        ),
    )


def to_toml(table: Mapping[str, Any]) -> str:
    """A table of plain values, tables of plain values, and arrays of such tables. None is left out."""
    plain, tables = [], []
    for key, value in table.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            tables.append(f"\n[{_key(key)}]\n{to_toml(value)}")
        elif isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
            tables += [f"\n[[{_key(key)}]]\n{to_toml(row)}" for row in value]
        else:
            # JSON of strings, numbers, booleans and arrays of them is TOML too.
            plain.append(f"{_key(key)} = {json.dumps(value)}\n")
    return "".join((*plain, *tables))


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def _load(path: Path, ranks: int) -> Cluster | None:
    """The profile at `path`, if there is a sound one for that many ranks."""
    try:
        cluster = load_cluster(path)
    except ValueError:
        return None
    return cluster if cluster.gpus_per_node == ranks else None
