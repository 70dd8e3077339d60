"""What a batch is: a nest of tuples, lists and mappings of tensors; how it is changed, counted and given to a model."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists, mappings and objects with attributes, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from tensors(item)


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with every tensor changed; a mapping becomes a dict."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: map_tensors(item, change) for name, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(item, change) for item in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(item, change) for item in batch)
    return batch


def samples_in(batch: Any) -> int:
    """Samples of a batch: the size of dimension 0 of its first tensor; 1 where that has no dimension, or none is."""
    first = next(tensors(batch), None)
    return 1 if first is None or first.dim() == 0 else first.shape[0]


def tokens_in(batch: Any) -> int:
    """Tokens of a batch: the elements of its first tensor of integers with two dimensions or more; 0 without one."""
    for tensor in tensors(batch):
        if tensor.dim() > 1 and not tensor.is_floating_point() and not tensor.is_complex():
            return tensor.numel()
    return 0


def call(model: Callable[..., Any], batch: Any) -> Any:
    """What the model makes of a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def count_of(output: Any) -> Tensor | int | None:
    """How many things the loss is a mean of, if the model says so: its `num_tokens`, or an integer beside the loss."""
    if isinstance(output, Mapping):
        return output.get("num_tokens")
    if isinstance(output, tuple | list) and len(output) > 1 and _is_count(output[1]):
        return output[1]
    return getattr(output, "num_tokens", None)


def _is_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.dtype in (torch.int64, torch.int32)
    return isinstance(value, int) and not isinstance(value, bool)
