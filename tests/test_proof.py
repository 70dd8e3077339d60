"""The proof against mutations of proven programs: it refuses them, or they still do what was promised."""

import random
from collections import Counter, deque
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from windtunnel.collectives.program import Algorithm, Program, Recv, Reduce, Send
from windtunnel.collectives.proof import ProofError, check_rendezvous, contributions, prove
from windtunnel.collectives.ring import RING

Op = Send | Recv | Reduce
Place = tuple[int, int, int]
"""(rank, step, op)"""

KINDS = st.sampled_from(list(RING))


def programs_of(kind: str, world: int) -> list[Program]:
    return [RING[kind].program(rank, world) for rank in range(world)]


def prove_programs(kind: str, programs: list[Program]) -> None:
    prove(Algorithm(kind, "mutant", lambda rank, world: programs[rank]), len(programs))


def run_on_numbers(kind: str, programs: list[Program]) -> list[list[int]]:
    """What the promised chunks of each rank hold, by a naive player of its own.

    One rank at a time runs as far as it gets. Numbers of 60 random bits stand for data: no two different sums of them
    are equal but by a chance of 2^-60.
    """
    world, draw = len(programs), random.Random(7)
    data = [[draw.getrandbits(60) for _ in range(world)] for _ in range(world)]
    inbox: dict[tuple[int, int], deque[int]] = {(a, b): deque() for a in range(world) for b in range(world)}

    def play(rank: int):
        for step in programs[rank]:
            before = list(data[rank])
            for op in step:
                if isinstance(op, Send):
                    inbox[rank, op.peer].append(before[op.chunk])
            for op in step:
                if not isinstance(op, Send):
                    while not inbox[op.peer, rank]:
                        yield
                    got = inbox[op.peer, rank].popleft()
                    data[rank][op.chunk] = got + (data[rank][op.chunk] if isinstance(op, Reduce) else 0)

    running = [play(rank) for rank in range(world)]
    for _ in range(4 * world * world + 10):
        running = [player for player in running if next(player, "done") != "done"]
    assert not running, "a program that the proof accepted is stuck"
    promised = [[rank] if kind == "reduce_scatter" else range(world) for rank in range(world)]
    return [[data[rank][chunk] for chunk in promised[rank]] for rank in range(world)]


def edited(programs: list[Program], place: Place, ops: tuple[Op, ...]) -> list[Program]:
    """The programs with the op at `place` replaced by `ops`."""
    rank, at, position = place
    steps = list(programs[rank])
    steps[at] = (*steps[at][:position], *ops, *steps[at][position + 1 :])
    return [*programs[:rank], tuple(steps), *programs[rank + 1 :]]


def op_at(programs: list[Program], place: Place) -> Op:
    rank, at, position = place
    return programs[rank][at][position]


@st.composite
def proven(draw: st.DrawFn) -> tuple[str, list[Program]]:
    kind = draw(KINDS)
    return kind, programs_of(kind, draw(st.integers(2, 7)))


def all_places(programs: list[Program]) -> list[Place]:
    return [(r, s, o) for r, program in enumerate(programs) for s, step in enumerate(program) for o in range(len(step))]


def places(programs: list[Program]) -> st.SearchStrategy[Place]:
    return st.sampled_from(all_places(programs))


@given(proven(), st.data())
def test_a_dropped_op_is_refused(case: tuple[str, list[Program]], data: st.DataObject) -> None:
    kind, programs = case
    with pytest.raises(ProofError):
        prove_programs(kind, edited(programs, data.draw(places(programs)), ()))


@given(proven(), st.data())
def test_a_duplicated_op_is_refused(case: tuple[str, list[Program]], data: st.DataObject) -> None:
    kind, programs = case
    place = data.draw(places(programs))
    op = op_at(programs, place)
    with pytest.raises(ProofError):
        prove_programs(kind, edited(programs, place, (op, op)))


@given(proven(), st.data())
def test_a_redirected_op_is_refused(case: tuple[str, list[Program]], data: st.DataObject) -> None:
    kind, programs = case
    place = data.draw(places(programs))
    op = op_at(programs, place)
    peer = data.draw(st.integers(0, len(programs) - 1))
    assume(peer != op.peer)
    with pytest.raises(ProofError):
        prove_programs(kind, edited(programs, place, (replace(op, peer=peer),)))


@given(proven(), st.data())
def test_another_chunk_is_refused(case: tuple[str, list[Program]], data: st.DataObject) -> None:
    kind, programs = case
    place = data.draw(places(programs))
    op = op_at(programs, place)
    chunk = data.draw(st.integers(0, len(programs) - 1))
    assume(chunk != op.chunk)
    with pytest.raises(ProofError):
        prove_programs(kind, edited(programs, place, (replace(op, chunk=chunk),)))


