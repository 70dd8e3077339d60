"""Tensors cut in parts along a dimension, and put together again.

Sizes of parts differ by at most one, the first ones being the larger; nothing is padded unless it is asked for.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .communicator import Communicator
from .roles import Whole, role_of


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


def reassemble(parts: Sequence[Tensor], wholes: Sequence[Whole]) -> Tensor:
    """The whole tensor, from parts and where each of them lies; padding is left out.

    Raises:
        ValueError: parts that do not make a whole.
    """
    shape, dim = wholes[0].shape, wholes[0].dim
    covered = sum(stop - start for whole in wholes for start, stop in whole.ranges)
    if covered != shape[dim] or any((whole.shape, whole.dim) != (shape, dim) for whole in wholes):
        raise ValueError(f"parts cover {covered} of {shape[dim]} elements of dimension {dim} of {shape}; allowed: all")
    result = parts[0].new_empty(shape)
    for part, whole in zip(parts, wholes, strict=True):
        offset = 0
        for start, stop in whole.ranges:
            result.narrow(dim, start, stop - start).copy_(part.narrow(dim, offset, stop - start))
            offset += stop - start
    return result


def gathered(part: Tensor, whole: Whole, group: Communicator) -> Tensor:
    """The whole tensor, on every rank of a group, each of which gives its part."""
    places = torch.zeros(group.world, len(whole.ranges), 2, dtype=torch.int64, device=part.device)
    places[group.rank].copy_(torch.tensor(whole.ranges))
    group.all_gather(places.view(-1), "places of parts").wait()
    wholes = [Whole(whole.shape, whole.dim, tuple(map(tuple, ranges))) for ranges in places.tolist()]
    sizes = [_elements(each) for each in wholes]
    rows = part.new_zeros(group.world, max(sizes))
    used = sum(stop - start for start, stop in whole.ranges)
    rows[group.rank, : sizes[group.rank]] = part.narrow(whole.dim, 0, used).reshape(-1)
    group.all_gather(rows.view(-1), "parts of parameters").wait()
    parts = [row[:size].view(_shape(each)) for row, size, each in zip(rows, sizes, wholes, strict=True)]
    return reassemble(parts, wholes)


def _shape(whole: Whole) -> list[int]:
    """Of a part without its padding."""
    used = sum(stop - start for start, stop in whole.ranges)
    return [used if dim == whole.dim else size for dim, size in enumerate(whole.shape)]


def _elements(whole: Whole) -> int:
    return int(torch.Size(_shape(whole)).numel())


def whole_parameters(
    parameters: dict[str, nn.Parameter], parts: Iterator[tuple[str, Tensor]], group: Communicator
) -> Iterator[tuple[str, Tensor]]:
    """`parts` by name with those that tensor ranks have cut put together again; all ranks must take part.

    Args:
        parameters: of the model, by name: their roles say what is cut.
        group: the tensor ranks.
    """
    for name, values in parts:
        role = role_of(parameters[name])
        if group.axis in role.cut and role.whole is not None:
            values = gathered(values, role.whole, group)
        yield name, values
