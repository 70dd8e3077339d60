"""Fits what kernels cost on a GPU to published measurements of kernels, and says how far off it is.

Matrix products give the share of the peak by data type and the time of an empty product; streaming kernels the
bandwidth of memory and of the cache; fused attention its share of the peak, forward and backward. Least squares on
logarithms, every source with the same weight, no training step among them. `python -m
windtunnel.experiments.fit_kernels` prints the figures of the catalogue beside those fitted now, and the errors.
"""

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import exp, log, prod
from pathlib import Path
from statistics import fmean, pvariance

from ..collectives.trace import Kernel
from ..sim.attention import BACKWARD, FLASH, FlashCurve, attention_seconds
from ..sim.gemm import SMALL_TILE_COST, matmul_seconds
from ..sim.hardware import Processor, load_processor
from ..sim.kernel import kernel_seconds
from .tables import show, table

PUBLISHED = Path(__file__).parent / "published"

GPU_NAMES = {
    "A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 SXM": "a100-80gb",
    "H100-SXM5-80GB": "h100-sxm",
    "NVIDIA H100 SXM": "h100-sxm",
}
"""What hw_microbench.csv calls a GPU, as the catalogue does. Its other rows are of GPUs and things not priced here."""

ITEM_BYTES = {"fp64": 8, "fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
STREAM_ARRAY_BYTES = 8 << 25
"""BabelStream's default: 2^25 doubles."""
STREAM_ARRAYS = {"Copy": 2, "Mul": 2, "Add": 3, "Triad": 3, "Dot": 2}
BENCHMARK_WIDTH = 2048
"""FlashAttention's benchmark has heads of so many features together."""

MATMUL, STREAM, FLASH_FORWARD, FLASH_BACKWARD, PLAIN = "matmul", "stream", "attention", "attention_backward", "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A published time of a kernel, or of a few that follow each other.

    Attributes:
        gpu: its name in the catalogue.
        kind: "matmul", "stream", "attention", "attention_backward", or "plain" for attention without a fused kernel.
    """

    gpu: str
    kind: str
    source: str
    what: str
    kernels: tuple[Kernel, ...]
    seconds: float

    @property
    def dtype(self) -> str:
        return self.kernels[0].dtype


# What was measured #


def matmul(batch: int, m: int, n: int, k: int, dtype: str) -> Kernel:
    """Results of 8-bit products have 16 bits."""
    item = ITEM_BYTES[dtype]
    read, write = batch * (m * k + k * n) * item, batch * m * n * max(item, 2)
    return Kernel("mm", "matmul", 2.0 * batch * m * n * k, read, write, dtype, (batch, m, n, k))


def attention(kind: str, shape: tuple[int, ...], dtype: str, causal: bool) -> Kernel:
    """Shape: (batch, heads, queries, keys, head size). A backward multiplies five times, a forward twice."""
    batch, heads, queries, keys, size = shape
    products = 5 if kind == BACKWARD else 2
    tokens = batch * heads * size * ITEM_BYTES[dtype]
    read, write = tokens * (queries + 2 * keys), tokens * queries
    return Kernel(kind, "attention", 2.0 * products * prod(shape), read, write, dtype, shape, causal)


def stream(nbytes: int, dtype: str) -> Kernel:
    return Kernel("mul", "memory", 0.0, nbytes - nbytes // 2, nbytes // 2, dtype, (nbytes // ITEM_BYTES[dtype] // 2,))


def plain_attention(shape: tuple[int, ...], dtype: str) -> tuple[Kernel, ...]:
    """Scores, softmax, weighted values: the scores go through memory four times."""
    batch, heads, queries, keys, size = shape
    scores = batch * heads * queries * keys * ITEM_BYTES[dtype]
    softmax = Kernel("_softmax", "memory", 0.0, scores, scores, dtype, (batch, heads, queries, keys))
    many = batch * heads
    return matmul(many, queries, keys, size, dtype), softmax, matmul(many, queries, size, keys, dtype)


def measurements() -> list[Measured]:
    """All rows of both files that are kernels of GPUs in the catalogue."""
    return [*_collected(), *_microbenchmarks()]


def _collected() -> list[Measured]:
    with (PUBLISHED / "kernel_measurements.csv").open(newline="") as file:
        return [_collected_row(row) for row in csv.DictReader(file)]


def _collected_row(row: dict[str, str]) -> Measured:
    sizes, _, mask = row["shape"].partition(" ")
    shape = tuple(map(int, sizes.split("x")))
    kind, dtype, value = row["kind"], row["dtype"], float(row["value"])
    match kind:
        case "matmul":
            batch, m, n, k = shape
            kernel = matmul(batch, m, n, k, dtype)
        case "stream":
            kernel = stream(shape[0], dtype)
        case _:
            kernel = attention(kind, shape, dtype, mask == "causal")
    # Causal attention is published by half of its FLOPs.
    seconds = value / 1e6 if row["unit"] == "us" else kernel.flops * (0.5 if kernel.causal else 1.0) / value / 1e12
    return Measured(
        gpu=row["gpu"], kind=kind, source=row["source"], what=row["shape"], kernels=(kernel,), seconds=seconds
    )


def _microbenchmarks() -> list[Measured]:
    with (PUBLISHED / "hw_microbench.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"] in GPU_NAMES]
    found = []
    for row in rows:
        kernels = _microbenchmark(row)
        if kernels:
            rate = float(row["value"]) * 1e12  # FLOP/s or bytes/s
            work = sum(kernel.flops for kernel in kernels) or sum(k.read_bytes + k.write_bytes for k in kernels)
            kind = PLAIN if len(kernels) > 1 else {"memory": STREAM}.get(kernels[0].family, kernels[0].family)
            found.append(
                Measured(
                    gpu=GPU_NAMES[row["gpu"]],
                    kind=kind,
                    source=row["source"].split()[0],
                    what=f"{row['row_id']} {row['parameter']}",
                    kernels=kernels,
                    seconds=work / rate,
                )
            )
    return found


def _microbenchmark(row: dict[str, str]) -> tuple[Kernel, ...]:
    """The kernels of a row of hw_microbench.csv; none if it is a copy or a file."""
    numbers = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", row["parameter"])}
    dtype = "fp16" if row["precision"] == "fp16 or bf16" else row["precision"]
    match row["kind"]:
        case "gemm":
            return (matmul(1, numbers["m"], numbers["n"], numbers["k"], dtype),)
        case "max_achievable_matmul":
            m, n, k = map(int, row["parameter"].partition("MxNxK=")[2].partition(";")[0].split("x"))
            return (matmul(1, m, n, k, dtype),)
        case "hbm_stream":
            return (stream(STREAM_ARRAYS[row["parameter"]] * STREAM_ARRAY_BYTES, "fp64"),)
        case "attention":
            heads, seq = BENCHMARK_WIDTH // numbers["head_dim"], numbers["seq"]
            shape = (numbers["batch"], heads, seq, seq, numbers["head_dim"])
            flash = row["parameter"].startswith("Flash")
            return (attention(FLASH_FORWARD, shape, dtype, False),) if flash else plain_attention(shape, dtype)
        case _:
            return ()


# Prices #


def price(measured: Measured, processor: Processor) -> float:
    return sum(kernel_seconds(kernel, processor) for kernel in measured.kernels)


def roofline(measured: Measured, processor: Processor) -> float:
    """What the same figures give without tiles, waves, splits, caches, masks and curves; for comparison."""
    total = 0.0
    for kernel in measured.kernels:
        share = processor.attention_efficiency if kernel.family == "attention" else processor.matmul_efficiency
        rate = processor.peak_flops.get(kernel.dtype, 1.0) * share
        traffic_s = (
            (kernel.read_bytes + kernel.write_bytes) / processor.memory_bytes_per_s / processor.memory_efficiency
        )
        total += processor.kernel_floor_s + max(kernel.flops / rate, traffic_s)
    return total


Price = Callable[[Measured, Processor], float]


def mean_error(rows: Iterable[Measured], processor: Processor, by: Price = price) -> float:
    """Mean absolute relative error."""
    return fmean(abs(by(row, processor) / row.seconds - 1) for row in rows)


def loss(rows: Sequence[Measured], processor: Processor, by: Price = price) -> float:
    """Mean square of log(priced / measured), every source with the same weight."""
    squares: dict[str, list[float]] = {}
    for row in rows:
        squares.setdefault(row.source, []).append(log(by(row, processor) / row.seconds) ** 2)
    return fmean(fmean(some) for some in squares.values())


# Fits #

LONG_S = 1e-3
"""Only products of a millisecond or more tell the share of the peak. Shorter ones are timed at clocks that a GPU does
not keep through a step: an A100 goes from 1,410 to about 1,200 MHz at its power limit (liangan1/GPU_travel)."""

STARTS_S = tuple(round(half * 5e-7, 7) for half in range(13))


def fit_matmul(rows: Sequence[Measured], processor: Processor, cost: float = SMALL_TILE_COST) -> Processor:
    """With the shares of the peak that price long products best, and the start that prices shapes best."""

    def by(row: Measured, one: Processor) -> float:
        return matmul_seconds(row.kernels[0], one.peak_flops[row.dtype], one, cost)

    def fitted(start_s: float) -> Processor:
        found = replace(processor, matmul_start_s=start_s)
        for dtypes, with_share in _SHARES.items():
            mine = [row for row in rows if row.dtype in dtypes]
            long = [row for row in mine if row.seconds >= LONG_S]
            if mine:
                found = with_share(found, _best_share(long or mine, partial(with_share, found), by))
        return found

    tells_start = min(row.seconds for row in rows) < SHORT_S
    return min(
        map(fitted, STARTS_S if tells_start else (processor.matmul_start_s,)),
        key=lambda one: shape_loss(rows, one, by),
    )


SHORT_S = 2e-5
"""Products that all take longer do not tell the start."""


def shape_loss(rows: Sequence[Measured], processor: Processor, by: Price) -> float:
    """Variance of log(priced / measured) within a source and data type, in the mean: clocks are a source's own."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        ratios.setdefault((row.source, row.dtype), []).append(log(by(row, processor) / row.seconds))
    return fmean(pvariance(some) for some in ratios.values())


def _share_of(dtype: str) -> Callable[[Processor, float], Processor]:
    return lambda one, share: replace(one, matmul_efficiencies={**one.matmul_efficiencies, dtype: share})


_SHARES: dict[tuple[str, ...], Callable[[Processor, float], Processor]] = {
    ("bf16", "fp16"): lambda one, share: replace(one, matmul_efficiency=share),
    **{(dtype,): _share_of(dtype) for dtype in ("fp8", "tf32", "fp32")},
}
"""Data types with a share of the peak in common, and a processor with that share."""


def _best_share(rows: Sequence[Measured], with_share: Callable[[float], Processor], by: Price) -> float:
    """By golden section: the loss of a share has one valley."""
    low, high = 0.05, 1.0
    golden = (5**0.5 - 1) / 2
    while high - low > 1e-3:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(rows, with_share(left), by) < loss(rows, with_share(right), by):
            high = right
        else:
            low = left
    return round((low + high) / 2, 3)


def fit_stream(rows: Sequence[Measured], processor: Processor) -> Processor:
    """With the bandwidths of memory and cache, the cache's size and the floor that price streaming kernels best."""
    large = [row for row in rows if _bytes(row) >= 100e6]
    fitted = replace(
        processor, memory_efficiency=_best_share(large, lambda s: replace(processor, memory_efficiency=s), price)
    )
    small = [row for row in rows if _bytes(row) < 100e6]
    if not small:
        return fitted
    fitted = replace(fitted, kernel_floor_s=_floor_s(small))
    inside = [row for row in small if 1e6 <= _bytes(row) <= 30e6]
    rates = [_bytes(row) / (row.seconds - fitted.kernel_floor_s) for row in inside if _bytes(row) >= 8e6]
    fitted = replace(fitted, cache_bytes_per_s=float(f"{exp(fmean(map(log, rates))):.3g}"))
    sizes = sorted(_bytes(row) for row in small)
    return min((replace(fitted, cache_bytes=size) for size in sizes), key=lambda one: loss(small, one))


def _floor_s(rows: Sequence[Measured]) -> float:
    """The time of the smallest kernel."""
    return round(min(rows, key=_bytes).seconds, 8)


def _bytes(row: Measured) -> int:
    return sum(kernel.read_bytes + kernel.write_bytes for kernel in row.kernels)


def fit_attention(rows: Sequence[Measured], processor: Processor, curve: FlashCurve = FLASH) -> Processor:
    """With the shares of the peak that price fused attention best, forward and, where it was measured, backward."""

    def by(row: Measured, one: Processor) -> float:
        return one.kernel_floor_s + attention_seconds(row.kernels[0], one.peak_flops[row.dtype], one, curve)

    forward = [row for row in rows if row.kind == FLASH_FORWARD]
    backward = [row for row in rows if row.kind == FLASH_BACKWARD]
    fitted = processor
    if forward:
        share = _best_share(forward, lambda s: replace(processor, attention_efficiency=s), by)
        fitted = replace(fitted, attention_efficiency=share)
    if backward:
        share = _best_share(backward, lambda s: replace(processor, attention_backward_efficiency=s), by)
        fitted = replace(fitted, attention_backward_efficiency=share)
    return fitted


def fit_curve(rows: Sequence[Measured]) -> FlashCurve:
    """What fused attention has in common on all GPUs, each of them fitted to it."""
    halves = (0.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0, 320.0, 384.0)

    def total(kind: str, curve: FlashCurve) -> float:
        mine = [row for row in rows if row.kind == kind]
        fitted = {gpu: fit_attention(_of(mine, gpu), _sourced(gpu), curve) for gpu in _gpus(mine)}

        def by(row: Measured, one: Processor) -> float:
            return one.kernel_floor_s + attention_seconds(row.kernels[0], one.peak_flops[row.dtype], one, curve)

        return fmean(loss(_of(mine, gpu), fitted[gpu], by) for gpu in fitted)

    forward = min(halves, key=lambda half: total(FLASH_FORWARD, replace(FLASH, forward_half_tokens=half)))
    backward = min(halves, key=lambda half: total(FLASH_BACKWARD, replace(FLASH, backward_half_tokens=half)))
    curve = FlashCurve(forward_half_tokens=forward, backward_half_tokens=backward, backward_share=1.0)
    both = [gpu for gpu in _gpus(rows) if any(row.kind == FLASH_BACKWARD for row in _of(rows, gpu))]
    shares = []
    for gpu in both:
        one = fit_attention([row for row in _of(rows, gpu) if row.kind != PLAIN], _sourced(gpu), curve)
        assert one.attention_backward_efficiency is not None
        shares.append(one.attention_backward_efficiency / one.attention_efficiency)
    return replace(curve, backward_share=round(fmean(shares), 2))


def fit_small_tile_cost(rows: Sequence[Measured]) -> float:
    """What loading operands more often costs, each GPU fitted to it."""

    def total(cost: float) -> float:
        def by(row: Measured, one: Processor) -> float:
            return matmul_seconds(row.kernels[0], one.peak_flops[row.dtype], one, cost)

        return fmean(
            shape_loss(mine, fit_matmul(mine, _sourced(gpu), cost), by)
            for gpu in _gpus(rows)
            if fits(mine := _of(rows, gpu))
        )

    return min((0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3), key=total)


def _gpus(rows: Iterable[Measured]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.gpu for row in rows))


