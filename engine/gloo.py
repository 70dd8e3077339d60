"""Plays our collective programs over Gloo's point-to-point messages.

A program of many steps does not advance by itself while autograd runs, so each communicator has one progress thread
that plays programs in the order in which they were started. Gloo's own reduce-scatter sends what an all-reduce sends;
experiments/bench/collectives.py measures both and where each wins.
"""

import math
import queue
import re
import threading
import time
import zlib
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from ..collectives.program import Program, Reduce, Send, chunk_bounds
from ..collectives.ring import RING
from .communicator import Call, CommunicationError, Communicator, Entry, Handle, native_collective
from .wire import written_bytes

NATIVE_BELOW_BYTES: dict[str, float] = {"all_reduce": math.inf, "reduce_scatter": 0, "all_gather": 0}
"""Buffers smaller than this go to Gloo's own call. Its reduce-scatter sends what an all-reduce sends, and takes 1.3 to
2.3 times our ring's time; its all-reduce is a ring itself, needs no thread of ours, and wins by 5 to 20 % on 2 ranks
and breaks even on 4. Its all-gather loses but for buffers below 128 KiB on 2 ranks, where it gains up to 35 us: too
little to give up that ranks which disagree about a call find out. (experiments/bench/results/collectives.csv)"""

ANSWER_S = 3.0
"""How long a rank that failed waits for the others to say what they were doing."""

POLL_S = 0.05


class _Play(NamedTuple):
    """A collective in the queue of the progress thread."""

    call: Call
    done: "Future[None]"


