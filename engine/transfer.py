"""Moves bytes between tiers and works on the host: one queue per direction, in order, each task after what it needs.

The engine says what is to be copied or done, and after what; `Transfers` does it on CPU ranks, `CudaTransfers` on
streams of a GPU, and `SimTransfers` writes it down. On a CPU device and host share their memory: copies between them
are plain, and are done at once.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..collectives.trace import Copy, HostWork
from .nvme import PAGE, Buffer, File, Folder, whole_pages
from .observer import SILENT, Observer

Job = Callable[[], object]

POLL_S = 1e-4
"""How often a thread looks whether a copy of a GPU has ended; CUDA's own wait knows no limit."""


class OffloadError(RuntimeError):
    """A copy, a file or a step on the host that failed or did not end in time; the message names it."""


@dataclass(slots=True)
class Moved:
    """What went one way so far, or what the host did: `nbytes` of payload in `seconds` of work."""

    calls: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / self.seconds if self.seconds else 0.0


class Task(ABC):
    """Something under way."""

    @abstractmethod
    def wait(self) -> None:
        """What is computed next may use the result. On CUDA the current stream waits for a copy, not the program."""

    def block(self) -> None:
        """Wait in this thread; what lies on the host may be used."""
        self.wait()


class Finished(Task):
    def wait(self) -> None:
        pass


FINISHED = Finished()


class Queued(Task):
    """A job in the thread of its queue."""

    def __init__(self, future: "Future[None]", what: str, timeout_s: float) -> None:
        self.future, self.what, self.timeout_s = future, what, timeout_s

    def wait(self) -> None:
        try:
            self.future.result(self.timeout_s)
        except FutureTimeoutError:
            raise OffloadError(f"{self.what} did not end within {self.timeout_s:g} s") from None
        except OSError as error:
            raise OffloadError(f"{self.what}: {error}") from error


