"""Proves a pipeline plan before anyone performs it: everything is done once, in an order that never gets stuck.

Two rules of sending are played. *Buffered* is Gloo's: a message leaves at once, and is found by its tag. *Rendezvous*
is NCCL's: a message moves when both sides have posted it, and from one rank to another messages meet in the order in
which both sides post them, whatever they are. Each direction between two ranks has a queue of its own (on NCCL: a
communicator of its own, else a posted receive would hold up a send the other way).
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Protocol

from .pipeline import (
    Action,
    Exchange,
    Item,
    Message,
    Plan,
    Post,
    Recv,
    Send,
    Tag,
    Wait,
    makes,
    messages,
    needs,
    peak_in_flight,
)
from .pipeline_clock import play


class Rule(Protocol):
    """When messages have met."""

    def post(self, rank: int, message: Message) -> Iterable[int]:
        """Post a rank's message; returns the ranks that may now go on."""
        ...

    def met(self, rank: int, message: Message) -> bool:
        """Whether a posted message has met its partner, or need not."""
        ...

    def left(self) -> Iterable[tuple[int, Message]]:
        """What was posted and never met: (rank, message)."""
        ...


class Buffered:
    """Gloo's rule: sends leave at once, receives look for their tag."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sent: dict[tuple[int, int, Tag], tuple[int, Message]] = {}
        self._received: dict[tuple[int, int, Tag], tuple[int, Message]] = {}

    def post(self, rank: int, message: Message) -> Iterable[int]:
        sends = isinstance(message, Send)
        key = _key(self._plan, rank, message)
        side = self._sent if sends else self._received
        if key in side:
            raise ValueError(f"{self._plan.schedule}: rank {rank}: {message}, for the second time")
        side[key] = (rank, message)
        return (message.peer,) if sends else ()

    def met(self, rank: int, message: Message) -> bool:
        return isinstance(message, Send) or _key(self._plan, rank, message) in self._sent

    def left(self) -> Iterable[tuple[int, Message]]:
        yield from (self._sent[key] for key in self._sent.keys() - self._received.keys())
        yield from (self._received[key] for key in self._received.keys() - self._sent.keys())


class Rendezvous:
    """NCCL's rule: in the order of posting, when both sides have posted."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._waiting: defaultdict[tuple[int, int], deque[tuple[int, Message]]] = defaultdict(deque)
        self._met: set[tuple[int, Message]] = set()

    def post(self, rank: int, message: Message) -> Iterable[int]:
        sender, receiver, tag = _key(self._plan, rank, message)
        waiting = self._waiting[sender, receiver]
        if not waiting or waiting[0][0] == rank:
            waiting.append((rank, message))
            return ()
        peer, other = waiting.popleft()
        if self._plan.tag(peer, other) != tag:
            raise ValueError(f"{self._plan.schedule}: rank {rank}: {message} meets rank {peer}: {other}")
        self._met.update({(rank, message), (peer, other)})
        return (peer,)

    def met(self, rank: int, message: Message) -> bool:
        return (rank, message) in self._met

    def left(self) -> Iterable[tuple[int, Message]]:
        return (posted for waiting in self._waiting.values() for posted in waiting)


BUFFERED, RENDEZVOUS = "buffered", "rendezvous"
RULES: dict[str, Callable[[Plan], Rule]] = {BUFFERED: Buffered, RENDEZVOUS: Rendezvous}


def prove(plan: Plan, rules: Iterable[str] = tuple(RULES)) -> None:
    """Check a plan: everything done once, dependencies, no deadlock, messages that meet, the promised memory.

    A plan without messages is taken as computation alone, whose messages come by themselves.

    Args:
        rules: of sending under which the plan must end: "buffered", "rendezvous".

    Raises:
        ValueError: names the rank and the action or the message that breaks a promise.
    """
    _check_complete(plan)
    for rank, (peak, most) in enumerate(zip(peak_in_flight(plan), plan.most_in_flight, strict=True)):
        if peak > most:
            raise ValueError(f"{plan.schedule}: rank {rank} keeps {peak} activations; promised: at most {most}")
    if not any(messages(item) for program in plan.programs for item in program):
        play(plan, lambda rank, action: 1)
        return
    for rule in rules:
        _Player(plan, rule).play()


