"""Messages between two CPU ranks, outside of any program: activations and gradients of a pipeline, through Gloo."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from .communicator import Call, CommunicationError, Entry
from .program import Arrival, Message, Posted

LETTER = 0x40000000
"""The bit of a tag that tells messages of two ranks from those of collectives (gloo.py)."""


def lone_message(entry: Entry) -> tuple[Posted, ...]:
    """A ledger's entry of kind "send" or "recv" as a step of a program, whoever the peer is: for counting bytes."""
    if entry.kind == "send":
        return (Posted((Message(0, 0, entry.elements, 0),), ()),)
    return (Posted((), (Arrival(0, 0, entry.elements, 0, False, (), ()),)),)


class Mail:
    """The messages of one group. Gloo's own thread moves them as soon as both ends have posted theirs.

    Args:
        look_up: called when a wait has failed; raises a RuntimeError that says why, if a rank has told.
    """

    def __init__(
        self, group: dist.ProcessGroup, names: Sequence[int], timeout_s: float, look_up: Callable[[], None]
    ) -> None:
        self.group, self.names, self.timeout_s, self.look_up = group, names, timeout_s, look_up
        self._count: Counter[tuple[str, int]] = Counter()  # messages so far, by direction and peer

    def post(self, call: Call) -> "_Delivery":
        place = (call.entry.kind, call.root)
        tag = LETTER | self._count[place] & (LETTER - 1)
        self._count[place] += 1
        move = self.group.send if call.entry.kind == "send" else self.group.recv
        return _Delivery(self, call, move([call.buffer.detach()], call.root, tag))


class _Delivery:
    def __init__(self, mail: Mail, call: Call, work: dist.Work) -> None:
        self.mail, self.call = mail, call
        self.work: dist.Work | None = work

    def wait(self) -> None:
        """Block until it is sent or here."""
        work, self.work = self.work, None
        if work is None:
            return  # a send of Gloo's must not be waited for twice: the second time never ends
        call, mail = self.call, self.mail
        try:
            work.wait(timedelta(seconds=mail.timeout_s))
        except RuntimeError as error:
            mine, peer = mail.names[mail.group.rank()], mail.names[call.root]
            way = (
                f"from rank {mine} to rank {peer}" if call.entry.kind == "send" else f"from rank {peer} to rank {mine}"
            )
            said = first_line(error)
            try:
                mail.look_up()
            except RuntimeError as cause:
                said = f"{said}; {cause}"
            raise CommunicationError(f"{call.entry}, {call.label}, {way}: {said}") from None


def first_line(error: Exception) -> str:
    """The first sentence of an error of Gloo's, without the place in its source that precedes it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[[^]]*\.(cc|cpp|h):\d+\]\s*", "", line).partition(". ")[0]
