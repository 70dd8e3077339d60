"""The caching allocator against the documented rules, by hand, and against what must hold of any allocator."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.sim.allocator import Block, CachingAllocator, OutOfMemoryError, segment_bytes

MIB = 1 << 20
SMALL, LARGE = 2 * MIB, 20 * MIB


def allocator(limit_bytes: float = float("inf"), *, expandable: bool = False) -> CachingAllocator:
    return CachingAllocator(rounding=512, limit_bytes=limit_bytes, expandable=expandable)


@pytest.mark.parametrize(
    ("nbytes", "segment", "block"),
    [
        (1, SMALL, 512),
        (513, SMALL, 1024),
        (MIB, SMALL, MIB),
        (MIB + 1, LARGE, MIB + 512),
        (10 * MIB - 512, LARGE, 10 * MIB - 512),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),  # rounded to 10 MiB before it is judged
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB, 10 * MIB + 512),
        (13 * MIB + 1, 14 * MIB, 14 * MIB),  # what is left is below 1 MiB and stays with the block
        (13 * MIB, 14 * MIB, 14 * MIB),  # of exactly 1 MiB, too
        (21 * MIB, 22 * MIB, 22 * MIB),
    ],
)
def test_a_first_request(nbytes: int, segment: int, block: int) -> None:
    """kSmallSize 1 MiB, kSmallBuffer 2 MiB, kLargeBuffer 20 MiB, kMinLargeAlloc 10 MiB, kRoundLarge 2 MiB."""
    memory = allocator()
    assert memory.allocate(nbytes).nbytes == memory.allocated_bytes == block
    assert memory.reserved_bytes == segment
    assert memory.segments == 1


def test_small_and_large_requests_have_pools_of_their_own() -> None:
    memory = allocator()
    memory.allocate(5 * MIB)  # leaves 15 MiB free
    memory.allocate(512)
    assert memory.reserved_bytes == LARGE + SMALL


def test_streams_do_not_share() -> None:
    memory = allocator()
    memory.free(memory.allocate(8 * MIB, "compute"))
    memory.allocate(8 * MIB, "copies")
    assert memory.reserved_bytes == 2 * LARGE
    memory.allocate(8 * MIB, "compute")
    assert memory.reserved_bytes == 2 * LARGE


def test_the_best_fit_is_the_smallest_block_that_is_large_enough() -> None:
    memory = allocator()
    blocks = [memory.allocate(size * MIB) for size in (40, 20, 30)]
    for block in blocks:
        memory.free(block)
    assert memory.reserved_bytes == 90 * MIB
    taken = memory.allocate(20 * MIB + 512)
    assert taken.start == 60 * MIB  # in the segment of 30 MiB
    assert memory.allocate(18 * MIB).start == 40 * MIB  # in the one of 20 MiB
    assert memory.reserved_bytes == 90 * MIB


def test_a_block_is_split_and_comes_back_whole() -> None:
    memory = allocator()
    first, second, third = (memory.allocate(6 * MIB) for _ in range(3))
    assert [first.start, second.start, third.start] == [0, 6 * MIB, 12 * MIB]
    memory.free(first)
    memory.free(third)
    assert sorted(block.nbytes for block in memory.free_blocks()) == [6 * MIB, 8 * MIB]
    memory.free(second)
    assert [block.nbytes for block in memory.free_blocks()] == [LARGE]


@pytest.mark.parametrize("live", [0, 1, 2])
def test_a_segment_with_a_block_in_use_stays(live: int) -> None:
    memory = allocator()
    blocks = [memory.allocate(6 * MIB) for _ in range(3)]
    for number, block in enumerate(blocks):
        if number != live:
            memory.free(block)
    memory.empty_cache()
    assert memory.reserved_bytes == LARGE
    memory.free(blocks[live])
    memory.empty_cache()
    assert memory.reserved_bytes == 0


def test_fragmentation() -> None:
    """Free bytes that do not lie together do not help: a classic of activations of several sizes."""
    memory = allocator()
    blocks = [memory.allocate(5 * MIB) for _ in range(8)]  # two segments of 20 MiB
    for block in blocks[::2]:
        memory.free(block)
    assert memory.allocated_bytes == 20 * MIB
    memory.allocate(8 * MIB)
    assert memory.reserved_bytes == 60 * MIB
    grown = allocator(expandable=True)
    blocks = [grown.allocate(5 * MIB) for _ in range(8)]
    for block in blocks[::2]:
        grown.free(block)
    grown.allocate(8 * MIB)  # a page of 20 MiB at the end
    assert grown.reserved_bytes == 60 * MIB
    grown.allocate(12 * MIB)  # behind it, where a segment of its own would be needed
    assert (grown.reserved_bytes, grown.segments) == (60 * MIB, 1)


def test_expandable_segments_grow_in_place() -> None:
    """A large request after a smaller one needs pages for the difference alone, not a segment of its own."""
    memory, grown = allocator(), allocator(expandable=True)
    for each in (memory, grown):
        each.free(each.allocate(40 * MIB))
        each.free(each.allocate(60 * MIB))
    assert memory.reserved_bytes == 100 * MIB
    assert grown.reserved_bytes == 60 * MIB
    small = allocator(expandable=True)
    small.allocate(MIB)
    assert small.reserved_bytes == SMALL


def test_a_block_that_can_grow_is_kept_for_what_needs_it() -> None:
    memory = allocator(expandable=True)
    first, _, last = (memory.allocate(size * MIB) for size in (30, 10, 20))
    memory.free(first)
    memory.free(last)  # fits better, but what comes after it has no memory yet
    assert memory.allocate(15 * MIB).start == 0
    assert memory.allocate(40 * MIB).start == 40 * MIB
    assert memory.reserved_bytes == 80 * MIB


def test_cached_segments_go_back_before_memory_runs_out() -> None:
    memory = allocator(100 * MIB)
    memory.free(memory.allocate(60 * MIB))
    kept = memory.allocate(6 * MIB)  # split off the 60 MiB, which thereby cannot go back
    with pytest.raises(OutOfMemoryError):
        memory.allocate(70 * MIB)
    memory.free(kept)
    memory.allocate(70 * MIB)
    assert (memory.reserved_bytes, memory.retries, memory.most_reserved_bytes) == (70 * MIB, 2, 70 * MIB)


def test_pages_in_the_middle_go_back() -> None:
    memory = allocator(100 * MIB, expandable=True)
    first, second, third = (memory.allocate(30 * MIB) for _ in range(3))
    assert memory.reserved_bytes == 100 * MIB
    memory.free(second)  # bytes 30 to 60 MiB, of which the page from 40 to 60 MiB is whole
    memory.empty_cache()
    assert memory.reserved_bytes == 80 * MIB
    assert memory.allocate(30 * MIB).start == 30 * MIB  # the page comes again
    assert memory.reserved_bytes == 100 * MIB
    memory.free(first)
    memory.free(third)
    with pytest.raises(OutOfMemoryError):
        memory.allocate(61 * MIB)


@given(st.integers(1, 1 << 40))
def test_a_segment_holds_what_it_is_for(size: int) -> None:
    assert size <= segment_bytes(size) <= max(LARGE, size + 2 * MIB)


PROGRAMS = st.lists(
    st.tuples(st.sampled_from(["take", "take", "give"]), st.integers(1, 40 * MIB) | st.integers(1, 3 * MIB)),
    max_size=60,
)


def check(memory: CachingAllocator, live: list[Block], sizes: dict[int, int]) -> None:
    """No two blocks overlap, free or not; the books are right."""
    places = sorted((block.start, block.nbytes) for block in [*live, *memory.free_blocks()])
    assert all(a + length <= b for (a, length), (b, _) in pairwise(places))
    assert all(block.nbytes >= sizes[id(block)] for block in live)
    assert sum(block.nbytes for block in live) == memory.allocated_bytes
    assert sum(length for _, length in places) == memory.reserved_bytes
    assert memory.allocated_bytes <= memory.reserved_bytes <= memory.most_reserved_bytes


@settings(max_examples=60, deadline=None)
@given(PROGRAMS, st.booleans(), st.sampled_from([float("inf"), 150 * MIB]), st.data())
def test_any_program(ops: list[tuple[str, int]], expandable: bool, limit: float, data: st.DataObject) -> None:
    memory = allocator(limit, expandable=expandable)
    live: list[Block] = []
    sizes: dict[int, int] = {}
    for kind, nbytes in ops:
        if kind == "take":
            try:
                block = memory.allocate(nbytes, data.draw(st.sampled_from(["compute", "compute", "copies"])))
            except OutOfMemoryError:
                assert not any(block.whole for block in memory.free_blocks())  # what could go back has gone
                continue
            live.append(block)
            sizes[id(block)] = nbytes
        elif live:
            memory.free(live.pop(data.draw(st.integers(0, len(live) - 1))))
        check(memory, live, sizes)
        assert memory.reserved_bytes <= limit
    for block in live:
        memory.free(block)
    check(memory, [], sizes)
    assert memory.allocated_bytes == 0
    if not expandable:
        assert all(block.whole for block in memory.free_blocks())  # neighbours have become one
    memory.empty_cache()
    assert (memory.reserved_bytes, memory.segments) == (0, 0)