class GlooCommunicator(Communicator):
    """Our programs, played by a thread, on CPU ranks.

    Attributes:
        programs: this rank's program for each kind of collective.
        native_below_bytes: buffers of a kind that are smaller than this go to Gloo's own call.
        wire_bytes: bytes that this process wrote to sockets while it played each entry, headers included; filled
            while `metered` is true.
    """

    def __init__(self, axis: str, group: dist.ProcessGroup, store: Store, timeout_s: float) -> None:
        super().__init__(axis, group.rank(), group.size())
        self.group, self.store, self.timeout_s = group, store, timeout_s
        self.native_below_bytes = NATIVE_BELOW_BYTES
        self.metered = False
        self.wire_bytes: dict[Entry, int] = {}
        self.programs: dict[str, Program] = {kind: ring.program(self.rank, self.world) for kind, ring in RING.items()}
        self._inbox = torch.empty(0, dtype=torch.uint8)
        self._sequence = 0
        self._queue: queue.SimpleQueue[_Play | None] = queue.SimpleQueue()
        self._failure: CommunicationError | None = None
        self._thread = threading.Thread(target=self._serve, name=f"windtunnel {axis} progress", daemon=True)
        self._thread.start()

    def algorithm(self, kind: str, nbytes: int, largest: bool) -> str:
        ours = kind in self.programs and not largest and nbytes >= self.native_below_bytes.get(kind, 0)
        return "ring" if ours else "native"

    def perform(self, call: Call) -> Handle:
        if self._failure is not None:
            raise self._failure
        play = _Play(call, Future())
        self._queue.put(play)
        return _GlooHandle(play, self.timeout_s + 2 * ANSWER_S)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(self.timeout_s)

    def release_buffers(self) -> None:
        self._inbox = torch.empty(0, dtype=torch.uint8)

    def _serve(self) -> None:
        """The progress thread: plays what is queued until None arrives."""
        while (play := self._queue.get()) is not None:
            self._finish(play)
            del play  # or the thread would keep the buffer alive while it waits for the next one

    def _finish(self, play: _Play) -> None:
        """Play, and hand the outcome to whoever waits. After a failure nothing is played any more."""
        try:
            if self._failure is None:
                self._play(play.call)
        except Exception as error:
            self._failure = self._explain(play.call, error)
        if self._failure is not None:
            play.done.set_exception(self._failure)
        else:
            play.done.set_result(None)

    def _play(self, call: Call) -> None:
        before = written_bytes() if self.metered else 0
        self._sequence += 1
        if call.entry.algorithm == "native":
            work = native_collective(self.group, call)
            work.wait(timedelta(seconds=self.timeout_s))
        else:
            self._play_program(self.programs[call.entry.kind], call.buffer, self._tag(call.entry))
        if self.metered:
            self.wire_bytes[call.entry] = self.wire_bytes.get(call.entry, 0) + written_bytes() - before

    def _tag(self, entry: Entry) -> int:
        """Equal on all ranks only if they play the same call as the same number: others never match, and time out."""
        signature = f"{entry.kind} {entry.elements} {entry.dtype} {self._sequence}"
        return zlib.crc32(signature.encode()) & 0x3FFFFFFF

    def _play_program(self, program: Program, buffer: Tensor, tag: int) -> None:
        """Play one rank's program in place on `buffer` [n]; step s has tag `tag + s`."""
        bounds = chunk_bounds(buffer.numel(), self.world)
        chunks = [buffer[start:stop] for start, stop in bounds]
        timeout = timedelta(seconds=self.timeout_s)
        for number, step in enumerate(program):
            pending, arriving = [], []
            for op in step:
                chunk = chunks[op.chunk]
                if isinstance(op, Send):
                    pending.append(self.group.send([chunk], op.peer, tag + number))
                    continue
                # A received chunk lands where it belongs; one to be added needs a place to wait.
                target = self._scratch(chunk) if isinstance(op, Reduce) else chunk
                pending.append(self.group.recv([target], op.peer, tag + number))
                if target is not chunk:
                    arriving.append((chunk, target))
            for work in pending:
                work.wait(timeout)
            for chunk, arrived in arriving:
                chunk.add_(arrived)

    def _scratch(self, like: Tensor) -> Tensor:
        nbytes = like.numel() * like.element_size()
        if self._inbox.numel() < nbytes:
            self._inbox = torch.empty(nbytes, dtype=torch.uint8)
        return self._inbox[:nbytes].view(like.dtype)

    def _explain(self, call: Call, error: Exception) -> CommunicationError:
        """Tell the other ranks what we were doing, hear what they were doing, and name those that differ."""
        mine = f"number {self._sequence}, {call.entry}"
        others = self._exchange(mine)
        missing = set(range(self.world)) - {self.rank} - set(others)
        parts = [f"{mine}, {call.label}: {_first_line(error)}"]
        parts += [f"rank {rank} was in {call}" for rank, call in sorted(others.items()) if call != mine]
        if missing:
            names = ", ".join(f"rank {rank}" for rank in sorted(missing))
            parts.append(f"{names} did not answer within {ANSWER_S:.0f} s (dead, stalled, or never made this call)")
        return CommunicationError("; ".join(parts))

    def _exchange(self, mine: str) -> dict[int, str]:
        """What each rank that answers in time says it was doing."""
        keys = {rank: f"windtunnel/{self.axis}/failure/{rank}" for rank in range(self.world)}
        answers: dict[int, str] = {}
        deadline = time.monotonic() + ANSWER_S
        with suppress(RuntimeError, OSError):  # the store's host may be gone: then nobody answers
            self.store.set(keys[self.rank], mine)
            while len(answers) < self.world - 1 and time.monotonic() < deadline:
                for rank in set(keys) - {self.rank} - set(answers):
                    if self.store.check([keys[rank]]):  # waiting on the store would log each time-out
                        answers[rank] = self.store.get(keys[rank]).decode()
                threading.Event().wait(POLL_S)
        return answers


def _first_line(error: Exception) -> str:
    """The first sentence of an error of Gloo's, without the place in its source that precedes it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\]\s*", "", line).partition(". ")[0]


class _GlooHandle:
    def __init__(self, play: _Play, timeout_s: float) -> None:
        self.play, self.timeout_s = play, timeout_s

    def wait(self) -> None:
        try:
            # A queue of earlier collectives may each take their time: only an idle thread means a hang.
            self.play.done.result(self.timeout_s)
        except FutureTimeoutError:
            raise CommunicationError(
                f"{self.play.call.entry} ({self.play.call.label}) was not even begun within {self.timeout_s:.0f} s"
            ) from None
