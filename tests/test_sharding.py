"""Tensors cut in parts and put together again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.engine.chunks import reassemble
from windtunnel.engine.roles import Whole
from windtunnel.engine.sharding import cut, sections, shard, unshard


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    data=st.data(),
    parts=st.integers(1, 5),
)
def test_shards_make_the_whole(shape: list[int], data: st.DataObject, parts: int) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    cut = shard(whole, dim, parts)
    sizes = [part.shape[dim] for part in cut]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(unshard(cut, dim), whole)


def test_shards_of_a_thousand_rows() -> None:
    assert [tuple(part.shape) for part in shard(torch.empty(1000, 10), 0, 4)] == [(250, 10)] * 4
    assert [part.shape[0] for part in shard(torch.empty(1003, 10), 0, 4)] == [251, 251, 251, 250]
    with pytest.raises(ValueError, match=r"dim = 2 of a tensor of shape \(3, 4\); allowed: 0 to 1"):
        shard(torch.empty(3, 4), 2, 2)
    with pytest.raises(ValueError, match="parts = 0"):
        shard(torch.empty(3, 4), 0, 0)


@given(widths=st.lists(st.integers(1, 6), min_size=1, max_size=3), parts=st.integers(1, 4), padding=st.integers(0, 2))
def test_fused_parts_are_reassembled(widths: list[int], parts: int, padding: int) -> None:
    """Each rank's share of several sections that lie side by side, padded at its end."""
    starts = [sum(widths[:number]) for number in range(len(widths))]
    values = torch.arange(3 * sum(widths)).view(3, -1)
    wholes = [
        Whole(
            tuple(values.shape),
            1,
            tuple((at + sections(width, parts)[rank][0], at + sections(width, parts)[rank][1])
                  for at, width in zip(starts, widths, strict=True)),
        )
        for rank in range(parts)
    ]  # fmt: skip
    cuts = [cut(values, whole, sum(b - a for a, b in whole.ranges) + padding) for whole in wholes]
    assert torch.equal(reassemble(cuts, wholes), values)
    if parts > 1 and sum(b - a for a, b in wholes[-1].ranges):
        with pytest.raises(ValueError, match="do not make a whole"):
            reassemble(cuts[:-1], wholes[:-1])
