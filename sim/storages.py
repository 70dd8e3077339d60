"""When the storages of a trace come and go, in the order of the program."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ..collectives.trace import TIERS, Alloc, Call, Free, Trace

MOST_REPEATS = 2
"""A phase that repeats leaves behind what it found, so twice shows its peak."""


class Moment(NamedTuple):
    """A storage comes or goes.

    Attributes:
        number: of the op, in program order from 1.
        phase, run: number of the phase in the trace, and of its repetition.
        call, position: where in the program the op is.
        storage: which one, numbered in the order in which they come.
        alloc: what it is.
        comes: or goes.
    """

    number: int
    phase: int
    run: int
    call: Call
    position: int
    storage: int
    alloc: Alloc
    comes: bool


def moments(trace: Trace) -> Iterator[Moment]:
    """Every storage that comes or goes, in program order; phases that repeat run `MOST_REPEATS` times at most.

    Raises:
        ValueError: the trace frees what it never allocated.
    """
    live: dict[tuple[str, int, int, int], tuple[int, Alloc]] = {}
    runs: Counter[tuple[str, int]] = Counter()
    number = made = 0
    turns = ((n, run, phase) for n, phase in enumerate(trace.phases) for run in range(min(phase.repeat, MOST_REPEATS)))
    for index, run, phase in turns:
        for call in phase.calls:
            here = (call.key, call.block)
            runs[here] += 1
            for position, op in enumerate(trace.segments[call.segment]):
                number += 1
                if isinstance(op, Alloc):
                    live[*here, runs[here], position] = made, op
                    yield Moment(number, index, run, call, position, made, op, True)
                    made += 1
                elif isinstance(op, Free):
                    ref = op.ref
                    block = ref.block_from(call.block)
                    maker = (ref.key, block, runs[ref.key, block] - ref.age, ref.op)
                    if maker not in live:
                        raise ValueError(f"segment {call.key!r} of block {call.block} frees {ref}, which is not live")
                    yield Moment(number, index, run, call, position, *live.pop(maker), False)


class Tiers:
    """Bytes of the tiers below the device."""

    def __init__(self) -> None:
        self.now = {tier: 0 for tier in TIERS if tier != "device"}
        self.most = dict(self.now)

    def change(self, alloc: Alloc, comes: bool) -> None:
        self.now[alloc.tier] += alloc.nbytes if comes else -alloc.nbytes
        self.most[alloc.tier] = max(self.most[alloc.tier], self.now[alloc.tier])
