"""Ring collectives: every rank sends to its right neighbour and receives from its left one.

Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009). A ring sends
(n - 1) / n of the buffer per round, the least that a reduce-scatter or an all-gather can.
"""

from .program import Algorithm, Program, Recv, Reduce, Send


def ring_reduce_scatter(rank: int, world: int) -> Program:
    """n - 1 steps; at the end rank r holds the sum of chunk r."""
    left, right = (rank - 1) % world, (rank + 1) % world
    return tuple(
        (Send(right, (rank - step - 1) % world), Reduce(left, (rank - step - 2) % world)) for step in range(world - 1)
    )


def ring_all_gather(rank: int, world: int) -> Program:
    """n - 1 steps; at first rank r holds chunk r, at the end every chunk."""
    left, right = (rank - 1) % world, (rank + 1) % world
    return tuple(
        (Send(right, (rank - step) % world), Recv(left, (rank - step - 1) % world)) for step in range(world - 1)
    )


def ring_all_reduce(rank: int, world: int) -> Program:
    """2 (n - 1) steps: a reduce-scatter, then an all-gather of the sums."""
    return ring_reduce_scatter(rank, world) + ring_all_gather(rank, world)


def _every_rank_alike(world: int) -> int:
    return 1


RING: dict[str, Algorithm] = {
    kind: Algorithm(kind, "ring", program, period=_every_rank_alike)
    for kind, program in (
        ("all_reduce", ring_all_reduce),
        ("reduce_scatter", ring_reduce_scatter),
        ("all_gather", ring_all_gather),
    )
}
"""The ring algorithm of each collective, by the collective's name."""
