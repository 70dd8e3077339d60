"""A world of ranks on this machine that stays alive: starting it costs seconds, giving it work costs milliseconds.

A body is a plain function `(rank, world, ...)` that can be imported by name; it runs on every rank, inside one Gloo
process group, and its results come back in the order of the ranks. The store lives in the parent, so that the ranks
can still say what they were doing when one of them is gone.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from .communicator import CommunicationError
from .device import keep_freed_memory
from .gloo import ANSWER_S

START_LIMIT_S = 120.0


class WorldError(RuntimeError):
    """A rank failed, died or did not end; the message has a line for each such rank. The world is over."""


class World:
    """`size` processes, joined by Gloo.

    Args:
        timeout_s: how long Gloo's own calls wait for other ranks (bodies give their communicators their own).
        threads: torch threads per rank; by default the machine's cores divided among the ranks.
        preload: further modules that ranks find imported; those of a process's first World count.
    """

    def __init__(
        self, size: int, *, timeout_s: float = 60.0, threads: int | None = None, preload: tuple[str, ...] = ()
    ) -> None:
        if size < 1:
            raise ValueError(f"world = {size}; allowed: at least 1 rank")
        self.size, self.timeout_s = size, timeout_s
        self.threads = threads or max(1, (os.cpu_count() or 1) // size)
        self.alive = True
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["windtunnel.engine.engine", "torch._dynamo", *preload]
        )  # torch.optim imports it at first use
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._store = store
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            settings = (rank, size, store.port, timeout_s, self.threads, theirs)
            process = context.Process(target=_rank_main, args=settings, name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(START_LIMIT_S)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids by rank."""
        return tuple(process.pid or 0 for process in self._processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def run(self, body: Callable[..., Any], *arguments: Any, limit_s: float = 600.0) -> list[Any]:
        """`body(rank, world, *arguments)` on every rank.

        Args:
            limit_s: how long the whole body may take.

        Returns:
            What each rank returned, by rank.

        Raises:
            WorldError: naming each rank that raised, died, or was still busy at the limit.
        """
        if not self.alive:
            raise WorldError("this world has ended: make a new one")
        for pipe in self._pipes:
            pipe.send((body, arguments))
        return self._collect(limit_s)

    def _collect(self, limit_s: float) -> list[Any]:
        """One answer from every rank, or the end of the world."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + limit_s
        waiting = set(range(self.size))
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            ready = wait([self._pipes[rank] for rank in waiting], timeout=left_s)
            for rank in [rank for rank in sorted(waiting) if self._pipes[rank] in ready]:
                waiting.discard(rank)
                good, answer = self._answer(rank)
                (results if good else failures)[rank] = answer
            if failures:  # the others will say soon what they miss, or never
                deadline = min(deadline, time.monotonic() + ANSWER_S + 2.0)
        if not failures and not waiting:
            return [results[rank] for rank in range(self.size)]
        for rank in waiting:
            failures.setdefault(rank, "was still busy" + ("" if len(failures) else f" after {limit_s:.0f} s"))
        self._kill()
        raise WorldError("; ".join(f"rank {rank} {failures[rank]}" for rank in sorted(failures)))

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = self._pipes[rank].recv()
        except EOFError:
            self._processes[rank].join(5.0)
            return False, f"died: {_exit_reason(self._processes[rank].exitcode)}"
        return answer

    def _kill(self) -> None:
        self.alive = False
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(5.0)

    def close(self) -> None:
        """End the ranks."""
        if not self.alive:
            return
        self.alive = False
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue  # that rank is gone already
        for process in self._processes:
            process.join(10.0)
            if process.is_alive():
                process.kill()


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _rank_main(rank: int, size: int, port: int, timeout_s: float, threads: int, pipe: Connection) -> None:
    """A rank: join the group, then serve bodies until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a world ends
    torch.set_num_threads(threads)
    keep_freed_memory()
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout_s))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    pipe.send((True, None))
    while (work := _next_work(pipe)) is not None:
        body, arguments = work
        try:
            answer = (True, body(rank, size, *arguments))
        except BaseException as error:
            answer = (False, _failure(error))
        try:
            pipe.send(answer)
        except OSError:
            return  # the parent is gone
    sys.stdout.flush()
    os._exit(0)  # no destructor of a process group waits for peers that have left


def _next_work(pipe: Connection) -> tuple[Callable[..., Any], tuple] | None:
    """What the parent wants done; None when it wants no more, or is gone."""
    try:
        work: tuple[Callable[..., Any], tuple] | None = pipe.recv()
    except EOFError:
        return None
    return work


def _failure(error: BaseException) -> str:
    """What went wrong, and where: the last frame names the line, unless the message says more than a line could."""
    if isinstance(error, CommunicationError):
        return f"failed: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return f"failed: {type(error).__name__}: {error} ({place})"
