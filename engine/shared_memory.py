"""Moves a program's messages through memory that the ranks of one host share.

Each ordered pair of ranks has a channel (engine/channel.py) in a file under /dev/shm that both map. The sender copies a
piece of a message into a free slot, the receiver copies it out, or adds it from there while it is still in the cache.
A step advances its sends and its receives in turn, slot by slot, so ranks that send to each other never block.

[Note: patience]
A waiting rank looks again at once a few times, yielding its core each time, because ranks may outnumber cores; then
it sleeps, which gives the interpreter's lock to the thread that runs backward.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .channel import SLOT_BYTES, SLOTS, Channel, find_channel, make_channel
from .program import Arrival, Message, Posted

FOLDER = Path("/dev/shm")

SMALLEST_PIECE_BYTES = 128 << 10
"""Large messages travel in full slots; smaller ones in up to SLOTS pieces, so that both ends copy at once, but not in
pieces below this, where the bookkeeping costs more than it gains."""

_ALIGNMENT_BYTES = 64

LOOKS = 50
SHORTEST_SLEEP_S = 20e-6
LONGEST_SLEEP_S = 1e-3
LOOK_UP_AFTER = 400
"""see [Note: patience]"""


class SharedMemory:
    """Messages of one group of ranks on one host.

    Args:
        rank: this rank's number in the group.
        names: what an error calls the ranks of the group.
        token: names the group's files; the same on all its ranks and on no other group's.
        look_up: called now and then while waiting; raises if another rank has given up.
    """

    name = "shared memory"

    def __init__(
        self, rank: int, names: Sequence[int], token: str, timeout_s: float, look_up: Callable[[], None]
    ) -> None:
        self.rank, self.names, self.token = rank, names, token
        self.timeout_s, self.look_up = timeout_s, look_up
        self.outward: dict[int, Channel] = {}
        self.inward: dict[int, Channel] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @property
    def received_bytes(self) -> int:
        """Payload that has come in, counted where the cursors are moved."""
        return sum(channel.payload_bytes for channel in self.inward.values())

    @property
    def sent_bytes(self) -> int:
        return sum(channel.payload_bytes for channel in self.outward.values())

    def play(self, steps: tuple[Posted, ...], buffer: Tensor, tag: int, largest: bool) -> None:
        for step in steps:
            self._step(step, buffer, tag, largest)

    def _step(self, step: Posted, buffer: Tensor, tag: int, largest: bool) -> None:
        sends = [_Move(message, buffer, tag + message.number) for message in step.sends]
        arrivals = [_Coming(arrival, buffer, tag + arrival.number, sends) for arrival in step.arrivals]
        for coming in arrivals:
            coming.earlier = [arrivals[place] for place in coming.arrival.earlier]
        self._lay_aside(arrivals, buffer)
        leaving, expected = _by_peer(sends), _by_peer(arrivals)
        patience = Patience(self.timeout_s, self.look_up)
        while leaving or expected:
            moved = False
            for peer in list(leaving):
                moved |= self._send(peer, leaving)
            for peer in list(expected):
                moved |= self._receive(peer, expected, largest)
            if moved:
                patience.renew()
            elif not patience.rest():
                raise RuntimeError(self._stuck(leaving, expected))
        for coming in arrivals:
            if coming.aside:
                place = buffer[coming.message.start : coming.message.stop]
                coming.arrival.apply(place, coming.landing, largest)

    def _send(self, peer: int, leaving: "dict[int, list[_Move]]") -> bool:
        """Copy one piece into the channel to a peer if there is room."""
        channel = self.outward.get(peer)
        if channel is None:
            channel = self.outward[peer] = make_channel(self._path(self.rank, peer))
        if not channel.can_write():
            return False
        move = leaving[peer][0]
        channel.write(move.next_piece(), move.tag)
        if move.finished:
            _drop_first(leaving, peer)
        return True

    def _receive(self, peer: int, expected: "dict[int, list[_Coming]]", largest: bool) -> bool:
        """Take one piece out of the channel from a peer if it is there and its place may be touched."""
        channel = self.inward.get(peer)
        if channel is None:
            channel = find_channel(self._path(peer, self.rank))
            if channel is None:
                return False
            self.inward[peer] = channel
        coming = expected[peer][0]
        if (waiting := channel.waiting()) is None or not coming.may_go_on():
            return False
        if waiting != (coming.tag, coming.next_bytes):
            return False  # another call's: it never matches, and the time runs out
        coming.take(channel, largest)
        if coming.finished:
            _drop_first(expected, peer)
        return True

    def _stuck(self, leaving: "dict[int, list[_Move]]", expected: "dict[int, list[_Coming]]") -> str:
        awaited = [f"rank {self.names[peer]} to read" for peer in leaving]
        awaited += [f"rank {self.names[peer]} to send" for peer in expected]
        return f"waited {self.timeout_s:g} s for {' and '.join(awaited)}"

    def _lay_aside(self, arrivals: "list[_Coming]", buffer: Tensor) -> None:
        """Give a landing place to those arrivals that could block each other if they waited for their place."""
        for coming in arrivals:
            others = any(coming is not other and coming.overlaps(other) for other in arrivals)
            blocked = any(before.aside for before in coming.earlier)
            uneven = any(send.message.start != coming.message.start for send in coming.sends)
            coming.aside = blocked or uneven or (others and bool(coming.sends))
        nbytes = sum(_aligned(coming.nbytes) for coming in arrivals if coming.aside)
        if self._scratch.numel() < nbytes:
            self._scratch = torch.empty(nbytes, dtype=torch.uint8)
        offset = 0
        for coming in arrivals:
            if coming.aside:
                coming.land_at(self._scratch[offset : offset + coming.nbytes].view(buffer.dtype))
                offset += _aligned(coming.nbytes)

    def _path(self, source: int, target: int) -> Path:
        return FOLDER / f"windtunnel-{self.token}-{source}-{target}"

    def release_buffers(self) -> None:
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def close(self, failed: bool = False) -> None:
        """Give back the channels once their receivers have read them, or at once if they never will."""
        deadline = time.monotonic() + (0 if failed else self.timeout_s)
        for peer, channel in self.outward.items():
            while not channel.drained() and time.monotonic() < deadline:
                time.sleep(LONGEST_SLEEP_S)
            self._path(self.rank, peer).unlink(missing_ok=True)
        self.outward.clear()
        self.inward.clear()
        self.release_buffers()


class _Move:
    """A message that travels piece by piece.

    Attributes:
        at: the elements of the buffer before this one have gone.
    """

    def __init__(self, message: Message, buffer: Tensor, tag: int) -> None:
        self.message, self.tag = message, tag
        self.at = message.start
        self.item_bytes = buffer.element_size()
        self.nbytes = (message.stop - message.start) * self.item_bytes
        self._step = _piece_bytes(self.nbytes) // self.item_bytes
        self._base, self._memory = 0, buffer

    @property
    def next_stop(self) -> int:
        return min(self.at + self._step, self.message.stop)

    @property
    def next_bytes(self) -> int:
        return (self.next_stop - self.at) * self.item_bytes

    @property
    def finished(self) -> bool:
        return self.at == self.message.stop

    def next_piece(self) -> Tensor:
        """The next piece, which is then on its way."""
        start, self.at = self.at, self.next_stop
        return self._memory[start - self._base : self.at - self._base]


class _Coming(_Move):
    """An arrival that travels piece by piece.

    Attributes:
        sends, earlier: moves of the same step that must have passed a place, or have ended, before it changes.
        aside: it waits in a landing place until the step is over.
    """

    def __init__(self, arrival: Arrival, buffer: Tensor, tag: int, sends: list[_Move]) -> None:
        super().__init__(arrival, buffer, tag)
        self.arrival = arrival
        self.sends = [sends[place] for place in arrival.sends]
        self.earlier: list[_Coming] = []
        self.aside = False

    def overlaps(self, other: _Move) -> bool:
        return self.message.start < other.message.stop and other.message.start < self.message.stop

    def land_at(self, landing: Tensor) -> None:
        self.aside, self.landing = True, landing
        self._base, self._memory = self.message.start, landing

    def take(self, channel: Channel, largest: bool) -> None:
        """Take the next piece out of the channel."""
        piece = self.next_piece()
        arrived = channel.arrived(piece.dtype, piece.numel())
        if self.aside:
            piece.copy_(arrived)
        else:
            self.arrival.apply(piece, arrived, largest)
        channel.free(piece.nbytes)

    def may_go_on(self) -> bool:
        """Whether nobody needs the next piece's place as it is any more."""
        if self.aside:
            return True
        stop = self.next_stop
        return all(send.at >= min(stop, send.message.stop) for send in self.sends) and all(
            before.finished for before in self.earlier
        )


