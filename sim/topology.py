"""The network as links: which ones a message takes, and how late it is.

Ranks are numbered so that neighbours are near: node by node, leaf by leaf. Each level of the network joins blocks of
ranks, and each block has one link up into the level and one link down. So a message goes up the links of its source
and down those of its target, and the innermost level that joins the two says which ones, and what the latency is.
"""

from dataclasses import dataclass
from math import lcm

import numpy as np

from ..collectives.tiers import Tier, Tiers
from .flows import Floats, Integers
from .hardware import Cluster


@dataclass(frozen=True, slots=True)
class Blocks:
    """Ranks side by side in blocks of `ranks`; a block may be split in `lanes`, by a rank's place among `lanes_over`.

    `Blocks(8)` are nodes of 8 ranks, `Blocks(8, 4, 8)` the 4 NICs of each, `Blocks(32, 4, 8)` the 4 rails of each pod
    of 4 such nodes.
    """

    ranks: int
    lanes: int = 1
    lanes_over: int = 1

    def of(self, ranks: Integers) -> Integers:
        """[...] number of the block, or of the lane, that each rank belongs to."""
        return ranks // self.ranks * self.lanes + ranks % self.lanes_over * self.lanes // self.lanes_over


@dataclass(frozen=True, slots=True)
class Link:
    """A link up and a link down, each of `bytes_per_s`, for every block."""

    name: str
    blocks: Blocks
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Level:
    """How a message travels between two ranks of the same block of `joins`.

    Attributes:
        links: that the message takes up from its source, and in reverse order down to its target.
        latency_s: from the moment when its last byte leaves to the moment when it arrives.
    """

    joins: Blocks
    latency_s: float
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """A network of links. Links are numbered, without end: those of any number of ranks.

    Attributes:
        levels: innermost first.
        tiers: the same network as the closed forms see it.
    """

    levels: tuple[Level, ...]
    tiers: tuple[Tier, ...]

    @property
    def links(self) -> tuple[Link, ...]:
        """The kinds of links, each once."""
        return tuple(dict.fromkeys(link for level in self.levels for link in level.links))

    def period(self, world: int) -> int:
        """The number of ranks after which the network under `world` ranks repeats; `world` if it never does."""
        blocks = {level.joins for level in self.levels} | {link.blocks for link in self.links}
        sizes = [min(block.ranks, world) for block in blocks if block.ranks < world or block.lanes > 1]
        period = lcm(*sizes)
        return period if world % period == 0 else world

    def route(self, source: int, target: int) -> tuple[int, ...]:
        """The links of a message from `source` to `target`, in the order in which it takes them."""
        links, _ = self.routes(np.array([source]), np.array([target]))
        return tuple(int(link) for link in links[0] if link >= 0)

    def latency(self, source: int, target: int) -> float:
        """Seconds by which a message from `source` arrives at `target` after it has left."""
        return float(self.routes(np.array([source]), np.array([target]))[1][0])

    def routes(self, sources: Integers, targets: Integers, period: int | None = None) -> tuple[Integers, Floats]:
        """Links and latency of many messages.

        Args:
            sources, targets: [messages] ranks.
            period: count ranks, and with them links, modulo this: a message that leaves the first `period` ranks takes
                the links down that its image takes which arrives there.

        Returns:
            ([messages, width] links, filled up with -1; [messages] seconds)

        Raises:
            ValueError: two ranks that no level joins.
        """
        level = self._level(sources, targets)
        kinds = self.links
        width = max(len(each.links) for each in self.levels)
        links = np.full((len(sources), 2 * width), -1)
        for number, each in enumerate(self.levels):
            taken = level == number
            ups, downs = (ends[taken] if period is None else ends[taken] % period for ends in (sources, targets))
            for place, link in enumerate(each.links):
                links[taken, place] = 2 * link.blocks.of(ups) * len(kinds) + kinds.index(link)
                links[taken, -1 - place] = (2 * link.blocks.of(downs) + 1) * len(kinds) + kinds.index(link)
        return links, np.array([each.latency_s for each in self.levels])[level]

    def capacities(self, links: Integers) -> Floats:
        """[...] bytes/s of links."""
        kinds = self.links
        return np.array([link.bytes_per_s for link in kinds])[links % len(kinds)]

    def _level(self, sources: Integers, targets: Integers) -> Integers:
        """[messages] number of the innermost level that joins two ranks."""
        level = np.full(len(sources), -1)
        for number, each in reversed(list(enumerate(self.levels))):
            level[each.joins.of(sources) == each.joins.of(targets)] = number
        if (apart := np.flatnonzero(level < 0)).size:
            raise ValueError(
                f"no tier joins ranks {sources[apart[0]]} and {targets[apart[0]]}: "
                f"the widest joins {self.levels[-1].joins.ranks} ranks"
            )
        return level


def of_tiers(tiers: Tiers) -> Topology:
    """The network that the closed forms price: at each tier one link up and one down for each block of the tier below.

    A message between ranks that tier t is the first to join takes the links of tier t alone: what lies below feeds
    them, and a node's link stands for its NICs all together.
    """
    below = [1, *(tier.ranks for tier in tiers)]
    return Topology(
        levels=tuple(
            Level(Blocks(tier.ranks), tier.latency_s, (Link(tier.name, Blocks(ranks), tier.bytes_per_s),))
            for ranks, tier in zip(below, tiers, strict=False)
        ),
        tiers=tuple(tiers),
    )


def topology(cluster: Cluster, gpus: int) -> Topology:
    """The network under a job of `gpus` ranks, node by node.

    Without a table [fabric] it is `of_tiers`. With one, each NIC is a link of its own: GPU g of a node uses NIC
    g * nics // gpus_per_node (a GPU with several NICs uses them as one). NICs meet in a leaf switch and leaves in a
    spine, whose links carry the leaf's whole bandwidth divided by the oversubscription.

    Raises:
        ValueError: the job does not fit in the cluster.
    """
    tiers = cluster.tiers(gpus)
    wiring, inter, node = cluster.fabric, cluster.inter_node, cluster.gpus_per_node
    if wiring is None or inter is None:
        return of_tiers(tiers)
    nics = min(inter.nics or 1, node)
    nic = Link("nic", Blocks(node, nics, node), inter.achieved_bytes_per_s / nics)
    levels = [Level(Blocks(node), cluster.intra_node.latency_s, of_tiers(tiers).levels[0].links)]
    if wiring.nodes_per_leaf is not None:
        pod = node * wiring.nodes_per_leaf
        leaves = Blocks(pod, nics, node) if wiring.kind == "rail" else Blocks(pod)
        leaf_bytes_per_s = inter.achieved_bytes_per_s * wiring.nodes_per_leaf / leaves.lanes
        leaf = Link("leaf", leaves, leaf_bytes_per_s / wiring.oversubscription)
        levels += [Level(leaves, inter.latency_s, (nic,)), Level(Blocks(tiers[-1].ranks), inter.latency_s, (nic, leaf))]
    else:
        levels.append(Level(Blocks(tiers[-1].ranks), inter.latency_s, (nic,)))
    return Topology(levels=tuple(levels), tiers=tiers)
