"""When everything in a pipeline plan takes place, without a clock: each time is the latest of those that it waits for.

A rank does the items of its program in order, and messages from one rank to another move in the order in which both
post them. So who waits for whom is known before any price is: the items of all ranks have one order in which each comes
after what it needs (`order`), and one pass along it finds all times (`evaluate`), those of many pipelines at once if
the prices are arrays. sim/pipeline.py plays the same plan as processes; a test holds the two together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from ..collectives.pipeline import Action, Item, Message, Plan, Post, Send, Tag, Wait, messages

Seconds = Any
"""A float, or an array of floats: [pipelines]."""


ACTION, POST, MEET, WAIT, END = range(5)
"""Kinds of a Doing: compute; post the first side of a message; post its second side, so that it moves; go on when it
has arrived; end a step."""


class Doing(NamedTuple):
    """What a rank does next; `subject` is the number of an action's price or of a message."""

    kind: int
    rank: int
    subject: int


class Way(NamedTuple):
    """What a message is and between whom."""

    what: str
    sender: int
    receiver: int


@dataclass(frozen=True, slots=True)
class Order:
    """The items of all ranks, each after what it needs.

    Attributes:
        prices: what actions cost, each once: (rank, one of the actions of a step that cost the same).
        ways: by message.
        actions: by rank, in the plan's order.
        doings: in order.
    """

    plan: Plan
    actions: tuple[tuple[Action, ...], ...]
    prices: tuple[tuple[int, Action], ...]
    ways: tuple[Way, ...]
    doings: tuple[Doing, ...]


@dataclass(slots=True)
class RankTimes:
    """What a rank has done so far.

    Attributes:
        starts_s, ends_s: of its actions, in the plan's order.
        exposed_s: waiting for messages that were on their way or queued behind others.
        marks: (now, compute, exposed) when each step ends, and at the start.
    """

    now_s: Seconds = 0.0
    compute_s: Seconds = 0.0
    exposed_s: Seconds = 0.0
    starts_s: list[Seconds] = field(default_factory=list)
    ends_s: list[Seconds] = field(default_factory=list)
    marks: list[tuple[Seconds, Seconds, Seconds]] = field(default_factory=lambda: [(0.0, 0.0, 0.0)])


@dataclass(frozen=True, slots=True)
class Times:
    """When everything takes place.

    Attributes:
        ranks: by pipeline rank.
        leaves_s, arrives_s: by message: when it begins to move, and its end.
    """

    ranks: tuple[RankTimes, ...]
    leaves_s: list[Seconds]
    arrives_s: list[Seconds]


def order(plan: Plan) -> Order:
    """The order of a plan with messages.

    Raises:
        ValueError: ranks that wait for each other, or that post the messages of one direction in different orders.
    """
    return _Orderer(plan).order()


