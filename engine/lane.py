"""Does the collectives of one group in the order of the calls, in a thread or by who waits, as torch's `Work`."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .communicator import CommunicationError

NO_LIMIT = timedelta(0)
"""What torch passes to `Work.wait` where the caller gave no time."""

SLACK_S = 10.0
"""What a failing collective may take beyond its time limit, in which ranks tell each other what they were doing."""


class Lane:
    """Jobs that are done one after the other.

    A thread does them, so that they advance while autograd runs; a caller that waits for one does what is left before
    it and that one itself, which spares two changes of threads.

    Args:
        timeout_s: how long one job may wait for other ranks before it fails by itself.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._works: deque[LaneWork] = deque()
        self._turn = threading.Lock()
        self._signal: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._open = True
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def start(self, name: str, outputs: Sequence[Any], job: Callable[[], None]) -> "LaneWork":
        """Append a job.

        Args:
            name: what an error calls it.
            outputs: the value of the work's future.

        Raises:
            CommunicationError: the lane is closed.
        """
        if not self._open:
            raise CommunicationError(f"{name} was called on a group that has been destroyed")
        work = LaneWork(self, name, outputs, job, (len(self._works) + 2) * (self.timeout_s + SLACK_S))
        self._works.append(work)
        self._signal.put(True)
        return work

    def do_until(self, work: "LaneWork") -> None:
        """Do what is queued up to one job, unless somebody is at it."""
        if self._turn.acquire(blocking=False):
            try:
                while self._works and not work.is_completed():
                    self._works.popleft().do()
            finally:
                self._turn.release()

    def close(self, limit_s: float) -> bool:
        """Wait for what is queued, and give back the thread. Nothing can be started any more.

        Returns:
            Whether this call closed it, in time.
        """
        if not self._open:
            return False
        self._open = False
        self._signal.put(False)
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while self._signal.get():
            with self._turn:
                while self._works:
                    self._works.popleft().do()


class LaneWork(dist.Work):
    """A collective in the lane."""

    def __init__(self, lane: Lane, name: str, outputs: Sequence[Any], job: Callable[[], None], limit_s: float) -> None:
        super().__init__()
        self.lane, self.name, self.outputs, self.limit_s = lane, name, list(outputs), limit_s
        self._job: Callable[[], None] | None = job
        self._done: Future[None] = Future()

    def do(self) -> None:
        """Do the job; once."""
        job, self._job = self._job, None  # the tensors may go when they are no longer needed
        assert job is not None
        try:
            with torch.inference_mode(False), torch.no_grad():  # whatever the mode of the thread that does it
                job()
        except Exception as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(None)

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Block until the outputs may be used.

        Raises:
            CommunicationError: it failed, or has not ended in the time given here (but may still end).
        """
        if timeout == NO_LIMIT:
            self.lane.do_until(self)
        limit_s = timeout.total_seconds() or self.limit_s
        try:
            self._done.result(limit_s)
        except FutureTimeoutError:
            raise CommunicationError(f"{self.name} has not ended within {limit_s:g} s") from None
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._done.done()

    def is_success(self) -> bool:
        return self._done.done() and self._done.exception() is None

    def exception(self) -> BaseException | None:
        return self._done.exception() if self._done.done() else None

    def result(self) -> list[Any]:
        return self.outputs

    def get_future(self) -> "torch.futures.Future[list[Any]]":
        """A future of the outputs.

        Its callbacks run in a thread of their own, because they may wait for the next collective (PowerSGD's do). A
        failure is raised inside `then`: an exception set from Python would be a mere value for C++, and DDP would take
        tensors out of it.
        """
        over: torch.futures.Future[None] = torch.futures.Future()
        outputs = over.then(lambda _: self._outputs_or_failure())
        self._done.add_done_callback(
            lambda _: threading.Thread(target=over.set_result, args=(None,), daemon=True).start()
        )
        return outputs

    def _outputs_or_failure(self) -> list[Any]:
        self._done.result(0)
        return self.outputs
