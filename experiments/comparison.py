"""Gradients, optimizer state and parameters of many ranks beside one process's: how far apart, and where first.

Each rank compares the elements that it holds and reports sums of squares; here they become distances of whole tensors.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..engine.inspection import Share

GRADIENT, PARAMETER, LOSS, STATE = "gradient", "parameter", "loss", "optimizer state "

Key = tuple[str, str]
"""(what, name of the parameter); what is GRADIENT, PARAMETER, or STATE and the optimizer's name for it."""

FLOOR = 1e-3
"""A tensor's distance is held against its own norm, but at least against this part of what a tensor of its size has on
average: a gradient that is truly zero (a key bias of attention) is rounding, and far from any other rounding."""


class Size(NamedTuple):
    """Of one process's tensor."""

    norm: float
    elements: int


class Off(NamedTuple):
    """What a rank holds of a tensor, and the sum of its squared differences from one process's."""

    start: int
    stop: int
    squares: float


Offs = dict[Key, Off]


def sizes(known: Mapping[Key, Tensor]) -> dict[Key, Size]:
    return {key: Size(float(values.double().norm()), values.numel()) for key, values in known.items()}


def compare(what: str, shares: Iterable[Share], known: Mapping[Key, Tensor]) -> Iterator[tuple[Key, Off]]:
    """Each share against the same elements of one process, in float64; what that does not have counts as zero."""
    for share in shares:
        key = (what + share.what if what == STATE else what, share.name)
        values, wanted = share.values.double().cpu(), known.get(key)
        start, stop = (share.start, share.stop) if values.numel() == share.stop - share.start else (0, 1)
        if wanted is not None and wanted.numel() == 1:
            start, stop = 0, 1
        difference = values if wanted is None else values - wanted.flatten()[start:stop].double()
        squares = float(difference.square().sum())
        yield key, Off(start, stop, math.inf if math.isnan(squares) else squares)


@dataclass(frozen=True, slots=True)
class Gap:
    """How far one tensor is from one process's at the end of one step.

    Attributes:
        rank: the first one of those that hold the elements that are off the most.
        distance: ||a - b|| over all ranks' shares, of copies of a share the worst.
        scale: what it is held against: ||b||, which for gradients and state has a FLOOR.
    """

    what: str
    parameter: str
    rank: int
    distance: float
    norm: float
    scale: float

    @property
    def relative(self) -> float:
        return self.distance / self.scale if self.distance else 0.0


def gaps(ranks: Sequence[Offs], known: Mapping[Key, Size]) -> list[Gap]:
    """One gap for each tensor: gradients in the order of backward, then the optimizer's state, then parameters."""
    average = {}
    for what in {what for what, _ in known}:
        of_kind = [size for (kind, _), size in known.items() if kind == what]
        average[what] = _root(size.norm for size in of_kind) / math.sqrt(sum(size.elements for size in of_kind))
    found = []
    for key in {**known, **{key: None for offs in ranks for key in offs}}:
        norm, elements = known.get(key, Size(0.0, 0))
        held = [(rank, offs[key]) for rank, offs in enumerate(ranks) if key in offs]
        spans: dict[tuple[int, int], float] = {}
        for _, off in held:
            spans[off[:2]] = max(spans.get(off[:2], 0.0), off.squares)
        missing = sum(stop - start for start, stop in spans) < elements
        rank = max(held, key=lambda of_rank: of_rank[1].squares)[0] if held else 0
        distance = math.inf if missing else math.sqrt(sum(spans.values()))
        least = 0.0 if key[0] == PARAMETER else FLOOR * average.get(key[0], 0.0) * math.sqrt(elements)
        found.append(Gap(*key, rank, distance, norm, max(norm, least, 1e-30)))
    first = [gap for gap in found if gap.what == GRADIENT]
    return first[::-1] + sorted((gap for gap in found if gap.what != GRADIENT), key=lambda gap: gap.what == PARAMETER)


def overall(found: Iterable[Gap]) -> float:
    """||a - b|| / ||b|| over all tensors of each kind; the worst kind's."""
    kinds: dict[str, list[Gap]] = {}
    for gap in found:
        kinds.setdefault(gap.what, []).append(gap)
    ratios = (_root(g.distance for g in kind) / max(_root(g.norm for g in kind), 1e-30) for kind in kinds.values())
    return max(ratios, default=0.0)


def worst(found: Iterable[Gap]) -> float:
    """The largest relative distance of a tensor."""
    return max((gap.relative for gap in found), default=0.0)


def first_difference(
    steps: Iterable[tuple[int, Sequence[Gap], float]], allowed: Callable[[str], float]
) -> dict[str, Any] | None:
    """Where ranks first leave one process.

    Within a step: gradients, in the order in which backward makes them, since a wrong one spoils those after it;
    then what the optimizer made of them, then the parameters, and the loss where nothing else is off.

    Args:
        steps: (number, gaps, relative difference of the loss) of each step, in order.
        allowed: the tolerance by what is compared.

    Returns:
        {step, rank, parameter, what}; rank and parameter are None for a loss.
    """
    for step, found, loss in steps:
        for gap in found:
            if not gap.relative <= allowed(gap.what):
                return {"step": step, "rank": gap.rank, "parameter": gap.parameter, "what": gap.what}
        if not loss <= allowed(LOSS):
            return {"step": step, "rank": None, "parameter": None, "what": LOSS}
    return None


def _root(values: Iterable[float]) -> float:
    return math.sqrt(sum(value * value for value in values))
