"""The vocabulary of a collective: what a rank sends, receives and reduces, as small values.

A *step* is the tuple of ops that a rank posts together; a *program* is one rank's tuple of steps; an *algorithm* is a
program for every rank of any world, and the way in which it cuts the buffer in chunks. An op names its peer and a run
of chunks that lie side by side.

What a step means, to whoever plays it: its sends carry what the chunks hold when the step begins; a rank goes on when
its sends have left and its receives have arrived; what arrived is then applied in the order of the ops. The messages
from one rank to another are matched in the order in which both list them.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, starmap, zip_longest


@dataclass(frozen=True, slots=True)
class Send:
    """Send `count` chunks of mine, from `chunk` on, to a peer, as they are when the step begins."""

    peer: int
    chunk: int
    count: int = 1

    def __str__(self) -> str:
        return f"{chunk_names(self.chunk, self.count)}->{self.peer}"


@dataclass(frozen=True, slots=True)
class Recv:
    """Receive `count` chunks from a peer over mine, from `chunk` on."""

    peer: int
    chunk: int
    count: int = 1

    def __str__(self) -> str:
        return f"{chunk_names(self.chunk, self.count)}<-{self.peer}"


@dataclass(frozen=True, slots=True)
class Reduce:
    """Receive `count` chunks from a peer and add them to mine, from `chunk` on."""

    peer: int
    chunk: int
    count: int = 1

    def __str__(self) -> str:
        return f"{chunk_names(self.chunk, self.count)}+<{self.peer}"


Op = Send | Recv | Reduce
Step = tuple[Op, ...]
Program = tuple[Step, ...]
Runs = tuple[tuple[int, int], ...]
"""(chunk, count) of each of some runs of chunks that lie side by side."""

Bounds = tuple[tuple[int, int], ...]
"""(start, stop) of each chunk of a buffer, in elements."""


def between(start: int, stop: int) -> Runs:
    """The one run from chunk `start` up to `stop`."""
    return ((start, stop - start),)


def post(op: type[Send] | type[Recv] | type[Reduce], peer: int, runs: Runs) -> Step:
    """One op with a peer for each run."""
    return tuple(starmap(partial(op, peer), runs))


def chunk_names(chunk: int, count: int) -> str:
    """`c3`, or `c3-5` for three chunks from 3 on."""
    return f"c{chunk}" if count == 1 else f"c{chunk}-{chunk + count - 1}"


def one_chunk_per_rank(world: int) -> tuple[int, ...]:
    """The cut of most algorithms: as many chunks as ranks."""
    return (world,)


def whole_buffer(world: int) -> tuple[int, ...]:
    """The cut of an algorithm whose every message is all of the buffer."""
    return (1,)


def no_symmetry(world: int) -> int:
    """The period of an algorithm in which every rank has a part of its own."""
    return world


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to do one kind of collective, in a world of any size.

    A buffer of a reduce-scatter, an all-gather or an all-to-all is cut first in one part per rank: part r is what rank
    r ends with, starts with, or exchanges with the others. Broadcast and reduce have rank 0 as their root.

    Attributes:
        kind: the collective ("all_reduce").
        name: the algorithm ("ring"); with the kind it is its label in errors, ledgers and timelines.
        program: (rank, world) -> that rank's program.
        cut: world -> how the buffer is cut, as `chunk_bounds` takes it: the chunks number the product of the parts.
        period: world -> p such that the programs of ranks r and r + p differ only in which chunks they name: their ops
            are alike, and each peer is shifted by p. The simulator plays p ranks for all.
    """

    kind: str
    name: str
    program: Callable[[int, int], Program]
    cut: Callable[[int], tuple[int, ...]] = one_chunk_per_rank
    period: Callable[[int], int] = no_symmetry

    def __str__(self) -> str:
        return f"{self.name} {self.kind}"

    def programs(self, world: int) -> list[Program]:
        """The programs of all ranks.

        A large world has a million ops, none of them garbage: the collector is paused, which would look at all of them
        again and again (half of the time at 512 ranks).
        """
        collecting = gc.isenabled()
        gc.disable()
        try:
            return [self.program(rank, world) for rank in range(world)]
        finally:
            if collecting:
                gc.enable()

    def bounds(self, elements: int, world: int) -> Bounds:
        """Where the chunks of a buffer of `elements` elements lie."""
        return chunk_bounds(elements, *self.cut(world))


def chunk_bounds(elements: int, *parts: int) -> Bounds:
    """Where each chunk of a buffer starts and stops: cut in `parts[0]` parts, each of them in `parts[1]`, and so on.

    The sizes of one cut differ by at most one, the longer ones first. A buffer shorter than its parts leaves the last
    chunks empty; they are sent as empty messages.
    """
    bounds: Bounds = ((0, elements),)
    for number in parts:
        bounds = tuple(piece for start, stop in bounds for piece in _cut(start, stop, number))
    return bounds


def _cut(start: int, stop: int, parts: int) -> Bounds:
    size, longer = divmod(stop - start, parts)
    return tuple(pairwise(start + part * size + min(part, longer) for part in range(parts + 1)))


def span(bounds: Bounds, op: Op) -> tuple[int, int]:
    """(start, stop) of the elements that an op carries."""
    return bounds[op.chunk][0], bounds[op.chunk + op.count - 1][1]


def sent_elements(program: Program, bounds: Bounds) -> int:
    """Elements that a rank sends when it plays `program` on a buffer cut at `bounds`."""
    spans = (span(bounds, op) for step in program for op in step if isinstance(op, Send))
    return sum(stop - start for start, stop in spans)


def show(programs: Sequence[Program]) -> str:
    """The programs of all ranks as a diagram: a line per rank, a column per step."""
    rows = [[" ".join(map(str, step)) for step in program] for program in programs]
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(f"rank {rank}: {line}".rstrip() for rank, line in enumerate(lines))
