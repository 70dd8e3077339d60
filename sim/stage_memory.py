"""Bytes in use on a pipeline rank: its flight, played in the order of the plan.

A flight does its micro-batches one at a time (engine/stage_flight.py). Here each action of the plan takes and gives
back what its phase of the flight did, so that as much is in flight as the schedule says, in its order, on the
allocator of the device. Of what a place in the program makes for every micro-batch, an action gives back the oldest
that is there, since backwards come in the order of the forwards; what is not there yet is not given back, so that there
are never fewer bytes than the rank holds.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from ..collectives.pipeline import (
    CLASSES,
    FORWARD,
    UPDATE,
    Action,
    Plan,
    Recv,
    kept,
    messages,
    phase_name,
)
from ..collectives.pipeline_messages import prefetch, with_communication
from ..collectives.pipeline_rehearsal import rehearsal
from ..collectives.pipeline_schedules import schedule
from ..collectives.trace import CATEGORIES, Alloc, Phase, Trace
from .hardware import Processor
from .memory import Ledger, Memory
from .storages import Moment, Tiers, moments

STEADY = 2
"""The step of a flight that is played in the order of the plan."""


class Slot(NamedTuple):
    """A place in the program where every micro-batch makes a storage.

    Attributes:
        work: the phase less the class of its micro-batch, e.g. "forward 0".
        run: which run of the segment at its block in the phase.
    """

    work: str
    key: str
    block: int
    run: int
    position: int


class Change(NamedTuple):
    """A storage comes or goes in a phase.

    Attributes:
        offset: number of the op in the phase.
        slot: where it is made; None outside of the actions of the steady step.
        lasts: a flight never gives it back.
    """

    offset: int
    moment: Moment
    slot: Slot | None
    lasts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFlight:
    """The flight of a rank, ready to be played.

    Attributes:
        changes: by phase of the trace, what comes and goes, in order.
        lengths: by phase, how many ops it has.
        resting: bytes by category between steps.
        kept_bytes: by chunk, what a forward leaves behind until its backward has ended.
    """

    trace: Trace
    changes: tuple[tuple[Change, ...], ...]
    lengths: tuple[int, ...]
    resting: Mapping[str, int]
    kept_bytes: tuple[int, ...]


def read_flight(trace: Trace, chunks: int) -> StageFlight:
    """A flight taken apart.

    Args:
        trace: its phases have the names that `phase_name` gives, each once in each of two steps, and "update".
        chunks: of the rank.
    """
    seen = list(moments(trace))
    lengths = [sum(len(trace.segments[call.segment]) for call in phase.calls) for phase in trace.phases]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    slots = _slots(trace, seen)
    gone = {moment.storage for moment in seen if not moment.comes}
    changes: list[list[Change]] = [[] for _ in trace.phases]
    for moment in seen:
        changes[moment.phase].append(
            Change(
                offset=moment.number - starts[moment.phase],
                moment=moment,
                slot=slots.get(moment.storage),
                lasts=moment.storage not in gone,
            )
        )
    after = _bytes_after(changes)
    forwards = [_last(trace.phases, phase_name(Action(FORWARD, chunk, 0), 1)) for chunk in range(chunks)]
    return StageFlight(
        trace=trace,
        changes=tuple(map(tuple, changes)),
        lengths=tuple(lengths),
        resting=after[_begin(trace.phases) - 1],
        kept_bytes=tuple(sum(after[number].values()) - sum(after[number - 1].values()) for number in forwards),
    )


def _begin(phases: Sequence[Phase]) -> int:
    return next(number for number, phase in enumerate(phases) if phase.step == STEADY)


def _last(phases: Sequence[Phase], name: str) -> int:
    return max(number for number, phase in enumerate(phases) if phase.name == name)


def _work(phase: Phase) -> str | None:
    """Kind and chunk of an action of the steady step; None if it is none."""
    words = phase.name.split()
    action = phase.step == STEADY and len(words) == len(("kind", "class", "chunk")) and words[1] in CLASSES
    return f"{words[0]} {words[2]}" if action else None


def _slots(trace: Trace, seen: Sequence[Moment]) -> dict[int, Slot]:
    """Of the storages that are made in the actions of the steady step."""
    works = [_work(phase) for phase in trace.phases]
    slots: dict[int, Slot] = {}
    runs: dict[tuple[int, str, int], list[int]] = defaultdict(list)  # numbers of the ops before each run
    for moment in seen:
        work = works[moment.phase]
        if moment.comes and work is not None:
            key, block = moment.call.key, moment.call.block
            begun = runs[moment.phase, key, block]
            if moment.number - moment.position not in begun:
                begun.append(moment.number - moment.position)
            slots[moment.storage] = Slot(work, key, block, len(begun) - 1, moment.position)
    return slots


def _bytes_after(changes: Sequence[Sequence[Change]]) -> list[dict[str, int]]:
    """By phase, bytes by category when it has ended."""
    now: Counter[str] = Counter(dict.fromkeys(CATEGORIES, 0))
    after = []
    for of_phase in changes:
        for change in of_phase:
            if change.moment.alloc.tier == "device":
                alloc = change.moment.alloc
                now[alloc.category] += alloc.nbytes if change.moment.comes else -alloc.nbytes
        after.append(dict(now))
    return after


def rank_memory(
    plan: Plan,
    rank: int,
    flight: StageFlight,
    processor: Processor,
    message_bytes: int,
    *,
    framework_bytes: int = 0,
    expandable_segments: bool = False,
) -> Memory:
    """What a pipeline rank uses in a step of the plan.

    What it receives lands in buffers that are used again: as many as it needs at once, of which the flight has those
    for one micro-batch. A schedule without a flush keeps older versions of the parameters besides.

    Args:
        plan: with its messages.
        message_bytes: what a rank receives of a micro-batch from its neighbour.
        framework_bytes: that its process takes outside of the allocator.
    """
    ledger = Ledger(flight.trace.segments, processor, framework_bytes, expandable_segments=expandable_segments)
    player = _Player(flight, ledger)
    begin = _begin(flight.trace.phases)
    for number in range(begin):
        player.perform(number, None)
    buffers = received_at_once(plan, rank) - received_at_once(_flown_plan(plan), rank)
    player.stand("received", [Alloc(message_bytes, "activations")] * max(0, buffers))
    versions = schedule(plan.schedule).weight_versions - 1
    player.stand("version", [Alloc(flight.resting["parameters"], "parameters")] * versions)
    if flight.trace.phases[begin].name == "begin":
        player.perform(begin, None)
    player.play(shortened(plan, rank), rank)
    return player.ledger.memory(player.elsewhere.most)


def _flown_plan(plan: Plan) -> Plan:
    """The plan of the flight, with its messages."""
    return prefetch(with_communication(rehearsal(plan, min(plan.micro_batches_per_step, len(CLASSES)))))


def received_at_once(plan: Plan, rank: int) -> int:
    """How many buffers a rank's messages need at most: each from its receive's post to the end of the backward."""
    held: Counter[tuple[int, int]] = Counter()
    most = 0
    for item in plan.programs[rank]:
        if isinstance(item, Action) and kept(item) < 0:
            del held[item.chunk, item.micro_batch]
        held.update((each.chunk, each.micro_batch) for each in messages(item) if isinstance(each, Recv))
        most = max(most, held.total())
    return most


def hungriest(plan: Plan, ranks: Sequence[int], flight: StageFlight, message_bytes: int) -> int:
    """Of ranks with equal flights, the one whose plan keeps the most bytes of activations and messages at once."""

    def most(rank: int) -> int:
        now = highest = 0
        for action in plan.actions(rank):
            now += kept(action) * flight.kept_bytes[action.chunk]
            highest = max(highest, now)
        return highest + message_bytes * received_at_once(plan, rank)

    return max(ranks, key=most)


def shortened(plan: Plan, rank: int) -> Plan:
    """A plan of fewer micro-batches under which a rank keeps as much at once; the given one if there is none.

    A rank that has filled up repeats itself: two rounds of micro-batches show what many do.
    """
    fewer = max(2 * plan.ranks, len(CLASSES))
    if not plan.flushes or plan.micro_batches <= fewer:
        return plan
    short = schedule(plan.schedule).plan(plan.ranks, fewer, plan.chunks)
    return short if _most_in_flight(short, rank) == _most_in_flight(plan, rank) else plan


def _most_in_flight(plan: Plan, rank: int) -> int:
    return max(accumulate(map(kept, plan.actions(rank))), default=0)


class _Player:
    """Plays the phases of a flight in any order."""

    def __init__(self, flight: StageFlight, ledger: Ledger) -> None:
        self.flight, self.ledger = flight, ledger
        self.elsewhere = Tiers()
        self._resting: dict[Hashable, Alloc] = {}  # off the device
        self._live: dict[Slot, deque[tuple[Slot, int]]] = defaultdict(deque)  # keys of the ledger, the oldest first
        self._number = 0

    def play(self, plan: Plan, rank: int) -> None:
        """The actions of a rank, and the update after each step of them."""
        phases, per_step = self.flight.trace.phases, plan.micro_batches_per_step
        steady = {phase.name: number for number, phase in enumerate(phases) if phase.step == STEADY}
        done = 0
        for action in plan.actions(rank):
            within = replace(action, micro_batch=action.micro_batch % per_step)
            self.perform(steady[phase_name(within, per_step)], action.micro_batch)
            done += kept(action) < 0
            if kept(action) < 0 and done % (plan.chunks * per_step) == 0:
                self.perform(steady[UPDATE], None)

    def stand(self, name: str, allocs: Sequence[Alloc]) -> None:
        """What is there for the whole step, though the flight does not show it."""
        for number, alloc in enumerate(allocs):
            self.ledger.take(self._number, (name, number), alloc)

    def perform(self, index: int, micro_batch: int | None) -> None:
        """Take and give back what a phase does.

        Args:
            micro_batch: that an action is for.
        """
        phase = self.flight.trace.phases[index]
        if phase.step > 0:
            self.ledger.begin()
        self.ledger.enter(self._number + 1, phase.name, micro_batch)
        for change in self.flight.changes[index]:
            if change.moment.comes:
                self._take(change, micro_batch)
            else:
                self._give(change, micro_batch)
        self._number += self.flight.lengths[index]

    def _take(self, change: Change, micro_batch: int | None) -> None:
        number, moment = self._number + change.offset, change.moment
        if change.slot is None or micro_batch is None:
            self._put(number, moment.storage, moment)
            return
        if change.lasts:  # the flight has one of it, however many micro-batches there are
            self._give_all(number, change.slot)
        key = (change.slot, micro_batch)
        self._live[change.slot].append(key)
        self._put(number, key, moment)

    def _give(self, change: Change, micro_batch: int | None) -> None:
        number = self._number + change.offset
        if change.slot is None:
            self._remove(number, change.moment.storage)
        elif micro_batch is None:
            self._give_all(number, change.slot)
        elif self._live[change.slot]:
            self._remove(number, self._live[change.slot].popleft())

    def _give_all(self, number: int, slot: Slot) -> None:
        for key in self._live.pop(slot, ()):
            self._remove(number, key)

    def _put(self, number: int, key: Hashable, moment: Moment) -> None:
        if moment.alloc.tier == "device":
            self.ledger.take(number, key, moment.alloc, moment)
        else:
            self._resting[key] = moment.alloc
            self.elsewhere.change(moment.alloc, True)

    def _remove(self, number: int, key: Hashable) -> None:
        """Once: what there is one of for all micro-batches goes with the first that is done with it."""
        if self.ledger.holds(key):
            self.ledger.give(number, key)
        elif key in self._resting:
            self.elsewhere.change(self._resting.pop(key), False)