class Patience:
    """Looks again at once for a while, then sleeps ever longer, and gives up at the time limit."""

    def __init__(self, timeout_s: float, look_up: Callable[[], None], longest_sleep_s: float = LONGEST_SLEEP_S) -> None:
        self.timeout_s, self.look_up, self.longest_sleep_s = timeout_s, look_up, longest_sleep_s
        self.renew()

    def renew(self) -> None:
        self.looks = 0
        self.deadline: float | None = None

    def rest(self) -> bool:
        """Whether there is time left."""
        self.looks += 1
        if self.looks < LOOKS:
            os.sched_yield()
            return True
        now = time.monotonic()
        if self.deadline is None:
            self.deadline = now + self.timeout_s
        if now > self.deadline:
            return False
        if self.looks % LOOK_UP_AFTER == 0:
            self.look_up()
        time.sleep(min(SHORTEST_SLEEP_S * (self.looks - LOOKS + 1), self.longest_sleep_s))
        return True


def _by_peer(moves: list) -> dict[int, list]:
    """Moves in order by peer."""
    lanes: dict[int, list] = {}
    for move in moves:
        lanes.setdefault(move.message.peer, []).append(move)
    return lanes


def _drop_first(lanes: dict[int, list], peer: int) -> None:
    lanes[peer].pop(0)
    if not lanes[peer]:
        del lanes[peer]


def _piece_bytes(nbytes: int) -> int:
    """How a message of this size is cut; both ends do it alike."""
    wanted = max(SMALLEST_PIECE_BYTES, nbytes // SLOTS)
    return min(SLOT_BYTES, _aligned(wanted))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
