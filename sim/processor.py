"""A GPU, or the share of a CPU that one rank gets: peaks, achievable shares of them, and measurements.

"Achievable" figures are fitted to measurements of kernels, never to training steps. Each figure has its source.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Literal

from ..reading import STRICT, nearest

DTYPES = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8")
"""Data types that a matrix product may have a peak for."""


def require(check: bool, name: str, value: object, allowed: str) -> None:
    if not check:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def require_positive(thing: object, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(thing, name)
        if value is not None:
            require(0 < value < math.inf, name, value, "> 0 and finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulPoint:
    """A measured matrix product: `batch` times (m, k) by (k, n) ran at `flops_per_s`."""

    __pydantic_config__ = STRICT

    dtype: str
    batch: int
    m: int
    n: int
    k: int
    flops_per_s: float

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require_positive(self, ("batch", "m", "n", "k", "flops_per_s"))


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCurve:
    """Measured seconds of an op against the bytes that it reads and writes.

    Attributes:
        name: the op, as in Kernel; "default" stands for ops of family "memory" without a curve of their own.
        dtype: as in Kernel.
        points: (bytes, seconds), bytes ascending.
    """

    __pydantic_config__ = STRICT

    name: str
    dtype: str
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes = [nbytes for nbytes, _ in self.points]
        rising = all(a < b for a, b in pairwise(sizes))
        positive = all(0 < value < math.inf for point in self.points for value in point)
        require(
            bool(sizes) and rising and positive,
            "points",
            self.points,
            "at least one pair of positive (bytes, seconds), bytes ascending",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """A GPU, or the share of a CPU that one rank gets.

    Attributes:
        name: of the catalogue entry or file.
        kind: "gpu" or "cpu".
        memory_bytes: what a program can allocate, the framework included.
        memory_bytes_per_s: peak of the memory.
        memory_efficiency: share of that peak which a streaming kernel reaches.
        peak_flops: dense FLOP/s of a matrix product by data type; a type that is missing is not supported.
        matmul_efficiency: largest share of the peak that a big matrix product reaches.
        matmul_efficiencies: the same by data type, where one is known to differ.
        matmul_start_s: time of a matrix product that multiplies nothing, beyond kernel_floor_s.
        attention_efficiency: largest share of the peak that fused attention reaches on long sequences, forward.
        attention_backward_efficiency: the same, backward; None: not measured, the forward's share tells.
        multiprocessors: how many tiles are computed at a time.
        tile: rows and columns of the output that one multiprocessor computes at full efficiency.
        cache_bytes: operands and results up to so many together stay in the last-level cache; 0: not measured.
        cache_bytes_per_s: at which a streaming kernel works in that cache; None: not measured, as from memory.
        launch_s: host time to issue one op.
        kernel_floor_s: time of a kernel that does nothing.
        framework_bytes: memory of the context and the communication library, in no allocator's count.
        allocation_bytes: allocations are rounded up to a multiple of this.
        asynchronous: whether the host runs ahead of the device.
        compute_rate_under_communication: speed of kernels while a collective runs, 1 being undisturbed.
        communication_rate_under_compute: speed of collectives while a kernel runs.
        matmul_points, kernel_curves: measurements that replace the roofline, of calibrated profiles.
        sources: where each figure is from, by field name.
    """

    __pydantic_config__ = STRICT

    name: str
    kind: Literal["gpu", "cpu"]
    memory_bytes: int
    memory_bytes_per_s: float
    memory_efficiency: float
    peak_flops: dict[str, float] = field(hash=False)
    matmul_efficiency: float
    attention_efficiency: float
    multiprocessors: int
    tile: tuple[int, int]
    launch_s: float
    kernel_floor_s: float
    framework_bytes: int
    allocation_bytes: int
    asynchronous: bool
    compute_rate_under_communication: float
    communication_rate_under_compute: float
    matmul_efficiencies: dict[str, float] = field(default_factory=dict, hash=False)
    matmul_start_s: float = 0.0
    attention_backward_efficiency: float | None = None
    cache_bytes: int = 0
    cache_bytes_per_s: float | None = None
    matmul_points: tuple[MatmulPoint, ...] = ()
    kernel_curves: tuple[KernelCurve, ...] = ()
    sources: dict[str, str] = field(hash=False)

    def __post_init__(self) -> None:
        require_positive(self, ("memory_bytes", "memory_bytes_per_s", "multiprocessors", "allocation_bytes"))
        require_positive(self, ("cache_bytes_per_s",))
        for name in _SHARES:
            require(0 < getattr(self, name) <= 1, name, getattr(self, name), "> 0 and <= 1")
        if self.attention_backward_efficiency is not None:
            share = self.attention_backward_efficiency
            require(0 < share <= 1, "attention_backward_efficiency", share, "> 0 and <= 1")
        for name in ("launch_s", "kernel_floor_s", "framework_bytes", "matmul_start_s", "cache_bytes"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), ">= 0 and finite")
        require(min(self.tile) > 0, "tile", self.tile, "two numbers > 0")
        require(bool(self.peak_flops), "peak_flops", self.peak_flops, "at least one data type with its FLOP/s")
        for dtype, flops_per_s in self.peak_flops.items():
            if dtype not in DTYPES:
                raise ValueError(
                    f"peak_flops has unknown {dtype!r}; allowed: {', '.join(DTYPES)}{nearest(dtype, DTYPES)}"
                )
            require(0 < flops_per_s < math.inf, f"peak_flops.{dtype}", flops_per_s, "> 0 and finite")
        for dtype, share in self.matmul_efficiencies.items():
            if dtype not in self.peak_flops:
                raise ValueError(
                    f"matmul_efficiencies has {dtype!r}; allowed: what peak_flops has, {', '.join(self.peak_flops)}"
                )
            require(0 < share <= 1, f"matmul_efficiencies.{dtype}", share, "> 0 and <= 1")
        given = [name for name in FIGURES if name not in MEASURED or getattr(self, name) != MEASURED[name]]
        check_sources(self.sources, required=given, known=FIGURES)

    def matmul_share(self, dtype: str) -> float:
        """Largest share of the peak that a matrix product reaches in a data type."""
        return self.matmul_efficiencies.get(dtype, self.matmul_efficiency)


_SHARES = (
    "memory_efficiency",
    "matmul_efficiency",
    "attention_efficiency",
    "compute_rate_under_communication",
    "communication_rate_under_compute",
)

FIGURES = tuple(f.name for f in fields(Processor) if f.name not in ("name", "kind", "asynchronous", "sources"))
"""The fields of a Processor that need an entry in its sources (those in MEASURED only where they are given)."""

MEASURED: dict[str, object] = {
    "matmul_efficiencies": {},
    "matmul_start_s": 0.0,
    "attention_backward_efficiency": None,
    "cache_bytes": 0,
    "cache_bytes_per_s": None,
    "matmul_points": (),
    "kernel_curves": (),
}
"""What may be left out of a Processor, and the value that stands for "not measured"."""


def check_sources(sources: Mapping[str, str], required: Iterable[str], known: Iterable[str]) -> None:
    known = tuple(known)
    for name in sources:
        if name not in known:
            raise ValueError(f"sources has unknown {name!r}; allowed: {', '.join(known)}{nearest(name, known)}")
    for name in required:
        if not sources.get(name, "").strip():
            raise ValueError(f"{name!r} has no source: say in [sources] where the figure is from")