def _of(rows: Iterable[Measured], gpu: str, *kinds: str) -> list[Measured]:
    return [row for row in rows if row.gpu == gpu and (not kinds or row.kind in kinds)]


FITS: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Measured], Processor], Processor], tuple[str, ...]]] = {
    "stream": ((STREAM,), fit_stream, ("memory_efficiency", "kernel_floor_s", "cache_bytes", "cache_bytes_per_s")),
    "matmul": ((MATMUL,), fit_matmul, ("matmul_efficiency", "matmul_efficiencies", "matmul_start_s")),
    "attention": (
        (FLASH_FORWARD, FLASH_BACKWARD),
        fit_attention,
        ("attention_efficiency", "attention_backward_efficiency"),
    ),
}
"""What is fitted together: kinds of rows, how, and the figures of a Processor that it gives. Streams come first: the
others need bandwidths."""


def _sourced(gpu: str) -> Processor:
    """A processor of the catalogue whose every figure may be set: what is fitted has its source here."""
    processor = load_processor(gpu)
    figures = {name for _, _, names in FITS.values() for name in names}
    return replace(processor, sources={**dict.fromkeys(figures, "fitted"), **processor.sources})


def fit(rows: Sequence[Measured], gpu: str) -> Processor:
    """The catalogue's processor with all figures that the rows tell."""
    processor = _sourced(gpu)
    for kinds, how, _ in FITS.values():
        mine = _of(rows, gpu, *kinds)
        if fits(mine):
            processor = how(mine, processor)
    return processor


