"""Tensors cut in parts along a dimension.

Sizes of parts differ by at most one, the first ones being the larger; nothing is padded unless it is asked for.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .roles import Whole


def sections(size: int, parts: int) -> tuple[tuple[int, int], ...]:
    """[start, stop) of each part of `size` elements.

    Raises:
        ValueError: fewer than one part.
    """
    if parts < 1:
        raise ValueError(f"parts = {parts}; allowed: at least 1")
    base, larger = divmod(size, parts)
    bounds = [part * base + min(part, larger) for part in range(parts + 1)]
    return tuple(pairwise(bounds))


def shard(tensor: Tensor, dim: int, parts: int) -> list[Tensor]:
    """Views of `tensor` that together are all of it: 1003 rows in 4 parts are 251, 251, 251 and 250.

    Raises:
        ValueError: no such dimension, or fewer than one part.
    """
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dim = {dim} of a tensor of shape {tuple(tensor.shape)}; allowed: 0 to {tensor.dim() - 1}")
    return [tensor.narrow(dim, start, stop - start) for start, stop in sections(tensor.shape[dim], parts)]


def unshard(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The inverse of `shard`, as a tensor of its own."""
    return torch.cat(tuple(parts), dim)


def cut(tensor: Tensor, whole: Whole, padded: int | None = None) -> Tensor:
    """The part of a whole tensor that `whole` describes, as a tensor of its own, with zeros up to `padded` elements
    along its dimension.
    """
    taken = torch.cat([tensor.narrow(whole.dim, start, stop - start) for start, stop in whole.ranges], whole.dim)
    missing = 0 if padded is None else padded - taken.shape[whole.dim]
    if missing:
        shape = [missing if dim == whole.dim else size for dim, size in enumerate(taken.shape)]
        taken = torch.cat((taken, taken.new_zeros(shape)), whole.dim)
    return taken
