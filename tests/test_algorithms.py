"""The catalogue: every algorithm in it is proved, is named after itself, and repeats as it says."""

from math import prod

import pytest
from windtunnel.collectives.algorithms import KINDS, algorithm, algorithms, names
from windtunnel.collectives.program import Program
from windtunnel.collectives.proof import prove


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", range(1, 25))
def test_every_algorithm_is_proved(kind: str, world: int) -> None:
    for one in algorithms(kind, world):
        prove(one, world)


@pytest.mark.parametrize(
    ("kind", "name", "world"),
    [
        ("all_reduce", "ring", 64),
        ("all_gather", "bidirectional_ring", 64),
        *((kind, "halving_doubling", world) for kind in KINDS[:5] for world in (64, 100, 128)),
        ("all_reduce", "recursive_doubling", 128),
        *((kind, "binomial_tree", 100) for kind in KINDS[:5]),
        *(
            (kind, "double_binary_tree/8", world)
            for kind in ("all_reduce", "broadcast", "reduce")
            for world in (64, 127)
        ),
        ("reduce", "chain/16", 64),
        ("all_reduce", "hierarchical/8x16", 128),
        ("all_reduce", "hierarchical/4x4x2/3", 32),
        *((kind, "hierarchical/4x4x4", 64) for kind in KINDS),
        ("all_to_all", "direct", 128),
        ("all_to_all", "pairwise", 128),
        ("reduce_scatter", "direct", 64),
    ],
)
def test_large_worlds_are_proved(kind: str, name: str, world: int) -> None:
    prove(algorithm(kind, name), world)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", range(1, 13))
def test_ranks_repeat_with_the_period(kind: str, world: int) -> None:
    """Ranks r and r + p have the same ops but for the chunks, and each peer is shifted by p."""
    for one in algorithms(kind, world):
        period, programs = one.period(world), one.programs(world)
        for rank in range(period, world):
            assert shape(programs[rank], 0, world) == shape(programs[rank - period], period, world), (one, rank)


def shape(program: Program, shift: int, world: int) -> list:
    return [[(type(op), (op.peer + shift) % world, op.count) for op in step] for step in program]


@pytest.mark.parametrize("kind", KINDS)
def test_periods_are_declared_where_there_are_some(kind: str) -> None:
    """The simulator plays few ranks for all: rings and single steps repeat by rank, grids by node."""
    periods = {one.name: one.period(8) for one in algorithms(kind, 8)}
    for name, period in periods.items():
        match name.split("/"):
            case ["ring" | "bidirectional_ring"]:
                assert period == 1
            case ["direct"]:
                assert period == 1
            case ["hierarchical", grid, *_] if kind in KINDS[:3]:
                assert period == prod(map(int, grid.split("x")[:-1]))
            case _:
                assert period == 8


@pytest.mark.parametrize("kind", ["reduce_scatter", "all_gather", "all_to_all"])
@pytest.mark.parametrize("world", [1, 4, 6, 8])
def test_the_first_cut_is_one_part_per_rank(kind: str, world: int) -> None:
    assert {one.cut(world)[0] for one in algorithms(kind, world)} == {world}


@pytest.mark.parametrize("kind", KINDS)
def test_an_algorithm_is_found_by_its_own_name(kind: str) -> None:
    found = [one for world in (1, 7, 12) for one in algorithms(kind, world)]
    assert all(algorithm(kind, one.name) is one or algorithm(kind, one.name) == one for one in found)
    assert {one.kind for one in found} == {kind}
    assert {one.name.split("/")[0] for one in found} == set(names(kind))


def test_grids_of_a_world() -> None:
    found = [one.name for one in algorithms("all_to_all", 12) if one.name.startswith("hierarchical")]
    assert found == [f"hierarchical/{grid}" for grid in ("2x6", "3x4", "4x3", "6x2", "2x2x3", "2x3x2", "3x2x2")]
    assert not [one for one in algorithms("all_reduce", 7) if one.name.startswith("hierarchical")]


def test_pieces_left_out_are_one() -> None:
    assert algorithm("all_reduce", "double_binary_tree").name == "double_binary_tree/1"
    assert algorithm("broadcast", "chain").cut(4) == (1,)
    assert algorithm("all_reduce", "hierarchical/8x4/2").cut(32) == (2, 8, 4)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (
            "allreduce",
            "ring",
            "kind = 'allreduce' is no collective; allowed: all_reduce, .*; did you mean 'all_reduce'",
        ),
        ("all_reduce", "rnig", "algorithm = 'rnig' does no all_reduce; allowed: ring, .*; did you mean 'ring'?"),
        ("broadcast", "ring", "algorithm = 'ring' does no broadcast; allowed: halving_doubling, "),
        ("all_reduce", "ring/4", "algorithm = 'ring/4' is not written like ring, in"),
        (
            "all_reduce",
            "double_binary_tree/0",
            "is not written like double_binary_tree/PIECES, in whole numbers from 1 on",
        ),
        ("reduce", "chain/2/2", "is not written like chain/PIECES"),
        ("all_reduce", "hierarchical", "is not written like hierarchical/GxN, /GxNxP or /GxN/PIECES"),
        ("all_reduce", "hierarchical/8", "is not written like hierarchical/GxN"),
        ("all_reduce", "hierarchical/8xtwo", "is not written like hierarchical/GxN"),
        ("all_to_all", "hierarchical/2x2/2", "pieces = 2: a hierarchical all_to_all has none"),
    ],
)
def test_other_names_are_refused(kind: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        algorithm(kind, name)
    assert "\n" not in str(refused.value)
