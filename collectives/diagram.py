"""An algorithm as the picture one would draw of it, in text.

Reading it: time runs to the right, a line is a rank and a column is a round, `c2->1` meets `c2<-0` (or `c2+<0`, which
adds) of the rank that the arrow points to in the same column.
"""

from collections import defaultdict

from .hierarchy import grid_of, group_in, phases
from .program import Algorithm, chunk_names
from .rendezvous import rendezvous
from .tree import Tree, binomial_tree, double_binary_tree


def draw(algorithm: Algorithm, world: int) -> str:
    """A line per rank and a column per round, in which those ops stand that meet in it; above, the trees or the grid.

    A round is as long as a message: an op stands in the first round in which both sides have posted it, so that a step
    whose partners are not equally far may cover several columns.

    Raises:
        ProofError: the ops never meet.
    """
    programs = algorithm.programs(world)
    cells: list[defaultdict[int, list[str]]] = [defaultdict(list) for _ in programs]
    rounds = rendezvous(programs).rounds
    for place, number in sorted(rounds.items()):
        cells[place.rank][number].append(str(programs[place.rank][place.step][place.op]))
    columns = [
        [str(number), *(" ".join(cells[rank][number]) for rank in range(world))]
        for number in range(max(rounds.values(), default=-1) + 1)
    ]
    names = ["round", *(f"rank {rank}" for rank in range(world))]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in (names, *columns)]
    table = [" | ".join(line).rstrip(" |") for line in zip(*padded, strict=True)]
    return "\n".join([f"{algorithm} of {world} ranks", *_picture(algorithm, world), *table])


def _picture(algorithm: Algorithm, world: int) -> list[str]:
    """The shape that the rounds alone do not show."""
    match algorithm.name.split("/")[0]:
        case "binomial_tree":
            return ["tree", *_indented(binomial_tree(world))]
        case "double_binary_tree":
            pieces = algorithm.cut(world)[1]
            trees = enumerate(double_binary_tree(world, algorithm.kind != "all_reduce"))
            return [
                line
                for half, tree in trees
                for line in (f"tree of {chunk_names(half * pieces, pieces)}", *_indented(tree))
            ]
        case "hierarchical":
            return _grid(algorithm, world)
        case _:
            return []


def _indented(tree: Tree) -> list[str]:
    """A line per rank, under its parent."""
    lines = []
    todo = [rank for rank, parent in enumerate(tree.parents) if parent is None]
    while todo:
        rank = todo.pop()
        lines.append("  " * (tree.depths[rank] + 1) + str(rank))
        todo += reversed(tree.children[rank])
    return lines


def _grid(algorithm: Algorithm, world: int) -> list[str]:
    """The groups of each tier, then the phases."""
    grid = grid_of(algorithm.name)
    tiers = []
    for tier in range(len(grid)):
        groups = [group for position, group in (group_in(grid, tier, rank) for rank in range(world)) if position == 0]
        tiers.append(f"tier {tier}: " + " | ".join(" ".join(map(str, group)) for group in groups))
    done = ", then ".join(f"{name} in tier {tier}" for name, tier in phases(algorithm.kind, grid))
    return [*tiers, f"phases: {done}"]
