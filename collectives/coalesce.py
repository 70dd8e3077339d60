"""Which of many small tensors travel in one collective.

A collective of n bytes takes alpha + n / beta at the least; k tensors alone pay alpha k times, in buckets once each.
"""

from collections.abc import Sequence


def buckets(sizes_bytes: Sequence[int], bucket_bytes: int) -> tuple[tuple[int, int], ...]:
    """(first, past the last) of the tensors in each bucket: consecutive ones, in their order.

    A bucket is filled as long as it stays within `bucket_bytes`; a tensor larger than that has one of its own.

    Raises:
        ValueError: bucket_bytes < 1, or a negative size.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes = {bucket_bytes}; allowed: >= 1")
    found, first, filled = [], 0, 0
    for place, size in enumerate(sizes_bytes):
        if size < 0:
            raise ValueError(f"sizes_bytes[{place}] = {size}; allowed: >= 0")
        if place > first and filled + size > bucket_bytes:
            found.append((first, place))
            first, filled = place, 0
        filled += size
    if first < len(sizes_bytes):
        found.append((first, len(sizes_bytes)))
    return tuple(found)
