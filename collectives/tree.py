"""Trees: latency that grows with the logarithm of the world.

Binomial trees as in Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH"
(2005), section 4. Two trees at once as in Sanders, Speck and Traff, "Two-tree algorithms for full bandwidth broadcast,
reduction and scan" (2009): a leaf of one tree works in the other, so no rank's link idles while others send twice.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from .program import Algorithm, Op, Program, Recv, Reduce, Send, between, one_chunk_per_rank, post, whole_buffer


def binomial_edges(position: int, size: int) -> Iterator[tuple[int, int, int]]:
    """The edges of a position in the binomial tree under position 0, from the root's side on.

    Yields:
        (other end, first position under the edge, one past the last); the other end is the parent if it is smaller.
    """
    bit = 1 << (size - 1).bit_length()
    while bit := bit >> 1:
        if position % (2 * bit) == 0 and position + bit < size:
            yield position + bit, position + bit, min(position + 2 * bit, size)
        elif position % (2 * bit) == bit:
            yield position - bit, position, min(position + bit, size)


def binomial_broadcast(position: int, group: Sequence[int], chunks: int = 1) -> Program:
    """ceil(log2 n) rounds in which whoever has the whole buffer sends it to one who has not.

    Args:
        group: n ranks; the one at position 0 is the root.
        chunks: how many chunks the whole buffer has.
    """
    return tuple(
        (Send(group[other], 0, chunks) if other > position else Recv(group[other], 0, chunks),)
        for other, _, _ in binomial_edges(position, len(group))
    )


def binomial_reduce(position: int, group: Sequence[int], chunks: int = 1) -> Program:
    """The broadcast backwards, adding: the sum ends at position 0."""
    return tuple(
        (Reduce(group[other], 0, chunks) if other > position else Send(group[other], 0, chunks),)
        for other, _, _ in reversed(list(binomial_edges(position, len(group))))
    )


def binomial_scatter(position: int, group: Sequence[int], starts: Sequence[int]) -> Program:
    """As the broadcast, but only what the receiver and those under it end with is sent.

    Args:
        starts: position p ends with the chunks from starts[p] up to starts[p + 1].
    """
    return tuple(
        post(Send if other > position else Recv, group[other], between(starts[first], starts[stop]))
        for other, first, stop in binomial_edges(position, len(group))
    )


def binomial_gather(position: int, group: Sequence[int], starts: Sequence[int]) -> Program:
    """The scatter backwards: position 0 ends with the chunks of all."""
    return tuple(
        post(Recv if other > position else Send, group[other], between(starts[first], starts[stop]))
        for other, first, stop in reversed(list(binomial_edges(position, len(group))))
    )


def _binomial(kind: str, rank: int, world: int) -> Program:
    ranks, starts = range(world), range(world + 1)
    match kind:
        case "broadcast":
            return binomial_broadcast(rank, ranks)
        case "reduce":
            return binomial_reduce(rank, ranks)
        case "all_reduce":
            return binomial_reduce(rank, ranks) + binomial_broadcast(rank, ranks)
        case "reduce_scatter":
            return binomial_reduce(rank, ranks, world) + binomial_scatter(rank, ranks, starts)
        case _:
            return binomial_gather(rank, ranks, starts) + binomial_broadcast(rank, ranks, world)


BINOMIAL_TREE: dict[str, Algorithm] = {
    kind: Algorithm(kind, "binomial_tree", partial(_binomial, kind), cut)
    for kind, cut in (
        ("all_reduce", whole_buffer),
        ("reduce_scatter", one_chunk_per_rank),
        ("all_gather", one_chunk_per_rank),
        ("broadcast", whole_buffer),
        ("reduce", whole_buffer),
    )
}


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree of ranks: for each rank its parent (None for the root), its children, and its edges to the root."""

    parents: tuple[int | None, ...]
    children: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]