def fits(rows: Sequence[Measured]) -> bool:
    """Whether rows of one fit tell its figures."""
    return any(row.kind != MATMUL or row.seconds >= LONG_S for row in rows)


def left_out_errors(rows: Sequence[Measured], gpu: str, name: str) -> dict[str, float]:
    """By source, the mean error on its rows of figures fitted to the other sources."""
    kinds, how, _ = FITS[name]
    mine = _of(rows, gpu, *kinds)
    errors = {}
    for source in dict.fromkeys(row.source for row in mine):
        others = [row for row in mine if row.source != source]
        left_out = [row for row in mine if row.source == source]
        told = {row.dtype for row in others}
        if fits(others) and all(row.kind == STREAM or row.dtype in told for row in left_out):
            errors[source] = mean_error(left_out, how(others, _sourced(gpu)))
    return errors


# What is printed #


def main() -> None:
    """Print what is in the catalogue beside what is fitted now, and the errors by GPU and kind."""
    rows = measurements()
    show(table("figures of the catalogue", ("", "catalogue", "fitted"), list(_figures(rows))))
    note = "Mean absolute relative errors: of a plain roofline, of the catalogue, and by kind and source if left out."
    columns = ("", "kind", "rows", "roofline", "catalogue", "worst", "left out")
    show(table("kernels, priced against published", columns, list(_errors(rows)), note))


