"""The vocabulary of a collective: what a rank sends, receives and reduces, as small values.

A *step* is the tuple of ops that a rank posts together; a *program* is one rank's tuple of steps. A buffer is cut into
as many chunks as there are ranks (`chunk_bounds`), and an op names its peer and a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Send:
    """Send my chunk to a peer, as it is when the step begins."""

    peer: int
    chunk: int

    def __str__(self) -> str:
        return f"c{self.chunk}->{self.peer}"


@dataclass(frozen=True, slots=True)
class Recv:
    """Receive a chunk from a peer over mine."""

    peer: int
    chunk: int

    def __str__(self) -> str:
        return f"c{self.chunk}<-{self.peer}"


@dataclass(frozen=True, slots=True)
class Reduce:
    """Receive a chunk from a peer and add it to mine."""

    peer: int
    chunk: int

    def __str__(self) -> str:
        return f"c{self.chunk}+<{self.peer}"


Step = tuple[Send | Recv | Reduce, ...]
Program = tuple[Step, ...]
Algorithm = Callable[[int, int], Program]
"""(rank, world) -> that rank's program."""


def chunk_bounds(elements: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Where each of `parts` chunks of a buffer starts and stops: sizes differ by at most one, the longer ones first.

    A buffer shorter than `parts` leaves the last chunks empty; they are sent as empty messages.
    """
    size, longer = divmod(elements, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return tuple(pairwise(starts))


def sent_elements(program: Program, bounds: tuple[tuple[int, int], ...]) -> int:
    """Elements that a rank sends when it plays `program` on a buffer cut at `bounds`."""
    sizes = [stop - start for start, stop in bounds]
    return sum(sizes[op.chunk] for step in program for op in step if isinstance(op, Send))


def show(algorithm: Algorithm, world: int) -> str:
    """The programs of all ranks as a diagram: a line per rank, a column per step."""
    rows = [[" ".join(map(str, step)) for step in algorithm(rank, world)] for rank in range(world)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"rank {rank}: {line}".rstrip() for rank, line in enumerate(lines))
