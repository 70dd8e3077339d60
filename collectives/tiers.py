"""A cluster as a collective sees it, and the closed-form time of a ring on it.

The alpha-beta model (Hockney 1994; Thakur, Rabenseifner and Gropp 2005, section 3): a message of n bytes takes
alpha + n / beta seconds, alpha a latency and beta a bandwidth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One level of the network, e.g. the switch inside a node or the fabric between nodes.

    Each block of the ranks that the tier before joins (each rank, in the first tier) has one link up into this tier and
    one link down from it. A message goes through the innermost tier that joins its two ranks, and through no other.

    Attributes:
        name: what a table or an error calls it ("intra_node", "inter_node").
        ranks: how many consecutive ranks it joins.
        latency_s: alpha, seconds from the moment when a message's last byte leaves to the moment when it has arrived.
        bytes_per_s: beta of a link, per direction (a node's NICs all together).
        start_s: of a whole collective that crosses this tier (launch, hand-shake), once; of several tiers the longest.
        local_bytes_per_s: at which a rank reads its part of the input from its own memory and writes its part of the
            result, where that does not hide behind the messages; infinite where it does.
    """

    name: str
    ranks: int
    latency_s: float
    bytes_per_s: float
    start_s: float = 0.0
    local_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks of tier {self.name!r} must be >= 1, got {self.ranks}")
        for field in ("latency_s", "start_s"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} of tier {self.name!r} must be >= 0, got {getattr(self, field)}")
        for field in ("bytes_per_s", "local_bytes_per_s"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} of tier {self.name!r} must be > 0, got {getattr(self, field)}")

    def hop_seconds(self, nbytes: float, sharing: int = 1) -> float:
        """A message of `nbytes` bytes, while `sharing` of that size leave through the same link."""
        return self.latency_s + nbytes * sharing / self.bytes_per_s


Tiers = Sequence[Tier]
"""Innermost first; each joins at least as many ranks as the one before."""


def crossed(group: int, tiers: Tiers) -> Tiers:
    """The tiers that `group` consecutive ranks, from the first of a block on, send through.

    Raises:
        ValueError: no tier joins them all.
    """
    for number, tier in enumerate(tiers):
        if tier.ranks >= group:
            return [
                tier
                for inside, tier in zip((1, *(t.ranks for t in tiers)), tiers[: number + 1], strict=False)
                if tier.ranks > inside
            ]
    raise ValueError(f"group = {group} ranks, but the tiers join at most {tiers[-1].ranks}")


RING_STEPS = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
"""Rounds of n - 1 steps that a ring of n ranks takes, by collective."""


def ring_seconds(kind: str, nbytes: float, group: int, tiers: Tiers) -> float:
    """Seconds of a ring collective on a whole buffer of `nbytes` bytes over `group` consecutive ranks.

    On one tier r (n - 1) (alpha + nbytes / n / beta), r = 2 for an all-reduce and 1 otherwise (Thakur et al. 2005,
    section 4; Patarasuk and Yuan 2009). For an all-gather `nbytes` counts the gathered buffer, for a reduce-scatter the
    full one. Exact on one tier, and on two of which the group fills whole blocks; elsewhere an upper bound: every step
    at the slowest hop.
    """
    if group == 1:
        return 0.0
    steps, chunk_bytes = RING_STEPS[kind] * (group - 1), nbytes / group
    met = crossed(group, tiers)
    if len(met) == 2 and group % met[0].ranks == 0:
        return _ring_over_blocks(steps, chunk_bytes, *met)
    return steps * max(tier.hop_seconds(chunk_bytes) for tier in met)


def _ring_over_blocks(steps: int, nbytes: float, near: Tier, far: Tier) -> float:
    """Seconds of `steps` steps round a ring, whose hops are near.ranks - 1 near ones and a far one, again and again.

    A rank begins a step when its own message of the step before has left and its neighbour's has arrived. So the time
    is the longest path of `steps` moves along the ring: a move is a hop (its latency and its message) or a pause (the
    message of a rank on the path). Paths pause where pauses are longest. What a hop gains over a pause adds up to a
    function that is linear between the ends of blocks, on a path that begins with the dearer kind of hop: a handful of
    paths has the longest among them.
    """
    block = near.ranks
    hop_near, hop_far = near.hop_seconds(nbytes), far.hop_seconds(nbytes)
    pause = nbytes / min(near.bytes_per_s, far.bytes_per_s)
    far_first, near_first = (steps - 1) // block, (steps - block + 1) // block
    paths = [
        (0, 1),
        (far_first * (block - 1), far_first + 1),
        (steps - 1 - far_first, far_first + 1),
        (block - 1, 0),
        ((near_first + 1) * (block - 1), near_first),
        (steps - steps // block, steps // block),
    ]
    return max(nears * hop_near + fars * hop_far + (steps - nears - fars) * pause for nears, fars in paths)
