"""A training step of a pipeline, composed from the prices of its stages: who waits for whom, and for how long.

Messages follow the rule that the proof calls rendezvous: they move when both sides have posted them, those from one
rank to another one after the other. What is posted without waiting overlaps with computation; a send or an exchange
that is not holds its rank. `compose` finds all times in one pass (sim/timetable.py); `compose_by_events` plays the plan
(collectives/pipeline.py) on simpy, one event per action and per message.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from simpy.events import Event, ProcessGenerator

from ..collectives.pipeline import FORWARD, Action, Item, Message, Plan, Post, Send, Tag, Wait, kept, messages
from .remembered import Remembered
from .replay import CountingEnvironment
from .timetable import Order, RankTimes, ends_of_steps, evaluate, order

LinkSeconds = Callable[[str, int, int], float]
"""(what: "activation" or "gradient", sender, receiver) -> seconds of a message; ranks are positions in the pipeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionPrice:
    """Seconds of an action on a micro-batch.

    Attributes:
        first_s: on the first micro-batch of a step, if that differs.
        last_s: on the last one (of one that is both, too), if that differs.
    """

    seconds: float
    first_s: float | None = None
    last_s: float | None = None

    def of(self, number: int, micro_batches: int) -> float:
        """Seconds on micro-batch `number` of a step's `micro_batches`."""
        if number == micro_batches - 1 and self.last_s is not None:
            return self.last_s
        if number == 0 and self.first_s is not None:
            return self.first_s
        return self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrice:
    """What a pipeline rank's work takes.

    Attributes:
        actions: by (kind, chunk), as the plan names them: ("F", 0), ("B", 0) or ("I", 0) and ("W", 0), and so on.
        after_s: what follows the rank's last action of a step: the exposed part of the reduction of gradients, the
            optimizer's step, the gathering of parameters.
    """

    actions: Mapping[tuple[str, int], ActionPrice]
    after_s: float = 0.0

    def seconds(self, action: Action, micro_batches: int) -> float:
        """Of an action in a step of `micro_batches`, which its number may exceed where a plan shows several steps."""
        price = self.actions[action.kind, action.chunk]
        return price.of(action.micro_batch % micro_batches, micro_batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way between two ranks, per direction."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, nbytes: int) -> float:
        return self.latency_s + nbytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPrice:
    """Messages between pipeline ranks, some of them inside a node, some between nodes; a `LinkSeconds`.

    Attributes:
        message_bytes: of an activation or a gradient of one micro-batch.
        nodes: by pipeline rank, its node.
    """

    message_bytes: int
    inside: Link
    between: Link
    nodes: Sequence[int]

    def __call__(self, what: str, sender: int, receiver: int) -> float:
        link = self.inside if self.nodes[sender] == self.nodes[receiver] else self.between
        return link.seconds(self.message_bytes)


def free(what: str, sender: int, receiver: int) -> float:
    """Messages that take no time."""
    return 0.0


class ActionSpan(NamedTuple):
    """An action as it ran."""

    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStep:
    """A step as one rank lives it; compute + exposed_p2p + bubble + after = the step.

    Attributes:
        exposed_p2p_s: waiting for messages that were on their way or queued behind others.
        bubble_s: waiting for other ranks' work, and for the slowest rank at the end.
        after_s: what follows the last action.
        actions: all of the plan in order.
        starts_s, ends_s: of each.
    """

    compute_s: float
    exposed_p2p_s: float
    bubble_s: float
    after_s: float
    actions: tuple[Action, ...]
    starts_s: Sequence[float]
    ends_s: Sequence[float]

    @property
    def spans(self) -> tuple[ActionSpan, ...]:
        """All actions in order, as they ran."""
        return tuple(map(ActionSpan, self.actions, self.starts_s, self.ends_s))

    @property
    def in_flight(self) -> tuple[tuple[float, int], ...]:
        """(time, activations of one chunk and micro-batch kept from then on)."""
        kept_from_then = accumulate(map(kept, self.actions))
        times = (span.start_s if span.action.kind == FORWARD else span.end_s for span in self.spans)
        return tuple(zip(times, kept_from_then, strict=True))

    @property
    def breakdown_s(self) -> dict[str, float]:
        return {
            "compute": self.compute_s,
            "exposed_p2p": self.exposed_p2p_s,
            "bubble": self.bubble_s,
            "after": self.after_s,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStep:
    """A composed step.

    Attributes:
        step_s: of a plan that does not flush: of a step in steady state.
        ranks: by pipeline rank.
        events: actions and messages that took place.
    """

    step_s: float
    ranks: tuple[RankStep, ...]
    events: int


def compose(plan: Plan, stages: Sequence[StagePrice], link: LinkSeconds = free) -> PipelineStep:
    """Play a plan with the prices of its stages.

    A plan that flushes has one step, from the first action of all until the last rank has done what follows. Of a plan
    that does not, the second step is looked at: on each rank from the end of the first to the end of the second.

    Args:
        plan: with its messages: `prefetch(with_communication(plan))` or `fuse(with_communication(plan))`.
        stages: by pipeline rank.
        link: seconds of a message.

    Raises:
        ValueError: not one price per rank, an action without a price, or ranks that wait for each other.
    """
    _check(plan, stages)
    ordered = order_of(plan)
    times = evaluate(
        ordered,
        [stages[rank].seconds(action, plan.micro_batches_per_step) for rank, action in ordered.prices],
        link,
        [stage.after_s for stage in stages],
    )
    return as_composed(plan, stages, times.ranks, len(ordered.doings))


def compose_by_events(plan: Plan, stages: Sequence[StagePrice], link: LinkSeconds = free) -> PipelineStep:
    """As `compose`, played on simpy: the same times but for rounding, without knowing in advance who waits for whom."""
    _check(plan, stages)
    played = _Played(plan, stages, link)
    played.run()
    return as_composed(plan, stages, played.ranks, played.env.steps)


_ORDERS: Remembered[Order] = Remembered(64)


def order_of(plan: Plan) -> Order:
    """`order`, of which the last ones are remembered."""
    return _ORDERS.of(plan, None, lambda: order(plan))


def as_composed(plan: Plan, stages: Sequence[StagePrice], ranks: Sequence[RankTimes], events: int) -> PipelineStep:
    """The step that counts, from what its ranks did when."""
    step = 0 if plan.flushes else 1
    step_s = max(rank.marks[step + 1][0] - rank.marks[step][0] for rank in ranks)
    lived = (_as_lived(plan, number, rank, stages[number], step, step_s) for number, rank in enumerate(ranks))
    return PipelineStep(step_s=step_s, ranks=tuple(lived), events=events)


def _check(plan: Plan, stages: Sequence[StagePrice]) -> None:
    if len(stages) != plan.ranks:
        raise ValueError(f"prices of {len(stages)} stages for a plan of {plan.ranks} ranks; give one for each rank")
    for rank, price in enumerate(stages):
        used = {(action.kind, action.chunk) for action in plan.actions(rank)}
        for kind, chunk in sorted(used - price.actions.keys()):
            raise ValueError(f"stages[{rank}] has no price for {kind!r} of chunk {chunk}; the plan has such actions")
    if plan.ranks > 1 and not any(messages(item) for item in plan.programs[0]):
        raise ValueError(f"the {plan.schedule} plan has no messages; add them by prefetch(with_communication(plan))")


def _as_lived(plan: Plan, number: int, rank: RankTimes, price: StagePrice, step: int, step_s: float) -> RankStep:
    """The sums of the step that counts; idle time is what is left of it."""
    (_, computed_s, waited_s), (_, compute_s, exposed_s) = rank.marks[step : step + 2]
    compute_s, exposed_s = compute_s - computed_s, exposed_s - waited_s
    return RankStep(
        compute_s=compute_s,
        exposed_p2p_s=exposed_s,
        bubble_s=step_s - compute_s - exposed_s - price.after_s,
        after_s=price.after_s,
        actions=tuple(plan.actions(number)),
        starts_s=rank.starts_s,
        ends_s=rank.ends_s,
    )


# The clock #


@dataclass(slots=True)
class _Transfer:
    """A message that one side has posted, or both; `begin_s` is when the second one did."""

    arrived: Event
    begin_s: float = 0.0
    end_s: float = 0.0


class _Played:
    """All ranks of a plan as simpy processes."""

    def __init__(self, plan: Plan, stages: Sequence[StagePrice], link: LinkSeconds) -> None:
        self.env = CountingEnvironment()
        self.ranks = [RankTimes() for _ in stages]
        self._plan, self._stages, self._link = plan, stages, link
        self._transfers: dict[Tag, _Transfer] = {}
        self._free_s: dict[tuple[int, int], float] = {}  # by (sender, receiver): when the last message has arrived
        self._processes = [self.env.process(self._perform(rank)) for rank in range(plan.ranks)]

    def run(self) -> None:
        self.env.run()
        for rank, process in enumerate(self._processes):
            if process.is_alive:
                done = list(self._plan.actions(rank))[: len(self.ranks[rank].ends_s)]
                last = done[-1] if done else "the start"
                raise ValueError(
                    f"{self._plan.schedule}: rank {rank} waits forever after {last}: the plan's messages do not meet;"
                    f" prefetch(with_communication(plan)) posts them without waiting"
                )

    def _perform(self, number: int) -> ProcessGenerator:
        rank, price = self.ranks[number], self._stages[number]
        ends = ends_of_steps(self._plan, number)
        for position, item in enumerate(self._plan.programs[number]):
            if isinstance(item, Action):
                rank.starts_s.append(self.env.now)
                seconds = price.seconds(item, self._plan.micro_batches_per_step)
                yield self.env.timeout(seconds)
                rank.compute_s += seconds
                rank.ends_s.append(self.env.now)
            else:
                yield from self._communicate(number, item)
            if position in ends:
                yield self.env.timeout(price.after_s)
                rank.marks.append((self.env.now, rank.compute_s, rank.exposed_s))

    def _communicate(self, number: int, item: Item) -> ProcessGenerator:
        posted = [self._post(number, message) for message in messages(item)]
        if isinstance(item, Post):
            return
        rank = self.ranks[number]
        awaited = [self._transfers[self._plan.tag(number, item.message)]] if isinstance(item, Wait) else posted
        for transfer in awaited:
            since_s = self.env.now
            if not transfer.arrived.processed:
                yield transfer.arrived
            rank.exposed_s += max(0.0, transfer.end_s - max(since_s, transfer.begin_s))

    def _post(self, rank: int, message: Message) -> _Transfer:
        """One side's post; the second one starts the transfer as soon as those before it have arrived."""
        tag = self._plan.tag(rank, message)
        if tag not in self._transfers:
            self._transfers[tag] = _Transfer(self.env.event())
            return self._transfers[tag]
        transfer = self._transfers[tag]
        channel = (rank, message.peer) if isinstance(message, Send) else (message.peer, rank)
        transfer.begin_s = self.env.now
        transfer.end_s = max(self.env.now, self._free_s.get(channel, 0.0)) + self._link(message.what, *channel)
        self._free_s[channel] = transfer.end_s
        self.env.process(self._arrive(transfer))
        return transfer

    def _arrive(self, transfer: _Transfer) -> ProcessGenerator:
        yield self.env.timeout(transfer.end_s - self.env.now)
        transfer.arrived.succeed()
