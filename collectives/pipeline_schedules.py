"""The catalogue of pipeline schedules: who computes what in which order, and what each schedule promises.

All orders are built directly, phase by phase; none is searched for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, zip_longest

from .pipeline import BACKWARD, FORWARD, INPUT, LOOP, WEIGHT, Action, Plan, V

Order = Callable[[int, int, int, int], Iterator[Action]]
"""(rank, ranks, micro-batches, chunks) -> what that rank computes."""

STEPS_WITHOUT_FLUSH = 3
"""Steps in the plan of a schedule that does not flush: one that fills the pipeline, one steady, one that drains it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One way to order the micro-batches of a step.

    Attributes:
        chunks: of the model per rank that it can have, from the least to the most; None: as many as there are layers.
        most_in_flight: (rank, ranks, micro-batches, chunks) -> the activations of one chunk and micro-batch that the
            rank keeps at most.
        bubble: (ranks, micro-batches, chunks) -> the share of a step in which a rank is idle, with equal stages and
            free messages; None where there is no closed form. A whole backward may take any time; a split one has parts
            that take as long as the forward.
        whole_groups: the micro-batches of a step are a multiple of the ranks; otherwise ranks wait for each other.
        splits_backward: in the part for the input and the part for the weights.
        flushes: every step drains the pipeline, so that it computes what one process would.
        performed: or only priced.
        weight_versions: that a rank keeps.
    """

    name: str
    source: str
    order: Order
    most_in_flight: Callable[[int, int, int, int], int]
    bubble: Callable[[int, int, int], Fraction | None]
    chunks: tuple[int, int | None] = (1, 1)
    placement: str = LOOP
    whole_groups: bool = False
    splits_backward: bool = False
    flushes: bool = True
    performed: bool = True
    weight_versions: int = 1

    def plan(self, ranks: int, micro_batches: int, chunks: int | None = None) -> Plan:
        """The plan of a step, computation alone.

        Args:
            chunks: of the model on each rank; left out: the fewest that the schedule can have.

        Raises:
            ValueError: a size below 1, chunks that the schedule cannot have, or micro-batches that it cannot order.
        """
        chunks = self.chunks[0] if chunks is None else chunks
        self.check(ranks, micro_batches, chunks)
        total = micro_batches if self.flushes else micro_batches * STEPS_WITHOUT_FLUSH
        return Plan(
            schedule=self.name,
            micro_batches=total,
            micro_batches_per_step=micro_batches,
            chunks=chunks,
            placement=self.placement,
            most_in_flight=tuple(self.most_in_flight(rank, ranks, total, chunks) for rank in range(ranks)),
            programs=tuple(tuple(self.order(rank, ranks, total, chunks)) for rank in range(ranks)),
        )

    def check(self, ranks: int, micro_batches: int, chunks: int) -> None:
        """Raise a ValueError, as `plan` does, if the sizes do not suit the schedule."""
        for name, size in (("ranks", ranks), ("micro_batches", micro_batches)):
            if size < 1:
                raise ValueError(f"{name} = {size} for the pipeline schedule {self.name!r}; allowed: 1 or more")
        fewest, most = self.chunks
        if chunks < fewest or (most is not None and chunks > most):
            allowed = f"{fewest} or more" if most is None else str(fewest)
            raise ValueError(f"chunks = {chunks} per rank for the schedule {self.name!r}; allowed: {allowed}")
        if self.whole_groups and micro_batches % ranks:
            raise ValueError(
                f"micro_batches = {micro_batches} for the schedule {self.name!r} on {ranks} pipeline ranks;"
                f" allowed: multiples of {ranks}, e.g. {-(-micro_batches // ranks) * ranks}"
            )
        if not self.flushes and micro_batches < ranks:
            raise ValueError(
                f"micro_batches = {micro_batches} for the schedule {self.name!r} on {ranks} pipeline ranks;"
                f" allowed: {ranks} or more, or else two versions of the weights are not enough"
            )


def schedule(name: str) -> Schedule:
    """The schedule of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown pipeline schedule {name!r}; there are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


# Orders: what one rank computes #


def _alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> Iterator[Action]:
    """`warm_up` forwards, then a forward and a backward in turn, then the backwards that are left."""
    yield from forwards[:warm_up]
    for pair in zip_longest(forwards[warm_up:], backwards):
        yield from (action for action in pair if action is not None)


