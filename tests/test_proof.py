"""The proof against mutants of proven programs: it passes exactly those whose numbers still come out right.

The oracle below plays the programs on random integers and knows nothing of the proof, the engine or the simulator.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.collectives.algorithms import KINDS, algorithm, algorithms
from windtunnel.collectives.program import Algorithm, Op, Program, Recv, Reduce, Send, Step
from windtunnel.collectives.proof import ProofError, prove
from windtunnel.collectives.rendezvous import check_rendezvous, rendezvous

Chunk = tuple[float, ...]
Data = list[list[Chunk]]
"""data[rank][chunk] is that chunk's numbers; whole ones, but where rounding is the question."""


def random_data(kind: str, world: int, chunks: int) -> Data:
    """Numbers of 60 random bits: no two different sums of them are equal but by a chance of 2^-60.

    No two chunks are equally long, so that one cannot stand for another, except in an all-to-all, where all are.
    """
    draw = random.Random(7)
    lengths = [1 if kind == "all_to_all" else 1 + chunk for chunk in range(chunks)]
    return [[tuple(draw.getrandbits(60) for _ in range(length)) for length in lengths] for _ in range(world)]


def right(kind: str, start: Data, end: Data) -> bool:
    """Whether `end` is what a collective makes of `start`, from its definition."""
    world, chunks = len(start), len(start[0])
    part = chunks // world
    sums = [tuple(map(sum, zip(*same, strict=True))) for same in zip(*start, strict=True)]
    mine = [range(rank * part, (rank + 1) * part) for rank in range(world)]
    match kind:
        case "all_reduce":
            return all(held == sums for held in end)
        case "reduce_scatter":
            return all(end[rank][chunk] == sums[chunk] for rank in range(world) for chunk in mine[rank])
        case "all_gather":
            gathered = [start[rank][chunk] for rank in range(world) for chunk in mine[rank]]
            return all(held == gathered for held in end)
        case "broadcast":
            return all(held == start[0] for held in end)
        case "reduce":
            return end[0] == sums
        case _:
            return all(
                end[to][chunk] == start[of][place]
                for of in range(world)
                for to in range(world)
                for chunk, place in zip(mine[of], mine[to], strict=True)
            )


def play(programs: list[Program], start: Data) -> Data | None:
    """What the ranks hold at the end, or None if they do not come to an end or lengths do not match.

    A message moves when its sender and its receiver stand in the steps that list it, and those listed before it between
    the same two have moved.
    """
    data = [list(chunks) for chunks in start]
    at = [0] * len(programs)
    before = [list(chunks) for chunks in data]
    moved: list[dict[int, list[Chunk]]] = [{} for _ in programs]  # by position in the step

    def next_op(rank: int, peer: int, sending: bool) -> int | None:
        for number, op in enumerate(programs[rank][at[rank]] if at[rank] < len(programs[rank]) else ()):
            if number not in moved[rank] and op.peer == peer and isinstance(op, Send) == sending:
                return number
        return None

    progress = True
    while progress:
        progress = False
        for sender in range(len(programs)):
            for receiver in {op.peer for step in programs[sender][at[sender] : at[sender] + 1] for op in step}:
                if receiver == sender or not 0 <= receiver < len(programs):
                    return None
                source, target = next_op(sender, receiver, True), next_op(receiver, sender, False)
                if source is None or target is None:
                    continue
                send, receive = programs[sender][at[sender]][source], programs[receiver][at[receiver]][target]
                message = before[sender][send.chunk : send.chunk + send.count]
                place = data[receiver][receive.chunk : receive.chunk + receive.count]
                if (
                    list(map(len, message)) != list(map(len, place))
                    or not len(place) == receive.count == send.count > 0
                ):
                    return None
                moved[sender][source] = moved[receiver][target] = message
                progress = True
        for rank, program in enumerate(programs):
            if at[rank] < len(program) and len(moved[rank]) == len(program[at[rank]]):
                for number, op in enumerate(program[at[rank]]):
                    for chunk, numbers in enumerate(moved[rank][number], start=op.chunk):
                        if isinstance(op, Recv):
                            data[rank][chunk] = numbers
                        elif isinstance(op, Reduce):
                            data[rank][chunk] = tuple(map(sum, zip(data[rank][chunk], numbers, strict=True)))
                at[rank], before[rank], moved[rank], progress = at[rank] + 1, list(data[rank]), {}, True
    return data if at == [len(program) for program in programs] else None


