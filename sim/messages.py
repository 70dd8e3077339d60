"""The messages of a collective as arrays: who sends what to whom, in which step it is posted, in which awaited."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import numpy as np

from ..collectives.program import Algorithm, Program, Send, Step
from .flows import Floats, Integers

MOST_MESSAGES = 2_000_000
"""Playing more than these takes minutes."""

FEW = 16
"""Of so many programs, about, the number of all messages is told."""


@dataclass(frozen=True, slots=True, eq=False)
class Messages:
    """All messages that the ranks 0 to `ranks` - 1 send. Steps are numbered through, those of one rank after another.

    Where the ranks stand for all of a larger world, a message to a rank beyond them is awaited by that rank's image,
    `ranks` or a multiple of it below: what leaves the block on one side arrives from an image on the other.

    Attributes:
        world: how many ranks there are in all.
        ranks: how many of them are here.
        first_step: [ranks + 1] number of each rank's first step; the last entry is how many steps there are.
        posted: [messages] the step whose beginning posts the message; ascending.
        awaited: [messages] the step that does not end before the message has arrived.
        nbytes: [messages]
        pair: [messages] which pair of ranks it joins: an index into sources and targets.
        sources, targets: [pairs] ranks of the world.
    """

    world: int
    ranks: int
    first_step: Integers
    posted: Integers
    awaited: Integers
    nbytes: Floats
    pair: Integers
    sources: Integers
    targets: Integers


def messages_of(algorithm: Algorithm, world: int, nbytes: float, ranks: int) -> Messages:
    """The messages of the first `ranks` ranks of a collective on a buffer of `nbytes` bytes, cut in equal chunks.

    Only the programs of one period of the algorithm are made; the others are like them.

    Raises:
        ValueError: more than about MOST_MESSAGES messages.
    """
    period = algorithm.period(world)
    # What many programs would take is told from a few; an odd stride takes ranks from all levels of a tree.
    known = {rank: algorithm.program(rank, world) for rank in range(0, period, period // FEW | 1)}
    ops = sum(len(step) for program in known.values() for step in program) / len(known)
    if ops * ranks / 2 > MOST_MESSAGES:  # a send and a receive are one message
        raise ValueError(
            f"fidelity = 'events' plays every message, and {algorithm} over {world} ranks has about "
            f"{ops * ranks / 2:,.0f}; allowed: {MOST_MESSAGES:,}: use 'closed_form', or fewer ranks"
        )
    programs = [known[rank] if rank in known else algorithm.program(rank, world) for rank in range(period)]
    return messages_of_programs(programs, nbytes / prod(algorithm.cut(world)), world, ranks)


def messages_of_programs(
    programs: Sequence[Program], chunk_bytes: float, world: int | None = None, ranks: int | None = None
) -> Messages:
    """The messages of these programs, whose chunks all have `chunk_bytes` bytes.

    Args:
        programs: of the first ranks; those of the others, up to `ranks`, are repetitions with the peers shifted.
        world: how many ranks there are; None: as many as programs.
        ranks: how many of them to take; None: all. A part of the world must be one that repeats.

    Raises:
        ValueError: a peer outside the world, or a send without its receive, or the reverse.
    """
    world = len(programs) if world is None else world
    ranks = world if ranks is None else ranks
    steps = [len(program) for program in programs]
    rank, step, peer, count, sends = _repeated(programs, ranks // len(programs), world)
    source, target = np.where(sends, rank, peer), np.where(sends, peer, rank)
    # A message and its images have the source of one of them, counted modulo `ranks`, and the distance in common.
    source, target = source % ranks, (target - source) % world + source % ranks
    key = source * 2 * world + target
    sent, received = (np.flatnonzero(chosen) for chosen in (sends, ~sends))
    sent_order, received_order = (chosen[np.argsort(key[chosen], kind="stable")] for chosen in (sent, received))
    _check_matched(key[sent_order], key[received_order], world)
    keys, pair_in_order = np.unique(key[sent_order], return_inverse=True)
    awaited, pair = np.empty_like(step), np.empty_like(step)
    awaited[sent_order], pair[sent_order] = step[received_order], pair_in_order
    return Messages(
        world=world,
        ranks=ranks,
        first_step=np.concatenate([[0], np.cumsum(steps * (ranks // len(programs)))]),
        posted=step[sent],
        awaited=awaited[sent],
        nbytes=(count[sent] * chunk_bytes).astype(np.float64),
        pair=pair[sent],
        sources=keys // (2 * world),
        targets=keys % (2 * world) % world,
    )


def _repeated(programs: Sequence[Program], times: int, world: int) -> tuple[Integers, ...]:
    """All ops of the programs, repeated `times` times: [ops] rank, step, peer, count of chunks, whether it sends."""
    steps = [step for program in programs for step in program]
    flat = np.fromiter(_fields(steps), np.int64).reshape(-1, 4)
    step, peer, count = flat[:, 0], flat[:, 1], flat[:, 2]
    rank = np.repeat(np.arange(len(programs)), [len(program) for program in programs])[step]
    if (strange := np.flatnonzero((peer < 0) | (peer >= world))).size:
        raise ValueError(f"rank {rank[strange[0]]} names peer {peer[strange[0]]}; allowed: 0 to {world - 1}")
    copy = np.arange(times)[:, None]
    return (
        (rank + copy * len(programs)).ravel(),
        (step + copy * len(steps)).ravel(),
        ((peer + copy * len(programs)) % world).ravel(),
        np.tile(count, times),
        np.tile(flat[:, 3] == 1, times),
    )


def _fields(steps: Sequence[Step]) -> Iterator[int]:
    return chain.from_iterable(
        (number, op.peer, op.count, isinstance(op, Send)) for number, step in enumerate(steps) for op in step
    )


def _check_matched(sent: Integers, received: Integers, world: int) -> None:
    """Both sorted: the keys of the pairs of ranks that the sends and the receives name."""
    if np.array_equal(sent, received):
        return
    for key in np.unique(np.concatenate([sent, received])):
        sends, receives = (int(np.count_nonzero(side == key)) for side in (sent, received))
        if sends != receives:
            source, target = key // (2 * world), key % (2 * world) % world
            raise ValueError(f"rank {source} sends rank {target} {sends} messages, but {target} awaits {receives}")