def tree_of(parents: Sequence[int | None]) -> Tree:
    """The tree in which rank r has parent `parents[r]`."""
    children: list[list[int]] = [[] for _ in parents]
    depths = [0] * len(parents)
    for rank, parent in enumerate(parents):
        if parent is not None:
            children[parent].append(rank)
        while parent is not None:
            depths[rank] += 1
            parent = parents[parent]
    return Tree(tuple(parents), tuple(map(tuple, children)), tuple(depths))


def binomial_tree(world: int) -> Tree:
    """The tree of a binomial broadcast from rank 0."""
    parents = [[other for other, _, _ in binomial_edges(rank, world) if other < rank] for rank in range(world)]
    return tree_of([above[0] if above else None for above in parents])


def in_order_parent(node: int, nodes: int) -> int:
    """The parent of a node of the binary tree whose nodes 1 to `nodes` read in order from left to right; 0 at the root.

    A node stands as high as its number has zero bits at the end, so odd nodes are leaves (Sanders et al. 2009, 3.1).
    """
    bit = node & -node
    parent = (node ^ bit) | (bit << 1)
    return parent if parent <= nodes else node ^ bit


@lru_cache(maxsize=16)
def double_binary_tree(world: int, rank_0_above: bool) -> tuple[Tree, Tree]:
    """Two binary trees in each of which the other's inner ranks are leaves.

    The second tree is the first one mirrored where the nodes are even in number, shifted by one where they are odd.

    Args:
        rank_0_above: whether rank 0 is the root of both, with one child each, and not a node: a broadcast's shape.
    """
    nodes, first = (world - 1, 1) if rank_0_above else (world, 0)
    mirrored = [nodes + 1 - node for node in range(nodes + 1)]
    shifted = [node % nodes + 1 if nodes else 0 for node in range(nodes + 1)]
    one, two = (
        _placed(nodes, [place - 1 + first for place in places], rank_0_above)
        for places in (range(nodes + 1), shifted if nodes % 2 else mirrored)
    )
    return one, two


def _placed(nodes: int, ranks: Sequence[int], rank_0_above: bool) -> Tree:
    """The in-order tree with rank `ranks[node]` at each node from 1 on."""
    parents: list[int | None] = [None] * (nodes + rank_0_above)
    for node in range(1, nodes + 1):
        above = in_order_parent(node, nodes)
        parents[ranks[node]] = ranks[above] if above else (0 if rank_0_above else None)
    return tree_of(parents)


def _double_binary_tree(kind: str, pieces: int, rank: int, world: int) -> Program:
    """Both trees at once, each with its half of the buffer, in as many pieces.

    In each round a rank adds one piece, passes the sum of the piece before up, and passes a total on down. An edge to
    a rank at depth d of a tree of height h carries piece k up in round k + h - d, and down in round k + d - 1, in an
    all-reduce h rounds later. All rounds of a broadcast or reduce: pieces + h - 1; of an all-reduce: pieces + 2 h - 1.
    """
    rounds: defaultdict[int, list[Op]] = defaultdict(list)
    for half, tree in enumerate(double_binary_tree(world, kind != "all_reduce")):
        parent, children, depth = tree.parents[rank], tree.children[rank], tree.depths[rank]
        height = max(tree.depths)
        for piece in range(pieces):
            chunk = half * pieces + piece
            if kind != "broadcast":
                up = piece + height - depth
                rounds[up - 1] += [Reduce(child, chunk) for child in children]
                rounds[up] += [Send(parent, chunk)] if parent is not None else []
            if kind != "reduce":
                down = piece + depth + (height if kind == "all_reduce" else 0)
                rounds[down - 1] += [Recv(parent, chunk)] if parent is not None else []
                rounds[down] += [Send(child, chunk) for child in children]
    return tuple(tuple(rounds[number]) for number in sorted(rounds) if rounds[number])


def double_binary_tree_algorithm(kind: str, pieces: int) -> Algorithm:
    """The all-reduce, broadcast or reduce on two trees; rank 0 is the root of a broadcast or reduce."""
    program = partial(_double_binary_tree, kind, pieces)
    return Algorithm(kind, f"double_binary_tree/{pieces}", program, cut=lambda world: (2, pieces))
