"""Proves a collective before anyone plays it: who contributed what to each chunk.

Neither torch nor processes are needed: a program is played on multisets of contributions.
"""

from math import prod

from .program import Algorithm, Program, Reduce, Send
from .rendezvous import Place, ProofError, Rendezvous, rendezvous

Origin = tuple[int, int]
"""(rank, chunk) at the start."""

Contributions = dict[Origin, int]
"""How many times each origin has been added up."""

Held = list[list[Contributions]]
"""held[rank][chunk] is what is in that rank's copy of that chunk."""

RUBBISH = -1
"""The rank from which comes what memory held before: no collective may pass it on."""


def prove(algorithm: Algorithm, world: int) -> None:
    """Check one algorithm at one world size: contributions, matching of sends and receives, absence of deadlock.

    Raises:
        ProofError: naming the first rank and chunk, or the ops, that break the promise of its kind.
    """
    chunks = prod(algorithm.cut(world))
    held = contributions(algorithm.programs(world), initial(algorithm.kind, world, chunks), algorithm.kind)
    for (rank, chunk), promised in wanted(algorithm.kind, world, chunks).items():
        if held[rank][chunk] != promised:
            raise ProofError(
                f"{algorithm} of {world} ranks: rank {rank} ends with {_sum(held[rank][chunk])} in chunk {chunk},"
                f" not {_sum(promised)}"
            )


def initial(kind: str, world: int, chunks: int) -> Held:
    """What is valid at the start: an all-gather's own part, a broadcast's root; of the others everything."""
    part = chunks // world

    def valid(rank: int, chunk: int) -> bool:
        match kind:
            case "all_gather":
                return chunk // part == rank
            case "broadcast":
                return rank == 0
            case _:
                return True

    return [[{(rank if valid(rank, chunk) else RUBBISH, chunk): 1} for chunk in range(chunks)] for rank in range(world)]


def wanted(kind: str, world: int, chunks: int) -> dict[tuple[int, int], Contributions]:
    """What each (rank, chunk) that a kind makes promises about must hold at the end."""
    part = chunks // world
    everywhere = [(rank, chunk) for rank in range(world) for chunk in range(chunks)]
    sums = [{(rank, chunk): 1 for rank in range(world)} for chunk in range(chunks)]
    match kind:
        case "all_reduce":
            return {(rank, chunk): sums[chunk] for rank, chunk in everywhere}
        case "reduce_scatter":
            return {(rank, chunk): sums[chunk] for rank, chunk in everywhere if chunk // part == rank}
        case "all_gather":
            return {(rank, chunk): {(chunk // part, chunk): 1} for rank, chunk in everywhere}
        case "broadcast":
            return {(rank, chunk): {(0, chunk): 1} for rank, chunk in everywhere}
        case "reduce":
            return {(0, chunk): sums[chunk] for chunk in range(chunks)}
        case "all_to_all":
            return {(rank, chunk): {(chunk // part, rank * part + chunk % part): 1} for rank, chunk in everywhere}
        case _:
            raise ValueError(f"kind = {kind!r}: there is no promise to prove")


def contributions(programs: list[Program], held: Held, kind: str) -> Held:
    """Play all ranks' programs under rendezvous, from what they hold.

    Args:
        kind: only in an all-to-all, whose chunks are equally long, may a message change its place in the buffer.

    Raises:
        ProofError: ops that never meet, chunks that do not exist, or chunks sent where others are awaited.
    """
    held = [list(chunks) for chunks in held]
    _check_chunks(programs, len(held[0]))
    meetings = rendezvous(programs)
    _check_pairs(programs, meetings, kind)
    under_way: dict[Place, list[Contributions]] = {}

    def receive(rank: int, at: int) -> None:
        for number, op in enumerate(programs[rank][at]):
            if not isinstance(op, Send):
                message = under_way.pop(meetings.source[Place(rank, at, number)])
                for chunk, arrived in enumerate(message, start=op.chunk):
                    held[rank][chunk] = _added(held[rank][chunk], arrived) if isinstance(op, Reduce) else arrived

    for rank, at in meetings.posted:
        if at > 0:  # whatever the step before waited for has been posted by now
            receive(rank, at - 1)
        for number, op in enumerate(programs[rank][at]):
            if isinstance(op, Send):
                under_way[Place(rank, at, number)] = held[rank][op.chunk : op.chunk + op.count]
    for rank, program in enumerate(programs):
        if program:
            receive(rank, len(program) - 1)
    return held


def _added(one: Contributions, other: Contributions) -> Contributions:
    total = dict(one)
    for origin, count in other.items():
        total[origin] = total.get(origin, 0) + count
    return total


def _check_chunks(programs: list[Program], chunks: int) -> None:
    for rank, program in enumerate(programs):
        for at, step in enumerate(program):
            for op in step:
                if op.chunk < 0 or op.count < 1 or op.chunk + op.count > chunks:
                    raise ProofError(f"rank {rank} step {at}: {op} names chunks that a buffer of {chunks} has not")


def _check_pairs(programs: list[Program], meetings: Rendezvous, kind: str) -> None:
    """Chunks differ in length: what one side sends must be what the other awaits."""
    for there, here in meetings.source.items():
        send, receive = (programs[place.rank][place.step][place.op] for place in (here, there))
        if send.count != receive.count or (kind != "all_to_all" and send.chunk != receive.chunk):
            raise ProofError(
                f"rank {there.rank} step {there.step}: {receive} meets rank {here.rank} step {here.step}: {send}"
            )


def _sum(contributions: Contributions) -> str:
    """`r0.c2 + 2 r3.c2`."""
    return " + ".join(
        f"{count} " * (count > 1) + ("rubbish" if rank == RUBBISH else f"r{rank}.c{chunk}")
        for (rank, chunk), count in sorted(contributions.items())
    )
