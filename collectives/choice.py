"""Which algorithm does a collective: the fastest in closed form, by the network and the size of the buffer."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .algorithms import KINDS
from .costs import seconds
from .tiers import Tiers, crossed

PIECES = tuple(1 << power for power in range(7))
"""In how many pieces chains and double trees are tried."""

OVERLAPPED_PIECES = (2, 4, 8)
"""In how many pieces hierarchical algorithms are tried, besides one."""

DIRECT_RANKS = 8
"""Up to how many ranks all messages at once are tried: what a rank pays for posting each is not in the model."""

NATIVE = {
    "all_reduce": ("ring", "double_binary_tree", "hierarchical"),
    "reduce_scatter": ("ring",),
    "all_gather": ("ring",),
    "broadcast": ("chain",),
    "reduce": ("chain",),
    "all_to_all": ("direct",),
}
"""The families that NCCL has (up to 2.22, without reduction in switches), by collective: what "native" can mean.

Its tree is one of nodes: GPUs of a node are a chain below it, so a node sends 2 (N - 1) / N of the buffer among N nodes
in the mean, as a hierarchical all-reduce does; a flat ring of n GPUs has each node send 2 (n - 1) / n of it (NCCL,
src/graph/trees.cc)."""

SAME_SHARE = 1e-9
"""Prices that differ by less are equal: their formulas add up in different orders."""

LARGEST_BYTES = 1 << 34
"""A selection tells sizes apart up to here; what is larger is done alike."""

CROSSOVER_SHARE = 0.02
"""How exactly crossover points are found, relative to the size."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An algorithm and its price."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Selection:
    """Which algorithm does each kind of collective, by the size of the buffer in bytes.

    Attributes:
        rows: for each kind ((from_bytes, name), ...), ascending, the first from 0. A name may be "native".
    """

    rows: Mapping[str, tuple[tuple[int, str], ...]]

    def __post_init__(self) -> None:
        for kind, rows in self.rows.items():
            starts = [start for start, _ in rows]
            if not starts or starts[0] != 0 or any(one >= other for one, other in pairwise(starts)):
                raise ValueError(f"rows of {kind!r} must ascend from 0 bytes, got {starts}")

    def name(self, kind: str, nbytes: int) -> str:
        """The algorithm for a whole buffer of `nbytes` bytes.

        Raises:
            ValueError: nothing was selected for this kind.
        """
        if kind not in self.rows:
            raise ValueError(f"kind = {kind!r}: an algorithm was selected for {', '.join(self.rows)} only")
        rows = self.rows[kind]
        return rows[bisect_right(rows, nbytes, key=lambda row: row[0]) - 1][1]

    def __str__(self) -> str:
        """A line per kind: `all_reduce: recursive_doubling, from 96 KiB ring`."""
        return "\n".join(
            f"{kind}: " + ", ".join(f"from {size_name(start)} {name}" if start else name for start, name in rows)
            for kind, rows in self.rows.items()
        )


def size_name(nbytes: float) -> str:
    """Three significant figures with a binary unit: 96 KiB, 1.5 MiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.0f} B"


def candidates(kind: str, group: int, tiers: Tiers) -> tuple[str, ...]:
    """The algorithms worth a try, in the order in which equals are preferred: the simpler first.

    Hierarchical ones follow the tiers, where the group fills them; chains and double trees come in several pieces. An
    all-reduce in one step is left out above two ranks: what each of them holds afterwards may differ in the last bits.

    Raises:
        ValueError: no such collective, or no tier joins the group.
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r} is no collective; allowed: {', '.join(KINDS)}")
    direct = ("direct",) if group <= DIRECT_RANKS else ()
    flat = {
        "all_reduce": ("ring", "halving_doubling", "recursive_doubling", "binomial_tree", *direct[: group <= 2]),
        "reduce_scatter": ("ring", "halving_doubling", *direct),
        "all_gather": ("ring", "halving_doubling", *direct),
        "broadcast": ("binomial_tree", "halving_doubling"),
        "reduce": ("binomial_tree", "halving_doubling"),
        "all_to_all": ("direct", "pairwise"),
    }[kind]
    pipelined = {
        "all_reduce": ("double_binary_tree",),
        "broadcast": ("chain", "double_binary_tree"),
        "reduce": ("chain", "double_binary_tree"),
    }.get(kind, ())
    grid = tier_grid(group, tiers)
    overlapped = OVERLAPPED_PIECES if kind in ("all_reduce", "reduce_scatter", "all_gather") else ()
    return (
        *flat,
        *([f"hierarchical/{grid}"] if grid else []),
        *(f"hierarchical/{grid}/{pieces}" for pieces in overlapped if grid),
        *(f"{name}/{pieces}" for name in pipelined for pieces in PIECES),
    )


