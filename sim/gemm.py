"""Seconds of a matrix product that nobody measured: tiles, waves of them, splits of the inner dimension, traffic.

A product is computed in tiles of the output, one per multiprocessor at a time; the last wave costs as much as a full
one, and a tile that overhangs as much as a whole one (NVIDIA, Matrix Multiplication Background User's Guide, tile and
wave quantization). A library tries several tiles, and where the output has too few of them it splits the inner
dimension among multiprocessors and adds up the parts.
"""

import math
from collections.abc import Iterable
from functools import lru_cache

from ..collectives.trace import Kernel
from .processor import Processor

SMALLER_TILES = ((128, 256), (128, 128), (64, 256), (64, 128), (64, 64), (32, 128), (16, 128))
"""Output tiles, either way round, that a matrix product may fall back to where the largest leaves processors idle."""

SMALL_TILE_COST = 0.06
"""What loading operands more often costs: a tile that loads r times the bytes per FLOP of the processor's own tile
takes 1 + 0.06 (r - 1) times as long. Fitted to the products of all GPUs (experiments/fit_kernels.py)."""

SPLITS = (1, 2, 4, 8, 16)
"""Into how many parts the inner dimension may be cut."""

SHORTEST_PART = 128
"""The inner dimension is not cut into parts shorter than this."""

STEP = 32
"""A tile advances along the inner dimension by so many elements (or its own side); what overhangs costs as much."""

PARTIAL_BYTES = 4
"""Parts of a split product are added in fp32."""


def matmul_seconds(kernel: Kernel, peak_flops: float, processor: Processor, cost: float = SMALL_TILE_COST) -> float:
    """Seconds of the product, its start included.

    Arithmetic and traffic overlap in part: the root of the sum of their squares, which lies between their maximum
    (perfect overlap) and their sum (none).

    Args:
        kernel: of family "matmul"; its shape is (batch, m, n, k).
        peak_flops: FLOP/s in its data type.
        cost: of small tiles, as SMALL_TILE_COST.
    """
    rate = peak_flops * processor.matmul_share(kernel.dtype)
    bytes_per_s = processor.memory_bytes_per_s * processor.memory_efficiency
    batch, m, n, k = kernel.shape
    outputs = batch * m * n
    traffic_bytes = kernel.read_bytes + kernel.write_bytes
    work_s = min(
        math.hypot(flops / rate, (traffic_bytes + partial_bytes(outputs, split)) / bytes_per_s)
        for split, flops in tiled_flops(batch, m, n, k, processor.multiprocessors, processor.tile, cost)
    )
    return processor.kernel_floor_s + processor.matmul_start_s + work_s


def partial_bytes(outputs: int, split: int) -> int:
    """Traffic of a split product's parts: each is written once and read once."""
    return 0 if split == 1 else 2 * split * outputs * PARTIAL_BYTES


@lru_cache(maxsize=65536)
def tiled_flops(
    batch: int, m: int, n: int, k: int, multiprocessors: int, tile: tuple[int, int], cost: float = SMALL_TILE_COST
) -> tuple[tuple[int, float], ...]:
    """(split, FLOPs) for each split of the inner dimension: what the product costs at full rate with its best tile.

    Idle multiprocessors of the last wave and overhanging tiles count.

    Args:
        tile: the processor's own; the best is taken among it and the standard ones that are smaller.
    """
    step = min(STEP, *tile)
    splits = [split for split in SPLITS if split == 1 or k >= split * SHORTEST_PART]
    return tuple(
        (
            split,
            min(
                _waves(batch * split, m, n, shape, multiprocessors)
                * (2.0 * shape[0] * shape[1] * step * math.ceil(k / split / step) * multiprocessors)
                * small_tile_cost(shape, tile, cost)
                for shape in _tiles(tile)
            ),
        )
        for split in splits
    )


def _waves(products: int, m: int, n: int, tile: tuple[int, int], multiprocessors: int) -> int:
    tiles = products * math.ceil(m / tile[0]) * math.ceil(n / tile[1])
    return math.ceil(tiles / multiprocessors)


def _tiles(own: tuple[int, int]) -> Iterable[tuple[int, int]]:
    smaller = [tile for tile in SMALLER_TILES if tile[0] * tile[1] < own[0] * own[1]]
    return {(a, b) for tile in (own, *smaller) for a, b in (tile, tile[::-1])}


def small_tile_cost(tile: tuple[int, int], own: tuple[int, int], cost: float = SMALL_TILE_COST) -> float:
    """Relative time per FLOP. A tile of a by b loads a + b operands for every a b products."""
    loads = sum(tile) / math.prod(tile)
    own_loads = sum(own) / math.prod(own)
    return max(1.0, 1.0 + cost * (loads / own_loads - 1.0))
