"""When a pipeline plan's actions run if messages are free, and how much of the step is idle."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from .pipeline import Action, Plan

Number = int | float | Fraction
"""Seconds, or any other unit of time; with whole numbers and fractions the answers are exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The time of each kind of action of one chunk and one micro-batch; a whole backward is the sum of its parts."""

    forward: Number = 1
    input: Number = 1
    weight: Number = 1

    def of(self, action: Action) -> Number:
        match action.kind:
            case "F":
                return self.forward
            case "I":
                return self.input
            case "W":
                return self.weight
            case _:
                return self.input + self.weight


class Slot(NamedTuple):
    """An action with its times."""

    action: Action
    start: Number
    end: Number


Timetable = tuple[tuple[Slot, ...], ...]
"""By rank, in order."""


def play(plan: Plan, seconds: Callable[[int, Action], Number]) -> Timetable:
    """Run each action as soon as its rank is free and what it needs is made; messages take no time.

    Args:
        seconds: (rank, action) -> its time.

    Raises:
        ValueError: ranks that wait for each other; names the first of them and its action.
    """
    todo = [tuple(plan.actions(rank)) for rank in range(plan.ranks)]
    slots: list[list[Slot]] = [[] for _ in todo]
    made: dict[tuple[int, str, int], Number] = {}  # when a stage's F, or B or I, of a micro-batch ended
    awaited: dict[tuple[int, str, int], int] = {}  # the rank that stands before it
    ready = list(range(plan.ranks))
    while ready:
        rank = ready.pop()
        now = slots[rank][-1].end if slots[rank] else 0
        for action in todo[rank][len(slots[rank]) :]:
            sources = _sources(plan, rank, action)
            missing = [source for source in sources if source not in made]
            if missing:
                awaited[missing[0]] = rank
                break
            start = max([now, *(made[source] for source in sources)])
            now = start + seconds(rank, action)
            slots[rank].append(Slot(action, start, now))
            if action.kind != "W":
                key = (plan.stage(rank, action.chunk), "F" if action.kind == "F" else "B", action.micro_batch)
                made[key] = now
                if key in awaited:
                    ready.append(awaited.pop(key))
    for rank, (actions, done) in enumerate(zip(todo, slots, strict=True)):
        if len(done) < len(actions):
            raise ValueError(
                f"{plan.schedule}: rank {rank} can never do {actions[len(done)]}: what it needs is not made"
            )
    return tuple(map(tuple, slots))


def _sources(plan: Plan, rank: int, action: Action) -> list[tuple[int, str, int]]:
    """What must be made before an action: (stage, "F" or "B" for either kind of backward, micro-batch)."""
    stage, number = plan.stage(rank, action.chunk), action.micro_batch
    match action.kind:
        case "F":
            return [(stage - 1, "F", number)] if stage > 0 else []
        case "W":
            return [(stage, "B", number)]
        case _:
            own = (stage, "F", number)
            return [own, (stage + 1, "B", number)] if stage < plan.stages - 1 else [own]


def step_window(plan: Plan, timetable: Timetable, rank: int) -> tuple[Number, Number]:
    """Start and end of the step that counts, as a rank sees it.

    A plan that flushes has one step, from the first action of all to the last. Of one that does not, it is the second
    step: from the end of the rank's last action of the first to the end of its last action of the second.
    """
    if plan.flushes:
        return 0, max(slots[-1].end for slots in timetable)
    per_step = plan.micro_batches_per_step
    ends = [max(slot.end for slot in timetable[rank] if slot.action.micro_batch // per_step == step) for step in (0, 1)]
    return ends[0], ends[1]


def bubble_fraction(plan: Plan, costs: Costs | None = None) -> Number:
    """The share of the step in which a rank is idle, in the mean over the ranks, if messages are free.

    Args:
        costs: left out: a backward takes twice as long as a forward, half of it for the input.

    Returns:
        A Fraction if the costs are whole numbers or fractions.

    Raises:
        ValueError: see `play`.
    """
    costs = costs or Costs()
    timetable = play(plan, lambda rank, action: costs.of(action))
    idle: Number = 0
    total: Number = 0
    for rank, slots in enumerate(timetable):
        start, end = step_window(plan, timetable, rank)
        busy = sum(
            min(slot.end, end) - max(slot.start, start) for slot in slots if start < slot.end and slot.start < end
        )
        idle += end - start - busy
        total += end - start
    return idle / total if isinstance(total, float) else Fraction(idle) / total
