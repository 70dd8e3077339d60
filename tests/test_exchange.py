"""Everyone with everyone: who meets whom, and how much is sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.exchange import DIRECT, PAIRWISE, round_robin
from windtunnel.collectives.program import Recv, Send, sent_elements
from windtunnel.collectives.proof import prove

WORLDS = st.integers(1, 24)


@given(world=WORLDS)
def test_a_pairwise_exchange_meets_each_other_rank_once(world: int) -> None:
    algorithm = PAIRWISE["all_to_all"]
    prove(algorithm, world)
    for rank, program in enumerate(algorithm.programs(world)):
        assert sorted(step[0].peer for step in program) == [other for other in range(world) if other != rank]
        assert all(step == (Send(step[0].peer, step[0].peer), Recv(step[0].peer, step[0].peer)) for step in program)
        assert sent_elements(program, algorithm.bounds(5 * world, world)) == 5 * (world - 1)


@given(pairs=st.integers(1, 12))
def test_an_even_number_of_ranks_is_busy_in_every_round(pairs: int) -> None:
    rounds = list(zip(*(round_robin(position, 2 * pairs) for position in range(2 * pairs)), strict=True))
    assert len(rounds) == 2 * pairs - 1
    for partners in rounds:
        assert all(partners[other] == position for position, other in enumerate(partners))


@pytest.mark.parametrize(
    ("kind", "buffers"), [("all_reduce", None), ("reduce_scatter", 1), ("all_gather", 1), ("all_to_all", 1)]
)
@given(world=WORLDS, part=st.integers(0, 9))
def test_one_step(kind: str, buffers: int | None, world: int, part: int) -> None:
    """All but an all-reduce send the least, (n - 1) / n of the buffer; an all-reduce n - 1 buffers."""
    algorithm = DIRECT[kind]
    prove(algorithm, world)
    for program in algorithm.programs(world):
        assert len(program) == (world > 1)
        assert sent_elements(program, algorithm.bounds(part * world, world)) == (buffers or world) * part * (world - 1)
