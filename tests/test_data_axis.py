"""Flights at another number of data-parallel ranks: told from two, and flown."""

from dataclasses import replace
from typing import Any

import pytest
from test_flight import SMALL, flight
from windtunnel.collectives.trace import Collective, Trace
from windtunnel.experiments.data_axis import at_size

WIDE = replace(SMALL, hidden=64, heads=4, kv_heads=4, ffn=256, vocab=512, seq=64)
"""All its units are multiples of 64 elements."""


def flights(stage: int, *worlds: int, **config: Any) -> list[Trace]:
    return [flight(WIDE, stage=stage, world=world, micro_steps=3, **config) for world in worlds]


@pytest.mark.parametrize("stage", range(4))
def test_a_third_size_is_told_from_two(stage: int) -> None:
    one, other, flown = flights(stage, 2, 8, 4, gradient_clipping=1.0, bf16={"enabled": True})
    assert at_size(one, other, 4) == flown
    assert at_size(other, one, 4) == flown
    assert (one == replace(flown, world=one.world)) == (stage == 0)


def test_buffers_that_need_padding_are_not_told() -> None:
    odd = replace(WIDE, vocab=509)
    one, other, flown = (flight(odd, stage=1, world=world) for world in (2, 4, 8))
    told = at_size(one, other, 8)
    assert told is None or told == flown
    sizes = {op.elements for segment in flown.segments for op in segment if isinstance(op, Collective)}
    assert any(size % 7 for size in sizes)
    assert at_size(one, other, 7) is None


@pytest.mark.parametrize(("first", "second", "ranks"), [(2, 2, 4), (1, 4, 8), (4, 8, 2), (4, 8, 1)])
def test_what_two_sizes_do_not_tell(first: int, second: int, ranks: int) -> None:
    one, other = flights(1, first, second)
    assert at_size(one, other, ranks) is None


def test_other_programs_are_not_told() -> None:
    one, other = flight(WIDE, stage=1, world=2), flight(WIDE, stage=2, world=4)
    assert at_size(one, other, 8) is None
    deeper = flight(replace(WIDE, layers=3), stage=1, world=4)
    assert at_size(one, deeper, 8) is None
    wider = flight(replace(WIDE, ffn=320), stage=1, world=4)
    assert at_size(one, wider, 8) is None