def numbers_are_right(kind: str, programs: list[Program], chunks: int) -> bool:
    start = random_data(kind, len(programs), chunks)
    end = play(programs, start)
    return end is not None and right(kind, start, end)


def with_programs(one: Algorithm, programs: list[Program], chunks: int) -> Algorithm:
    return replace(one, program=lambda rank, world: programs[rank], cut=lambda world: (chunks,))


def proof_passes(one: Algorithm, programs: list[Program], chunks: int) -> bool:
    try:
        prove(with_programs(one, programs, chunks), len(programs))
    except ProofError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 8])
def test_the_oracle_agrees_on_every_algorithm(kind: str, world: int) -> None:
    for one in algorithms(kind, world):
        assert numbers_are_right(kind, one.programs(world), prod(one.cut(world))), one


@pytest.mark.parametrize("world", range(2, 13))
def test_all_ranks_round_their_sums_alike(world: int) -> None:
    """Replicas must not drift apart: every all-reduce but the one-step one leaves the same bits on all ranks."""
    draw = random.Random(world)
    for one in algorithms("all_reduce", world):
        if one.name != "direct":
            chunks = prod(one.cut(world))
            start = [[(draw.uniform(-1, 1) * 10 ** draw.randint(-8, 8),) for _ in range(chunks)] for _ in range(world)]
            end = play(one.programs(world), start)
            assert end == [end[0]] * world, one


Steps = list[Step]
Mutation = Callable[[st.DrawFn, Steps, int, int], None]
"""Edits one rank's steps in place, given the number of ranks and of chunks."""


def _place(draw: st.DrawFn, steps: Steps) -> tuple[int, int]:
    return draw(st.sampled_from([(at, number) for at, step in enumerate(steps) for number in range(len(step))]))


def _edit(steps: Steps, place: tuple[int, int], *ops: Op) -> Op:
    """Put `ops` where an op stood, and return it."""
    at, number = place
    old = steps[at][number]
    steps[at] = (*steps[at][:number], *ops, *steps[at][number + 1 :])
    return old


def drop_op(draw: st.DrawFn, steps: Steps, world: int, chunks: int) -> None:
    _edit(steps, _place(draw, steps))


def duplicate_op(draw: st.DrawFn, steps: Steps, world: int, chunks: int) -> None:
    at, number = _place(draw, steps)
    _edit(steps, (at, number), steps[at][number], steps[at][number])


def swap_ops(draw: st.DrawFn, steps: Steps, world: int, chunks: int) -> None:
    one = _place(draw, steps)
    other = draw(
        st.sampled_from([(one[0], number) for number in range(len(steps[one[0]]))]) | st.just(_place(draw, steps))
    )
    _edit(steps, other, _edit(steps, one, steps[other[0]][other[1]]))


def redirect(draw: st.DrawFn, steps: Steps, world: int, chunks: int) -> None:
    at, number = _place(draw, steps)
    _edit(steps, (at, number), replace(steps[at][number], peer=draw(st.integers(0, world))))


def rename_chunks(draw: st.DrawFn, steps: Steps, world: int, chunks: int) -> None:
    at, number = _place(draw, steps)
    run = {
        "chunk": draw(st.integers(0, chunks)),
        "count": draw(st.just(steps[at][number].count) | st.integers(0, chunks)),
    }
    _edit(steps, (at, number), replace(steps[at][number], **run))


