"""Which ops meet: the strictest way to play programs, in which a message moves only when both sides have posted it.

That is NCCL's rule for grouped point-to-point calls: the ops of a step are posted together, those from one rank to
another meet in the order in which both list them, and the next step is posted when all of a step have met. Programs
that end under it also end where sends are buffered, as on sockets, and there with the same data: what a step sends and
what it waits for does not depend on the timing.
"""

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import NamedTuple

from .program import Program, Send


class ProofError(ValueError):
    """A program that does not do what its collective promises; the message names rank, step and op."""


class Place(NamedTuple):
    """Where an op stands in the programs of all ranks."""

    rank: int
    step: int
    op: int


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """How the ops of all ranks meet.

    Attributes:
        posted: (rank, step) in an order in which the steps may be posted, each after all that it depends on.
        source: for each receive the send that feeds it.
        rounds: for each op the round in which it meets its partner, if every message takes one round.
    """

    posted: list[tuple[int, int]]
    source: dict[Place, Place]
    rounds: dict[Place, int]


def rendezvous(programs: list[Program]) -> Rendezvous:
    """Let all ops meet that can.

    Raises:
        ProofError: ops that never meet: nobody awaits them or they wait for each other; or a peer that does not exist.
    """
    _check_peers(programs)
    meetings = Rendezvous([], {}, {})
    # What one rank has posted to another and not met yet: either sends or receives, in order.
    waiting: defaultdict[tuple[int, int], deque[Place]] = defaultdict(deque)
    at = [0] * len(programs)  # the step that a rank has posted or is about to post
    unmet = [0] * len(programs)  # how many ops of that step have not met
    begun = [0] * len(programs)  # the round in which it was posted
    latest = [-1] * len(programs)  # the round in which an op of the rank met last
    ready = deque(rank for rank, program in enumerate(programs) if program)
    while ready:
        rank = ready.popleft()
        step = programs[rank][at[rank]]
        begun[rank], unmet[rank] = latest[rank] + 1, len(step)
        meetings.posted.append((rank, at[rank]))
        touched = {rank}
        for number, op in enumerate(step):
            place, sending = Place(rank, at[rank], number), isinstance(op, Send)
            queue = waiting[(rank, op.peer) if sending else (op.peer, rank)]
            if not queue or queue[0].rank == rank:
                queue.append(place)
                continue
            partner, number_of_round = queue.popleft(), max(begun[rank], begun[op.peer])
            meetings.source[partner if sending else place] = place if sending else partner
            for end in (place, partner):
                meetings.rounds[end] = number_of_round
                latest[end.rank] = max(latest[end.rank], number_of_round)
                unmet[end.rank] -= 1
            touched.add(op.peer)
        for other in touched:
            if unmet[other] == 0:
                at[other] += 1
                if at[other] < len(programs[other]):
                    ready.append(other)
    if any(at[rank] < len(program) for rank, program in enumerate(programs)):
        raise ProofError(_why_stuck(programs, at))
    return meetings


def check_rendezvous(programs: list[Program]) -> None:
    """No op is left over and no rank waits for ever when messages meet in order.

    Raises:
        ProofError: as `rendezvous`.
    """
    rendezvous(programs)


def _check_peers(programs: list[Program]) -> None:
    for rank, program in enumerate(programs):
        for at, step in enumerate(program):
            for op in step:
                if op.peer == rank or not 0 <= op.peer < len(programs):
                    raise ProofError(f"rank {rank} step {at}: {op} names no other rank of {len(programs)}")


def _why_stuck(programs: list[Program], at: list[int]) -> str:
    """An op without a partner, or all that wait for each other."""
    sends: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    receives: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for rank, program in enumerate(programs):
        for number, step in enumerate(program):
            for op in step:
                label = f"rank {rank} step {number}: {op}"
                (sends[rank, op.peer] if isinstance(op, Send) else receives[op.peer, rank]).append(label)
    for pair in {**sends, **receives}:
        sent, awaited = sends[pair], receives[pair]
        if len(sent) != len(awaited):
            alone = max(sent, awaited, key=len)[min(len(sent), len(awaited))]
            source, target = pair
            return f"{alone} never meets: rank {source} sends {len(sent)} to rank {target}, which awaits {len(awaited)}"
    stuck = [
        f"rank {rank} step {at[rank]}: {' '.join(map(str, program[at[rank]]))}"
        for rank, program in enumerate(programs)
        if at[rank] < len(program)
    ]
    return f"deadlock under in-order rendezvous: {'; '.join(stuck)}"
