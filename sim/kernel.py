"""Seconds of one kernel on one processor: what was measured where there is a measurement, else a roofline.

The roofline (Williams, Waterman and Patterson 2009) takes the slower of arithmetic and memory traffic. Arithmetic of a
matrix product is counted in whole tiles and whole waves of tiles, as NVIDIA's Matrix Multiplication Background User's
Guide describes (tile and wave quantization). The time of a kernel that does nothing comes on top: the pipeline of a
kernel fills and drains once.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable

from ..collectives.trace import Kernel
from .processor import KernelCurve, MatmulPoint, Processor

SMALLER_TILES = ((128, 256), (128, 128), (64, 256), (64, 128), (64, 64))
"""Output tiles, either way round, that a matrix product may fall back to where the largest leaves processors idle."""

SMALL_TILE_COST = 0.25
"""What loading operands more often costs: a tile that loads r times the bytes per FLOP of the processor's own tile
takes 1 + 0.25 (r - 1) times as long. Fitted to the small products of hw_microbench (A100 fp16, H100 fp8)."""

NEIGHBOURS = 4
"""How many measured products the rate of another one is interpolated from."""


class KernelCost:
    """`kernel_seconds` on one processor, with a memory: a replay asks for the same kernels over and over."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self._seconds: dict[Kernel, float] = {}

    def __call__(self, kernel: Kernel) -> float:
        """Seconds of the kernel; see `kernel_seconds`."""
        seconds = self._seconds.get(kernel)
        if seconds is None:
            seconds = self._seconds[kernel] = kernel_seconds(kernel, self.processor)
        return seconds


def kernel_seconds(kernel: Kernel, processor: Processor) -> float:
    """Seconds of the kernel, never less than the processor's kernel_floor_s.

    Raises:
        ValueError: the family is unknown, or the processor has no arithmetic in the kernel's data type.
    """
    match kernel.family:
        case "memory":
            seconds = _measured(kernel, processor, default=True)
            return seconds if seconds is not None else _roofline(0.0, kernel, processor)
        case "matmul":
            return _matmul_seconds(kernel, processor)
        case "attention":
            seconds = _measured(kernel, processor)
            if seconds is not None:
                return seconds
            rate = _peak(kernel, processor) * processor.attention_efficiency
        case "convolution":
            seconds = _measured(kernel, processor)
            if seconds is not None:
                return seconds
            rate = _peak(kernel, processor) * processor.matmul_efficiency
        case _:
            raise ValueError(
                f"kernel {kernel.name!r} has unknown family {kernel.family!r}; "
                "known: matmul, attention, convolution, memory"
            )
    return _roofline(kernel.flops / rate, kernel, processor)


def _roofline(arithmetic_s: float, kernel: Kernel, processor: Processor) -> float:
    traffic_bytes = kernel.read_bytes + kernel.write_bytes
    traffic_s = traffic_bytes / (processor.memory_bytes_per_s * processor.memory_efficiency)
    return processor.kernel_floor_s + max(arithmetic_s, traffic_s)


def _peak(kernel: Kernel, processor: Processor) -> float:
    try:
        return processor.peak_flops[kernel.dtype]
    except KeyError:
        raise ValueError(
            f"kernel {kernel.name!r} computes in {kernel.dtype!r}, which processor {processor.name!r} does not have; "
            f"it has {', '.join(processor.peak_flops)}"
        ) from None


def _matmul_seconds(kernel: Kernel, processor: Processor) -> float:
    points = [point for point in processor.matmul_points if point.dtype == kernel.dtype]
    batch, m, n, k = kernel.shape
    if points:
        rate = _interpolated_flops_per_s((batch, m, n, k), points)
        return max(kernel.flops / rate, processor.kernel_floor_s)
    rate = _peak(kernel, processor) * processor.matmul_efficiency
    return _roofline(_tiled_flops(batch, m, n, k, processor) / rate, kernel, processor)


def _tiled_flops(batch: int, m: int, n: int, k: int, processor: Processor) -> float:
    """FLOPs that the product costs at full rate: idle processors of the last wave and overhanging tiles count too.

    The best tile is taken among the processor's own and the standard ones that are smaller.
    """
    return min(
        _waves(batch, m, n, tile, processor.multiprocessors)
        * (2.0 * tile[0] * tile[1] * k * processor.multiprocessors)
        * _small_tile_cost(tile, processor.tile)
        for tile in _tiles(processor.tile)
    )


def _waves(batch: int, m: int, n: int, tile: tuple[int, int], multiprocessors: int) -> int:
    tiles = batch * math.ceil(m / tile[0]) * math.ceil(n / tile[1])
    return math.ceil(tiles / multiprocessors)


def _tiles(own: tuple[int, int]) -> Iterable[tuple[int, int]]:
    smaller = [tile for tile in SMALLER_TILES if tile[0] * tile[1] < own[0] * own[1]]
    return {(a, b) for tile in (own, *smaller) for a, b in (tile, tile[::-1])}


def _small_tile_cost(tile: tuple[int, int], own: tuple[int, int]) -> float:
    """Relative time per FLOP. A tile of a by b loads a + b operands for every a b products."""
    loads = sum(tile) / math.prod(tile)
    own_loads = sum(own) / math.prod(own)
    return max(1.0, 1.0 + SMALL_TILE_COST * (loads / own_loads - 1.0))


def _interpolated_flops_per_s(shape: tuple[int, int, int, int], points: list[MatmulPoint]) -> float:
    """The rate at `shape` from the nearest measured products, weighted by 1 / distance^2 in log (batch, m, n, k)."""
    wanted = [math.log(max(size, 1)) for size in shape]

    def distance(point: MatmulPoint) -> float:
        return math.dist(wanted, [math.log(size) for size in (point.batch, point.m, point.n, point.k)])

    near = sorted((distance(point), point.flops_per_s) for point in points)[:NEIGHBOURS]
    if near[0][0] == 0.0:
        return near[0][1]
    weights = [1.0 / d**2 for d, _ in near]
    logs = [math.log(rate) for _, rate in near]
    return math.exp(sum(w * log for w, log in zip(weights, logs, strict=True)) / sum(weights))


def _measured(kernel: Kernel, processor: Processor, default: bool = False) -> float | None:
    """Seconds from the curve of the op at its data type, else at any, else (where asked) from the curve "default"."""
    curve = _find_curve(kernel.name, kernel.dtype, processor)
    if curve is None and default:
        curve = _find_curve("default", kernel.dtype, processor)
    if curve is None:
        return None
    return max(_on_curve(kernel.read_bytes + kernel.write_bytes, curve.points), processor.kernel_floor_s)


def _find_curve(name: str, dtype: str, processor: Processor) -> KernelCurve | None:
    named = [curve for curve in processor.kernel_curves if curve.name == name]
    exact = [curve for curve in named if curve.dtype == dtype]
    return next(iter(exact or named), None)


def _on_curve(nbytes: float, points: tuple[tuple[float, float], ...]) -> float:
    """Seconds at `nbytes`: log-log between two points, at the bandwidth of the last point beyond either end."""
    position = bisect_left(points, nbytes, key=lambda point: point[0])
    if position == len(points) or (position == 0 and nbytes < points[0][0]):
        end_bytes, end_s = points[min(position, len(points) - 1)]
        return end_s * nbytes / end_bytes
    (right_bytes, right_s) = points[position]
    if right_bytes == nbytes:
        return right_s
    (left_bytes, left_s) = points[position - 1]
    part = math.log(nbytes / left_bytes) / math.log(right_bytes / left_bytes)
    return left_s * math.pow(right_s / left_s, part)