def tier_grid(group: int, tiers: Tiers) -> str:
    """The grid of the tiers that a group crosses, "8x4"; empty where that is one tier or the group does not fill it."""
    sizes = [1, *(min(tier.ranks, group) for tier in crossed(group, tiers))]
    if len(sizes) <= 2 or any(outer % inner for inner, outer in pairwise(sizes)):
        return ""
    return "x".join(str(outer // inner) for inner, outer in pairwise(sizes))


def choose(kind: str, nbytes: float, group: int, tiers: Tiers, allowed: Sequence[str] | None = None) -> Choice:
    """The fastest algorithm by price; of equals the first.

    Args:
        allowed: the names to choose from; None: all candidates.

    Raises:
        ValueError: no tier joins the group, or an allowed name has no price for this collective.
    """
    names = candidates(kind, group, tiers) if allowed is None else allowed
    if not names:
        raise ValueError(f"allowed = {allowed!r} leaves no algorithm for {kind}: name one, or leave it out")
    best = Choice("", math.inf)
    for name in names:
        choice = Choice(name, seconds(kind, name, nbytes, group, tiers))
        if not best.name or choice.seconds < best.seconds * (1 - SAME_SHARE):
            best = choice
    return best


def native(kind: str, group: int, tiers: Tiers) -> tuple[str, ...]:
    """The candidates that NCCL has too, to price its own collectives."""
    return tuple(name for name in candidates(kind, group, tiers) if name.split("/")[0] in NATIVE[kind])


def select(
    group: int, tiers: Tiers, kinds: Iterable[str] = KINDS, allowed: Mapping[str, Sequence[str]] | None = None
) -> Selection:
    """Which algorithm is fastest at every size, for each kind.

    Args:
        allowed: for some kinds the names to choose from.
    """
    return Selection({kind: crossovers(kind, group, tiers, (allowed or {}).get(kind)) for kind in kinds})


def crossovers(
    kind: str, group: int, tiers: Tiers, allowed: Sequence[str] | None = None
) -> tuple[tuple[int, str], ...]:
    """((from_bytes, name), ...): where another algorithm becomes the fastest.

    The choice is looked at for every power of two, and where two neighbours differ at sizes between them, until a
    change is known to `CROSSOVER_SHARE`. A name that is best only somewhere between two equal neighbours is missed.
    """
    names = candidates(kind, group, tiers) if allowed is None else allowed

    def best(nbytes: int) -> str:
        return choose(kind, nbytes, group, tiers, names).name

    def between(low: int, low_name: str, high: int, high_name: str) -> list[tuple[int, str]]:
        """The changes above `low` and up to `high`."""
        if low_name == high_name:
            return []
        if high - low <= max(1, CROSSOVER_SHARE * high):
            return [(high, high_name)]
        middle = (low + high) // 2
        name = best(middle)
        return between(low, low_name, middle, name) + between(middle, name, high, high_name)

    sizes = [0, *(1 << power for power in range(LARGEST_BYTES.bit_length()))]
    chosen = [(nbytes, best(nbytes)) for nbytes in sizes]
    rows = [chosen[0]]
    for low, high in pairwise(chosen):
        rows += between(*low, *high)
    return tuple(rows)
