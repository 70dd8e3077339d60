"""Everyone with everyone: the all-to-all by pairwise exchange, and collectives in a single step for small messages.

Thakur, Rabenseifner and Gropp (2005), section 4.2, for the pairwise exchange.
"""

from collections.abc import Sequence

from .program import Algorithm, Program, Recv, Reduce, Runs, Send, no_symmetry, one_chunk_per_rank, post, whole_buffer
from .ring import every_part, every_rank_alike


def pairwise_exchange(position: int, group: Sequence[int], blocks: Sequence[Runs]) -> Program:
    """What the ranks of a group hold for each other, block by block, changes places.

    Every round is a matching, and what comes takes the place of what goes.

    Args:
        blocks: for each position the chunks that go to it, and where what comes from it belongs.
    """
    return tuple(
        post(Send, group[other], blocks[other]) + post(Recv, group[other], blocks[other])
        for other in round_robin(position, len(group))
    )


def round_robin(position: int, size: int) -> list[int]:
    """Whom the player at `position` meets in each round of a tournament in which everyone meets everyone once.

    The circle method: those who go round meet in round t if their positions add up to t modulo their number, which is
    odd. Whoever would meet himself meets the one who stands still, or of an odd number of players is left out.
    """
    round_of = size - 1 + size % 2
    still = round_of
    met = []
    for turn in range(round_of):
        other = turn * (round_of + 1) // 2 % round_of if position == still else (turn - position) % round_of
        met.append(still if other == position else other)
    return [other for other in met if other < size]


def pairwise_all_to_all(rank: int, world: int) -> Program:
    """n - 1 exchanges, all ranks at once in each where they are even in number."""
    return pairwise_exchange(rank, range(world), every_part(world))


def direct_all_to_all(rank: int, world: int) -> Program:
    """One step: every part goes to its rank, and every part that comes has to wait until its place has been sent."""
    return _at_once(
        [
            (Send((rank + d) % world, (rank + d) % world), Recv((rank - d) % world, (rank - d) % world))
            for d in _hops(world)
        ]
    )


def direct_reduce_scatter(rank: int, world: int) -> Program:
    """One step: part p goes to rank p from everyone at once."""
    return _at_once(
        [(Send((rank + d) % world, (rank + d) % world), Reduce((rank - d) % world, rank)) for d in _hops(world)]
    )


def direct_all_gather(rank: int, world: int) -> Program:
    """One step: a rank's part goes to everyone."""
    return _at_once(
        [(Send((rank + d) % world, rank), Recv((rank - d) % world, (rank - d) % world)) for d in _hops(world)]
    )


def direct_all_reduce(rank: int, world: int) -> Program:
    """One step: everyone's whole buffer goes to everyone.

    Each rank adds in an order of its own, so that sums that are rounded may differ between ranks in the last bits.
    """
    return _at_once([(Send((rank + d) % world, 0), Reduce((rank - d) % world, 0)) for d in _hops(world)])


def _hops(world: int) -> range:
    return range(1, world)


def _at_once(steps: Sequence[tuple[Send, Recv | Reduce]]) -> Program:
    return (tuple(op for step in steps for op in step),) if steps else ()


DIRECT: dict[str, Algorithm] = {
    kind: Algorithm(kind, "direct", program, cut, period)
    for kind, program, cut, period in (
        ("all_reduce", direct_all_reduce, whole_buffer, every_rank_alike),
        ("reduce_scatter", direct_reduce_scatter, one_chunk_per_rank, every_rank_alike),
        ("all_gather", direct_all_gather, one_chunk_per_rank, every_rank_alike),
        ("all_to_all", direct_all_to_all, one_chunk_per_rank, every_rank_alike),
    )
}

PAIRWISE: dict[str, Algorithm] = {
    "all_to_all": Algorithm("all_to_all", "pairwise", pairwise_all_to_all, one_chunk_per_rank, no_symmetry)
}
