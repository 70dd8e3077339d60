"""Collectives of CPU ranks: our programs, played in order by whoever comes first, a thread or the caller that waits.

A program of many steps does not advance by itself while autograd runs, so each communicator has one progress thread.
A caller that waits for a collective plays what is left in the queue itself, which spares the change of threads.
"""

import hashlib
import os
import queue
import secrets
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.utils._python_dispatch import _disable_current_modes

from ..collectives.algorithms import KINDS, algorithm, names
from ..collectives.choice import Selection, select
from .communication_section import Communication
from .communicator import (
    Call,
    CommunicationError,
    Communicator,
    Entry,
    Handle,
    SoloCommunicator,
    native_collective,
    new_process_group,
)
from .letterbox import LARGEST_BYTES, Letterboxes
from .letters import Mail, first_line, lone_message
from .program import Arrival, Message, Posted, Transport, lower
from .shared_memory import FOLDER, SharedMemory
from .sockets import Sockets
from .wire import written_bytes


def default_selection(transport: str, world: int) -> Selection:
    """What is fastest over a transport between ranks of one host (experiments/bench/results/collectives.csv).

    Over sockets a message costs several changes of threads, so few of them win. Through shared memory a step costs
    little and the copies count. On two ranks every algorithm of one step is the same exchange, and a sum of two has the
    same bits in either order.
    """
    kinds = ("all_reduce", "reduce_scatter", "all_gather")
    moves = {"all_to_all": ((0, "direct"),), "broadcast": ((0, "binomial_tree"),), "reduce": ((0, "binomial_tree"),)}
    if world == 2:
        return Selection({**dict.fromkeys(kinds, ((0, "direct"),)), **moves})
    parts: tuple[tuple[int, str], ...] = ((0, "direct"),)
    if transport == SharedMemory.name:
        sums = ((0, "binomial_tree"), (2 << 20, "halving_doubling"))
        parts = (*parts, (2 << 20, "ring"))
    else:
        sums = ((0, "binomial_tree"), (32 << 20, "ring"))
    return Selection({"all_reduce": sums, "reduce_scatter": parts, "all_gather": parts, **moves})


APART = "the ranks are on several hosts or see different /dev/shm"

ANSWER_S = 3.0
"""How long a rank that failed waits for the others to say what they were doing."""

POLL_S = 0.05


