"""Recursive halving and doubling: log2 n exchanges with partners whose ranks differ in one bit.

Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH" (2005), section 4;
Rabenseifner, "Optimization of collective reduction operations" (2004); the broadcast after van de Geijn (1994). Powers
of two send the least elements possible in the fewest steps possible.

Where n is no power of two, n - c ranks stand aside, c the largest power of two below (Thakur et al., section 4.5): of
the first 2 (n - c) ranks every odd one hands its data to the even one before it, which is one of the c ranks of the
*core*, and gets the result from it at the end.
"""

from collections.abc import Sequence
from functools import partial

from .program import Algorithm, Program, Recv, Reduce, Runs, Send, between, one_chunk_per_rank, post, whole_buffer
from .tree import binomial_gather, binomial_scatter

Starts = Sequence[int]
"""Position p of a group has the chunks from starts[p] up to starts[p + 1]."""


def halving(position: int, group: Sequence[int], starts: Starts, bits: Sequence[int]) -> Program:
    """Log2 n steps, each over half of the chunks of the one before; the rank at `position` ends with the sum of a part.

    Args:
        group: n ranks, n a power of two.
        starts: the n parts. The parts end in order of position if the largest bit comes first.
        bits: in which bit of their position the partners of each step differ.
    """
    return tuple(
        post(Send, group[other], _chunks(starts, give)) + post(Reduce, group[other], _chunks(starts, keep))
        for other, keep, give in _exchanges(position, len(group), bits)
    )


def doubling(position: int, group: Sequence[int], starts: Starts, bits: Sequence[int]) -> Program:
    """The halving backwards, overwriting: from one part to all of them; `bits` are those of the halving."""
    return tuple(
        post(Send, group[other], _chunks(starts, keep)) + post(Recv, group[other], _chunks(starts, give))
        for other, keep, give in reversed(_exchanges(position, len(group), bits))
    )


def _exchanges(position: int, size: int, bits: Sequence[int]) -> list[tuple[int, range, range]]:
    """(partner, the parts that this rank keeps, those that the partner keeps) of each step of a halving."""
    parts = range(size)
    exchanges = []
    for bit in bits:
        lower, upper = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        parts, give = (upper, lower) if position & bit else (lower, upper)
        exchanges.append((position ^ bit, parts, give))
    return exchanges


def _chunks(starts: Starts, parts: range) -> Runs:
    return between(starts[parts.start], starts[parts.stop])


def core_ranks(world: int) -> list[int]:
    """The core, as many as the largest power of two that fits: ranks 0, 2, 4 ... whose next stands aside, and the rest.

    With a part for each rank of the world, position p of the core takes those from its rank up to the next position's.
    """
    size = 1 << (world.bit_length() - 1)
    aside = world - size
    return [2 * position if position < aside else position + aside for position in range(size)]


def _halving_doubling(kind: str, rank: int, world: int) -> Program:
    """What the core does, between what those who stand aside give and get."""
    core = core_ranks(world)
    of_ranks = kind in ("reduce_scatter", "all_gather")
    starts = [*core, world] if of_ranks else range(len(core) + 1)
    aside = world - len(core)
    if rank >= 2 * aside:
        return _in_core(kind, rank - aside, core, starts)
    even, everything = rank - rank % 2, between(0, starts[-1])
    odds = between(even + 1, even + 2) if of_ranks else everything
    match kind:
        case "all_gather":
            given = _one_way(rank, even + 1, even, odds)
        case "broadcast":
            given = ()
        case _:
            given = _add_up(rank, between(0, starts[len(core) // 2]), between(starts[len(core) // 2], starts[-1]))
    got = () if kind == "reduce" else _one_way(rank, even, even + 1, everything if kind == "all_gather" else odds)
    return given + (_in_core(kind, rank // 2, core, starts) if rank == even else ()) + got


def _in_core(kind: str, position: int, core: Sequence[int], starts: Starts) -> Program:
    far_first = [len(core) >> shift for shift in range(1, len(core).bit_length())]
    match kind:
        case "all_reduce":  # neighbours exchange most, the farthest least: the parts need no order
            near_first = far_first[::-1]
            return halving(position, core, starts, near_first) + doubling(position, core, starts, near_first)
        case "reduce_scatter":
            return halving(position, core, starts, far_first)
        case "all_gather":
            return doubling(position, core, starts, far_first)
        case "broadcast":
            return binomial_scatter(position, core, starts) + doubling(position, core, starts, far_first)
        case _:
            return halving(position, core, starts, far_first) + binomial_gather(position, core, starts)


def _add_up(rank: int, lower: Runs, upper: Runs) -> Program:
    """An even rank ends with the sum of its own and the next rank's buffer; each of the two adds up one half."""
    if rank % 2:
        return post(Send, rank - 1, lower) + post(Reduce, rank - 1, upper), post(Send, rank - 1, upper)
    return post(Send, rank + 1, upper) + post(Reduce, rank + 1, lower), post(Recv, rank + 1, upper)


def _one_way(rank: int, source: int, target: int, chunks: Runs) -> Program:
    """One step of `rank`, which is the source or the target."""
    return (post(Send, target, chunks) if rank == source else post(Recv, source, chunks),)


def recursive_doubling(rank: int, world: int) -> Program:
    """Log2 n exchanges of the whole buffer, the fewest steps of an all-reduce, plus 2 where n is no power of two."""
    core = core_ranks(world)
    aside = world - len(core)
    position = rank - aside if rank >= 2 * aside else rank // 2
    exchanges = [core[position ^ (1 << bit)] for bit in range(len(core).bit_length() - 1)]
    program: Program = tuple((Send(partner, 0), Reduce(partner, 0)) for partner in exchanges)
    if rank >= 2 * aside:
        return program
    if rank % 2:
        return (Send(rank - 1, 0),), (Recv(rank - 1, 0),)
    return (Reduce(rank + 1, 0),), *program, (Send(rank + 1, 0),)


def one_chunk_per_core_rank(world: int) -> tuple[int, ...]:
    """The cut of what need not end in order of rank."""
    return (len(core_ranks(world)),)


HALVING_DOUBLING: dict[str, Algorithm] = {
    kind: Algorithm(kind, "halving_doubling", partial(_halving_doubling, kind), cut)
    for kind, cut in (
        ("all_reduce", one_chunk_per_core_rank),
        ("reduce_scatter", one_chunk_per_rank),
        ("all_gather", one_chunk_per_rank),
        ("broadcast", one_chunk_per_core_rank),
        ("reduce", one_chunk_per_core_rank),
    )
}

RECURSIVE_DOUBLING: dict[str, Algorithm] = {
    "all_reduce": Algorithm("all_reduce", "recursive_doubling", recursive_doubling, whole_buffer)
}
