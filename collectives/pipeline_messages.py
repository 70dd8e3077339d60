"""Passes over pipeline plans: messages put in, received ahead of their use, posted together. Each is a pure function.

Two forms can be performed under in-order rendezvous (collectives/pipeline_proof.py proves which plan can):
`prefetch(with_communication(plan))` posts without waiting and suits every schedule; `fuse(with_communication(plan))`
blocks at each exchange, as Megatron-LM's batched send and receive does (Narayanan et al. 2021, section 4.1).
"""

from collections import defaultdict, deque
from dataclasses import replace
from itertools import groupby

from .pipeline import Action, Exchange, Item, Message, Plan, Post, Recv, Send, Wait, makes, messages, needs

Channels = dict[tuple[int, int], deque[Recv]]
"""By (sender, receiver) what the receiver gets, in the order in which it is sent."""


def with_communication(plan: Plan) -> Plan:
    """Each send right after the action that makes it, each receive right before the action that needs it.

    From one rank to another, messages are received in the order in which they are sent: one that is needed later than
    another sent after it is received together with that one. Neighbouring stages on one rank pass no message.

    Raises:
        ValueError: the plan has messages already, or an action needs what nobody makes before.
    """
    if any(messages(item) for program in plan.programs for item in program):
        raise ValueError(f"the {plan.schedule} plan has messages already; give one of computation alone")
    channels = _channels(plan)
    return replace(plan, programs=tuple(_joined(plan, rank, channels) for rank in range(plan.ranks)))


def _channels(plan: Plan) -> Channels:
    channels: Channels = defaultdict(deque)
    for rank in range(plan.ranks):
        for action in plan.actions(rank):
            send = makes(plan, rank, action)
            if send is not None and send.peer != rank:
                chunk = plan.place(plan.tag(rank, send).stage).chunk
                channels[rank, send.peer].append(Recv(send.what, chunk, send.micro_batch, rank))
    return channels


def _joined(plan: Plan, rank: int, channels: Channels) -> tuple[Item, ...]:
    """A rank's program with its messages; takes what it receives out of the channels."""
    program: list[Item] = []
    early: set[Recv] = set()
    for action in plan.actions(rank):
        need = needs(plan, rank, action)
        if need is not None and need.peer != rank:
            if need in early:
                early.remove(need)
            else:
                received = _received_until(need, rank, channels[need.peer, rank])
                program += received
                early.update(received[:-1])
        program.append(action)
        send = makes(plan, rank, action)
        if send is not None and send.peer != rank:
            program.append(send)
    return tuple(program)


def _received_until(need: Recv, rank: int, channel: deque[Recv]) -> list[Recv]:
    received: list[Recv] = []
    while not received or received[-1] != need:
        if not channel:
            raise ValueError(f"rank {rank} can never {need}: it is not sent")
        received.append(channel.popleft())
    return received


def prefetch(plan: Plan, ahead: int = 1) -> Plan:
    """Sends that the rank does not wait for, and receives posted before the `ahead` actions that precede their use.

    A message then travels while both ranks compute. A rank holds buffers for the receives of `ahead` + 1 actions.

    Args:
        plan: with messages that stand alone, as `with_communication` puts them.

    Raises:
        ValueError: `ahead` is negative, or messages are posted or fused already.
    """
    if ahead < 0:
        raise ValueError(f"ahead = {ahead}; allowed: 0 or more actions")
    return replace(plan, programs=tuple(_prefetched(program, ahead) for program in plan.programs))


def _prefetched(program: tuple[Item, ...], ahead: int) -> tuple[Item, ...]:
    gaps: list[tuple[list[Send], list[Recv], Action | None]] = [([], [], None)]
    for item in program:
        sends, receives, _ = gaps[-1]
        match item:
            case Action():
                gaps[-1] = (sends, receives, item)
                gaps.append(([], [], None))
            case Send():
                sends.append(item)
            case Recv():
                receives.append(item)
            case _:
                raise ValueError(f"cannot prefetch around {item}: its messages are posted or fused already")
    posted: list[Item] = []
    for number, (sends, receives, action) in enumerate(gaps):
        posted += [Post((send,)) for send in sends]
        coming = gaps[: ahead + 1] if number == 0 else gaps[number + ahead : number + ahead + 1]
        posted += [Post((receive,)) for _, later, _ in coming for receive in later]
        posted += map(Wait, receives)
        if action is not None:
            posted.append(action)
    return tuple(posted)


def fuse(plan: Plan) -> Plan:
    """Neighbouring messages become one exchange, or one post if they are posted without waiting."""
    return replace(plan, programs=tuple(_fused(program) for program in plan.programs))


def _fused(program: tuple[Item, ...]) -> tuple[Item, ...]:
    fused: list[Item] = []
    for kind, run in groupby(program, _posting):
        items = list(run)
        together: tuple[Message, ...] = tuple(message for item in items for message in messages(item))
        if kind is None or len(items) == 1:
            fused += items
        else:
            fused.append(kind(together))
    return tuple(fused)


def _posting(item: Item) -> type[Exchange] | type[Post] | None:
    match item:
        case Send() | Recv() | Exchange():
            return Exchange
        case Post():
            return Post
        case _:
            return None
