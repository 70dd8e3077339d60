"""Hierarchical collectives: what crosses which tier, in how many steps, and where it ends."""

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.collectives.hierarchy import Grid, group_in, hierarchical, strides
from windtunnel.collectives.program import Algorithm, Send, span
from windtunnel.collectives.proof import prove
from windtunnel.collectives.rendezvous import rendezvous

GRIDS = st.lists(st.integers(1, 5), min_size=2, max_size=3).map(tuple).filter(lambda grid: prod(grid) <= 18)
RINGS = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}


def sent_by_tier(algorithm: Algorithm, grid: Grid, rank: int, elements: int) -> list[int]:
    """Elements that a rank sends to others of its group in each tier."""
    world = prod(grid)
    bounds = algorithm.bounds(elements, world)
    sent = [0] * len(grid)
    for step in algorithm.program(rank, world):
        for op in step:
            if isinstance(op, Send):
                (tier,) = [tier for tier in range(len(grid)) if op.peer in group_in(grid, tier, rank)[1]]
                start, stop = span(bounds, op)
                sent[tier] += stop - start
    return sent


@given(grid=GRIDS, data=st.data())
def test_groups_partition_the_world(grid: Grid, data: st.DataObject) -> None:
    world = prod(grid)
    assert strides(grid)[-1] == world
    tier = data.draw(st.integers(0, len(grid) - 1))
    groups = {tuple(group_in(grid, tier, rank)[1]) for rank in range(world)}
    assert sorted(rank for group in groups for rank in group) == list(range(world))
    for rank in range(world):
        position, group = group_in(grid, tier, rank)
        assert group[position] == rank
        assert len(group) == grid[tier]


@pytest.mark.parametrize("kind", [*RINGS, "broadcast", "reduce", "all_to_all"])
@settings(max_examples=40)
@given(grid=GRIDS)
def test_proved_on_every_grid(kind: str, grid: Grid) -> None:
    prove(hierarchical(kind, grid), prod(grid))


@pytest.mark.parametrize("kind", RINGS)
@given(grid=GRIDS, rank=st.integers(0, 10**6), part=st.integers(1, 4))
def test_a_tier_carries_what_the_tiers_inside_left(kind: str, grid: Grid, rank: int, part: int) -> None:
    """r (g - 1) / g of the buffer over the product of the tiers inside: the sum is r (n - 1) / n, as in a flat ring."""
    world = prod(grid)
    elements = part * world
    expected = [
        RINGS[kind] * (size - 1) * (elements // stride // size)
        for size, stride in zip(grid, strides(grid), strict=False)
    ]
    assert sent_by_tier(hierarchical(kind, grid), grid, rank % world, elements) == expected
    assert sum(expected) == RINGS[kind] * (world - 1) * part


@pytest.mark.parametrize("kind", RINGS)
@settings(max_examples=30)
@given(grid=GRIDS, pieces=st.integers(1, 4), rank=st.integers(0, 10**6))
def test_steps_and_overlap(kind: str, grid: Grid, pieces: int, rank: int) -> None:
    """g - 1 steps per tier and direction; each piece more takes the longest phase: the other phases are hidden."""
    world = prod(grid)
    algorithm = hierarchical(kind, grid, pieces)
    prove(algorithm, world)
    phases = [size - 1 for size in grid]
    if kind == "all_reduce":
        phases = [*phases[:-1], 2 * phases[-1], *phases[:-1]]
    assert len(algorithm.program(rank % world, world)) == sum(phases) + (pieces - 1) * max(phases)


@given(grid=GRIDS)
def test_an_all_reduce_sends_one_run_per_step(grid: Grid) -> None:
    for program in hierarchical("all_reduce", grid).programs(prod(grid)):
        assert all([type(op).__name__ for op in step] in (["Send", "Reduce"], ["Send", "Recv"]) for step in program)


@given(grid=GRIDS)
def test_trees_cross_a_tier_once_for_each_group_behind_it(grid: Grid) -> None:
    world = prod(grid)
    for kind in ("broadcast", "reduce"):
        algorithm = hierarchical(kind, grid)
        sent = [sent_by_tier(algorithm, grid, rank, 1) for rank in range(world)]
        times = [(size - 1) * (world // size // stride) for size, stride in zip(grid, strides(grid), strict=False)]
        assert [sum(tier) for tier in zip(*sent, strict=True)] == times
        rounds = max(rendezvous(algorithm.programs(world)).rounds.values(), default=-1) + 1
        assert rounds == sum((size - 1).bit_length() for size in grid)


@given(grid=GRIDS, rank=st.integers(0, 10**6))
def test_an_all_to_all_sends_few_large_messages_outwards(grid: Grid, rank: int) -> None:
    """g - 1 exchanges per tier, each of n / g parts; in the outermost tier a message is one run."""
    world = prod(grid)
    algorithm = hierarchical("all_to_all", grid)
    assert sent_by_tier(algorithm, grid, rank % world, world) == [(size - 1) * (world // size) for size in grid]
    program = algorithm.program(rank % world, world)
    assert len(program) == sum(size - 1 for size in grid)
    assert all(len(step) == 2 for step in program[len(program) - grid[-1] + 1 :])


@pytest.mark.parametrize("kind", ["broadcast", "reduce", "all_to_all"])
def test_pieces_where_there_are_none(kind: str) -> None:
    with pytest.raises(ValueError, match=f"pieces = 2: a hierarchical {kind} has none; leave them out"):
        hierarchical(kind, (2, 2), 2)


def test_a_grid_of_another_size() -> None:
    with pytest.raises(ValueError, match="a grid of 2x3 is for 6 ranks, not for world = 8; choose another grid"):
        hierarchical("all_reduce", (2, 3)).program(0, 8)


def test_a_large_world_costs_no_more_than_its_steps() -> None:
    """Ranks of 16,384 share nothing but their steps: as many ops as the ring of 2,048 nodes has."""
    program = hierarchical("all_reduce", (8, 2048)).program(5, 16384)
    assert len(program) == 2 * (7 + 2047)
    assert len({id(op) for step in program for op in step}) <= 3 * 2048 + 4 * 8
