"""A cluster as a collective sees it, and the closed-form time of a ring on it.

The alpha-beta model (Hockney 1994; Thakur, Rabenseifner and Gropp 2005, section 3): a message of n bytes takes
alpha + n / beta seconds, alpha a latency and beta a bandwidth.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One level of the network, e.g. the switch inside a node or the fabric between nodes.

    Attributes:
        name: what a table or an error calls it ("intra_node", "inter_node").
        ranks: how many consecutive ranks it joins.
        latency_s: alpha, seconds from the start of a send to its first byte at the receiver.
        bytes_per_s: beta per direction, for the one ring that crosses this tier (a node's NICs all together).
    """

    name: str
    ranks: int
    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks of tier {self.name!r} must be >= 1, got {self.ranks}")
        if self.latency_s < 0:
            raise ValueError(f"latency_s of tier {self.name!r} must be >= 0, got {self.latency_s}")
        if self.bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s of tier {self.name!r} must be > 0, got {self.bytes_per_s}")


Tiers = Sequence[Tier]
"""Innermost first; each joins at least as many ranks as the one before."""


def slowest_hop(group: int, tiers: Tiers) -> Tier:
    """The tier that paces a flat ring over `group` consecutive ranks: the steps of a ring move in lockstep.

    Returns a tier with the largest latency and the smallest bandwidth among those that the ring crosses.
    """
    crossed = []
    for tier in tiers:
        crossed.append(tier)
        if tier.ranks >= group:
            break
    else:
        raise ValueError(f"group = {group} ranks, but the tiers join at most {tiers[-1].ranks}")
    return Tier(
        name=crossed[-1].name,
        ranks=group,
        latency_s=max(tier.latency_s for tier in crossed),
        bytes_per_s=min(tier.bytes_per_s for tier in crossed),
    )


RING_STEPS = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
"""Rounds of n - 1 steps that a ring of n ranks takes, by collective."""


def ring_seconds(kind: str, nbytes: float, group: int, tiers: Tiers) -> float:
    """Seconds of a ring collective on a whole buffer of `nbytes` bytes over `group` consecutive ranks.

    r (n - 1) (alpha + nbytes / n / beta), r = 2 for an all-reduce and 1 otherwise (Thakur et al. 2005, section 4;
    Patarasuk and Yuan 2009). For an all-gather `nbytes` counts the gathered buffer, for a reduce-scatter the full one.
    """
    if group == 1:
        return 0.0
    hop = slowest_hop(group, tiers)
    return RING_STEPS[kind] * (group - 1) * (hop.latency_s + nbytes / group / hop.bytes_per_s)