def overwrite_for_add(draw: st.DrawFn, steps: Steps, world: int, chunks: int) -> None:
    """And add for overwrite."""
    receives = [
        (at, number) for at, step in enumerate(steps) for number, op in enumerate(step) if not isinstance(op, Send)
    ]
    if receives:
        at, number = draw(st.sampled_from(receives))
        op = steps[at][number]
        _edit(steps, (at, number), (Recv if isinstance(op, Reduce) else Reduce)(op.peer, op.chunk, op.count))


def drop_step(draw: st.DrawFn, steps: Steps, world: int, chunks: int) -> None:
    del steps[draw(st.integers(0, len(steps) - 1))]


def duplicate_step(draw: st.DrawFn, steps: Steps, world: int, chunks: int) -> None:
    at = draw(st.integers(0, len(steps) - 1))
    steps.insert(at, steps[at])


def swap_steps(draw: st.DrawFn, steps: Steps, world: int, chunks: int) -> None:
    one, other = draw(st.integers(0, len(steps) - 1)), draw(st.integers(0, len(steps) - 1))
    steps[one], steps[other] = steps[other], steps[one]


def split_step(draw: st.DrawFn, steps: Steps, world: int, chunks: int) -> None:
    at, number = _place(draw, steps)
    steps[at : at + 1] = [steps[at][:number], steps[at][number:]]


def join_steps(draw: st.DrawFn, steps: Steps, world: int, chunks: int) -> None:
    at = draw(st.integers(0, len(steps) - 1))
    steps[at : at + 2] = [tuple(op for step in steps[at : at + 2] for op in step)]


MUTATIONS: tuple[Mutation, ...] = (
    drop_op,
    duplicate_op,
    swap_ops,
    redirect,
    rename_chunks,
    overwrite_for_add,
    drop_step,
    duplicate_step,
    swap_steps,
    split_step,
    join_steps,
)


@st.composite
def mutants(draw: st.DrawFn, mutations: tuple[Mutation, ...] = MUTATIONS) -> tuple[Algorithm, list[Program], int]:
    """An algorithm, the programs of all ranks with one or two mutations, and the number of chunks."""
    kind, world = draw(st.sampled_from(KINDS)), draw(st.integers(2, 9))
    one = draw(st.sampled_from(algorithms(kind, world)))
    programs, chunks = one.programs(world), prod(one.cut(world))
    for mutate in draw(st.lists(st.sampled_from(mutations), min_size=1, max_size=2)):
        rank = draw(st.sampled_from([rank for rank, program in enumerate(programs) if any(program)]))
        steps = list(programs[rank])
        mutate(draw, steps, world, chunks)
        programs[rank] = tuple(steps)
    return one, programs, chunks


@settings(max_examples=350)
@given(mutants())
def test_the_proof_passes_exactly_the_mutants_whose_numbers_are_right(
    mutant: tuple[Algorithm, list[Program], int],
) -> None:
    one, programs, chunks = mutant
    assert proof_passes(one, programs, chunks) == numbers_are_right(one.kind, programs, chunks)


@settings(max_examples=150)
@given(mutants((swap_ops, swap_steps, split_step, join_steps, overwrite_for_add)))
def test_mutants_that_may_be_harmless(mutant: tuple[Algorithm, list[Program], int]) -> None:
    """Changes of order: many of them change nothing, or only whether ranks wait for each other."""
    one, programs, chunks = mutant
    assert proof_passes(one, programs, chunks) == numbers_are_right(one.kind, programs, chunks)


