"""A pipelined step as a timeline: actions, messages, the streams inside actions, memory of each rank.

What happens inside an action was recorded in the flight of its stage; it is moved to where the composed step has the
action. The composition knows nothing of streams, so where two actions meet that did not meet in the flight, what still
runs on a stream pushes back what follows on it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from ..collectives.pipeline import (
    ACTIVATION,
    BACKWARD,
    FORWARD,
    GRADIENT,
    UPDATE,
    WEIGHT,
    Action,
    Plan,
    Tag,
    makes,
    needs,
    phase_name,
)
from ..collectives.pipeline_schedules import schedule
from ..collectives.trace import Trace
from .pipeline import LinkSeconds, PipelineStep
from .recording import Arrow, Change, MemoryTrack, Played, arrows, changes, memory_track, played, steady_phase, totals
from .replay import Replay
from .streams import Span
from .timeline import Process, Timeline

MOST_SPANS = 100_000
"""So many spans inside actions are drawn, of the first ranks: some 15 MB of JSON. Other ranks have actions alone."""

ACTIONS = "actions"


@dataclass(frozen=True)
class StageRecord:
    """The flight of a stage, replayed with its spans kept.

    Attributes:
        rounding: the allocator hands out multiples of so many bytes.
        fusion: with which it was replayed.
    """

    trace: Trace
    replay: Replay
    rounding: int
    fusion: str = "none"

    @cached_property
    def ops(self) -> list[Played]:
        return played(self.trace, self.replay, self.fusion)

    @cached_property
    def steady(self) -> Mapping[str, int]:
        """By name, the number of the played phase of the steady step."""
        first = steady_phase(self.trace)
        return {span.name: first + at for at, span in enumerate(self.replay.phase_spans[first:])}

    @cached_property
    def _ops_by_phase(self) -> Mapping[int, list[Played]]:
        found: dict[int, list[Played]] = defaultdict(list)
        for one in self.ops:
            found[one.phase].append(one)
        return found

    def ops_of(self, phase: int) -> Sequence[Played]:
        """What a phase did, in the order of the program."""
        return self._ops_by_phase.get(phase, ())

    @cached_property
    def by_phase(self) -> Mapping[int, list[Played]]:
        """What takes time in each phase."""
        found: dict[int, list[Played]] = defaultdict(list)
        for one in self.ops:
            if one.span is not None:
                found[one.phase].append(one)
        return found

    @cached_property
    def arrows_to(self) -> Mapping[Played, list[tuple[str, Played]]]:
        found: dict[Played, list[tuple[str, Played]]] = defaultdict(list)
        for name, source, target in arrows(self.ops):
            found[target].append((name, source))
        return found

    @cached_property
    def changes_by_phase(self) -> Mapping[int, list[Change]]:
        """Changes of memory by the phase in which they happen."""
        found: dict[int, list[Change]] = defaultdict(list)
        for change in changes(self.ops, self.replay.phase_spans, self.rounding):
            found[change.phase].append(change)
        return found

    def resting(self) -> dict[str, int]:
        """Bytes by category between steps."""
        first = steady_phase(self.trace)
        return totals(change for phase, found in self.changes_by_phase.items() if phase < first for change in found)

    def begin_s(self, phase: int) -> float:
        return self.replay.phase_spans[phase].start_s


class MessageSpan(NamedTuple):
    """A message between pipeline ranks, as it leaves one action and is there for another."""

    tag: Tag
    sender: int
    receiver: int
    source: Span
    moving: Span
    target: Span


def step_timeline(
    plan: Plan, step: PipelineStep, stages: Sequence[StageRecord], memory: Sequence[MemoryTrack], link: LinkSeconds
) -> Timeline:
    """All that a composed step shows.

    Args:
        plan: that was composed.
        stages: by pipeline rank; ranks that do the same may share one.
        memory: by pipeline rank, see `rank_memory_track`.
        link: seconds of a message.
    """
    sent = message_spans(plan, step, link)
    processes, found, left = [], list[Arrow](), MOST_SPANS
    for rank, stage in enumerate(stages):
        left -= sum(len(stage.by_phase.get(phase, ())) for phase, _ in _placed_phases(plan, step, rank, stage))
        streams, inside = _inside(plan, step, rank, stage) if left >= 0 else ([], [])
        found += inside
        messages = [message.moving for message in sent if message.sender == rank]
        name = f"pipeline rank {rank}" + ("" if left >= 0 else " (actions alone)")
        processes.append(Process(name, (*_actions(plan, step, rank), *messages, *streams), memory[rank]))
    return Timeline(tuple(processes), (*_message_arrows(sent), *found))


def updates(plan: Plan, step: PipelineStep, rank: int) -> list[tuple[float, float]]:
    """(start, end) of what follows a rank's last action of each step of the plan."""
    last: dict[int, float] = {}
    for action, _, end_s in step.ranks[rank].spans:
        last[action.micro_batch // plan.micro_batches_per_step] = end_s
    return [(end_s, end_s + step.ranks[rank].after_s) for end_s in last.values()]


def _actions(plan: Plan, step: PipelineStep, rank: int) -> list[Span]:
    """In the order of time."""
    spans = [Span(ACTIONS, str(action), start_s, end_s) for action, start_s, end_s in step.ranks[rank].spans]
    spans += [Span(ACTIONS, UPDATE, start_s, end_s) for start_s, end_s in updates(plan, step, rank)]
    return sorted(spans, key=lambda span: (span.start_s, span.end_s))


def message_spans(plan: Plan, step: PipelineStep, link: LinkSeconds) -> list[MessageSpan]:
    """The messages between ranks, in the order in which they leave.

    Receives are posted ahead, so a message leaves when the action that makes it has ended and those before it between
    the same two ranks have arrived.
    """
    made: dict[Tag, tuple[int, Span]] = {}
    needed: dict[Tag, tuple[int, Span]] = {}
    for rank, lived in enumerate(step.ranks):
        for action, start_s, end_s in lived.spans:
            span = Span(ACTIONS, str(action), start_s, end_s)
            if (sent := makes(plan, rank, action)) is not None and sent.peer != rank:
                made[plan.tag(rank, sent)] = rank, span
            if (received := needs(plan, rank, action)) is not None:
                needed[plan.tag(rank, received)] = rank, span
    found = list[MessageSpan]()
    free_s: dict[tuple[int, int], float] = defaultdict(float)
    for tag, (sender, source) in sorted(made.items(), key=lambda item: item[1][1].end_s):
        receiver, target = needed[tag]
        what = GRADIENT if tag.gradient else ACTIVATION
        start_s = max(source.end_s, free_s[sender, receiver])
        end_s = free_s[sender, receiver] = start_s + link(what, sender, receiver)
        moving = Span(f"messages to rank {receiver}", f"{what} {tag.micro_batch}", start_s, end_s)
        found.append(MessageSpan(tag, sender, receiver, source, moving, target))
    return found


def _message_arrows(sent: Iterable[MessageSpan]) -> Iterator[Arrow]:
    for message in sent:
        yield Arrow("send", message.source, message.moving, message.sender, message.sender)
        yield Arrow("receive", message.moving, message.target, message.sender, message.receiver)


# Inside the actions #


def _placed_phases(plan: Plan, step: PipelineStep, rank: int, stage: StageRecord) -> Iterator[tuple[int, float]]:
    """(number of the phase of the flight, when the step begins it), in the order of time."""
    lived = step.ranks[rank]
    placed = [
        (start_s, stage.steady[phase_name(_within(plan, action), plan.micro_batches_per_step)])
        for action, start_s, _ in lived.spans
    ]
    placed += [(start_s, stage.steady[UPDATE]) for start_s, _ in updates(plan, step, rank)]
    for start_s, phase in sorted(placed):
        yield phase, start_s


def _within(plan: Plan, action: Action) -> Action:
    """The action with the number of its micro-batch in its own step."""
    return replace(action, micro_batch=action.micro_batch % plan.micro_batches_per_step)


def _inside(plan: Plan, step: PipelineStep, rank: int, stage: StageRecord) -> tuple[list[Span], list[Arrow]]:
    """The streams of a rank, and what follows from what on them."""
    spans, found = list[Span](), list[Arrow]()
    latest: dict[Played, Span] = {}
    free_s: dict[str, float] = defaultdict(float)
    for phase, start_s in _placed_phases(plan, step, rank, stage):
        shift_s = start_s - stage.begin_s(phase)
        for one in stage.by_phase.get(phase, ()):
            assert one.span is not None
            begin_s = max(one.span.start_s + shift_s, free_s[one.span.stream])
            end_s = begin_s + (one.span.end_s - one.span.start_s)
            free_s[one.span.stream] = end_s
            span = latest[one] = replace(one.span, start_s=begin_s, end_s=end_s)
            spans.append(span)
            sources = ((name, latest.get(source)) for name, source in stage.arrows_to.get(one, ()))
            found += (
                Arrow(name, source, span, rank, rank)
                for name, source in sources
                if source is not None and source.end_s <= begin_s  # what was pushed back may end too late
            )
    return spans, found


# Memory #


def rank_memory_track(plan: Plan, step: PipelineStep, rank: int, stage: StageRecord, message_bytes: int) -> MemoryTrack:
    """Memory of a rank through the step: what its flight did in each action, where the step has the action.

    What a chunk has received of a micro-batch is there from its forward to the end of its backward; versions of the
    parameters that a schedule without a flush keeps are there all the time.
    """
    base = stage.resting()
    base["parameters"] *= schedule(plan.schedule).weight_versions
    found = [*_phase_changes(plan, step, rank, stage), *_received(plan, step, rank, message_bytes)]
    found.sort(key=lambda change: change.time_s)
    return memory_track(found, base)


def _phase_changes(plan: Plan, step: PipelineStep, rank: int, stage: StageRecord) -> Iterable[Change]:
    for phase, start_s in _placed_phases(plan, step, rank, stage):
        shift_s = start_s - stage.begin_s(phase)
        for change in stage.changes_by_phase.get(phase, ()):
            yield change._replace(time_s=change.time_s + shift_s)


def _received(plan: Plan, step: PipelineStep, rank: int, message_bytes: int) -> Iterable[Change]:
    for action, start_s, end_s in step.ranks[rank].spans:
        if plan.stage(rank, action.chunk) > 0:
            if action.kind == FORWARD:
                yield Change(start_s, 0, "activations", message_bytes)
            elif action.kind in (BACKWARD, WEIGHT):
                yield Change(end_s, 0, "activations", -message_bytes)