def _figures(rows: Sequence[Measured]) -> Iterable[tuple[str, str, str]]:
    yield "SMALL_TILE_COST", f"{SMALL_TILE_COST}", f"{fit_small_tile_cost([r for r in rows if r.kind == MATMUL])}"
    curve = fit_curve([row for row in rows if row.kind in (FLASH_FORWARD, FLASH_BACKWARD)])
    for name in ("forward_half_tokens", "backward_half_tokens", "backward_share"):
        yield f"FLASH.{name}", f"{getattr(FLASH, name)}", f"{getattr(curve, name)}"
    for gpu in _gpus(rows):
        given, fitted = load_processor(gpu), fit(rows, gpu)
        for name in (name for _, _, names in FITS.values() for name in names):
            before, now = getattr(given, name), getattr(fitted, name)
            if now != before or now:
                yield f"{gpu} {name}", f"{before}", f"{now}"


def _errors(rows: Sequence[Measured]) -> Iterable[tuple[str, ...]]:
    for gpu, kind in product(_gpus(rows), (MATMUL, STREAM, FLASH_FORWARD, FLASH_BACKWARD, PLAIN)):
        mine, processor = _of(rows, gpu, kind), load_processor(gpu)
        if not mine:
            continue
        fitted = [name for name, (kinds, _, _) in FITS.items() if kind in kinds]
        left_out = left_out_errors(rows, gpu, fitted[0]) if fitted else {}
        worst = max(mine, key=lambda row: abs(log(price(row, processor) / row.seconds)))
        yield (
            gpu,
            kind,
            f"{len(mine)}",
            f"{mean_error(mine, processor, roofline):.1%}",
            f"{mean_error(mine, processor):.1%}",
            f"{price(worst, processor) / worst.seconds - 1:+.0%} {worst.what}",
            ", ".join(f"{error:.0%}" for error in left_out.values()) or "-",
        )


if __name__ == "__main__":
    main()
