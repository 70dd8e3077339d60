"""PyTorch's caching allocator of device memory: what it hands out, and what it holds to do so.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (and CUDAAllocatorConfig.h for the sizes), with its default
settings or with `expandable_segments:True`. Requests of up to 1 MiB are cut from segments of 2 MiB; those of less than
10 MiB from segments of 20 MiB; larger ones get a segment of their own, rounded up to 2 MiB. A free block serves the
smallest request that fits best, on the stream where it was used; what is left over is split off if it is worth it.
Freed neighbours of one segment become one block. A segment that is free as a whole goes back to the device only when
the device has no more to give.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

SMALL_REQUEST_BYTES = 1 << 20
SMALL_SEGMENT_BYTES = 2 << 20
LARGE_SEGMENT_BYTES = 20 << 20
OWN_SEGMENT_BYTES = 10 << 20
ROUND_SEGMENT_BYTES = 2 << 20
"""kSmallSize, kSmallBuffer, kLargeBuffer, kMinLargeAlloc and kRoundLarge of the CUDA caching allocator."""

ADDRESS_SPACE_BYTES = 1 << 60
"""Of an expandable segment: more than any device has (there it is 9/8 of the device's memory)."""


class OutOfMemoryError(Exception):
    """The device cannot give the bytes of a segment that a request needs, not even after cached ones went back."""


class Block:
    """A stretch of a segment: in use, free, or (of an expandable segment) without memory behind it.

    Attributes:
        start, nbytes: where it lies.
        live: whether it is in use.
        mapped: whether there is memory behind it.
        before, after: its neighbours in the segment.
    """

    __slots__ = ("after", "before", "live", "mapped", "nbytes", "pool", "start")

    def __init__(self, pool: "_Pool", start: int, nbytes: int, *, mapped: bool = True) -> None:
        self.pool, self.start, self.nbytes, self.mapped = pool, start, nbytes, mapped
        self.live = False
        self.before: Block | None = None
        self.after: Block | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of its segment."""
        return self.before is None and self.after is None


class _Pool:
    """Free blocks of one stream, of small or of large requests."""

    __slots__ = ("at", "keys", "small", "unmapped")

    def __init__(self, small: bool) -> None:
        self.small = small
        self.keys: list[tuple[int, int]] = []  # (bytes, start) of each free block, ascending
        self.at: dict[int, Block] = {}  # by start
        self.unmapped: list[int] = []  # starts of the blocks without memory, ascending

    @property
    def page_bytes(self) -> int:
        """In what pieces an expandable segment of the pool grows."""
        return SMALL_SEGMENT_BYTES if self.small else LARGE_SEGMENT_BYTES

    def put(self, block: Block) -> None:
        insort(self.keys, (block.nbytes, block.start))
        self.at[block.start] = block

    def take(self, block: Block) -> None:
        del self.keys[bisect_left(self.keys, (block.nbytes, block.start))]
        del self.at[block.start]

    def put_unmapped(self, block: Block) -> None:
        insort(self.unmapped, block.start)
        self.at[block.start] = block

    def take_unmapped(self, block: Block) -> None:
        del self.unmapped[bisect_left(self.unmapped, block.start)]
        del self.at[block.start]

    def free_blocks(self) -> list[Block]:
        return [self.at[start] for _, start in self.keys]


class CachingAllocator:
    """The memory of one device.

    A search for the best fit is a bisection over the free blocks of a pool; pools are short because neighbours merge.

    Attributes:
        allocated_bytes: of the blocks in use.
        reserved_bytes: what the device has given and not got back.
        most_reserved_bytes: at most so far.
        segments: how many separate stretches the device has given; an expandable one counts once.
        retries: how often the device had no more to give, so that cached segments went back to it.
    """

    def __init__(self, *, rounding: int, limit_bytes: float = float("inf"), expandable: bool = False) -> None:
        """
        Args:
            rounding: requests are rounded up to a multiple of so many bytes (kMinBlockSize, 512 on CUDA).
            limit_bytes: what the device can give.
            expandable: whether segments grow in place (expandable_segments:True).
        """
        self.rounding, self.limit_bytes, self.expandable = rounding, limit_bytes, expandable
        self.allocated_bytes = self.reserved_bytes = self.most_reserved_bytes = self.segments = self.retries = 0
        self._pools: dict[tuple[str, bool], _Pool] = {}
        self._next_start = 0

    def allocate(self, nbytes: int, stream: str = "compute") -> Block:
        """A block of at least `nbytes` bytes for work on `stream`.

        Raises:
            OutOfMemoryError: the device cannot give the segment that it needs; all that has changed is that cached
                segments went back.
        """
        assert nbytes > 0, "an empty storage needs no memory"
        size = -(-nbytes // self.rounding) * self.rounding
        pool = self._pool(stream, size <= SMALL_REQUEST_BYTES)
        block = self._best_fit(pool, size) or self._new(pool, size)
        rest = block.nbytes - size
        if rest >= self.rounding if pool.small or self.expandable else rest > SMALL_REQUEST_BYTES:
            self._split(block, size)
        block.live = True
        self.allocated_bytes += block.nbytes
        return block

    def free(self, block: Block) -> None:
        """Take a block back. It may not be used after this."""
        assert block.live, "a block is freed once"
        block.live = False
        self.allocated_bytes -= block.nbytes
        self._merge(block)
        block.pool.put(block)

    def empty_cache(self) -> None:
        """Give back to the device what is free as a whole."""
        for pool in self._pools.values():
            for block in pool.free_blocks():
                if self.expandable:
                    self._unmap(block)
                elif block.whole:
                    pool.take(block)
                    self.segments -= 1
                    self.reserved_bytes -= block.nbytes

    def free_blocks(self) -> Iterator[Block]:
        """All blocks that are free and have memory."""
        for pool in self._pools.values():
            yield from pool.free_blocks()

    def begin(self) -> None:
        """Count peaks from here on."""
        self.most_reserved_bytes = self.reserved_bytes

    def _pool(self, stream: str, small: bool) -> _Pool:
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = _Pool(small)
        return pool

    def _best_fit(self, pool: _Pool, size: int) -> Block | None:
        """The smallest free block that is large enough, of equals the one at the lowest address."""
        place = bisect_left(pool.keys, (size, -1))
        if place == len(pool.keys):
            return None
        block = pool.at[pool.keys[place][1]]
        if self.expandable:  # a block counts as what it can grow to
            for larger in range(place + 1, len(pool.keys)):
                other = pool.at[pool.keys[larger][1]]
                if _can_grow_to(other) >= _can_grow_to(block):
                    break
                block = other
        pool.take(block)
        return block

    def _new(self, pool: _Pool, size: int) -> Block:
        """A free block, in no pool, with memory that the device gives."""
        grow = self._grow if self.expandable else self._new_segment
        try:
            return grow(pool, size)
        except OutOfMemoryError:
            self.empty_cache()
            self.retries += 1
            return grow(pool, size)

    def _new_segment(self, pool: _Pool, size: int) -> Block:
        nbytes = segment_bytes(size)
        self._reserve(nbytes)
        self.segments += 1
        return Block(pool, self._addresses(nbytes), nbytes)

    def _reserve(self, nbytes: int) -> None:
        if self.reserved_bytes + nbytes > self.limit_bytes:
            raise OutOfMemoryError(f"{nbytes} bytes more than the {self.reserved_bytes} held exceed {self.limit_bytes}")
        self.reserved_bytes += nbytes
        self.most_reserved_bytes = max(self.most_reserved_bytes, self.reserved_bytes)

    def _addresses(self, nbytes: int) -> int:
        start, self._next_start = self._next_start, self._next_start + nbytes
        return start

    def _split(self, block: Block, size: int) -> None:
        """Cut what is more than `size` off as a free block of its own."""
        rest = self._cut(block, size)
        block.pool.put(rest)

    def _cut(self, block: Block, size: int) -> Block:
        """Shorten a block to `size`; what is cut off is in no pool yet."""
        rest = Block(block.pool, block.start + size, block.nbytes - size, mapped=block.mapped)
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        block.after, block.nbytes = rest, size
        return rest

    def _merge(self, block: Block) -> None:
        """Join a block, which is in no pool, with its neighbours of the same kind, which leave theirs."""
        before, after = block.before, block.after
        if before is not None and not before.live and before.mapped == block.mapped:
            self._leave(before)
            block.start, block.nbytes, block.before = before.start, before.nbytes + block.nbytes, before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and not after.live and after.mapped == block.mapped:
            self._leave(after)
            block.nbytes, block.after = block.nbytes + after.nbytes, after.after
            if block.after is not None:
                block.after.before = block

    def _leave(self, block: Block) -> None:
        if block.mapped:
            block.pool.take(block)
        else:
            block.pool.take_unmapped(block)

    # Expandable segments: one range of addresses per pool, with memory behind a part of it. #

    def _grow(self, pool: _Pool, size: int) -> Block:
        """The lowest stretch that is free or without memory and long enough, with memory put behind what lacks it."""
        if not pool.unmapped:
            tail = Block(pool, self._addresses(ADDRESS_SPACE_BYTES), ADDRESS_SPACE_BYTES, mapped=False)
            pool.put_unmapped(tail)
            self.segments += 1
        block = self._lowest_stretch(pool, size)
        while not block.mapped or block.nbytes < size:
            if block.mapped:
                assert block.after is not None
                block = self._map(block.after, size - block.nbytes)
            else:
                block = self._map(block, size)
        pool.take(block)
        return block

    def _lowest_stretch(self, pool: _Pool, size: int) -> Block:
        for start in pool.unmapped:
            block = pool.at[start]
            if block.before is not None and not block.before.live:
                block = block.before
            stretch, end = 0, block
            while stretch < size and not end.live:
                stretch += end.nbytes
                if end.after is None:
                    break
                end = end.after
            if stretch >= size:
                return block
        raise AssertionError("the range of addresses has no end")

    def _map(self, block: Block, size: int) -> Block:
        """Put memory behind the first `size` bytes of a block, in whole pages; what it becomes with its neighbours."""
        pool = block.pool
        size = min(block.nbytes, -(-size // pool.page_bytes) * pool.page_bytes)
        self._reserve(size)
        pool.take_unmapped(block)
        if size < block.nbytes:
            pool.put_unmapped(self._cut(block, size))
        block.mapped = True
        self._merge(block)
        pool.put(block)
        return block

    def _unmap(self, block: Block) -> None:
        """Take the memory from the whole pages of a free block."""
        pool, page = block.pool, block.pool.page_bytes
        origin = self._origin(block)
        first = origin + -(-(block.start - origin) // page) * page
        last = origin + (block.start + block.nbytes - origin) // page * page
        if first >= last:
            return
        pool.take(block)
        if first > block.start:
            head, block = block, self._cut(block, first - block.start)
            pool.put(head)
        if last < block.start + block.nbytes:
            pool.put(self._cut(block, last - block.start))
        self.reserved_bytes -= block.nbytes
        block.mapped = False
        self._merge(block)
        if block.whole:
            self.segments -= 1
        else:
            pool.put_unmapped(block)

    def _origin(self, block: Block) -> int:
        """Where the segment begins, from which its pages count."""
        return block.start // ADDRESS_SPACE_BYTES * ADDRESS_SPACE_BYTES


def segment_bytes(size: int) -> int:
    """What the device is asked for when a (rounded) request finds no free block, without expandable segments."""
    if size <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_SEGMENT_BYTES) * ROUND_SEGMENT_BYTES


def _can_grow_to(block: Block) -> int:
    """Of an expandable segment: a free block's bytes with those behind it that have no memory yet."""
    after = block.after
    return block.nbytes + (after.nbytes if after is not None and not after.mapped else 0)