@pytest.mark.parametrize("kind", KINDS)
def test_no_message_is_sent_in_vain(kind: str) -> None:
    """Any algorithm without any one of its messages, its send and its receive, loses its proof.

    But van de Geijn's broadcast, whose all-gather brings the root what it has.
    """
    cases = [(one, world) for world in (2, 4, 5) for one in algorithms(kind, world)]
    for one, world in cases:
        if (one.kind, one.name) == ("broadcast", "halving_doubling"):
            continue
        programs = one.programs(world)
        for receive, send in rendezvous(programs).source.items():
            mutant = list(programs)
            for place in (receive, send):
                steps = list(mutant[place.rank])
                _edit(steps, (place.step, place.op))
                mutant[place.rank] = tuple(steps)
            assert not proof_passes(one, mutant, prod(one.cut(world))), (str(one), world, send)


def test_an_exchange_that_only_buffers_let_through() -> None:
    """Both send, then both receive: sockets buffer the messages, a rendezvous waits for ever."""
    programs: list[Program] = [((Send(1 - rank, rank),), (Recv(1 - rank, 1 - rank),)) for rank in range(2)]
    with pytest.raises(ProofError, match=r"deadlock under in-order rendezvous: rank 0 step 0: c0->1; rank 1 step 0"):
        check_rendezvous(programs)
    assert not numbers_are_right("all_gather", programs, 2)


def test_a_round_begins_when_both_sides_are_there() -> None:
    """Rank 2 has nothing to do at first, but what it awaits is sent in the second round; empty steps take none."""
    programs: list[Program] = [((Send(1, 0),), (Send(2, 0),)), ((Recv(0, 0),),), ((), (Recv(0, 0),))]
    rounds = rendezvous(programs).rounds
    assert rounds == {(0, 0, 0): 0, (1, 0, 0): 0, (0, 1, 0): 1, (2, 1, 0): 1}


def test_posted_together_the_exchange_is_safe() -> None:
    programs: list[Program] = [((Send(1 - rank, rank), Recv(1 - rank, 1 - rank)),) for rank in range(2)]
    assert proof_passes(algorithm("all_gather", "ring"), programs, 2)


@pytest.mark.parametrize(
    ("kind", "programs", "message"),
    [
        (
            "all_reduce",
            [((Send(1, 0),),), ()],
            "rank 0 step 0: c0->1 never meets: rank 0 sends 1 .* rank 1, .* awaits 0",
        ),
        (
            "all_reduce",
            [((Recv(1, 1),),), ()],
            "rank 0 step 0: c1<-1 never meets: rank 1 sends 0 .* rank 0, .* awaits 1",
        ),
        ("all_reduce", [(), ()], r"rank 0 ends with r0.c0 in chunk 0, not r0.c0 \+ r1.c0"),
        ("all_gather", [(), ()], "rank 0 ends with rubbish in chunk 1, not r1.c1"),
        (
            "reduce",
            [((Reduce(1, 0, 2), Reduce(1, 0)),), ((Send(0, 0, 2), Send(0, 0)),)],
            r"rank 0 ends with r0.c0 \+ 2 r1.c0",
        ),
        ("all_reduce", [((Send(1, 1, 2),),), ()], "rank 0 step 0: c1-2->1 names chunks that a buffer of 2 has not"),
        ("all_reduce", [(), ((Send(1, 1),),)], "rank 1 step 0: c1->1 names no other rank of 2"),
        (  # two sends in one order and two receives in the other: chunks would be mixed up
            "all_reduce",
            [((Send(1, 0), Send(1, 1)),), ((Recv(0, 1), Recv(0, 0)),)],
            "rank 1 step 0: c1<-0 meets rank 0 step 0: c0->1",
        ),
    ],
)
def test_messages_name_rank_step_and_op(kind: str, programs: list[Program], message: str) -> None:
    with pytest.raises(ProofError, match=message):
        prove(with_programs(algorithm(kind, "binomial_tree"), programs, 2), 2)


def test_an_unknown_promise_is_refused() -> None:
    with pytest.raises(ValueError, match="kind = 'scan': there is no promise to prove"):
        prove(replace(algorithm("all_reduce", "ring"), kind="scan"), 2)
