"""Seconds of one kernel on one processor: what was measured where there is a measurement, else a roofline.

The roofline (Williams, Waterman and Patterson 2009) takes the slower of arithmetic and memory traffic; matrix products
(gemm.py) and attention (attention.py) have more to them. The time of a kernel that does nothing comes on top: the
pipeline of a kernel fills and drains once. All that only moves bytes (softmax, norms, dropout, optimizers, embeddings)
is priced by its own traffic.
"""

import math
from bisect import bisect_left

from ..collectives.trace import Kernel
from .attention import attention_seconds
from .gemm import matmul_seconds
from .processor import KernelCurve, MatmulPoint, Processor

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
            if seconds is not None:
                return seconds
            return processor.kernel_floor_s + traffic_seconds(kernel.read_bytes + kernel.write_bytes, processor)
        case "matmul":
            return _matmul_seconds(kernel, processor)
        case "attention":
            seconds = _measured(kernel, processor)
            if seconds is not None:
                return seconds
            arithmetic_s = attention_seconds(kernel, _peak(kernel, processor), processor)
        case "convolution":
            seconds = _measured(kernel, processor)
            if seconds is not None:
                return seconds
            arithmetic_s = kernel.flops / (_peak(kernel, processor) * processor.matmul_share(kernel.dtype))
        case _:
            raise ValueError(
                f"kernel {kernel.name!r} has unknown family {kernel.family!r}; "
                "known: matmul, attention, convolution, memory"
            )
    traffic_s = (kernel.read_bytes + kernel.write_bytes) / (processor.memory_bytes_per_s * processor.memory_efficiency)
    return processor.kernel_floor_s + max(arithmetic_s, traffic_s)


def traffic_seconds(nbytes: int, processor: Processor) -> float:
    """Seconds that a kernel streams so many bytes, without the time of a kernel that does nothing.

    That time makes small kernels slow. One whose operands and results fit into the cache together is faster than
    memory: it finds there what the kernel before it has just written.
    """
    if processor.cache_bytes_per_s is not None and nbytes <= processor.cache_bytes:
        return nbytes / processor.cache_bytes_per_s
    return nbytes / (processor.memory_bytes_per_s * processor.memory_efficiency)


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
    if points:
        batch, m, n, k = kernel.shape
        rate = _interpolated_flops_per_s((batch, m, n, k), points)
        return max(kernel.flops / rate, processor.kernel_floor_s)
    return matmul_seconds(kernel, _peak(kernel, processor), processor)


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
