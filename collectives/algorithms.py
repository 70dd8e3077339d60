"""The catalogue: every algorithm of every collective by its name.

| name                      | all-reduce | reduce-scatter | all-gather | broadcast | reduce | all-to-all |
|---------------------------|------------|----------------|------------|-----------|--------|------------|
| ring                      | x          | x              | x          |           |        |            |
| bidirectional_ring        | x          | x              | x          |           |        |            |
| chain/PIECES              |            |                |            | x         | x      |            |
| halving_doubling          | x          | x              | x          | x         | x      |            |
| recursive_doubling        | x          |                |            |           |        |            |
| binomial_tree             | x          | x              | x          | x         | x      |            |
| double_binary_tree/PIECES | x          |                |            | x         | x      |            |
| direct                    | x          | x              | x          |           |        | x          |
| pairwise                  |            |                |            |           |        | x          |
| hierarchical/GxN[xP]      | x          | x              | x          | x         | x      | x          |

Pieces left out are one; hierarchical/GxN/PIECES does the first three with phases that overlap.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterator
from functools import cache

from .exchange import DIRECT, PAIRWISE
from .halving import HALVING_DOUBLING, RECURSIVE_DOUBLING
from .hierarchy import hierarchical
from .program import Algorithm
from .ring import BIDIRECTIONAL_RING, RING, chain
from .tree import BINOMIAL_TREE, double_binary_tree_algorithm

KINDS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "all_to_all")

PLAIN: dict[str, dict[str, Algorithm]] = {
    "ring": RING,
    "bidirectional_ring": BIDIRECTIONAL_RING,
    "halving_doubling": HALVING_DOUBLING,
    "recursive_doubling": RECURSIVE_DOUBLING,
    "binomial_tree": BINOMIAL_TREE,
    "direct": DIRECT,
    "pairwise": PAIRWISE,
}
"""The families whose name says everything."""

PIPELINED: dict[str, tuple[Callable[[str, int], Algorithm], tuple[str, ...]]] = {
    "chain": (chain, ("broadcast", "reduce")),
    "double_binary_tree": (double_binary_tree_algorithm, ("all_reduce", "broadcast", "reduce")),
}
"""The families with a number of pieces, and what they do."""


def names(kind: str) -> tuple[str, ...]:
    """The families that do `kind`.

    Raises:
        ValueError: there is no such collective.
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r} is no collective; allowed: {', '.join(KINDS)}{_nearest(kind, KINDS)}")
    plain = [name for name, kinds in PLAIN.items() if kind in kinds]
    return (*plain, *(name for name, (_, kinds) in PIPELINED.items() if kind in kinds), "hierarchical")


@cache
def algorithm(kind: str, name: str) -> Algorithm:
    """The algorithm that does `kind` under `name`: "ring", "chain/8", "hierarchical/8x4", "hierarchical/8x4/2".

    Raises:
        ValueError: no such collective, name, grid or number of pieces; the message shows the nearest name.
    """
    family, *options = name.split("/")
    if family not in names(kind):
        allowed = ", ".join(names(kind))
        raise ValueError(f"algorithm = {name!r} does no {kind}; allowed: {allowed}{_nearest(family, names(kind))}")
    if family in PLAIN and not options:
        return PLAIN[family][kind]
    if family in PIPELINED and all(map(_counts, options)) and len(options) <= 1:
        return PIPELINED[family][0](kind, *(int(pieces) for pieces in options or "1"))
    if family == "hierarchical" and options and len(options) <= 2 and all(map(_counts, options[1:])):
        grid = options[0].split("x")
        if len(grid) >= 2 and all(map(_counts, grid)):
            return hierarchical(kind, tuple(map(int, grid)), *map(int, options[1:]))
    shape = "/PIECES" if family in PIPELINED else "/GxN, /GxNxP or /GxN/PIECES" if family == "hierarchical" else ""
    raise ValueError(f"algorithm = {name!r} is not written like {family}{shape}, in whole numbers from 1 on")


def _counts(text: str) -> bool:
    return re.fullmatch("[1-9][0-9]*", text) is not None


def algorithms(kind: str, world: int) -> list[Algorithm]:
    """Representatives of every family that does `kind` in a world of this size.

    Pipelined ones with 1 and with 4 pieces; hierarchical ones on every grid of two or three tiers without tiers of
    one rank, those of two tiers also in 2 pieces where they can.
    """
    plain = [name for name in names(kind) if name in PLAIN]
    pipelined = [f"{name}/{pieces}" for name in names(kind) if name in PIPELINED for pieces in (1, 4)]
    grids = ["x".join(map(str, grid)) for tiers in (2, 3) for grid in _grids(world, tiers)]
    overlapping = kind in ("all_reduce", "reduce_scatter", "all_gather")
    pieces = [f"{grid}/2" for grid in grids if grid.count("x") == 1 and overlapping]
    return [
        algorithm(kind, name) for name in (*plain, *pipelined, *(f"hierarchical/{grid}" for grid in grids + pieces))
    ]


def _grids(world: int, tiers: int) -> Iterator[tuple[int, ...]]:
    """The ways to write `world` as a product of `tiers` factors above 1, in order."""
    if tiers == 1:
        if world > 1:
            yield (world,)
        return
    for inner in range(2, world // 2 + 1):
        if world % inner == 0:
            yield from ((inner, *outer) for outer in _grids(world // inner, tiers - 1))


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
