"""Coalescing: the cut is a partition within its limits, and the results are those of each tensor alone."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_performed import make
from windtunnel.collectives.coalesce import buckets
from windtunnel.engine.coalesce import Coalescer
from windtunnel.engine.communicator import SoloCommunicator
from windtunnel.engine.world import World


@given(sizes=st.lists(st.integers(0, 100), max_size=40), limit=st.integers(1, 150))
def test_a_partition_that_cannot_be_coarser(sizes: list[int], limit: int) -> None:
    """Consecutive, complete, within the limit unless alone; and no two neighbours would fit together."""
    found = buckets(sizes, limit)
    assert [place for first, last in found for place in range(first, last)] == list(range(len(sizes)))
    for first, last in found:
        assert last > first
        assert sum(sizes[first:last]) <= limit or last == first + 1
    for (first, last), (_, following) in itertools.pairwise(found):
        assert following > last
        assert sum(sizes[first : last + 1]) > limit


@pytest.mark.parametrize(("sizes", "limit", "message"), [([1], 0, "bucket_bytes = 0"), ([3, -1], 5, r"\[1\] = -1")])
def test_bad_sizes(sizes: list[int], limit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        buckets(sizes, limit)


SHAPES = [(3, 4), (), (0,), (7,), (2, 2, 2), (300,), (1,)]


def together(rank: int, world: int, bucket_bytes: int, largest: bool) -> int:
    """Twice, because the arena is used again; returns how many collectives there were."""
    communicator = make("sockets")
    coalescer = Coalescer(communicator, bucket_bytes)
    for turn in range(2):
        tensors = [torch.full(shape, float(rank + place + turn)) for place, shape in enumerate(SHAPES)]
        tensors[0] = tensors[0].T
        coalescer.all_reduce(tensors, "test", largest=largest).wait()
        for place, tensor in enumerate(tensors):
            values = [r + place + turn for r in range(world)]
            assert tensor.eq(max(values) if largest else sum(values)).all(), (place, tensor)
    communicator.close()
    return communicator.ledger.total()


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_the_results_of_each_alone(two_ranks: World, bucket_bytes: int, largest: bool) -> None:
    sizes = [4 * torch.Size(shape).numel() for shape in SHAPES]
    collectives = 2 * len(buckets(sizes, bucket_bytes))
    assert two_ranks.run(together, bucket_bytes, largest) == [collectives] * 2


def test_no_tensors_is_no_collective() -> None:
    coalescer = Coalescer(SoloCommunicator())
    coalescer.all_reduce([], "nothing").wait()
    coalescer.all_reduce([torch.ones(2)], "one").wait()


def test_what_it_refuses() -> None:
    coalescer = Coalescer(SoloCommunicator())
    with pytest.raises(ValueError, match=r"tensors of mixed have dtypes torch\.float16, torch\.float32"):
        coalescer.all_reduce([torch.ones(1), torch.ones(1).half()], "mixed")
    handle = coalescer.all_reduce([torch.ones(1)], "first")
    with pytest.raises(RuntimeError, match="second: the tensors of the earlier call are still under way"):
        coalescer.all_reduce([torch.ones(1)], "second")
    handle.wait()
    handle.wait()  # a second wait has nothing to do
    coalescer.release_buffers()
    coalescer.all_reduce([torch.ones(1)], "third").wait()
