"""Rings and chains: every rank talks to its neighbours only.

Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009). A ring sends
(n - 1) / n of the buffer per round, the least that a reduce-scatter or an all-gather can.
"""

from collections.abc import Callable, Sequence

from .program import Algorithm, Program, Recv, Reduce, Runs, Send, Step, post


def reduce_scatter_around(position: int, group: Sequence[int], blocks: Sequence[Runs]) -> Program:
    """n - 1 steps of the rank at `position` in a ring of n ranks, which ends with the sum of `blocks[position]`.

    Args:
        group: the ranks in the order of the ring.
        blocks: for each position the chunks that it ends with.
    """
    left, right = _neighbours(position, group)
    return _turns(position - 1, _posted(Send, right, blocks), _posted(Reduce, left, blocks))


def all_gather_around(position: int, group: Sequence[int], blocks: Sequence[Runs]) -> Program:
    """n - 1 steps of the rank at `position`, which starts with `blocks[position]` and ends with all blocks."""
    left, right = _neighbours(position, group)
    return _turns(position, _posted(Send, right, blocks), _posted(Recv, left, blocks))


def all_reduce_around(position: int, group: Sequence[int], blocks: Sequence[Runs]) -> Program:
    """2 (n - 1) steps: a reduce-scatter, then an all-gather of the sums."""
    left, right = _neighbours(position, group)
    sends = _posted(Send, right, blocks)  # once for both: a large world has many
    adding = _turns(position - 1, sends, _posted(Reduce, left, blocks))
    return adding + _turns(position, sends, _posted(Recv, left, blocks))


def _neighbours(position: int, group: Sequence[int]) -> tuple[int, int]:
    return group[position - 1], group[(position + 1) % len(group)]


def _posted(op: type[Send] | type[Recv] | type[Reduce], peer: int, blocks: Sequence[Runs]) -> list[Step]:
    return [post(op, peer, runs) for runs in blocks]


def _turns(first: int, sends: list[Step], receives: list[Step]) -> Program:
    """Send block `first` while the block before it comes, pass that one on, and so on backwards round the ring."""
    size = len(sends)
    return tuple([sends[(first - turn) % size] + receives[(first - turn - 1) % size] for turn in range(size - 1)])


def every_part(world: int, pieces: int = 1, piece: int = 0) -> list[Runs]:
    """The blocks of a ring of all ranks: part r of the buffer belongs to rank r; of parts in pieces, one piece."""
    return [((part * pieces + piece, 1),) for part in range(world)]


def ring_reduce_scatter(rank: int, world: int) -> Program:
    """n - 1 steps; at the end rank r holds the sum of chunk r."""
    return reduce_scatter_around(rank, range(world), every_part(world))


def ring_all_gather(rank: int, world: int) -> Program:
    """n - 1 steps; at first rank r holds chunk r, at the end every chunk."""
    return all_gather_around(rank, range(world), every_part(world))


def ring_all_reduce(rank: int, world: int) -> Program:
    """2 (n - 1) steps: a reduce-scatter, then an all-gather of the sums."""
    return all_reduce_around(rank, range(world), every_part(world))


Around = Callable[[int, Sequence[int], Sequence[Runs]], Program]


def _both_ways(around: Around, rank: int, world: int) -> Program:
    """The first half of every part goes to the right, the second to the left, in the same steps."""
    right = around(rank, range(world), every_part(world, 2, 0))
    left = around(world - 1 - rank, range(world)[::-1], every_part(world, 2, 1)[::-1])
    return tuple([one + other for one, other in zip(right, left, strict=True)])


def bidirectional_reduce_scatter(rank: int, world: int) -> Program:
    """n - 1 steps, which send half of a ring's elements in each direction: twice as fast on full-duplex links."""
    return _both_ways(reduce_scatter_around, rank, world)


def bidirectional_all_gather(rank: int, world: int) -> Program:
    """n - 1 steps, as in the reduce-scatter."""
    return _both_ways(all_gather_around, rank, world)


def bidirectional_all_reduce(rank: int, world: int) -> Program:
    """2 (n - 1) steps: a reduce-scatter, then an all-gather."""
    return _both_ways(all_reduce_around, rank, world)


def chain_broadcast(rank: int, world: int, pieces: int) -> Program:
    """Rank 0 to 1 to 2 and so on: a rank passes a piece on while it receives the next; pieces + n - 2 rounds."""
    steps: list[Step] = [()] * (pieces + 1)
    for piece in range(pieces):
        if rank > 0:
            steps[piece] += (Recv(rank - 1, piece),)
        if rank < world - 1:
            steps[piece + 1] += (Send(rank + 1, piece),)
    return tuple(filter(None, steps))


def chain_reduce(rank: int, world: int, pieces: int) -> Program:
    """Rank n - 1 to n - 2 and so on to 0: a rank passes the sum of a piece on while it adds to the next."""
    steps: list[Step] = [()] * (pieces + 1)
    for piece in range(pieces):
        if rank < world - 1:
            steps[piece] += (Reduce(rank + 1, piece),)
        if rank > 0:
            steps[piece + 1] += (Send(rank - 1, piece),)
    return tuple(filter(None, steps))


def in_halves(world: int) -> tuple[int, ...]:
    """The cut of a bidirectional ring: a part per rank, each in two halves."""
    return (world, 2)


def every_rank_alike(world: int) -> int:
    """The period of a ring."""
    return 1


RING: dict[str, Algorithm] = {
    kind: Algorithm(kind, "ring", program, period=every_rank_alike)
    for kind, program in (
        ("all_reduce", ring_all_reduce),
        ("reduce_scatter", ring_reduce_scatter),
        ("all_gather", ring_all_gather),
    )
}
"""The ring algorithm of each collective, by the collective's name."""

BIDIRECTIONAL_RING: dict[str, Algorithm] = {
    kind: Algorithm(kind, "bidirectional_ring", program, in_halves, every_rank_alike)
    for kind, program in (
        ("all_reduce", bidirectional_all_reduce),
        ("reduce_scatter", bidirectional_reduce_scatter),
        ("all_gather", bidirectional_all_gather),
    )
}


def chain(kind: str, pieces: int) -> Algorithm:
    """The broadcast or reduce along a chain, pipelined in pieces."""
    program = {"broadcast": chain_broadcast, "reduce": chain_reduce}[kind]
    return Algorithm(
        kind, f"chain/{pieces}", lambda rank, world: program(rank, world, pieces), cut=lambda world: (pieces,)
    )