def _forwards(micro_batches: int) -> list[Action]:
    return [Action(FORWARD, 0, number) for number in range(micro_batches)]


def _backwards(micro_batches: int) -> list[Action]:
    return [Action(BACKWARD, 0, number) for number in range(micro_batches)]


def _sequential(rank: int, ranks: int, micro_batches: int, chunks: int) -> Iterator[Action]:
    return _alternate(_forwards(micro_batches), _backwards(micro_batches), 0)


def _gpipe(rank: int, ranks: int, micro_batches: int, chunks: int) -> Iterator[Action]:
    return chain(_forwards(micro_batches), _backwards(micro_batches))


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int, chunks: int) -> Iterator[Action]:
    return _alternate(_forwards(micro_batches), _backwards(micro_batches), ranks - 1 - rank)


def _interleaved(rank: int, ranks: int, micro_batches: int, chunks: int) -> Iterator[Action]:
    """Groups of `ranks` micro-batches go through one chunk after the other, backward in the opposite order."""
    order = [
        (chunk, first + number)
        for first in range(0, micro_batches, ranks)
        for chunk in range(chunks)
        for number in range(ranks)
    ]
    forwards = [Action(FORWARD, chunk, number) for chunk, number in order]
    backwards = [Action(BACKWARD, chunks - 1 - chunk, number) for chunk, number in order]
    return _alternate(forwards, backwards, _interleaved_warm_up(rank, ranks, chunks))


def _interleaved_warm_up(rank: int, ranks: int, chunks: int) -> int:
    return 2 * (ranks - 1 - rank) + (chunks - 1) * ranks


def _zb_h1(rank: int, ranks: int, micro_batches: int, chunks: int) -> Iterator[Action]:
    """1F1B whose weight parts come `rank` micro-batches late.

    So later ranks, which keep fewer activations for lack of warm-up, keep as many as the first, and weight parts are
    left to fill the gaps at the end.
    """
    forwards = ranks - 1 - rank
    yield from _forwards(min(forwards, micro_batches))
    for number in range(micro_batches):
        if number + forwards < micro_batches:
            yield Action(FORWARD, 0, number + forwards)
        yield Action(INPUT, 0, number)
        if number >= rank:
            yield Action(WEIGHT, 0, number - rank)
    yield from (Action(WEIGHT, 0, number) for number in range(max(0, micro_batches - rank), micro_batches))


def _zb_v(rank: int, ranks: int, micro_batches: int, chunks: int) -> Iterator[Action]:
    """Down the V in chunk 0 and up in chunk 1, so that rank 0 has the loss and gradients start where forwards did.

    Warm-up fills every rank with 2 * ranks activations; then each of the two chunks does a forward, an input part and a
    weight part in turn; at the end `rank` pairs of input parts go ahead of their weight parts. Too few micro-batches
    for that leave out the actions of those that are missing.
    """
    down, up = _Chunk(0, micro_batches), _Chunk(1, micro_batches)
    turns = max(micro_batches, 2 * ranks - 1)
    yield from down.next(FORWARD, 2 * (ranks - rank) - 1)
    for _ in range(rank):
        yield from chain(up.next(FORWARD), down.next(FORWARD))
    for _ in range(ranks - rank):
        yield from chain(up.next(FORWARD), up.next(INPUT), up.next(WEIGHT))
    for _ in range(turns - ranks):
        yield from chain(down.next(FORWARD), down.next(INPUT), down.next(WEIGHT))
        yield from chain(up.next(FORWARD), up.next(INPUT), up.next(WEIGHT))
    for _ in range(rank):
        yield from chain(down.next(INPUT), up.next(INPUT))
    for _ in range(ranks - rank):
        yield from chain(down.next(INPUT), down.next(WEIGHT))
    yield from chain(up.next(WEIGHT, rank), down.next(WEIGHT, rank))


class _Chunk:
    """Counts the actions of one chunk; those of micro-batches that there are not are left out."""

    def __init__(self, chunk: int, micro_batches: int) -> None:
        self.chunk, self.micro_batches = chunk, micro_batches
        self.done = {FORWARD: 0, INPUT: 0, WEIGHT: 0}

    def next(self, kind: str, times: int = 1) -> Iterator[Action]:
        first = self.done[kind]
        self.done[kind] += times
        return (Action(kind, self.chunk, number) for number in range(first, min(first + times, self.micro_batches)))


