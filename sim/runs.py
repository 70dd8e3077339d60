"""Which run of a segment a reference means when a trace is played."""

from collections import defaultdict
from collections.abc import Iterator

from ..collectives.trace import Ref


class Runs:
    """Which run of a segment an age means, where a phase is played more often than it was flown.

    A Ref counts runs as the flight had them, in which a phase that repeats took place once. So what comes after all
    plays of a phase counts them as one, and inside it the last play comes first. An op that this one has not, because
    the flight meant a run before the phase, is found there.
    """

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[tuple[str, int], list[int]] = defaultdict(list)
        self._last: dict[tuple[str, int], list[int]] = defaultdict(list)
        self._now: dict[tuple[str, int], list[int]] = defaultdict(list)

    def begin(self, key: str, block: int) -> int:
        """A run begins; its number."""
        self._number += 1
        self._now[key, block].append(self._number)
        return self._number

    def play(self) -> None:
        """The phase is played once more."""
        self._last, self._now = self._now, defaultdict(list)

    def end(self) -> None:
        """The phase has been played as often as it is."""
        for place, runs in self._now.items():
            self._before[place] += runs
        self._last, self._now = defaultdict(list), defaultdict(list)

    def back(self, ref: Ref, block: int) -> Iterator[int]:
        """The runs that a Ref may mean, the likeliest first."""
        place = ref.key, block
        before, last, now = (runs.get(place, []) for runs in (self._before, self._last, self._now))
        for runs in (before + last + now, before + now):
            if ref.age < len(runs):
                yield runs[-1 - ref.age]
