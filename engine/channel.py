"""A ring of slots in memory that two ranks map: one writes into it, the other reads.

[Note: cursors]
A channel has two counters of slots on cache lines of their own: `written` is advanced by the sender alone, `read` by
the receiver alone. A slot's bytes must be visible before the counter that announces them. x86 keeps stores in order;
on weaker machines (ARM) a release followed by an acquire of one lock is a full barrier, and costs 0.1 us everywhere.
"""

import mmap
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

SLOT_BYTES = 512 << 10
SLOTS = 4

_LINE_WORDS = 16  # two cache lines of 64 bytes, which x86 fetches together
_WRITTEN, _READ = 0, _LINE_WORDS
_LABELS = 2 * _LINE_WORDS  # of each slot: tag, bytes
_DATA_BYTES = mmap.PAGESIZE


def channel_bytes(slot_bytes: int) -> int:
    """Of a channel's file."""
    return _DATA_BYTES + SLOTS * slot_bytes


class Channel:
    """One end of the ring of slots from one rank to another: see [Note: cursors].

    Args:
        slot_bytes: a multiple of the size of every dtype.

    Attributes:
        count: slots that this end has written or read.
        payload_bytes: what has gone through this end.
    """

    def __init__(self, file: int, slot_bytes: int = SLOT_BYTES) -> None:
        self.slot_bytes = slot_bytes
        self._map = mmap.mmap(file, channel_bytes(slot_bytes))
        self.words = memoryview(self._map).cast("Q")
        data = torch.frombuffer(self._map, dtype=torch.uint8, offset=_DATA_BYTES)
        self._slots = {torch.uint8: list(data.split(slot_bytes))}
        self.count = 0
        self.payload_bytes = 0

    def slot(self, number: int, dtype: torch.dtype) -> Tensor:
        if dtype not in self._slots:
            self._slots[dtype] = [slot.view(dtype) for slot in self._slots[torch.uint8]]
        return self._slots[dtype][number % SLOTS]

    def can_write(self) -> bool:
        return self.count - self.words[_READ] < SLOTS

    def drained(self) -> bool:
        """Whether the receiver has read all that was written."""
        return self.words[_READ] == self.count

    def write(self, piece: Tensor, tag: int) -> None:
        """Fill the next slot; there must be a free one."""
        self.slot(self.count, piece.dtype)[: piece.numel()].copy_(piece)
        label = _LABELS + 2 * (self.count % SLOTS)
        self.words[label] = tag
        self.words[label + 1] = piece.nbytes
        self._advance(_WRITTEN, piece.nbytes)

    def waiting(self) -> tuple[int, int] | None:
        """(tag, bytes) of the next slot to read, if it has been written."""
        if self.words[_WRITTEN] == self.count:
            return None
        _barrier()
        label = _LABELS + 2 * (self.count % SLOTS)
        return self.words[label], self.words[label + 1]

    def arrived(self, dtype: torch.dtype, elements: int) -> Tensor:
        """What is `waiting`; it stays until `free`."""
        return self.slot(self.count, dtype)[:elements]

    def free(self, nbytes: int) -> None:
        """The oldest slot may be written again."""
        self._advance(_READ, nbytes)

    def _advance(self, cursor: int, nbytes: int) -> None:
        _barrier()
        self.count += 1
        self.payload_bytes += nbytes
        self.words[cursor] = self.count


def make_channel(path: Path, slot_bytes: int = SLOT_BYTES) -> Channel:
    """The sender's end. It gets its name when it is whole.

    Raises:
        RuntimeError: there is no room for it.
    """
    beside, nbytes = path.with_suffix(".new"), channel_bytes(slot_bytes)
    file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(file, 0, nbytes)
        os.rename(beside, path)
        return Channel(file, slot_bytes)
    except OSError as error:
        os.unlink(beside)
        room = os.statvfs(path.parent)
        raise RuntimeError(
            f"{path.parent} has no room for {nbytes} bytes, {room.f_bavail * room.f_frsize} are free: enlarge it"
            f" (docker run --shm-size), or use sockets ({error})"
        ) from None
    finally:
        os.close(file)


def find_channel(path: Path, slot_bytes: int = SLOT_BYTES) -> Channel | None:
    """The receiver's end, once the sender has made it. Both have it then, and nobody else needs its name."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        os.unlink(path)
        return Channel(file, slot_bytes)
    finally:
        os.close(file)


_fence = threading.Lock()


def _barrier() -> None:
    """Everything before is visible to others before anything after: see [Note: cursors]."""
    _fence.acquire()
    _fence.release()
    _fence.acquire()
    _fence.release()