# Promises #


def _one(rank: int, ranks: int, micro_batches: int, chunks: int) -> int:
    return 1


def _all(rank: int, ranks: int, micro_batches: int, chunks: int) -> int:
    return micro_batches


def _distance_to_the_end(rank: int, ranks: int, micro_batches: int, chunks: int) -> int:
    return min(micro_batches, ranks - rank)


def _interleaved_in_flight(rank: int, ranks: int, micro_batches: int, chunks: int) -> int:
    return min(micro_batches * chunks, _interleaved_warm_up(rank, ranks, chunks) + 1)


def _as_first_rank(rank: int, ranks: int, micro_batches: int, chunks: int) -> int:
    return min(micro_batches, ranks) * chunks


def _flush_bubble(ranks: int, micro_batches: int, chunks: int) -> Fraction:
    """Narayanan et al. 2021, section 2.2, as a share of the step, not of its ideal time."""
    return Fraction(ranks - 1, chunks * micro_batches + ranks - 1)


def _zb_h1_bubble(ranks: int, micro_batches: int, chunks: int) -> Fraction | None:
    """Idle time (ranks - 1) * (t_F + t_I - t_W), Qi et al. 2023, table 2, of a step of enough micro-batches."""
    return Fraction(ranks - 1, 3 * micro_batches + ranks - 1) if micro_batches >= ranks else None


def _zb_v_bubble(ranks: int, micro_batches: int, chunks: int) -> Fraction | None:
    """A rank waits for the first activation, and its end for that of the others: ranks - 1 actions of a chunk.

    The optimizer that Qi et al. start on each rank on its own (section 4) would hide them.
    """
    return Fraction(ranks - 1, 6 * micro_batches + ranks - 1) if micro_batches >= 2 * ranks - 1 else None


def _sequential_bubble(ranks: int, micro_batches: int, chunks: int) -> Fraction:
    return Fraction(ranks - 1, ranks)


def _no_bubble(ranks: int, micro_batches: int, chunks: int) -> Fraction:
    return Fraction(0)


ALL = (
    Schedule(
        name="sequential",
        source="layer parallelism: one micro-batch at a time",
        order=_sequential,
        most_in_flight=_one,
        bubble=_sequential_bubble,
    ),
    Schedule(
        name="gpipe",
        source="Huang et al. 2019, GPipe",
        order=_gpipe,
        most_in_flight=_all,
        bubble=_flush_bubble,
    ),
    Schedule(
        name="1f1b",
        source="Narayanan et al. 2021, PipeDream-Flush",
        order=_one_forward_one_backward,
        most_in_flight=_distance_to_the_end,
        bubble=_flush_bubble,
    ),
    Schedule(
        name="interleaved",
        source="Narayanan et al. 2021, Efficient large-scale language model training on GPU clusters, section 2.2",
        order=_interleaved,
        most_in_flight=_interleaved_in_flight,
        bubble=_flush_bubble,
        chunks=(2, None),
        whole_groups=True,
    ),
    Schedule(
        name="zb-h1",
        source="Qi et al. 2023, Zero Bubble Pipeline Parallelism, section 2.1",
        order=_zb_h1,
        most_in_flight=_as_first_rank,
        bubble=_zb_h1_bubble,
        splits_backward=True,
    ),
    Schedule(
        name="zb-v",
        source="Qi et al. 2023, Zero Bubble Pipeline Parallelism, section 6",
        order=_zb_v,
        most_in_flight=_as_first_rank,
        bubble=_zb_v_bubble,
        chunks=(2, 2),
        placement=V,
        splits_backward=True,
    ),
    Schedule(
        name="pipedream-2bw",
        source="Narayanan et al. 2021, Memory-Efficient Pipeline-Parallel DNN Training (weights one step old)",
        order=_one_forward_one_backward,
        most_in_flight=_distance_to_the_end,
        bubble=_no_bubble,
        flushes=False,
        performed=False,
        weight_versions=2,
    ),
)

SCHEDULES: dict[str, Schedule] = {one.name: one for one in ALL}
"""By name."""
