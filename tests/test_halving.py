"""Recursive halving and doubling: the fewest steps, and on powers of two the fewest elements."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.halving import HALVING_DOUBLING, RECURSIVE_DOUBLING, core_ranks
from windtunnel.collectives.program import Send, sent_elements
from windtunnel.collectives.proof import prove
from windtunnel.collectives.rendezvous import rendezvous

HALVINGS = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "broadcast": 2, "reduce": 2}
"""How often log2 n steps are made."""

EXTRA = {"all_reduce": 3, "reduce_scatter": 3, "all_gather": 2, "broadcast": 1, "reduce": 2}
"""Steps more where n is no power of two: two to add up, one to hand a part in, one to hand the result out."""


def rounds(programs: list) -> int:
    return max(rendezvous(programs).rounds.values(), default=-1) + 1


@pytest.mark.parametrize("kind", HALVINGS)
@given(world=st.integers(1, 40))
def test_steps(kind: str, world: int) -> None:
    algorithm = HALVING_DOUBLING[kind]
    prove(algorithm, world)
    log2 = world.bit_length() - 1
    extra = 0 if world == 1 << log2 else EXTRA[kind]
    assert rounds(algorithm.programs(world)) == HALVINGS[kind] * log2 + extra


@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter", "all_gather"])
@given(bits=st.integers(0, 6), part=st.integers(0, 50))
def test_powers_of_two_send_the_least(kind: str, bits: int, part: int) -> None:
    """(n - 1) / n of the buffer per rank and direction, the lower bound (Thakur et al. 2005, sections 4.3 to 4.5)."""
    world = 2**bits
    algorithm = HALVING_DOUBLING[kind]
    for program in algorithm.programs(world):
        assert sent_elements(program, algorithm.bounds(part * world, world)) == HALVINGS[kind] * (world - 1) * part


@given(bits=st.integers(1, 6))
def test_an_all_reduce_exchanges_most_with_its_neighbour(bits: int) -> None:
    program = HALVING_DOUBLING["all_reduce"].program(0, 2**bits)
    sends = [(op.peer, op.count) for step in program for op in step if isinstance(op, Send)]
    out = [(1 << bit, 2 ** (bits - 1 - bit)) for bit in range(bits)]
    assert sends == out + out[::-1]


@given(world=st.integers(2, 40))
def test_those_aside_send_and_get_once(world: int) -> None:
    """An odd rank that stands aside sends its buffer once, in two halves, and gets the result at the end."""
    aside = world - len(core_ranks(world))
    algorithm = HALVING_DOUBLING["all_reduce"]
    programs, bounds = algorithm.programs(world), algorithm.bounds(4 * world, world)
    for rank in range(1, 2 * aside, 2):
        assert {op.peer for step in programs[rank] for op in step} == {rank - 1}
        assert sent_elements(programs[rank], bounds) == 4 * world
        assert len(programs[rank]) == 3


@given(world=st.integers(1, 40))
def test_recursive_doubling_has_the_fewest_steps(world: int) -> None:
    """log2 n exchanges of the whole buffer; two more to hand in and out where n is no power of two."""
    algorithm = RECURSIVE_DOUBLING["all_reduce"]
    prove(algorithm, world)
    log2 = world.bit_length() - 1
    assert rounds(algorithm.programs(world)) == log2 + 2 * (world != 1 << log2)
    assert sent_elements(algorithm.program(0, world), ((0, 7),)) == 7 * (log2 + (world != 1 << log2))


@given(world=st.integers(1, 200))
def test_the_core_is_the_largest_power_of_two(world: int) -> None:
    core = core_ranks(world)
    assert len(core) & (len(core) - 1) == 0
    assert len(core) <= world < 2 * len(core)
    assert core[0] == 0
    assert core == sorted(set(core))
    assert core[-1] <= world - 1
    assert all(rank + 1 in core or rank % 2 == 0 for rank in core if rank + 1 < world)
