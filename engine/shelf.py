"""Where the inputs of a block rest from its forward until it is computed again.

By default where they are. They may also be copied: to the host, into one buffer that is allocated once (so that what
lives long does not lie scattered among what lives short), and each tensor-parallel rank may keep 1/n of them. The three
go together. A copy has the strides of its original, because kernels may round differently on another layout.
"""

import weakref
from typing import Protocol

import torch
from torch import Tensor

from .communicator import Communicator
from .device import copy_stream_for
from .observer import Observer

ALIGNMENT_BYTES = 64
"""Tensors in one slot begin at multiples of it: a cache line, and a multiple of every element's size."""


class Resting(Protocol):
    """An input that waits for its block to be computed again."""

    def fetch(self) -> Tensor:
        """Its values on its device, a leaf of a new graph."""


class Shelf:
    """Puts inputs where they rest.

    Args:
        device: of the inputs.
        host: they rest on the host; pinned and copied beside the computation where the device is a GPU.
        slots: places in one buffer for the inputs of that many blocks; None for memory of their own.
        group: the tensor-parallel ranks, whose inputs are equal; each keeps a part. One rank keeps all of it.
    """

    def __init__(
        self, device: torch.device, *, host: bool, slots: int | None, group: Communicator, observer: Observer
    ) -> None:
        self.device, self.host, self.group = device, host, group
        self.arena = None if slots is None else Arena(slots, self._memory)
        self.copies = copy_stream_for(device, observer)
        self._observer = observer

    @property
    def copying(self) -> bool:
        return self.host or self.arena is not None or self.group.world > 1

    def put(self, tensors: list[Tensor]) -> list[Resting]:
        """The inputs of one call of a block."""
        if not self.copying:
            return [Reference(tensor) for tensor in tensors]
        if not tensors:
            return []
        sizes = [self._rest_elements(tensor) for tensor in tensors]
        places = self._places([(size, tensor.dtype) for size, tensor in zip(sizes, tensors, strict=True)])
        return [Copy(self, tensor, place) for tensor, place in zip(tensors, places, strict=True)]

    def resting_bytes(self, tensor: Tensor) -> int:
        """What an input takes on its device while it rests."""
        if self.host:
            return 0
        if self.copying:
            return self._rest_elements(tensor) * tensor.element_size()
        return tensor.untyped_storage().nbytes()

    def _rest_elements(self, tensor: Tensor) -> int:
        return -(-tensor.numel() // self.group.world)

    def _places(self, wanted: list[tuple[int, torch.dtype]]) -> list[Tensor]:
        """One flat tensor for each number of elements: out of one slot of the arena, or memory of its own."""
        if self.arena is None:
            return [self._memory(elements * dtype.itemsize).view(dtype) for elements, dtype in wanted]
        slot = self.arena.take(sum(_aligned(elements * dtype.itemsize) for elements, dtype in wanted))
        places, start = [], 0
        for elements, dtype in wanted:
            places.append(slot[start : start + elements * dtype.itemsize].view(dtype))
            start += _aligned(elements * dtype.itemsize)
        self.arena.release_with(places)
        return places

    def _memory(self, nbytes: int) -> Tensor:
        """[nbytes] where inputs rest."""
        with self._observer.category("activations"):
            if self.host:
                return self.copies.memory(nbytes)
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)


class Reference:
    """An input that rests where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._values, self._version = tensor.detach(), tensor._version

    def fetch(self) -> Tensor:
        """
        Raises:
            RuntimeError: it was changed in place since, so its block cannot be computed again.
        """
        if self._values._version != self._version:
            raise RuntimeError(
                f"an input of shape {tuple(self._values.shape)} of a block was changed in place after the block used"
                " it, so the block cannot be computed again: use an operation that is not in place"
            )
        return self._values.detach().requires_grad_()


class Copy:
    """An input of which a copy, or a part of a copy, rests elsewhere."""

    def __init__(self, shelf: Shelf, tensor: Tensor, place: Tensor) -> None:
        self._shelf, self.place = shelf, place
        self._shape, self._elements = tensor.shape, tensor.numel()
        self._strides = torch.empty_like(tensor, device="meta").stride()
        with torch.no_grad():
            if shelf.group.world == 1:
                self._ready = shelf.copies.copy(self._in_shape(place), tensor)
            else:
                whole = self._whole(tensor.dtype)
                self._in_shape(whole).copy_(tensor)
                self._ready = shelf.copies.copy(place, self._mine(whole))

    def fetch(self) -> Tensor:
        shelf = self._shelf
        with torch.no_grad():
            values = shelf.copies.fetch(self.place, self._ready)
            if shelf.group.world > 1:
                whole = self._whole(values.dtype)
                self._mine(whole).copy_(values)
                shelf.group.all_gather(whole, "saved inputs").wait()
                values = whole
            return self._in_shape(values).requires_grad_()

    def _whole(self, dtype: torch.dtype) -> Tensor:
        """[parts of all ranks], whose tail is padding."""
        return torch.zeros(self.place.numel() * self._shelf.group.world, dtype=dtype, device=self._shelf.device)

    def _mine(self, whole: Tensor) -> Tensor:
        return whole.view(self._shelf.group.world, -1)[self._shelf.group.rank]

    def _in_shape(self, flat: Tensor) -> Tensor:
        return flat[: self._elements].as_strided(self._shape, self._strides, flat.storage_offset())


class Arena:
    """Equal slots in one buffer. It is allocated at the first call, and anew when inputs are larger than its slots."""

    def __init__(self, slots: int, memory: "Memory") -> None:
        self.slots, self._memory = slots, memory
        self.buffer: Tensor | None = None
        self._slot_bytes = 0
        self._free: list[int] = []
        self._last = 0

    def take(self, nbytes: int) -> Tensor:
        """[nbytes] of a free slot. `release_with` says until when it is taken.

        Raises:
            RuntimeError: all slots are taken.
        """
        if self.buffer is None or nbytes > self._slot_bytes:
            self._slot_bytes = _aligned(nbytes)
            self.buffer = self._memory(self._slot_bytes * self.slots)
            self._free = list(range(self.slots))
        if not self._free:
            raise RuntimeError(
                f"all {self.slots} places for saved inputs are taken: raise activation_checkpointing.number_checkpoints"
                " to the number of blocks (or segments) that run before their backward does"
            )
        self._last = min(self._free)
        self._free.remove(self._last)
        start = self._last * self._slot_bytes
        return self.buffer[start : start + nbytes]

    def release_with(self, places: list[Tensor]) -> None:
        """The slot that was taken last is free again when the last of these tensors is gone."""
        free, number, left = self._free, self._last, len(places)

        def gone() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                free.append(number)

        for place in places:
            weakref.finalize(place, gone).atexit = False


class Memory(Protocol):
    """A function that allocates [nbytes] of bytes."""

    def __call__(self, nbytes: int) -> Tensor: ...


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
