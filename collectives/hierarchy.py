"""Hierarchical collectives on a grid of ranks: most of the traffic stays inside a node.

Rank = (p N + n) G + g on a grid of G GPUs x N nodes x P pods: the *tier* of the GPUs is the innermost, and neighbours
in it have consecutive ranks. A rank's *group* in a tier are those that differ from it in that coordinate alone. Two
tiers as in Jia et al., "Highly scalable deep learning training system with mixed-precision" (2018), section 4.3, and
with reduce-scatters inside as NCCL's CollNet and BlueConnect (Cho et al. 2019) do.
"""

from functools import partial
from itertools import accumulate
from math import prod
from operator import mul

from .exchange import pairwise_exchange
from .program import Algorithm, Program, Runs, Step, no_symmetry
from .ring import all_gather_around, all_reduce_around, reduce_scatter_around
from .tree import binomial_broadcast, binomial_reduce

Grid = tuple[int, ...]
"""Ranks per tier, innermost first."""


def grid_of(name: str) -> Grid:
    """The grid in the name of an algorithm: (8, 4) of "hierarchical/8x4"."""
    return tuple(map(int, name.split("/")[1].split("x")))


def strides(grid: Grid) -> tuple[int, ...]:
    """How far apart neighbours in each tier are in ranks; last the size of the world."""
    return tuple(accumulate(grid, mul, initial=1))


def group_in(grid: Grid, tier: int, rank: int) -> tuple[int, range]:
    """A rank's position in its group of a tier, and the group."""
    stride, next_stride = strides(grid)[tier : tier + 2]
    position = rank % next_stride // stride
    first = rank - position * stride
    return position, range(first, first + next_stride, stride)


def phases(kind: str, grid: Grid) -> tuple[tuple[str, int], ...]:
    """What is done one after another: (collective, tier in whose groups it is done)."""
    inwards = range(len(grid))[::-1]
    last = len(grid) - 1
    match kind:
        case "all_reduce":
            adding = tuple(("reduce_scatter", tier) for tier in range(last))
            return (*adding, ("all_reduce", last), *(("all_gather", tier) for _, tier in adding[::-1]))
        case "all_gather" | "broadcast":
            return tuple((kind, tier) for tier in inwards)
        case _:
            return tuple((kind, tier) for tier in inwards[::-1])


def _nested_blocks(grid: Grid, tier: int, rank: int, piece: int) -> list[Runs]:
    """Of a buffer cut by pieces, then G, N and P, what each position of a rank's group in a tier takes care of.

    The chunks of a rank's position in the tiers further in; a run each, which the tiers further out cut again.
    """
    world = prod(grid)
    mine = world * piece
    for inner in range(tier):
        position, _ = group_in(grid, inner, rank)
        mine += position * (world // strides(grid)[inner + 1])
    count = world // strides(grid)[tier + 1]
    return [((mine + position * count, count),) for position in range(grid[tier])]


def _ranked_blocks(grid: Grid, tier: int, rank: int, pieces: int, piece: int) -> list[Runs]:
    """The same where part r of the buffer must belong to rank r: as many runs as ranks that a position stands for."""
    stride, next_stride = strides(grid)[tier : tier + 2]
    firsts = [rank % stride + position * stride for position in range(grid[tier])]
    return [tuple([(part * pieces + piece, 1) for part in range(first, prod(grid), next_stride)]) for first in firsts]


def _exchanged_blocks(grid: Grid, tier: int) -> list[Runs]:
    """For each position in a tier, all parts of the ranks that have that position in it."""
    stride, next_stride = strides(grid)[tier : tier + 2]
    firsts = [position * stride for position in range(grid[tier])]
    return [tuple([(part, stride) for part in range(first, prod(grid), next_stride)]) for first in firsts]


AROUND = {"reduce_scatter": reduce_scatter_around, "all_gather": all_gather_around, "all_reduce": all_reduce_around}


def _with_rings(kind: str, grid: Grid, pieces: int, rank: int, world: int) -> Program:
    """Rings in every group. Pieces follow each other at a distance of the longest phase, each in a phase of its own."""
    programs: list[list[Program]] = []
    for piece in range(pieces):
        programs.append([])
        for name, tier in phases(kind, grid):
            if kind == "all_reduce":
                blocks = _nested_blocks(grid, tier, rank, piece)
            else:
                blocks = _ranked_blocks(grid, tier, rank, pieces, piece)
            position, group = group_in(grid, tier, rank)
            programs[-1].append(AROUND[name](position, group, blocks))
    distance = max(map(len, programs[0]))
    return overlapped([tuple(step for phase in program for step in phase) for program in programs], distance)


def overlapped(programs: list[Program], distance: int) -> Program:
    """Programs of equal length in one, each starting `distance` steps after the one before.

    If the ops of each program that meet stand in the same step on both sides, then so they do here, and in one order.
    """
    steps: list[Step] = [()] * (len(programs[0]) + distance * (len(programs) - 1))
    for number, program in enumerate(programs):
        for at, step in enumerate(program, start=number * distance):
            steps[at] += step
    return tuple(steps)


def _with_trees(kind: str, grid: Grid, rank: int) -> Program:
    """A binomial tree per group, in each tier only among the first ranks of the tiers further in."""
    program: Program = ()
    for _, tier in phases(kind, grid):
        if rank % strides(grid)[tier] == 0:
            position, group = group_in(grid, tier, rank)
            tree = binomial_broadcast if kind == "broadcast" else binomial_reduce
            program += tree(position, group)
    return program


def _all_to_all(grid: Grid, rank: int) -> Program:
    """Within the node everything bound for the same position goes to the rank there; then across nodes, in place.

    A part that rank r holds for rank s moves to the rank and the place that have their coordinates exchanged, in one
    tier after another: at the end it is at rank s in place r.
    """
    program: Program = ()
    for _, tier in phases("all_to_all", grid):
        position, group = group_in(grid, tier, rank)
        program += pairwise_exchange(position, group, _exchanged_blocks(grid, tier))
    return program


def _program(kind: str, grid: Grid, pieces: int, rank: int, world: int) -> Program:
    if world != prod(grid):
        name = "x".join(map(str, grid))
        raise ValueError(f"a grid of {name} is for {prod(grid)} ranks, not for world = {world}; choose another grid")
    if kind in AROUND:
        return _with_rings(kind, grid, pieces, rank, world)
    return _all_to_all(grid, rank) if kind == "all_to_all" else _with_trees(kind, grid, rank)


def _cut(kind: str, grid: Grid, pieces: int, world: int) -> tuple[int, ...]:
    match kind:
        case "all_reduce":
            return (*([pieces] if pieces > 1 else []), *grid)
        case "broadcast" | "reduce":
            return (1,)
        case _:
            return (world, pieces) if pieces > 1 else (world,)


def hierarchical(kind: str, grid: Grid, pieces: int = 1) -> Algorithm:
    """A collective on a grid; with pieces, one piece travels between nodes while the next is added up inside them.

    Raises:
        ValueError: pieces of a kind that sends its buffer whole; and from its program, if the grid does not fit.
    """
    if pieces > 1 and kind not in AROUND:
        raise ValueError(f"pieces = {pieces}: a hierarchical {kind} has none; leave them out")
    name = "hierarchical/" + "x".join(map(str, grid)) + (f"/{pieces}" if pieces > 1 else "")
    period = (lambda world: strides(grid)[-2]) if kind in AROUND else no_symmetry
    return Algorithm(kind, name, partial(_program, kind, grid, pieces), partial(_cut, kind, grid, pieces), period)
