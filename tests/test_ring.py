"""Rings: counted; tests/test_algorithms.py proves them and tests/test_performed.py performs them."""

from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.program import Send, chunk_bounds, sent_elements
from windtunnel.collectives.proof import prove
from windtunnel.collectives.rendezvous import rendezvous
from windtunnel.collectives.ring import BIDIRECTIONAL_RING, RING, chain
from windtunnel.collectives.tiers import RING_STEPS

KINDS = tuple(RING)


@given(kind=st.sampled_from(KINDS), world=st.integers(1, 24), elements=st.integers(0, 2000))
def test_steps_and_traffic_equal_the_closed_form(kind: str, world: int, elements: int) -> None:
    """r (n - 1) steps of one send each, and r (n - 1) / n of the buffer sent per rank (the mean where n does not
    divide it), r = 2 for an all-reduce and 1 otherwise: Patarasuk and Yuan 2009."""
    rounds = 2 if kind == "all_reduce" else 1
    assert RING_STEPS[kind] == rounds
    programs = [RING[kind].program(rank, world) for rank in range(world)]
    assert all(len(program) == rounds * (world - 1) for program in programs)
    assert all(sum(isinstance(op, Send) for op in step) == 1 for program in programs for step in program)
    sent = [sent_elements(program, chunk_bounds(elements, world)) for program in programs]
    assert sum(sent) == rounds * (world - 1) * elements
    if elements % world == 0:
        assert sent == [rounds * (world - 1) * elements // world] * world


@given(kind=st.sampled_from(KINDS), world=st.integers(2, 12), elements=st.integers(0, 500))
def test_both_ways_halve_what_a_link_carries(kind: str, world: int, elements: int) -> None:
    """The steps and the elements of a ring, in every step half of them to each neighbour."""
    both, one = BIDIRECTIONAL_RING[kind], RING[kind]
    bounds = both.bounds(elements, world)
    for rank, program in enumerate(both.programs(world)):
        assert len(program) == len(one.program(rank, world))
        assert all(
            [op.peer for op in step if isinstance(op, Send)] == [(rank + 1) % world, (rank - 1) % world]
            for step in program
        )
        if elements % (2 * world) == 0:
            assert sent_elements(program, bounds) == sent_elements(
                one.program(rank, world), one.bounds(elements, world)
            )


@given(kind=st.sampled_from(["broadcast", "reduce"]), world=st.integers(2, 12), pieces=st.integers(1, 12))
def test_a_chain_is_as_long_as_its_ranks_and_pieces(kind: str, world: int, pieces: int) -> None:
    """n - 1 hops of the first piece, a round for each other one; every rank but the last sends the buffer once."""
    algorithm = chain(kind, pieces)
    prove(algorithm, world)
    programs = algorithm.programs(world)
    assert max(rendezvous(programs).rounds.values()) + 1 == pieces + world - 2
    sent = [sent_elements(program, algorithm.bounds(60, world)) for program in programs]
    assert sorted(sent) == [0] + [60] * (world - 1)
    assert all(sum(isinstance(op, Send) for op in step) <= 1 for program in programs for step in program)
