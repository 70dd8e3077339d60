"""Ways to send fewer bytes in a collective, described: what each makes of a buffer, and what it puts on the wire.

engine/compressed.py performs them. Elements are those of the buffer; `world` ranks each hold one.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..reading import STRICT, nearest, read_into


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """The same collective in another floating-point format.

    Attributes:
        scale: multiplied before the cast and divided by after it, a power of two; "dynamic" asks the largest magnitude
            of all ranks first (one scalar all-reduce) and leaves headroom for the sum.
    """

    __pydantic_config__ = STRICT
    dtype: Literal["fp16", "bf16", "fp32"]
    scale: float | Literal["dynamic"] = 1.0

    def __post_init__(self) -> None:
        if self.scale != "dynamic" and not (0 < self.scale < math.inf and math.frexp(self.scale)[0] == 0.5):
            raise ValueError(f"scale = {self.scale}; allowed: a power of two such as 65536.0, or 'dynamic'")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockQuantized:
    """int8 or int4 with a scale per block: ZeRO++'s qwZ for gathers, qgZ for reductions (Wang et al. 2023)."""

    __pydantic_config__ = STRICT
    bits: Literal[4, 8]
    block: int = 256
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        _at_least_one("block", self.block)

    def payload_bytes(self, elements: int) -> int:
        return -(-elements * self.bits // 8) + 4 * -(-elements // self.block)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneBit:
    """Signs and a mean magnitude per block, what is lost carried to the next step (Tang et al. 2021)."""

    __pydantic_config__ = STRICT
    block: int = 256

    def __post_init__(self) -> None:
        _at_least_one("block", self.block)

    def payload_bytes(self, elements: int) -> int:
        return -(-elements // 8) + 4 * -(-elements // self.block)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The largest `fraction` of the values and their places, the rest carried to the next step (Stich et al. 2018)."""

    __pydantic_config__ = STRICT
    fraction: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction = {self.fraction}; allowed: above 0, at most 1")

    def kept(self, elements: int) -> int:
        return math.ceil(self.fraction * elements)

    def payload_bytes(self, elements: int) -> int:
        return 8 * self.kept(elements)


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """The buffer as a matrix, sent as two factors of `rank` columns, the rest carried on (Vogels et al. 2019).

    Attributes:
        columns: of the matrix; best a width that all weights in the buffer share. None makes it as good as square.
    """

    __pydantic_config__ = STRICT
    rank: int = 4
    columns: int | None = None

    def __post_init__(self) -> None:
        _at_least_one("rank", self.rank)
        _at_least_one("columns", 1 if self.columns is None else self.columns)

    def shape(self, elements: int) -> tuple[int, int, int]:
        """(rows, columns, rank) for a buffer; the rank is at most either side."""
        columns = max(1, self.columns or math.isqrt(max(0, elements - 1)) + 1)
        rows = -(-elements // columns)
        return rows, columns, min(self.rank, rows, columns)


Coded = BlockQuantized | OneBit | TopK
"""Schemes whose every message stands for itself: coded here, decoded and summed there."""

Scheme = Cast | Coded | LowRank

ERROR_FEEDBACK = (OneBit, TopK, LowRank)
"""Schemes that carry what they lose into the next step, and so keep a whole buffer of it on every rank."""

SCHEMES: dict[str, tuple[type, dict[str, Any]]] = {
    "fp16": (Cast, {"dtype": "fp16"}),
    "bf16": (Cast, {"dtype": "bf16"}),
    "fp32": (Cast, {"dtype": "fp32"}),
    "fp16_scaled": (Cast, {"dtype": "fp16", "scale": "dynamic"}),
    "int8": (BlockQuantized, {"bits": 8}),
    "int4": (BlockQuantized, {"bits": 4}),
    "one_bit": (OneBit, {}),
    "top_k": (TopK, {}),
    "power_sgd": (LowRank, {}),
}
"""Schemes by the name that a config calls them, and what the name says of their fields."""


def scheme_named(name: str, options: dict[str, Any], where: str) -> Scheme:
    """The scheme called `name`, with its fields as `options` say.

    Raises:
        ValueError: no such scheme, or an option that it does not have.
    """
    if name not in SCHEMES:
        raise ValueError(f"{where} = {name!r}; allowed: {', '.join(SCHEMES)}{nearest(name, SCHEMES)}")
    kind, said = SCHEMES[name]
    for option in sorted({"dtype", "bits"} & options.keys()):
        raise ValueError(f"{where}: option {option!r} is what the name {name!r} says already; leave it out")
    scheme: Scheme = read_into(kind, {**said, **options}, f"{where} = {name!r}")
    return scheme


def wire_bytes(scheme: Scheme, kind: str, elements: int, world: int) -> float:
    """Payload that a rank sends for one compressed collective, the mean over the ranks.

    n elements, N ranks, c(m) bytes for m coded elements. An uncompressed fp32 all-reduce sends 8 n (N-1)/N, the other
    two half of it.

        Cast           the same with 2 bytes (or 4) for 4; the scalar that agrees on a dynamic scale is not counted
        block, 1 bit   (N-1) c(n/N) for a reduce-scatter (exchanged) or all-gather, twice that for an all-reduce
        top-k          (N-1) c(n) for an all-reduce (all gather all), (N-1) c(n/N) for a reduce-scatter
        low rank       all-reduces of both factors: 8 r (rows + columns) (N-1)/N for either

    Args:
        kind: "all_reduce", "reduce_scatter" or "all_gather".
    """
    rounds = 2 if kind == "all_reduce" else 1
    if isinstance(scheme, Cast):
        return rounds * elements * (4 if scheme.dtype == "fp32" else 2) * (world - 1) / world
    if isinstance(scheme, LowRank):
        rows, columns, rank = scheme.shape(elements)
        return 8 * rank * (rows + columns) * (world - 1) / world
    if isinstance(scheme, TopK) and kind == "all_reduce":
        return float((world - 1) * scheme.payload_bytes(elements))
    return float(rounds * (world - 1) * scheme.payload_bytes(-(-elements // world)))


def _at_least_one(field: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{field} = {value}; allowed: at least 1")
