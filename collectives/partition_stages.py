"""Which layers make which stage of a pipeline: contiguous parts whose largest cost is as small as can be."""

import math
from collections.abc import Sequence
from itertools import accumulate


def balanced(
    costs: Sequence[float], parts: int, per_copy: Sequence[float] | None = None, copies: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Cut layers into contiguous parts of at least one layer so that the most expensive part is as cheap as it can be.

    Part p that has layers i to j - 1 costs sum(costs[i:j]) + copies[p] * sum(per_copy[i:j]): with the bytes of a
    layer's states, the bytes of its activations and the micro-batches under way on a stage, that is the stage's memory.
    Dynamic programming over the last boundary, O(parts * layers^2); of equal cuts the one with the earliest boundaries.

    Args:
        costs: of each layer, not negative.
        per_copy: of each layer, not negative; none by default.
        copies: by part; one each by default.

    Returns:
        The boundaries: part p has layers bounds[p] to bounds[p + 1] - 1.

    Raises:
        ValueError: fewer layers than parts, or a cost that is negative or not a number.
    """
    count = len(costs)
    extra = [0.0] * count if per_copy is None else list(per_copy)
    times = [1] * parts if copies is None else list(copies)
    if not 1 <= parts <= count:
        raise ValueError(f"{count} layers in {parts} stages; allowed: at least one layer per stage")
    if len(extra) != count or len(times) != parts:
        raise ValueError(f"{len(extra)} further costs and {len(times)} copies; allowed: {count} and {parts}")
    if any(not 0 <= cost < math.inf for cost in (*costs, *extra)):
        raise ValueError("a layer's cost is negative or not finite; allowed: numbers >= 0")
    once, again = ([0.0, *accumulate(each)] for each in (costs, extra))
    best = [0.0 if stop == 0 else math.inf for stop in range(count + 1)]  # of the parts so far, by where they stop
    before: list[list[int]] = []
    for part in range(parts):
        sums = [one + times[part] * more for one, more in zip(once, again, strict=True)]
        reached, came_from = [math.inf] * (count + 1), [0] * (count + 1)
        for stop in range(part + 1, count - (parts - part - 1) + 1):
            worst = [max(best[start], sums[stop] - sums[start]) for start in range(part, stop)]
            reached[stop] = min(worst)
            came_from[stop] = part + worst.index(reached[stop])
        best = reached
        before.append(came_from)
    bounds = [count]
    for came_from in reversed(before):
        bounds.append(came_from[bounds[-1]])
    return tuple(reversed(bounds))
