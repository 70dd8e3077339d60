"""When a sent message has surely arrived, told from the plan alone: then its buffer is free without waiting."""

from .pipeline import Plan, Post, Recv, Send, Tag, Wait


def acknowledgements(plan: Plan, rank: int) -> dict[Recv, tuple[Send, ...]]:
    """By what a rank receives, the messages that it has sent and that must have arrived by then.

    A peer that has waited for a message before it sends another one has, with that, acknowledged the first. Sends whose
    peer sends nothing afterwards are not listed: the end of the step waits for them.

    Args:
        plan: with messages that are posted, as `prefetch` makes them.
    """
    replies = {peer: _replies(plan, peer, rank) for peer in range(plan.ranks) if peer != rank}
    waits = {plan.tag(rank, item.message): item.message for item in plan.programs[rank] if isinstance(item, Wait)}
    found: dict[Recv, list[Send]] = {}
    for send in _posted(plan, rank):
        reply = replies[send.peer].get(plan.tag(rank, send))
        if reply is not None:
            found.setdefault(waits[reply], []).append(send)
    return {receive: tuple(sends) for receive, sends in found.items()}


def _posted(plan: Plan, rank: int) -> list[Send]:
    posts = (item for item in plan.programs[rank] if isinstance(item, Post))
    return [message for post in posts for message in post.messages if isinstance(message, Send)]


def _replies(plan: Plan, rank: int, to: int) -> dict[Tag, Tag]:
    """By what a rank gets from `to`, the first message that it posts to `to` after it has waited for that."""
    found: dict[Tag, Tag] = {}
    got: list[Tag] = []
    for item in plan.programs[rank]:
        match item:
            case Wait(message) if message.peer == to:
                got.append(plan.tag(rank, message))
            case Post(messages):
                for reply in messages:
                    if isinstance(reply, Send) and reply.peer == to:
                        found.update(dict.fromkeys(got, plan.tag(rank, reply)))
                        got = []
            case _:
                pass
    return found