class Transfers:
    """On CPU ranks: copies between device and host at once, host work and files in a thread each.

    Attributes:
        near: whether the device can use host memory as it is.
        moved: by direction of a Copy, and by name of HostWork.
    """

    near = True

    def __init__(self, timeout_s: float, observer: Observer = SILENT) -> None:
        self.timeout_s, self.observer = timeout_s, observer
        self.moved: dict[str, Moved] = defaultdict(Moved)
        self._queues: dict[str, ThreadPoolExecutor] = {}
        self._last: dict[str, Task] = {}
        self._counting = threading.Lock()
        self._storages: dict[int, Tensor] = {}

    # Memory #

    def empty(self, elements: int, dtype: torch.dtype, category: str) -> Tensor:
        """Host memory: a tensor [elements] of a category of collectives/trace.py. It stays until `close`."""
        return self.adopt(torch.empty(elements, dtype=dtype))

    def adopt(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage as host memory; on a CPU nothing else tells it from the device's."""
        self._storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def host_storages(self) -> set[int]:
        """The numbers of all storages that the engine keeps in host memory, buffers included."""
        return set(self._storages)

    def buffer(self, nbytes: int) -> Buffer:
        """Page-aligned host memory for files."""
        buffer = Buffer(nbytes)
        self.adopt(buffer.tensor)
        return buffer

    def folder(self, path: str, rank: int) -> Folder:
        """A new folder for this rank's files under `path`."""
        return Folder(path, rank)

    def fill(self, target: Tensor, source: Tensor) -> None:
        """First values for host memory, before training: neither timed nor counted."""
        target.copy_(source)

    # Tasks #

    def copy(self, op: Copy, source: Tensor, target: Tensor, after: Iterable[Task] = ()) -> Task:
        """Copy between device and host, when the computation issued before it has ended."""
        for task in after:
            task.block()
        self._timed(op.direction, op.nbytes, lambda: target.copy_(source))
        return FINISHED

    def work(self, op: HostWork, job: Job, after: Iterable[Task] = ()) -> Task:
        """Do something with host memory in the thread of the host."""
        return self._queue("host", op.name, op.read_bytes + op.write_bytes, job, after)

    def read(self, op: Copy, file: File, buffer: Buffer, after: Iterable[Task] = ()) -> Task:
        return self._queue(op.direction, op.direction, op.nbytes, lambda: file.read(buffer), after)

    def write(self, op: Copy, file: File, buffer: Buffer, after: Iterable[Task] = ()) -> Task:
        return self._queue(op.direction, op.direction, op.nbytes, lambda: file.write(buffer), after)

    def lift(self, scalar: Tensor, device: torch.device, after: Task) -> Tensor:
        """A zero-dimensional tensor of the host, on the device."""
        after.wait()
        return scalar.to(device)

    def _queue(self, queue: str, name: str, nbytes: int, job: Job, after: Iterable[Task]) -> Task:
        before = tuple(after)

        def perform() -> None:
            for task in before:
                task.block()
            with torch.no_grad():  # which is a thread's own
                self._timed(name, nbytes, job)

        if queue not in self._queues:
            self._queues[queue] = ThreadPoolExecutor(1, thread_name_prefix=f"windtunnel {queue}")
        task = Queued(self._queues[queue].submit(perform), f"{name} ({nbytes} bytes)", self.timeout_s)
        self._last[queue] = task
        return task

    def _timed(self, name: str, nbytes: int, job: Job) -> None:
        began = time.perf_counter()
        job()
        self._count(name, nbytes, time.perf_counter() - began)

    def _count(self, name: str, nbytes: int, seconds: float) -> None:
        with self._counting:
            moved = self.moved[name]
            moved.calls += 1
            moved.nbytes += nbytes
            moved.seconds += seconds

    def report(self) -> dict[str, Moved]:
        """A copy of `moved`, up to date."""
        with self._counting:
            return {name: Moved(m.calls, m.nbytes, m.seconds) for name, m in self.moved.items()}

    def drain(self) -> None:
        """Wait for everything under way; raises what failed of it."""
        for task in self._last.values():
            task.block()

    def close(self) -> None:
        """End the threads."""
        for queue in self._queues.values():
            queue.shutdown(wait=False, cancel_futures=True)
        self._queues.clear()


class CudaTransfers(Transfers):
    """On a GPU: a stream for each direction between device and host; the rest as on a CPU."""

    near = False

    def __init__(self, device: torch.device, timeout_s: float, pin: bool) -> None:
        super().__init__(timeout_s)
        self.device, self.pin = device, pin
        self._streams = {direction: torch.cuda.Stream(device) for direction in ("to_host", "to_device")}
        self._untimed: list[tuple[Copy, torch.cuda.Event, torch.cuda.Event]] = []

    def empty(self, elements: int, dtype: torch.dtype, category: str) -> Tensor:
        return self.adopt(torch.empty(elements, dtype=dtype, pin_memory=self.pin))

    def copy(self, op: Copy, source: Tensor, target: Tensor, after: Iterable[Task] = ()) -> Task:
        stream = self._streams[op.direction]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            for task in after:
                task.wait()
            begun.record()
            target.copy_(source, non_blocking=True)
            ended.record()
        for tensor in (source, target):
            if tensor.is_cuda:
                tensor.record_stream(stream)  # its memory may be freed before the copy has run
        self._fold()
        self._untimed.append((op, begun, ended))
        return StreamCopy(op, ended, self.device, self.timeout_s)

    def _fold(self) -> None:
        while self._untimed and self._untimed[0][2].query():
            op, begun, ended = self._untimed.pop(0)
            self._count(op.direction, op.nbytes, begun.elapsed_time(ended) / 1e3)

    def report(self) -> dict[str, Moved]:
        self._fold()
        return super().report()


class StreamCopy(Task):
    def __init__(self, op: Copy, ended: torch.cuda.Event, device: torch.device, timeout_s: float) -> None:
        self.op, self.ended, self.device, self.timeout_s = op, ended, device, timeout_s

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.ended)

    def block(self) -> None:
        limit = time.monotonic() + self.timeout_s
        while not self.ended.query():
            if time.monotonic() > limit:
                raise OffloadError(f"{self.op.direction} of {self.op.label} did not end within {self.timeout_s:g} s")
            time.sleep(POLL_S)


