"""Performs a collective's program: what this rank posts in each step, in elements of its buffer, for any transport.

`lower` turns an algorithm into messages; a transport (engine/sockets.py, engine/shared_memory.py) moves them. Both keep
the meaning that collectives/program.py gives to a step.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..collectives.program import Algorithm, Bounds, Op, Reduce, Send, span


@dataclass(frozen=True, slots=True)
class Message:
    """A run of elements on its way between this rank and `peer`.

    Attributes:
        start, stop: the elements of the buffer, at least one.
        number: its place among all messages of the program from the one rank to the other.
    """

    peer: int
    start: int
    stop: int
    number: int


@dataclass(frozen=True, slots=True)
class Arrival(Message):
    """A message that comes in.

    Attributes:
        reduces: it is combined with what is there, else it takes its place.
        sends: the sends of the step that carry some of the same elements, by position: they must have left before.
        earlier: the arrivals of the step that come before in its order and touch some of the same elements.
    """

    reduces: bool
    sends: tuple[int, ...]
    earlier: tuple[int, ...]

    def apply(self, place: Tensor, arrived: Tensor, largest: bool) -> None:
        """Put what arrived in its place, or combine it with what is there: the sum, or the maximum."""
        if not self.reduces:
            place.copy_(arrived)
        elif largest:
            torch.maximum(place, arrived, out=place)
        else:
            place.add_(arrived)


@dataclass(frozen=True, slots=True)
class Posted:
    """What a rank posts together. Arrivals are applied in this order."""

    sends: tuple[Message, ...]
    arrivals: tuple[Arrival, ...]


class Transport(Protocol):
    """Moves messages between the ranks of one group."""

    name: str

    def play(self, steps: tuple[Posted, ...], buffer: Tensor, tag: int, largest: bool) -> None:
        """Play one rank's steps in place on `buffer` [n], contiguous.

        Args:
            tag: equal on all ranks only if they play the same call; others' messages never match.
            largest: what is combined is the maximum instead of the sum.

        Raises:
            RuntimeError: a rank did not come within the time limit; the message names it.
        """

    def release_buffers(self) -> None:
        """Drop scratch memory."""

    def close(self, failed: bool = False) -> None:
        """Give back what outlives the process; after a failure without waiting for peers."""


def lower(algorithm: Algorithm, rank: int, world: int, elements: int, root: int = 0) -> tuple[Posted, ...]:
    """The messages of one rank; empty runs, which both sides know, are left out.

    Args:
        root: the rank that plays the part of rank 0: all are renumbered.
    """
    bounds = algorithm.bounds(elements, world)
    program = algorithm.program((rank - root) % world, world)
    numbers: Counter[tuple[bool, int]] = Counter()
    steps = (_post(step, bounds, lambda op: (op.peer + root) % world, numbers) for step in program)
    return tuple(step for step in steps if step.sends or step.arrivals)


def _post(
    step: tuple[Op, ...], bounds: Bounds, peer_of: Callable[[Op], int], numbers: Counter[tuple[bool, int]]
) -> Posted:
    sends: list[Message] = []
    arrivals: list[Arrival] = []
    coming = []
    for op in step:
        outward, peer = isinstance(op, Send), peer_of(op)
        start, stop = span(bounds, op)
        if start == stop:
            continue
        message = Message(peer, start, stop, numbers[outward, peer])
        numbers[outward, peer] += 1
        if outward:
            sends.append(message)
        else:
            coming.append((message, isinstance(op, Reduce)))
    for message, reduces in coming:
        earlier = tuple(place for place, other in enumerate(arrivals) if _overlap(message, other))
        leaving = tuple(place for place, other in enumerate(sends) if _overlap(message, other))
        arrivals.append(Arrival(message.peer, message.start, message.stop, message.number, reduces, leaving, earlier))
    return Posted(tuple(sends), tuple(arrivals))


def _overlap(a: Message, b: Message) -> bool:
    return a.start < b.stop and b.start < a.stop
