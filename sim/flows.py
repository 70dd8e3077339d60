"""Flows that share links: the rate that each gets when all are treated max-min fairly."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

TIE = 1e-12
"""Relative difference below which two figures that rounding alone sets apart count as equal."""


def max_min_rates(capacities: Floats, routes: NDArray[np.integer[Any]]) -> Floats:
    """The max-min fair rate of each flow: no rate can be raised without lowering one that is not larger.

    Progressive filling (Bertsekas and Gallager, Data Networks, 2nd edition, section 6.5.2): the rates of all flows rise
    together until a link is full; the flows through it keep the rate they have, the others go on rising.

    Args:
        capacities: [links] bytes/s, > 0. Infinite for a link that never fills.
        routes: [flows, width] the links of each flow. A shorter route is filled up with a link of infinite capacity.

    Returns:
        [flows] bytes/s; infinite for a flow through no link that fills.
    """
    rates = np.full(len(routes), np.inf)
    left = capacities.astype(np.float64)
    rising = np.arange(len(routes))
    while rising.size:
        crossed = routes[rising]
        flows = np.bincount(crossed.ravel(), minlength=left.size)
        share = np.divide(left, flows, out=np.full_like(left, np.inf), where=flows > 0)
        lowest = share.min()
        if lowest == np.inf:
            break
        stopped: Flags = (share <= lowest * (1 + TIE))[crossed].any(axis=1)
        rates[rising[stopped]] = lowest
        taken = np.bincount(crossed[stopped].ravel(), minlength=left.size)
        left = np.maximum(left - lowest * taken, 0.0)
        rising = rising[~stopped]
    return rates
