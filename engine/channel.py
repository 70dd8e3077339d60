"""A ring of slots in memory that two ranks map: one writes into it, the other reads.

[Note: cursors]
A channel has two counters of slots on cache lines of their own: `written` is advanced by the sender alone, `read` by
the receiver alone. A slot's bytes must be visible before the counter that announces them. x86 keeps stores in order;
on weaker machines (ARM) a release followed by an acquire of one lock is a full barrier, and costs 0.1 us everywhere.
"""

import mmap
import threading

import torch
from torch import Tensor

SLOT_BYTES = 512 << 10
SLOTS = 4

_LINE_WORDS = 16  # two cache lines of 64 bytes, which x86 fetches together
_WRITTEN, _READ = 0, _LINE_WORDS
_LABELS = 2 * _LINE_WORDS  # of each slot: tag, bytes
_DATA_BYTES = mmap.PAGESIZE
CHANNEL_BYTES = _DATA_BYTES + SLOTS * SLOT_BYTES


class Channel:
    """One end of the ring of slots from one rank to another: see [Note: cursors].

    Attributes:
        count: slots that this end has written or read.
        payload_bytes: what has gone through this end.
    """

    def __init__(self, file: int) -> None:
        self._map = mmap.mmap(file, CHANNEL_BYTES)
        self.words = memoryview(self._map).cast("Q")
        data = torch.frombuffer(self._map, dtype=torch.uint8, offset=_DATA_BYTES)
        self._slots = {torch.uint8: list(data.split(SLOT_BYTES))}
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


_fence = threading.Lock()


def _barrier() -> None:
    """Everything before is visible to others before anything after: see [Note: cursors]."""
    _fence.acquire()
    _fence.release()
    _fence.acquire()
    _fence.release()
