"""Plays the groups of an axis: the same collective in all of them at once, on the network that they share."""

from dataclasses import replace
from math import lcm, prod

from ..collectives.groups import Placement
from ..collectives.program import Algorithm, Program
from .messages import FEW, MOST_MESSAGES
from .program import play, play_programs
from .topology import Topology


def play_groups(
    algorithm: Algorithm, placement: Placement, nbytes: float, topology: Topology, *, fold: bool = True
) -> float:
    """Seconds until the last rank of the last group has played its program on a buffer of `nbytes` bytes.

    No message leaves a block of groups, so the ranks up to the first place where both the blocks and the network repeat
    stand for all.

    Args:
        fold: False to play every rank.

    Raises:
        ValueError: too many messages to play, or a rank that the network does not reach.
    """
    if placement.stride == 1 and placement.size == placement.world:
        return play(algorithm, placement.size, nbytes, topology, fold=fold)
    period = lcm(placement.span, topology.period(placement.world))
    ranks = period if fold and placement.world % period == 0 else placement.world
    alike = algorithm.period(placement.size)
    few = [algorithm.program(position, placement.size) for position in range(0, alike, alike // FEW | 1)]
    messages = sum(len(step) for program in few for step in program) / 2 / len(few) * ranks
    if messages > MOST_MESSAGES:
        raise ValueError(
            f"fidelity = 'events' plays every message, and {algorithm} in groups of {placement.size} has about"
            f" {messages:,.0f}; allowed: {MOST_MESSAGES:,}: use 'closed_form', or fewer ranks"
        )
    programs = [algorithm.program(position, placement.size) for position in range(alike)]
    chunk_bytes = nbytes / prod(algorithm.cut(placement.size))
    return play_programs([_moved(programs, placement, rank) for rank in range(ranks)], chunk_bytes, topology)


def _moved(programs: list[Program], placement: Placement, rank: int) -> Program:
    """The program of a rank, its peers numbered as in the world; programs repeat, with the peers shifted."""
    group = placement.group(rank)
    position = rank % placement.span // placement.stride
    shift = position - position % len(programs)
    program = programs[position % len(programs)]
    return tuple(tuple(replace(op, peer=group[(op.peer + shift) % placement.size]) for op in step) for step in program)
