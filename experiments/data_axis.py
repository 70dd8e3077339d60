"""A flight at one number of data-parallel ranks from flights at two others.

What a rank computes with its micro-batch does not depend on how many others there are; its shards do. Two flights show
which numbers are sizes of shards: they shrink as the ranks grow, where all other numbers are the same in both. This is
exact where buffers need no padding, and `at_size` answers None where it cannot tell: fly then.
"""

from dataclasses import fields, replace
from functools import cache
from typing import Any

from ..collectives.trace import Collective, Op, Segment, Trace

DATA = "data"

FINEST = 16
"""What a size must be a multiple of, per rank: whole elements of any type, however bytes count them."""


class UnlikeError(Exception):
    """Two flights that differ in more than the sizes of shards, or a size that would need padding."""


def at_size(one: Trace, other: Trace, ranks: int) -> Trace | None:
    """The trace at `ranks` data-parallel ranks, more than in the smaller one of two flights; None: cannot be told.

    A buffer that has the same size at two numbers of ranks and is a multiple of a third one, larger than the smallest
    of them, has that size there too: padding is shorter than there are ranks.
    """
    first, second = one.world.get(DATA, 1), other.world.get(DATA, 1)
    if first == second or min(first, second, ranks) < 2 or ranks <= min(first, second) or not _alike(one, other):
        return None
    try:
        segments = tuple(
            _segment(a, b, first, second, ranks) for a, b in zip(one.segments, other.segments, strict=True)
        )
    except UnlikeError:
        return None
    return replace(one, world={**one.world, DATA: ranks}, segments=segments)


def _alike(one: Trace, other: Trace) -> bool:
    """Whether two traces call equally many segments in the same order, on meshes that differ in this axis alone."""
    return (
        {**one.world, DATA: 0} == {**other.world, DATA: 0}
        and one.blocks == other.blocks
        and one.phases == other.phases
        and len(one.segments) == len(other.segments)
    )


def _segment(one: Segment, other: Segment, first: int, second: int, ranks: int) -> Segment:
    if len(one) != len(other):
        raise UnlikeError
    return tuple(_op(a, b, first, second, ranks) for a, b in zip(one, other, strict=True))


def _op(one: Op, other: Op, first: int, second: int, ranks: int) -> Op:
    if isinstance(one, Collective) and DATA in one.axis and not one.scalar and one.elements % ranks:
        raise UnlikeError
    if one == other:
        return one
    if type(one) is not type(other):
        raise UnlikeError
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in _names(type(one)))
    return replace(one, **{name: _value(a, b, first, second, ranks) for name, a, b in pairs if a != b})


def _value(one: Any, other: Any, first: int, second: int, ranks: int) -> Any:
    """A field that differs: the size of a shard, or a tuple of sizes."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return tuple(a if a == b else _value(a, b, first, second, ranks) for a, b in zip(one, other, strict=True))
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        raise UnlikeError
    whole = one * first
    if whole != other * second or whole % (ranks * FINEST):
        raise UnlikeError
    return type(one)(whole // ranks)


@cache
def _names(kind: type[Op]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))
