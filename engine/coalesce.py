"""Many small tensors in a few collectives: packed side by side in an arena that stays, and unpacked afterwards."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..collectives.coalesce import buckets
from .arena import unpack
from .communicator import Communicator, Handle

BUCKET_BYTES = 1 << 20
"""Where the latency of a collective is a small part of its time (experiments/bench/results/coalesced.csv)."""

Start = Callable[[Tensor, str], Handle]


class Coalescer:
    """Sums tensors over the ranks, one collective per bucket.

    Only one call at a time may be under way: its handle must have been waited for before the next one starts.

    Args:
        bucket_bytes: the largest bucket, but for a tensor that is larger by itself.
    """

    def __init__(self, communicator: Communicator, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.communicator, self.bucket_bytes = communicator, bucket_bytes
        self._arenas: dict[torch.dtype, Tensor] = {}
        self._under_way: CoalescedHandle | None = None

    def all_reduce(self, tensors: Sequence[Tensor], label: str, *, largest: bool = False) -> "CoalescedHandle":
        """Start the sum (or, with `largest`, the maximum) of each tensor over the ranks, in place.

        Args:
            tensors: of any shapes, all of one dtype on one device; the same on all ranks, in the same order.

        Raises:
            ValueError: tensors of several dtypes.
            RuntimeError: an earlier call has not been waited for.
        """
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(f"tensors of {label} have dtypes {names}; allowed: one dtype per call")
        if self._under_way is not None:
            raise RuntimeError(f"{label}: the tensors of the earlier call are still under way; wait for them first")
        parts = buckets([tensor.nbytes for tensor in tensors], self.bucket_bytes)
        arena = self._arena(tensors)
        runs, offset = [], 0
        for first, last in parts:
            members = [tensor.detach() for tensor in tensors[first:last]]
            flat = arena[offset : offset + sum(tensor.numel() for tensor in members)]
            offset += flat.numel()
            torch.cat([tensor.reshape(-1) for tensor in members], out=flat)
            handle = self.communicator.all_reduce(flat, f"{label}, {len(members)} tensors", largest=largest)
            runs.append((handle, flat, members))
        handles = CoalescedHandle(self, runs)
        self._under_way = handles if runs else None
        return handles

    def _arena(self, tensors: Sequence[Tensor]) -> Tensor:
        elements = sum(tensor.numel() for tensor in tensors)
        dtype = tensors[0].dtype if tensors else torch.float32
        arena = self._arenas.get(dtype)
        if arena is None or arena.numel() < elements:
            arena = torch.empty(elements, dtype=dtype, device=tensors[0].device if tensors else None)
            self._arenas[dtype] = arena
        return arena

    def done(self) -> None:
        """The arena may be used again."""
        self._under_way = None

    def release_buffers(self) -> None:
        """Drop the arenas; nothing may be under way."""
        self._arenas.clear()


class CoalescedHandle:
    """Tensors under way together."""

    def __init__(self, coalescer: Coalescer, runs: list[tuple[Handle, Tensor, list[Tensor]]]) -> None:
        self._coalescer, self._runs = coalescer, runs

    def wait(self) -> None:
        """Block until every tensor has its result; each bucket is unpacked while the next ones are on their way."""
        if not self._runs:
            return
        for handle, flat, members in self._runs:
            handle.wait()
            unpack(flat, members)
        self._runs = []
        self._coalescer.done()