class SimTransfers(Transfers):
    """In a flight: writes down what would be moved and done. Host memory is on torch's meta device: shapes only."""

    near = False

    def __init__(self, observer: Observer) -> None:
        super().__init__(0.0, observer)

    def empty(self, elements: int, dtype: torch.dtype, category: str) -> Tensor:
        tensor = torch.empty(elements, dtype=dtype, device="meta")
        self.observer.rests("host", tensor.numel() * tensor.element_size(), category)
        return tensor

    def adopt(self, tensor: Tensor) -> Tensor:
        self.observer.rests("host", tensor.numel() * tensor.element_size(), "optimizer")
        return tensor

    def fill(self, target: Tensor, source: Tensor) -> None:
        """There are no values."""

    def buffer(self, nbytes: int) -> Buffer:
        self.observer.rests("host", nbytes, "buffers")
        return Buffer(nbytes, torch.empty(nbytes, dtype=torch.uint8, device="meta"))

    def folder(self, path: str, rank: int) -> Folder:
        return _NoFolder()

    def copy(self, op: Copy, source: Tensor, target: Tensor, after: Iterable[Task] = ()) -> Task:
        for task in after:
            if isinstance(task, WrittenDown):
                # A GPU's stream waits for its own copies; for a thread of the host it is the program that waits.
                self.observer.awaits(task.address, op.direction if task.on_stream else "program")
        return WrittenDown(self.observer, self.observer.moves(op), on_stream=True)

    def work(self, op: HostWork, job: Job, after: Iterable[Task] = ()) -> Task:
        task = self._write_down("host", op, after)
        job()
        return task

    def read(self, op: Copy, file: File, buffer: Buffer, after: Iterable[Task] = ()) -> Task:
        return self._write_down(op.direction, op, after)

    def write(self, op: Copy, file: File, buffer: Buffer, after: Iterable[Task] = ()) -> Task:
        return self._write_down(op.direction, op, after)

    def lift(self, scalar: Tensor, device: torch.device, after: Task) -> Tensor:
        result = torch.zeros((), dtype=scalar.dtype, device=device)
        self.copy(Copy("to_device", scalar.element_size(), "norm"), scalar, result, [after]).wait()
        return result

    def _write_down(self, stream: str, op: Copy | HostWork, after: Iterable[Task]) -> Task:
        for task in after:
            if isinstance(task, WrittenDown):
                self.observer.awaits(task.address, stream)
        return WrittenDown(self.observer, self.observer.moves(op), on_stream=False)


class WrittenDown(Task):
    """`address` is where the observer has it; `on_stream`: a copy of the GPU's, not the work of a thread."""

    def __init__(self, observer: Observer, address: Any, on_stream: bool) -> None:
        self.observer, self.address, self.on_stream = observer, address, on_stream

    def wait(self) -> None:
        self.observer.awaits(self.address, "compute" if self.on_stream else "program")


class _NoFolder(Folder):
    """A folder in which nothing is kept."""

    def __init__(self) -> None:
        pass

    def file(self, label: str, nbytes: int) -> File:
        return _NoFile(nbytes)

    def close(self) -> None:
        pass


class _NoFile(File):
    def __init__(self, nbytes: int) -> None:
        self.nbytes = PAGE + whole_pages(nbytes)

    def read(self, buffer: Buffer) -> None:
        raise AssertionError("a flight reads no files")

    def write(self, buffer: Buffer) -> None:
        pass