def _check_complete(plan: Plan) -> None:
    """Each chunk does each micro-batch once: a forward and a whole backward or both of its parts."""
    for rank in range(plan.ranks):
        done: defaultdict[tuple[int, int], str] = defaultdict(str)
        for action in plan.actions(rank):
            done[action.chunk, action.micro_batch] += action.kind
        for chunk in range(plan.chunks):
            for number in range(plan.micro_batches):
                kinds = "".join(sorted(done.pop((chunk, number), "")))
                if kinds not in ("BF", "FIW"):
                    raise ValueError(
                        f"{plan.schedule}: rank {rank} does {kinds or 'nothing'} with micro-batch {number} in chunk"
                        f" {chunk}; allowed: F and B once each, or F, I and W"
                    )
        for chunk, number in done:
            raise ValueError(
                f"{plan.schedule}: rank {rank} works on micro-batch {number} in chunk {chunk}; there are"
                f" {plan.micro_batches} micro-batches and {plan.chunks} chunks"
            )


def _key(plan: Plan, rank: int, message: Message) -> tuple[int, int, Tag]:
    """(sender, receiver, tag): the same for both sides."""
    ends = (rank, message.peer) if isinstance(message, Send) else (message.peer, rank)
    return *ends, plan.tag(rank, message)


class _Player:
    """Plays all programs under one rule, each rank as far as it can."""

    def __init__(self, plan: Plan, rule: str) -> None:
        self._plan = plan
        self._name = rule
        self._rule = RULES[rule](plan)
        self._at = [0] * plan.ranks
        self._posted_until = [-1] * plan.ranks  # the last item whose messages are posted
        self._has: list[set[Action | Message]] = [set() for _ in range(plan.ranks)]
        self._ready = deque(range(plan.ranks))

    def play(self) -> None:
        while self._ready:
            rank = self._ready.popleft()
            program = self._plan.programs[rank]
            while self._at[rank] < len(program) and self._done(rank, program[self._at[rank]]):
                self._at[rank] += 1
        for rank, (at, program) in enumerate(zip(self._at, self._plan.programs, strict=True)):
            if at < len(program):
                raise ValueError(f"{self._plan.schedule}: deadlock ({self._name}): rank {rank} can never {program[at]}")
        for rank, message in self._rule.left():
            raise ValueError(f"{self._plan.schedule}: rank {rank}: {message}, which never meets its partner")

    def _done(self, rank: int, item: Item) -> bool:
        """Do an item if that is possible now; whether the rank can go on to the next."""
        if isinstance(item, Action):
            self._compute(rank, item)
            return True
        if self._posted_until[rank] < self._at[rank]:
            self._posted_until[rank] = self._at[rank]
            for message in messages(item):
                self._post(rank, message)
        match item:
            case Post():
                return True
            case Wait():
                awaited: tuple[Message, ...] = (item.message,)
            case Send() | Recv() | Exchange():
                awaited = messages(item)
        if not all(self._rule.met(rank, message) for message in awaited):
            return False
        self._has[rank].update(message for message in awaited if isinstance(message, Recv))
        return True

    def _compute(self, rank: int, action: Action) -> None:
        has = self._has[rank]
        own = {"F": (), "W": ("I",)}.get(action.kind, ("F",))
        for kind in own:
            if Action(kind, action.chunk, action.micro_batch) not in has:
                raise ValueError(f"{self._plan.schedule}: rank {rank} does {action} before its {kind}")
        need = needs(self._plan, rank, action)
        if need is not None and not self._arrived(rank, need):
            raise ValueError(f"{self._plan.schedule}: rank {rank} does {action}, but did not {need}")
        has.add(action)
        made = makes(self._plan, rank, action)
        if made is not None:
            has.add(made)

    def _arrived(self, rank: int, need: Recv) -> bool:
        """Received, or made by this rank itself."""
        if need.peer != rank:
            return need in self._has[rank]
        tag = self._plan.tag(rank, need)
        maker = self._plan.place(tag.stage + (1 if tag.gradient else -1)).chunk
        return Send(need.what, maker, need.micro_batch, rank) in self._has[rank]

    def _post(self, rank: int, message: Message) -> None:
        if not 0 <= message.peer < self._plan.ranks or message.peer == rank:
            raise ValueError(f"{self._plan.schedule}: rank {rank}: {message}, which is no other rank")
        if isinstance(message, Send) and message not in self._has[rank]:
            raise ValueError(f"{self._plan.schedule}: rank {rank}: {message}, which nothing before has made")
        self._ready += self._rule.post(rank, message)