class GlooCommunicator(Communicator):
    """Our programs on CPU ranks.

    Args:
        group: the ranks; all of them make this communicator at the same time.
        store: where ranks tell each other why they failed.
        timeout_s: how long one step of a collective waits for another rank.
        shared_memory: whether ranks talk through shared memory; by default they do if all are on one host.
        owner: the process group was made for this communicator and ends with it.

    Attributes:
        names: the ranks of the group as the whole world numbers them.
        selection: which algorithm does each kind of collective, by size; equal on all ranks.
        transport: what moves the messages.
        wire_bytes: bytes that this process wrote to sockets while it played each entry, headers included; filled
            while `metered` is true.
    """

    def __init__(
        self,
        axis: str,
        group: dist.ProcessGroup,
        store: Store,
        timeout_s: float,
        *,
        shared_memory: bool | None = None,
        owner: bool = False,
    ) -> None:
        self.owner = owner
        self.names, self._token, one_host = _introduce(group)
        super().__init__(axis, group.rank(), group.size())
        self.group, self.store, self.timeout_s = group, store, timeout_s
        self.metered = False
        self.wire_bytes: dict[Entry, int] = {}
        self.transport: Transport = Sockets(group, self.names, timeout_s)
        if shared_memory or (shared_memory is None and one_host):
            if not one_host:
                raise ValueError(f"shared_memory = True, but {APART}: leave it out")
            self.transport = SharedMemory(self.rank, self.names, self._token, timeout_s, self._look_up)
        self.selection = default_selection(self.transport.name, self.world)
        self._mail = Mail(group, self.names, timeout_s, self._look_up)
        self.letterboxes = Letterboxes(self.rank, self.names, self._token, timeout_s, self._look_up)
        self._sequence = 0
        self._plays: deque[_Play] = deque()
        self._entrance, self._turn = threading.Lock(), threading.Lock()
        self._signal: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._failure: CommunicationError | None = None
        self._thread = threading.Thread(target=self._serve, name=f"windtunnel {axis} progress", daemon=True)
        self._thread.start()

    def follow(self, wishes: Communication) -> None:
        super().follow(wishes)
        if wishes.transport == "shared_memory" and self.transport.name != "shared memory":
            raise ValueError(f"communication.transport = 'shared_memory', but {APART}; allowed: auto, sockets")
        if wishes.transport == "sockets":
            self._over_sockets()
        if wishes.tiers:
            self.selection = select(self.world, wishes.network())

    def force(self, name: str, *, over_sockets: bool = False) -> None:
        """Have every collective done by one algorithm wherever it knows the kind; on all ranks, between collectives."""
        self.forced = {kind: name for kind in KINDS if _known(kind, name)}
        if over_sockets:
            self._over_sockets()

    def _over_sockets(self) -> None:
        if not isinstance(self.transport, Sockets):
            self.transport.close()
            self.transport = Sockets(self.group, self.names, self.timeout_s)
            self.selection = default_selection(self.transport.name, self.world)

    def algorithm(self, kind: str, nbytes: int, largest: bool) -> str:
        return self.selection.name(kind, nbytes)

    def steps(self, entry: Entry, root: int = 0) -> tuple[Posted, ...]:
        """The messages of this rank in a collective that one of our programs does, or in a message of its own."""
        if entry.kind in ("send", "recv"):
            return lone_message(entry)
        return _lowered(entry.kind, entry.algorithm, self.rank, self.world, entry.elements, root)

    def among(self, members: Sequence[tuple[int, ...]], axis: str) -> Communicator:
        group = new_process_group(members, self.names, self.timeout_s)
        if group is not None and group.size() == 1:
            dist.destroy_process_group(group)
            group = None
        if group is None:
            return SoloCommunicator(axis)
        return GlooCommunicator(axis, group, self.store, self.timeout_s, owner=True)

    def post(self, calls: Sequence[Call]) -> list[Handle]:
        """Start messages at once, beside the queue, with or without the peer."""
        if self._failure is not None:
            raise self._failure
        return [self._carrier(call).post(call) for call in calls]

    def _carrier(self, call: Call) -> Mail | Letterboxes:
        """Both ends know the size, so they take the same one; each has an order of its own."""
        shared = isinstance(self.transport, SharedMemory) and call.buffer.nbytes <= LARGEST_BYTES
        return self.letterboxes if shared else self._mail

    def give_up(self, cause: str) -> None:
        """Fail from now on, and have the others' waits fail: where they look into shared memory within a second, where
        they wait for a socket when this process ends or their time is over."""
        if self._failure is None:
            self._failure = CommunicationError(f"this rank gave up: {cause}")
            with suppress(RuntimeError, OSError):  # the store's host may be gone: then nobody hears
                self.store.set(self._board(self.rank), f"gave up: {cause}")
                if not self.store.check([self._board("any")]):
                    self.store.set(self._board("any"), f"rank {self.names[self.rank]} gave up: {cause}")

    # The queue #

    def perform(self, call: Call) -> Handle:
        if self._failure is not None:
            raise self._failure
        with self._entrance:
            self._sequence += 1
            play = _Play(call, self._sequence)
            self._plays.append(play)
        self._signal.put(True)
        return _GlooHandle(self, play)

    def _serve(self) -> None:
        """The progress thread: plays what is queued, until it is told to end."""
        while self._signal.get():
            with self._turn:
                while self._plays:
                    self._finish(self._plays.popleft())

    def play_until(self, wanted: "_Play") -> None:
        """Play the queue up to one collective, unless somebody is at it.

        Dispatch modes of the caller (a recomputation that counts operators) do not see it: whether the caller plays is
        chance.
        """
        if not self._turn.acquire(blocking=False):
            return
        try:
            with _disable_current_modes():
                while self._plays and not wanted.over:
                    self._finish(self._plays.popleft())
        finally:
            self._turn.release()

    def _finish(self, play: "_Play") -> None:
        """Play, and hand the outcome to whoever waits. After a failure nothing is played any more."""
        try:
            if self._failure is None:
                self._play(play.call, play.number)
        except Exception as error:
            self._failure = self._explain(play, error)
            self.transport.close(failed=True)
        play.end(self._failure)

    def close(self) -> None:
        self._signal.put(False)
        self._thread.join(self.timeout_s)
        self.transport.close(failed=self._failure is not None)
        try:
            self.letterboxes.close(failed=self._failure is not None)
        finally:
            if self.owner:
                dist.destroy_process_group(self.group)
                self.owner = False
                for holder in (self, self._mail, self.transport):  # its threads end with the last reference
                    vars(holder).pop("group", None)

    def release_buffers(self) -> None:
        self.transport.release_buffers()

    # One collective #

    def _play(self, call: Call, number: int) -> None:
        before = written_bytes() if self.metered else 0
        tag = _tag(call, number)
        if call.entry.algorithm == "native":
            self.transport.play(self._handshake(), torch.zeros(2, dtype=torch.uint8), tag, False)
            native_collective(self.group, call).wait(timedelta(seconds=self.timeout_s))
        else:
            # Not a leaf of autograd any more: a caller's thread may play it with gradients on.
            flat = call.buffer.detach().reshape(-1)
            steps = self.steps(call.entry, call.root)
            self.transport.play(steps, flat, tag, call.largest)
            if not call.buffer.is_contiguous():
                call.buffer.detach().copy_(flat.view(call.buffer.shape))
        if self.metered:
            self.wire_bytes[call.entry] = self.wire_bytes.get(call.entry, 0) + written_bytes() - before

    def _handshake(self) -> tuple[Posted, ...]:
        """A byte to the right neighbour before a call of Gloo's own.

        Ranks that disagree stop here: Gloo would mix the values of dtypes of one width, and end the process where
        sizes differ.
        """
        left, right = (self.rank - 1) % self.world, (self.rank + 1) % self.world
        return (Posted((Message(right, 0, 1, 0),), (Arrival(left, 1, 2, 0, False, (), ()),)),)

    # Failure #

    def _board(self, rank: int | str) -> str:
        return f"windtunnel/{self._token}/failure/{rank}"

    def _look_up(self) -> None:
        """Give up early if another rank did."""
        if self.store.check([self._board("any")]):
            raise RuntimeError(self.store.get(self._board("any")).decode())

    def _explain(self, play: "_Play", error: Exception) -> CommunicationError:
        """Tell the other ranks what we were doing, hear what they were doing, and name those that differ."""
        mine = f"number {play.number}, {play.call.entry}"
        others = self._exchange(f"was in {mine}")
        parts = [f"{mine}, {play.call.label}: {first_line(error)}"]
        parts += [
            f"rank {self.names[rank]} {said}" for rank, said in sorted(others.items()) if said != f"was in {mine}"
        ]
        missing = sorted(set(range(self.world)) - {self.rank} - set(others))
        if missing:
            silent = ", ".join(f"rank {self.names[rank]}" for rank in missing)
            parts.append(f"{silent} did not answer within {ANSWER_S:.0f} s (dead, stalled, or never made this call)")
        return CommunicationError("; ".join(parts))

    def _exchange(self, mine: str) -> dict[int, str]:
        """What each rank that answers in time says of itself."""
        answers: dict[int, str] = {}
        deadline = time.monotonic() + ANSWER_S
        with suppress(RuntimeError, OSError):  # the store's host may be gone: then nobody answers
            self.store.set(self._board(self.rank), mine)
            if not self.store.check([self._board("any")]):
                self.store.set(self._board("any"), "another rank gave up")
            while len(answers) < self.world - 1 and time.monotonic() < deadline:
                for rank in set(range(self.world)) - {self.rank} - set(answers):
                    if self.store.check([self._board(rank)]):  # waiting on the store would log each time-out
                        answers[rank] = self.store.get(self._board(rank)).decode()
                threading.Event().wait(POLL_S)
        return answers


