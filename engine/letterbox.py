"""Messages between two ranks of one host, outside of any program, through memory that both map.

[Note: letterboxes]
Each ordered pair of ranks has a channel (engine/channel.py) for its messages, apart from that of the collectives. A
message takes one slot: the sender copies it in when it is posted, the receiver copies it out when it waits for it, and
neither needs a thread of the other. Where all slots are taken the message stays in line, and a thread, which is
started then, puts it in as soon as there is room. A wait for a message in line copies it aside and ends, so a send
never waits for its receiver, and no order of posts and waits can block.

Both ends know the size of every message. So both know without asking when one is too large for the slots, and change
to a channel with larger ones. What is larger than LARGEST_BYTES goes through Gloo (engine/letters.py).
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from .channel import Channel, find_channel, make_channel
from .communicator import Call, CommunicationError, Handle
from .shared_memory import FOLDER, LONGEST_SLEEP_S, Patience

SMALLEST_SLOT_BYTES = 64 << 10
LARGEST_BYTES = 8 << 20
"""Of a message in a letterbox, so that a channel takes 32 MiB at most."""

LONGEST_NAP_S = 100e-6
"""Between two looks for a message: a stage that waits has nothing else to do, and the next one waits for it in turn."""


def slot_bytes_for(nbytes: int, now: int) -> int:
    """Of the channel that takes a message of `nbytes` after one with slots of `now` bytes (0: none)."""
    return max(now, SMALLEST_SLOT_BYTES, 1 << (nbytes - 1).bit_length() if nbytes else 0)


class Letterboxes:
    """The messages of one rank to and from the others of its group: see [Note: letterboxes].

    Args:
        rank: this rank's number in the group.
        names: what an error calls the ranks of the group.
        token: names the group's files; the same on all its ranks and on no other group's.
        look_up: called now and then while waiting; raises if another rank has given up.
    """

    def __init__(
        self, rank: int, names: Sequence[int], token: str, timeout_s: float, look_up: Callable[[], None]
    ) -> None:
        self.rank, self.names, self.token = rank, names, token
        self.timeout_s, self.look_up = timeout_s, look_up
        self._lock = threading.Lock()
        self._outward: dict[int, _Outbox] = {}
        self._inward: dict[int, _Inbox] = {}
        self._in_line = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def received_bytes(self) -> int:
        """Payload that has come in, counted where the cursors are moved."""
        return sum(box.payload_bytes for box in self._inward.values())

    @property
    def sent_bytes(self) -> int:
        return sum(box.payload_bytes for box in self._outward.values())

    def post(self, call: Call) -> Handle:
        """Start a message of LARGEST_BYTES or less."""
        with self._lock:
            if call.entry.kind == "recv":
                inbox = self._inward.setdefault(call.root, _Inbox(self._path(call.root, self.rank)))
                letter = inbox.enqueue(call.buffer.detach())
                return _Receipt(self, call, inbox, letter)
            outbox = self._outward.setdefault(call.root, _Outbox(self._path(self.rank, call.root)))
            letter = outbox.enqueue(call.buffer.detach())
            outbox.push()
            if not letter.done:
                self._hurry()
            return _Dispatch(self, letter)

    def take(self, inbox: "_Inbox") -> bool:
        """Take the next message that is awaited from a peer, if it is there."""
        with self._lock:
            return inbox.take()

    def lay_aside(self, letter: "_Letter") -> None:
        """The place of a message in line may change from now on."""
        with self._lock:
            if not letter.done:
                letter.values = letter.values.clone()

    def _hurry(self) -> None:
        """Have the thread look for room."""
        self._in_line.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._push_on, name="windtunnel letters", daemon=True)
            self._thread.start()

    def _push_on(self) -> None:
        while self._in_line.wait() and not self._closed:
            with self._lock:
                left = [box for box in self._outward.values() if not box.push()]
                if not left:
                    self._in_line.clear()
            time.sleep(LONGEST_NAP_S)

    def close(self, failed: bool = False) -> None:
        """Give back the channels once their receivers have read them, or at once if they never will.

        Raises:
            CommunicationError: a receiver did not read what was sent to it within the time limit.
        """
        deadline = time.monotonic() + (0 if failed else self.timeout_s)
        for box in self._outward.values():
            while not box.drained() and time.monotonic() < deadline:
                time.sleep(LONGEST_SLEEP_S)
        unread = sorted(self.names[peer] for peer, box in self._outward.items() if not box.drained())
        self._give_back()
        if unread and not failed:
            peers = ", ".join(map(str, unread))
            raise CommunicationError(
                f"messages from rank {self.names[self.rank]} were never received by rank {peers}: waited"
                f" {self.timeout_s:g} s when closing"
            )

    def _give_back(self) -> None:
        self._closed = True
        self._in_line.set()
        if self._thread is not None:
            self._thread.join(self.timeout_s)
        for box in self._outward.values():
            box.unlink()
        self._outward.clear()
        self._inward.clear()

    def _path(self, source: int, target: int) -> Path:
        return FOLDER / f"windtunnel-{self.token}-{source}-{target}-letters"


class _Letter:
    """A message that is in line, or awaited; `values` [n] are let go of when it is done."""

    __slots__ = ("done", "number", "slot_bytes", "values")

    def __init__(self, values: Tensor, number: int, slot_bytes: int) -> None:
        self.values, self.number, self.slot_bytes = values, number, slot_bytes
        self.done = False


class _Box(ABC):
    """One end of what goes from one rank to another, in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._letters: deque[_Letter] = deque()
        self._channel: Channel | None = None
        self._count = self._slot_bytes = self._before_bytes = 0

    @property
    def payload_bytes(self) -> int:
        return self._before_bytes + (0 if self._channel is None else self._channel.payload_bytes)

    def enqueue(self, values: Tensor) -> _Letter:
        self._slot_bytes = slot_bytes_for(values.nbytes, self._slot_bytes)
        letter = _Letter(values, self._count, self._slot_bytes)
        self._count += 1
        self._letters.append(letter)
        return letter

    @abstractmethod
    def _open(self, slot_bytes: int) -> Channel | None:
        """The channel with such slots, if it is there."""

    def _name(self, slot_bytes: int) -> Path:
        return self._path.with_name(f"{self._path.name}-{slot_bytes}")

    def _channel_of(self, letter: _Letter) -> Channel | None:
        """The channel that a message goes through, once it is there."""
        if self._channel is None or self._channel.slot_bytes != letter.slot_bytes:
            channel = self._open(letter.slot_bytes)
            if channel is None:
                return None
            self._before_bytes = self.payload_bytes
            self._channel = channel
        return self._channel

    def _finish(self) -> None:
        letter = self._letters.popleft()
        letter.done = True
        del letter.values


