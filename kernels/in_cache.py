"""Several operators over large tensors, a piece at a time: what passes between them stays in cache.

One operator after another over whole tensors moves each intermediate value to memory and back. A piece of 64 Ki
elements and its intermediate values fit in a core's second-level cache, so that memory sees inputs and outputs alone.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PIECE = 1 << 16
"""Elements of a piece."""

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """dtype that values are computed in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def element_wise(formula: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """outputs = formula(*inputs) of tensors with as many elements each; the formula gets pieces [n] in a `wide` dtype.

    Args:
        outputs: contiguous; results are rounded to their dtypes, once.
    """
    flat = [tensor.reshape(-1) for tensor in inputs]
    made = [tensor.view(-1) for tensor in outputs]
    elements = PIECE if flat[0].device.type == "cpu" else max(1, flat[0].numel())
    for start in range(0, flat[0].numel(), elements):
        piece = slice(start, start + elements)
        for target, value in zip(made, formula(*(t[piece].to(wide(t.dtype)) for t in flat)), strict=True):
            target[piece].copy_(value)


def rows_of(tensor: Tensor) -> Tensor:
    """[..., D] as [rows, D]; D may be 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def row_pieces(matrix: Tensor) -> list[slice]:
    """The rows of [rows, D] in pieces; all at once where it is not a CPU's cache that counts."""
    rows, width = matrix.shape[0], matrix.shape[1]
    count = max(1, PIECE // max(1, width)) if matrix.device.type == "cpu" else max(1, rows)
    return [slice(start, start + count) for start in range(0, rows, count)]


def check_floating(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Raise a ValueError unless `tensor` is of a floating dtype, and of that of `like` on its device."""
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, FLOATING))}")
    if like is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}; allowed: {like.dtype} on {like.device}, as the first input"
        )