class _Orderer:
    """Ranks that go on until they wait for a message that has not been posted by both sides."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.prices: dict[tuple[int, Action], int] = {}
        self.numbers: dict[Tag, int] = {}
        self.ways: list[Way] = []
        self.sent: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.received: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.met: set[int] = set()
        self.waiting: dict[int, list[int]] = {}
        self.ready = list(range(plan.ranks))
        self.doings: list[Doing] = []
        self.last: list[Action | None] = [None] * plan.ranks

    def order(self) -> Order:
        walks = [self._walk(rank) for rank in range(self.plan.ranks)]
        while self.ready:
            rank = self.ready.pop()
            awaited = next(walks[rank], None)
            if awaited is not None:
                self.waiting.setdefault(awaited, []).append(rank)
        if self.waiting:
            rank = min(rank for ranks in self.waiting.values() for rank in ranks)
            raise ValueError(
                f"{self.plan.schedule}: rank {rank} waits forever after {self.last[rank] or 'the start'}: the plan's"
                " messages do not meet; prefetch(with_communication(plan)) posts them without waiting"
            )
        self._check_orders()
        actions = tuple(tuple(self.plan.actions(rank)) for rank in range(self.plan.ranks))
        return Order(self.plan, actions, tuple(self.prices), tuple(self.ways), tuple(self.doings))

    def _walk(self, rank: int) -> Iterator[int]:
        """Do the items of a rank; gives the number of each message that has yet to meet."""
        ends = ends_of_steps(self.plan, rank)
        met, doings = self.met, self.doings
        alike: dict[tuple[str, int, int], int] = {}
        for position, item in enumerate(self.plan.programs[rank]):
            if isinstance(item, Action):
                price = item.kind, item.chunk, self._representative(item.micro_batch)
                if price not in alike:
                    alike[price] = self.prices.setdefault((rank, Action(*price)), len(self.prices))
                doings.append(Doing(ACTION, rank, alike[price]))
                self.last[rank] = item
            else:
                for number in self._communicate(rank, item):
                    if number not in met:
                        yield number
                    doings.append(Doing(WAIT, rank, number))
            if position in ends:
                doings.append(Doing(END, rank, 0))

    def _representative(self, micro_batch: int) -> int:
        """The first micro-batch of a step that costs the same: first, middle and last ones differ."""
        per_step = self.plan.micro_batches_per_step
        number = micro_batch % per_step
        return number if number in (0, per_step - 1) else 1

    def _communicate(self, rank: int, item: Item) -> list[int]:
        """Post what an item posts; the messages that it waits for."""
        if isinstance(item, Wait):
            return [self.numbers[self.plan.tag(rank, item.message)]]
        posted = [self._post(rank, message) for message in messages(item)]
        return [] if isinstance(item, Post) else posted

    def _post(self, rank: int, message: Message) -> int:
        tag = self.plan.tag(rank, message)
        number = self.numbers.get(tag)
        if number is None:
            number = self.numbers[tag] = len(self.ways)
            pair = (rank, message.peer) if isinstance(message, Send) else (message.peer, rank)
            self.ways.append(Way(message.what, *pair))
            self.doings.append(Doing(POST, rank, number))
        else:
            self.met.add(number)
            self.ready += self.waiting.pop(number, ())
            self.doings.append(Doing(MEET, rank, number))
        if isinstance(message, Send):
            self.sent[rank, message.peer].append(number)
        else:
            self.received[message.peer, rank].append(number)
        return number

    def _check_orders(self) -> None:
        """Messages from a rank to another are queued in the order in which they met; both sides must agree on it."""
        for (sender, receiver), numbers in self.sent.items():
            if self.received.get((sender, receiver)) != numbers:
                raise ValueError(
                    f"{self.plan.schedule}: rank {receiver} does not receive what rank {sender} sends in the order in"
                    " which it is sent; with_communication(plan) puts messages in that do"
                )


def evaluate(
    order: Order,
    action_s: Sequence[Seconds],
    message_s: Callable[[str, int, int], Seconds],
    after_s: Sequence[Seconds],
) -> Times:
    """When everything takes place.

    Args:
        action_s: by number in `order.prices`; floats, or arrays of the prices in many pipelines: [pipelines].
        message_s: (what, sender, receiver) -> seconds of a message, likewise.
        after_s: by rank, what follows its last action of a step.
    """
    arrays = any(isinstance(price, np.ndarray) for price in (*action_s, *after_s))
    ranks = [RankTimes() for _ in range(order.plan.ranks)]
    later: Callable[[Seconds, Seconds], Seconds] = np.maximum if arrays else max
    posted_s: list[Seconds] = [0.0] * len(order.ways)
    begins_s, leaves_s, arrives_s = posted_s.copy(), posted_s.copy(), posted_s.copy()
    links = {way: message_s(*way) for way in dict.fromkeys(order.ways)}
    channels = {way: way[1:] for way in links}
    free_s: dict[tuple[int, ...], Seconds] = dict.fromkeys(channels.values(), 0.0)
    for kind, number, subject in order.doings:
        rank = ranks[number]
        if kind == ACTION:
            rank.starts_s.append(rank.now_s)
            rank.now_s = rank.now_s + action_s[subject]
            rank.compute_s = rank.compute_s + action_s[subject]
            rank.ends_s.append(rank.now_s)
        elif kind == POST:
            posted_s[subject] = rank.now_s
        elif kind == MEET:
            way = order.ways[subject]
            channel = channels[way]
            begins_s[subject] = begin_s = later(posted_s[subject], rank.now_s)
            leaves_s[subject] = leave_s = later(begin_s, free_s[channel])
            arrives_s[subject] = free_s[channel] = leave_s + links[way]
        elif kind == WAIT:
            since_s, arrival_s = rank.now_s, arrives_s[subject]
            rank.now_s = later(since_s, arrival_s)
            rank.exposed_s = rank.exposed_s + later(0.0, arrival_s - later(since_s, begins_s[subject]))
        else:
            rank.now_s = rank.now_s + after_s[number]
            rank.marks.append((rank.now_s, rank.compute_s, rank.exposed_s))
    return Times(tuple(ranks), leaves_s, arrives_s)


def ends_of_steps(plan: Plan, rank: int) -> set[int]:
    """Where in a rank's program the steps end: at the last action, or at the message right after it that it makes."""
    last: dict[int, int] = {}
    program = plan.programs[rank]
    for position, (item, after) in enumerate(zip_longest(program, program[1:])):
        if isinstance(item, Action):
            sends = after is not None and any(isinstance(message, Send) for message in messages(after))
            last[item.micro_batch // plan.micro_batches_per_step] = position + sends
    return set(last.values())