@given(proven(), st.data())
def test_an_overwrite_for_a_sum(case: tuple[str, list[Program]], data: st.DataObject) -> None:
    kind, programs = case
    sums = [place for place in all_places(programs) if isinstance(op_at(programs, place), Reduce)]
    if not sums:  # an all-gather adds nothing
        return
    place = data.draw(st.sampled_from(sums))
    op = op_at(programs, place)
    with pytest.raises(ProofError):
        prove_programs(kind, edited(programs, place, (Recv(op.peer, op.chunk),)))


@given(proven(), st.data())
def test_a_sum_for_an_overwrite(case: tuple[str, list[Program]], data: st.DataObject) -> None:
    kind, programs = case
    overwrites = [place for place in all_places(programs) if isinstance(op_at(programs, place), Recv)]
    if not overwrites:  # a reduce-scatter adds all that it receives
        return
    place = data.draw(st.sampled_from(overwrites))
    op = op_at(programs, place)
    check_mutant(kind, programs, edited(programs, place, (Reduce(op.peer, op.chunk),)))


@given(proven(), st.data())
def test_two_swapped_ops(case: tuple[str, list[Program]], data: st.DataObject) -> None:
    """Of one rank or of two: a harmless swap (within a step) passes, and must then change nothing."""
    kind, programs = case
    one = data.draw(places(programs))
    rank, at, position = data.draw(places(programs))
    here = data.draw(st.sampled_from([(one[0], one[1], position), (one[0], at, position), (rank, at, position)]))
    first, second = op_at(programs, one), op_at(programs, here)
    check_mutant(kind, programs, edited(edited(programs, one, (second,)), here, (first,)))


def check_mutant(kind: str, programs: list[Program], mutant: list[Program]) -> None:
    try:
        prove_programs(kind, mutant)
    except ProofError:
        return
    assert run_on_numbers(kind, mutant) == run_on_numbers(kind, programs)


@pytest.mark.parametrize("kind", RING)
@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_naive_player_agrees_on_the_rings(kind: str, world: int) -> None:
    draw = random.Random(7)
    data = [[draw.getrandbits(60) for _ in range(world)] for _ in range(world)]
    sums = [sum(column) for column in zip(*data, strict=True)]
    wanted = {
        "all_reduce": [sums] * world,
        "reduce_scatter": [[total] for total in sums],
        "all_gather": [[data[chunk][chunk] for chunk in range(world)]] * world,
    }
    assert run_on_numbers(kind, programs_of(kind, world)) == wanted[kind]


def test_an_exchange_that_only_buffers_let_through() -> None:
    """Both send, then both receive: sockets buffer the messages, a rendezvous waits for ever."""
    programs: list[Program] = [((Send(1 - rank, rank),), (Recv(1 - rank, 1 - rank),)) for rank in range(2)]
    assert run_on_numbers("all_gather", programs) == run_on_numbers("all_gather", programs_of("all_gather", 2))
    with pytest.raises(ProofError, match=r"deadlock under in-order rendezvous: rank 0 step 0: c0->1; rank 1 step 0"):
        check_rendezvous(programs)
    with pytest.raises(ProofError, match="deadlock"):
        prove_programs("all_gather", programs)


def test_posted_together_the_exchange_is_safe() -> None:
    prove_programs("all_gather", [((Send(1 - rank, rank), Recv(1 - rank, 1 - rank)),) for rank in range(2)])


def test_messages_of_a_pair_meet_in_order() -> None:
    """Two sends in one order and two receives in the other: chunks would be mixed up."""
    programs: list[Program] = [((Send(1, 0), Send(1, 1)),), ((Recv(0, 1), Recv(0, 0)),)]
    held = [[Counter([rank]), Counter([rank])] for rank in range(2)]
    with pytest.raises(ProofError, match="rank 1 step 0 awaits chunk 1 of rank 0, which sends chunk 0"):
        contributions(programs, held)


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        ([((Send(1, 0),),), ()], "rank 0 sends chunk 0 to rank 1, which never receives it"),
        ([((Recv(1, 1),),), ()], "rank 0 waits for ever in step 0: c1<-1"),
        ([(), ()], r"all_reduce: rank 0 ends with \{0: 1\} in chunk 0, not \{0: 1, 1: 1\}"),
    ],
)
def test_messages_name_rank_step_and_op(programs: list[Program], message: str) -> None:
    with pytest.raises(ProofError, match=message):
        prove_programs("all_reduce", programs)
