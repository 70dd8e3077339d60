"""Trees: their shapes, how deep they are, and what a rank sends in them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.program import Send, sent_elements
from windtunnel.collectives.proof import prove
from windtunnel.collectives.rendezvous import rendezvous
from windtunnel.collectives.tree import (
    BINOMIAL_TREE,
    Tree,
    binomial_tree,
    double_binary_tree,
    double_binary_tree_algorithm,
    in_order_parent,
)

WORLDS = st.integers(1, 70)
PIPELINED = ["all_reduce", "broadcast", "reduce"]


def rounds(programs: list) -> int:
    return max(rendezvous(programs).rounds.values(), default=-1) + 1


def subtree(tree: Tree, rank: int) -> list[int]:
    return [rank, *(below for child in tree.children[rank] for below in subtree(tree, child))]


@given(world=WORLDS)
def test_a_binomial_tree_spans_all_ranks(world: int) -> None:
    tree = binomial_tree(world)
    assert sorted(subtree(tree, 0)) == list(range(world))
    assert max(tree.depths) <= math.ceil(math.log2(world))
    assert tree.depths == tuple(rank.bit_count() for rank in range(world))


@pytest.mark.parametrize(("kind", "times"), [("broadcast", 1), ("reduce", 1), ("all_reduce", 2)])
@given(world=WORLDS)
def test_a_binomial_tree_takes_logarithmic_rounds(kind: str, times: int, world: int) -> None:
    """times ceil(log2 n) rounds; each edge of the tree carries the buffer once each way."""
    programs = BINOMIAL_TREE[kind].programs(world)
    assert rounds(programs) == times * math.ceil(math.log2(world))
    assert sum(sent_elements(program, ((0, 3),)) for program in programs) == 3 * times * (world - 1)


@given(bits=st.integers(0, 5))
def test_a_binomial_scatter_sends_only_what_is_needed(bits: int) -> None:
    """The root of a reduce-scatter sends (n - 1) / n of the buffer, as a scatter must."""
    algorithm, world = BINOMIAL_TREE["reduce_scatter"], 2**bits
    assert sent_elements(algorithm.program(0, world), algorithm.bounds(world, world)) == world - 1


@given(nodes=st.integers(1, 200))
def test_in_order_tree(nodes: int) -> None:
    """Read from left to right the nodes are 1 to n: what is left of a node is smaller, what is right of it larger."""
    parents = {node: in_order_parent(node, nodes) for node in range(1, nodes + 1)}
    (root,) = [node for node, parent in parents.items() if parent == 0]

    def in_order(node: int) -> list[int]:
        below = [child for child, parent in parents.items() if parent == node]
        left, right = [child for child in below if child < node], [child for child in below if child > node]
        assert len(left) <= 1
        assert len(right) <= 1
        return [*(number for child in left for number in in_order(child)), node] + [
            number for child in right for number in in_order(child)
        ]

    assert in_order(root) == list(range(1, nodes + 1))
    assert all(node not in parents.values() for node in range(1, nodes + 1, 2))


@given(world=WORLDS, rank_0_above=st.booleans())
def test_two_complementary_trees(world: int, rank_0_above: bool) -> None:
    """Sanders, Speck and Traff 2009, section 3: binary, shallow; nobody but a root above both is inner in both."""
    trees = double_binary_tree(world, rank_0_above)
    for tree in trees:
        (root,) = [rank for rank, parent in enumerate(tree.parents) if parent is None]
        assert root == 0 or not rank_0_above
        assert sorted(subtree(tree, root)) == list(range(world))
        assert all(len(children) <= 2 for children in tree.children)
        nodes = world - rank_0_above
        assert max(tree.depths) <= (math.floor(math.log2(nodes)) if nodes else 0) + rank_0_above
    first = 1 if rank_0_above else 0
    assert not any(trees[0].children[rank] and trees[1].children[rank] for rank in range(first, world))


@pytest.mark.parametrize("kind", PIPELINED)
@given(world=st.integers(2, 24), pieces=st.integers(1, 9))
def test_pieces_follow_each_other_without_a_gap(kind: str, world: int, pieces: int) -> None:
    """A round for each edge on the longest way, and one for each piece after the first."""
    algorithm = double_binary_tree_algorithm(kind, pieces)
    prove(algorithm, world)
    heights = [max(tree.depths) for tree in double_binary_tree(world, kind != "all_reduce")]
    longest = max(heights) * (2 if kind == "all_reduce" else 1)
    assert rounds(algorithm.programs(world)) == pieces + longest - 1


@given(world=st.integers(2, 40), pieces=st.integers(1, 8))
def test_full_bandwidth(world: int, pieces: int) -> None:
    """A broadcast: nobody sends or receives more than one buffer; an all-reduce: nobody sends more than two."""
    elements = 2 * pieces * 3
    for kind, most in (("broadcast", 1), ("all_reduce", 2)):
        algorithm = double_binary_tree_algorithm(kind, pieces)
        sent = [sent_elements(program, algorithm.bounds(elements, world)) for program in algorithm.programs(world)]
        assert max(sent) <= most * elements
        assert sum(sent) == most * (world - 1) * elements


def test_a_rank_sends_receives_and_adds_different_pieces_at_once() -> None:
    """In the middle of an all-reduce an inner rank does all of its work in every step."""
    program = double_binary_tree_algorithm("all_reduce", 8).program(1, 6)
    middle = program[5]
    assert [type(op).__name__ for op in middle].count("Reduce") == 2
    assert sorted({op.chunk for op in middle}) == [2, 3, 4, 5, 10, 13]  # down, got, up, added; and a leaf elsewhere
    assert sum(isinstance(op, Send) for op in middle) == 4