class _Outbox(_Box):
    """The sender's end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._made: dict[int, Channel] = {}  # not in use yet

    def enqueue(self, values: Tensor) -> _Letter:
        before = self._slot_bytes
        letter = super().enqueue(values)
        if letter.slot_bytes != before:  # now, where an error reaches the caller
            self._made[letter.slot_bytes] = make_channel(self._name(letter.slot_bytes), letter.slot_bytes)
        return letter

    def _open(self, slot_bytes: int) -> Channel | None:
        return self._made.pop(slot_bytes)

    def push(self) -> bool:
        """Copy messages into slots as far as there is room; whether all are in."""
        while self._letters:
            letter = self._letters[0]
            channel = self._channel_of(letter)
            assert channel is not None
            if not channel.can_write():
                return False
            channel.write(letter.values, letter.number)
            self._finish()
        return True

    def drained(self) -> bool:
        return not self._letters and (self._channel is None or self._channel.drained())

    def unlink(self) -> None:
        """Take away the names of channels that the receiver has not opened."""
        for path in self._path.parent.glob(f"{self._path.name}-*"):
            path.unlink(missing_ok=True)


class _Inbox(_Box):
    """The receiver's end."""

    def _open(self, slot_bytes: int) -> Channel | None:
        return find_channel(self._name(slot_bytes), slot_bytes)

    def take(self) -> bool:
        """Copy the next awaited message out of its slot, if it is there.

        Raises:
            RuntimeError: it has another size.
        """
        if not self._letters:
            return False
        letter = self._letters[0]
        channel = self._channel_of(letter)
        if channel is None or (waiting := channel.waiting()) is None:
            return False
        place = letter.values
        if waiting != (letter.number, place.nbytes):
            raise RuntimeError(
                f"message number {waiting[0]} has {waiting[1]} bytes, but number {letter.number} of {place.nbytes}"
                " bytes is awaited"
            )
        place.copy_(channel.arrived(place.dtype, place.numel()))
        channel.free(place.nbytes)
        self._finish()
        return True


class _Dispatch:
    """The handle of a send."""

    def __init__(self, boxes: Letterboxes, letter: _Letter) -> None:
        self._boxes, self._letter = boxes, letter

    def wait(self) -> None:
        """Never blocks: see [Note: letterboxes]."""
        if not self._letter.done:
            self._boxes.lay_aside(self._letter)


class _Receipt:
    """The handle of a receive."""

    def __init__(self, boxes: Letterboxes, call: Call, inbox: _Inbox, letter: _Letter) -> None:
        self._boxes, self._call, self._inbox, self._letter = boxes, call, inbox, letter

    def wait(self) -> None:
        """Block until it is here; messages that were posted before it are taken on the way."""
        if self._letter.done:
            return
        boxes, call = self._boxes, self._call
        patience = Patience(boxes.timeout_s, boxes.look_up, LONGEST_NAP_S)
        try:
            while not self._letter.done:
                if boxes.take(self._inbox):
                    patience.renew()
                elif not patience.rest():
                    raise RuntimeError(f"waited {boxes.timeout_s:g} s")
        except RuntimeError as error:
            names = boxes.names
            way = f"from rank {names[call.root]} to rank {names[boxes.rank]}"
            raise CommunicationError(f"{call.entry}, {call.label}, {way}: {error}") from None
