"""Several tensors in one flat buffer and back; tensors with gaps, and copies without."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Arena:
    """CPU memory for one flat buffer at a time. It grows and is kept, because fresh memory costs page faults."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        """[elements], with any values; it takes the place of the buffer before."""
        nbytes = elements * dtype.itemsize
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return self._memory[:nbytes].view(dtype)

    @contextmanager
    def flat(self, tensors: Sequence[Tensor], *, read: bool = True) -> Iterator[Tensor]:
        """One buffer [n] for all tensors, of one dtype: the memory of a single one where that is possible, else a copy.

        Args:
            read: whether the buffer has the tensors' values at the beginning. The tensors have its values at the end.
        """
        [first, *others] = tensors
        if not others and first.is_contiguous() and not first.is_inference():
            yield first.data.view(-1)
            return
        buffer = self.buffer(sum(lengths(tensors)), first.dtype)
        if read:
            pack(tensors, buffer)
        yield buffer
        unpack(buffer, tensors)


def lengths(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.numel() for tensor in tensors]


def pack(tensors: Sequence[Tensor], buffer: Tensor) -> None:
    """Copy tensors of any shapes into `buffer` [their elements], one behind the other."""
    for place, tensor in zip(buffer.split(lengths(tensors)), tensors, strict=True):
        place.view(tensor.shape).copy_(tensor)


def unpack(buffer: Tensor, tensors: Sequence[Tensor]) -> None:
    """The reverse of `pack`."""
    for place, tensor in zip(buffer.split(lengths(tensors)), tensors, strict=True):
        overwrite(tensor, place)


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Copy values of any shape without autograd's knowledge: it does not count it as a change (`data`).

    Inference tensors, which may be written in inference mode only, can be written too.
    """
    with torch.inference_mode(tensor.is_inference()):
        tensor.data.copy_(values.reshape(tensor.shape))


def contiguous(arguments: Any, copies: list[tuple[Tensor, Tensor]]) -> Any:
    """The same arguments, nested as they are, with copies for tensors that Gloo would misread: (tensor, its copy)."""
    if isinstance(arguments, list | tuple):
        return [contiguous(argument, copies) for argument in arguments]
    if isinstance(arguments, Tensor) and arguments.layout == torch.strided and not arguments.is_contiguous():
        copies.append((arguments, arguments.contiguous()))
        return copies[-1][1]
    return arguments


def leaves(nested: Sequence[Any]) -> list[Tensor]:
    """The tensors in lists in lists."""
    return [leaf for item in nested for leaf in (leaves(item) if isinstance(item, list) else [item])]
