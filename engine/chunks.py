"""Where a rank's elements lie in whole parameters: ranges of a flattened part, as boxes of the whole.

A parameter may be cut twice: along a dimension by model parallelism (`Whole`), and what is left, flattened, by ZeRO. A
checkpoint has the whole one, in its own shape, and neither cut is seen there: a range of a flattened row-major part is
a few boxes of it, however many rows it has.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .roles import Whole, role_of

Box = tuple[tuple[int, int], ...]
"""[start, stop) by dimension."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a whole parameter, and where its values are in a flat tensor of some of this rank's elements.

    Attributes:
        offset, shape: of the box.
        start: of its first value in the flat tensor.
        strides: of its values there.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The box as a view of a flat, contiguous tensor."""
        assert flat.dim() == 1
        assert flat.is_contiguous()
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.start)


def whole_of(name: str, parameter: nn.Parameter) -> Whole:
    """Which part of the whole parameter this rank's is; all of it where nobody cut it. A scalar is a vector of one.

    Raises:
        ValueError: a parameter that is cut, and nobody said how; the message calls it `name`.
    """
    role = role_of(parameter)
    if role.whole is not None:
        return role.whole
    if role.cut:
        raise ValueError(
            f"parameter {name} is cut along {', '.join(role.cut)}, and its role does not say which part of the whole"
            " this rank has: give it Role(cut=..., whole=Whole(shape, dim, ranges))"
        )
    shape = tuple(parameter.shape) or (1,)
    return Whole(shape, 0, ((0, shape[0]),))


def chunks(whole: Whole, part: Sequence[int], start: int, stop: int) -> tuple[Chunk, ...]:
    """The boxes of the whole parameter that elements [start, stop) of a flattened part are, none for padding.

    Args:
        part: shape of this rank's part, the whole one's but for `whole.dim`.

    Returns:
        In N dimensions at most 2 N - 1 boxes for each range of the whole; values count from `start`.
    """
    part = tuple(part) or (1,)
    strides = tuple(math.prod(part[dim + 1 :]) for dim in range(len(part)))
    found: list[Chunk] = []
    for box in boxes(part, start, stop):
        first = 0  # of the range in the part, along the dimension that is cut
        for low, high in whole.ranges:
            begin, end = max(box[whole.dim][0], first), min(box[whole.dim][1], first + high - low)
            if begin < end:
                inside = (*box[: whole.dim], (begin, end), *box[whole.dim + 1 :])
                offset = [a for a, _ in inside]
                position = sum(a * stride for a, stride in zip(offset, strides, strict=True)) - start
                offset[whole.dim] += low - first
                found.append(Chunk(tuple(offset), tuple(b - a for a, b in inside), position, strides))
            first += high - low
    return tuple(found)


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a flattened row-major tensor: the end of a row, whole rows, the beginning of a row."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows
    if first > last:
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * inner)
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
    yield from _in_row(shape, last, last * inner, stop)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop), all of one row."""
    before = row * math.prod(shape[1:])
    for box in boxes(shape[1:], start - before, stop - before):
        yield ((row, row + 1), *box)


def reassemble(parts: Sequence[Tensor], wholes: Sequence[Whole]) -> Tensor:
    """The whole parameter from the parts of all ranks along an axis.

    Args:
        parts: each in its own shape; padding that lies outside of its whole's ranges is left out.
        wholes: one for each part, of one shape and dimension.

    Raises:
        ValueError: parts that leave a gap.
    """
    shape, dim = wholes[0].shape, wholes[0].dim
    covered = 0
    for start, stop in sorted(each for whole in wholes for each in whole.ranges):
        if start > covered:
            break
        covered = max(covered, stop)
    if covered < shape[dim] or any((whole.shape, whole.dim) != (shape, dim) for whole in wholes):
        raise ValueError(f"parts {[(each.dim, each.ranges) for each in wholes]} do not make a whole of shape {shape}")
    result = parts[0].new_empty(shape)
    for part, whole in zip(parts, wholes, strict=True):
        first = 0
        for start, stop in whole.ranges:
            result.narrow(dim, start, stop - start).copy_(part.narrow(dim, first, stop - start))
            first += stop - start
    return result
