"""How ranks of one job may differ: nodes with another GPU or slower links, and ranks that are slow at everything."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from random import Random
from typing import NamedTuple

from .processor import Processor, require


class Pace(NamedTuple):
    """How fast a rank computes: `factor` times the seconds that its processor takes."""

    processor: Processor
    factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesLike:
    """Table [[nodes_like]] of a cluster file, resolved: nodes that differ from the others.

    Attributes:
        first: number of the first one, from 0, in the order in which a job takes nodes.
        count: how many follow each other.
        processor: what they have; None: the cluster's.
        inter_node_share: of the cluster's bandwidth between nodes that theirs have, e.g. 0.5 with half the NICs down.
    """

    first: int = 0
    count: int = 1
    processor: Processor | None = None
    inter_node_share: float = 1.0

    def __post_init__(self) -> None:
        require(self.first >= 0, "nodes_like.first", self.first, ">= 0")
        require(self.count >= 1, "nodes_like.count", self.count, ">= 1")
        share = self.inter_node_share
        require(0 < share <= 1, "nodes_like.inter_node_share", share, "> 0 and <= 1")

    @property
    def nodes(self) -> range:
        return range(self.first, self.first + self.count)


def check_apart(tables: Iterable[NodesLike]) -> None:
    """Raises ValueError where a node is in two tables."""
    seen: set[int] = set()
    for table in tables:
        twice = seen.intersection(table.nodes)
        if twice:
            raise ValueError(f"nodes_like: node {min(twice)} is in two tables; allowed: each node in one at most")
        seen.update(table.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stragglers:
    """Ranks that compute slowly all the time, drawn at random.

    Attributes:
        ranks: below 1 the share of all ranks, rounded; from 1 on how many.
        factor: how many times as long they compute.
        seed: of the draw.
    """

    ranks: float = 0.0
    factor: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        whole = self.ranks < 1 or float(self.ranks).is_integer()
        require(
            0 <= self.ranks < inf and whole, "slow_ranks", self.ranks, "a share below 1, or a whole number of ranks"
        )
        require(1 <= self.factor < inf, "slow_factor", self.factor, ">= 1 and finite")

    def drawn(self, world: int) -> tuple[int, ...]:
        """The slow ones of so many ranks, ascending.

        Raises:
            ValueError: more than there are.
        """
        count = round(self.ranks * world) if self.ranks < 1 else int(self.ranks)
        if count > world:
            raise ValueError(f"slow_ranks = {count}; allowed: at most the {world} ranks of the job")
        if self.factor == 1.0:
            return ()
        return tuple(sorted(Random(self.seed).sample(range(world), count)))