class _Play:
    """A collective in the queue, and how it ended."""

    def __init__(self, call: Call, number: int) -> None:
        self.call, self.number = call, number
        self.over = False
        self.failure: CommunicationError | None = None
        self._under_way = threading.Lock()
        self._under_way.acquire()

    def end(self, failure: CommunicationError | None) -> None:
        self.failure, self.over = failure, True
        self._under_way.release()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over in time."""
        if not self.over and self._under_way.acquire(timeout=timeout_s):
            self._under_way.release()
        return self.over


class _GlooHandle:
    def __init__(self, communicator: GlooCommunicator, play: _Play) -> None:
        self.communicator, self.play = communicator, play

    def wait(self) -> None:
        play = self.play
        if not play.over:
            with _disable_current_modes():  # who watches a block's operators (recompute) must not see a transport's
                self.communicator.play_until(play)
        limit_s = self.communicator.timeout_s + 2 * ANSWER_S
        # A queue of earlier collectives may each take their time: only an idle thread means a hang.
        if not play.wait(limit_s):
            raise CommunicationError(f"{play.call.entry} ({play.call.label}) was not even begun within {limit_s:.0f} s")
        if play.failure is not None:
            raise play.failure


@lru_cache(maxsize=512)
def _lowered(kind: str, name: str, rank: int, world: int, elements: int, root: int) -> tuple[Posted, ...]:
    return lower(algorithm(kind, name), rank, world, elements, root)


def _introduce(group: dist.ProcessGroup) -> tuple[tuple[int, ...], str, bool]:
    """(the ranks' numbers in the whole world, a name that this group of ranks alone has, whether they share a host)."""
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group = {group!r}: this process (rank {dist.get_rank()}) is not one of its ranks; only those may make a"
            " communicator over it"
        )
    mine = [dist.get_rank() if dist.is_initialized() else group.rank(), _host(), secrets.randbits(63)]
    everyone = torch.tensor(mine * group.size())
    if group.size() > 1:
        group._allgather_base(everyone, torch.tensor(mine)).wait()  # for as long as the group allows
    numbers, hosts, tokens = everyone.view(-1, len(mine)).T.tolist()
    return tuple(numbers), f"{tokens[0]:016x}", len(set(hosts)) == 1


def _host() -> int:
    """Equal on ranks that see the same shared memory: the same boot of the same host, and the same /dev/shm."""
    if not FOLDER.is_dir():
        return secrets.randbits(63)  # nobody to share with
    boot = Path("/proc/sys/kernel/random/boot_id")
    facts = (socket.gethostname(), boot.read_text() if boot.exists() else "", os.stat(FOLDER).st_dev)
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7], "little")


def _tag(call: Call, number: int) -> int:
    """Equal on all ranks only if they play the same call as the same number: others never match, and time out."""
    entry = call.entry
    signature = (entry.kind, entry.elements, entry.dtype, entry.algorithm, call.largest, call.root, number)
    return zlib.crc32(repr(signature).encode()) & 0x3FFFFFFF


def _known(kind: str, name: str) -> bool:
    return name == "native" or name.split("/")[0] in names(kind)
