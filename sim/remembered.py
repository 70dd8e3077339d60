"""Results that belong to a large value, found again without comparing it: the value is known by its identity."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Remembered(Generic[T]):
    """The results last used.

    Args:
        most: how many; each holds on to the value that it belongs to, so that an identity means one value.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._found: dict[tuple[int, Hashable], tuple[object, T]] = {}

    def of(self, value: object, how: Hashable, make: Callable[[], T]) -> T:
        """What was made of `value` in this way before, else what `make` makes now. `value` must not change."""
        key = id(value), how
        entry = self._found.pop(key, None) or (value, make())
        self._found[key] = entry
        if len(self._found) > self.most:
            del self._found[next(iter(self._found))]
        return entry[1]
