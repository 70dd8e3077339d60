"""Plays the groups of an axis: the same collective in all of them at once, on the network that they share."""

from dataclasses import replace
from math import lcm, prod

from ..collectives.groups import Placement
from ..collectives.program import Algorithm, Program
from .messages import MOST_MESSAGES
from .program import play, play_programs
from .topology import Topology


def play_groups(algorithm: Algorithm, placement: Placement, nbytes: float, topology: Topology) -> float:
    """Seconds until the last rank of the last group has played its program on a buffer of `nbytes` bytes.

    No message leaves a block of groups, so the ranks up to the first place where both the blocks and the network repeat
    stand for all.

    Raises:
        ValueError: too many messages to play, or a rank that the network does not reach.
    """
    if placement.stride == 1 and placement.size == placement.world:
        return play(algorithm, placement.size, nbytes, topology)
    period = lcm(placement.span, topology.period(placement.world))
    ranks = period if placement.world % period == 0 else placement.world
    programs = [algorithm.program(position, placement.size) for position in range(placement.size)]
    messages = sum(len(step) for program in programs for step in program) / 2 * ranks / placement.size
    if messages > MOST_MESSAGES:
        raise ValueError(
            f"fidelity = 'events' plays every message, and {algorithm} in groups of {placement.size} has {messages:,.0f};"
            f" allowed: {MOST_MESSAGES:,}: use 'closed_form', or fewer ranks"
        )
    chunk_bytes = nbytes / prod(algorithm.cut(placement.size))
    return play_programs([_moved(programs, placement, rank) for rank in range(ranks)], chunk_bytes, topology)


def _moved(programs: list[Program], placement: Placement, rank: int) -> Program:
    """The program of a rank, its peers numbered as in the world."""
    group = placement.group(rank)
    program = programs[group.index(rank)]
    return tuple(tuple(replace(op, peer=group[op.peer]) for op in step) for step in program)
