"""Which ranks form which groups: a mesh of named axes over the ranks, and the network as a strided group sees it.

The innermost axis joins neighbours, so it lies inside a node where a node is large enough; the ranks of an outer axis
are as far apart as the axes inside it are large.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from .tiers import Tier, Tiers

JOINED = "*"
"""Between the names of axes that make one group together: "shard*replica" are all data-parallel ranks."""


PIPELINE, TIED = "pipeline", "tied"
"""The axis of stages, and that of the two stages of each pipeline that hold one parameter together."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How the groups of an axis lie among `world` ranks: `size` ranks each, `stride` apart, all at work at once.

    The groups are blocks of size * stride consecutive ranks, each block `stride` groups side by side.
    """

    size: int
    stride: int
    world: int

    @property
    def span(self) -> int:
        """Ranks of a block: from the first rank of a group to the first one of the group that follows in its lane."""
        return self.size * self.stride

    def group(self, rank: int) -> tuple[int, ...]:
        """The ranks of the group that `rank` is in, ascending."""
        first = rank // self.span * self.span + rank % self.stride
        return tuple(range(first, first + self.span, self.stride))


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks on a grid: rank = position on the first axis + its size * (position on the second + ...).

    Attributes:
        axes: (name, size), innermost first.

    Raises:
        ValueError: no axis, a size below 1, or a name that is empty, given twice or contains "*".
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if not names or len(set(names)) < len(names) or any(not name or JOINED in name for name in names):
            raise ValueError(f"axes = {names}; allowed: one or more different names without {JOINED!r}")
        for name, size in self.axes:
            if size < 1:
                raise ValueError(f"axis {name!r} has size {size}; allowed: at least 1")

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> "Mesh":
        return cls(tuple(sizes.items()))

    @property
    def world(self) -> int:
        return prod(size for _, size in self.axes)

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.axes)

    def position(self, rank: int) -> dict[str, int]:
        """The coordinates of a rank by axis."""
        place, found = rank, {}
        for name, size in self.axes:
            place, found[name] = divmod(place, size)
        return found

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All groups of an axis, or of several that are joined by "*": ranks that agree on all other axes, ascending.

        Raises:
            ValueError: no such axis.
        """
        inside = self._named(axis)
        steps, stride = {}, 1
        for name, size in self.axes:
            steps[name] = range(0, size * stride, stride)
            stride *= size
        outside = [name for name, _ in self.axes if name not in inside]
        members = [sum(offsets) for offsets in product(*(steps[name] for name in reversed(inside)))]
        firsts = [sum(offsets) for offsets in product(*(steps[name] for name in reversed(outside)))]
        return tuple(tuple(first + member for member in members) for first in firsts)

    def placement(self, axis: str) -> Placement:
        """How the groups of an axis lie, or of several neighbouring ones.

        Two stages that are tied count as neighbours: what lies between them is as fast between any two.

        Raises:
            ValueError: no such axis, or joined axes with another one between them, whose ranks have no single stride.
        """
        if axis == TIED:
            return replace(self.placement(PIPELINE), size=2)
        inside, names = self._named(axis), [name for name, _ in self.axes]
        first = names.index(inside[0])
        if tuple(names[first : first + len(inside)]) != inside:
            raise ValueError(f"axis {axis!r} joins axes that are not neighbours among {', '.join(names)}")
        sizes = [size for _, size in self.axes]
        return Placement(prod(sizes[first : first + len(inside)]), prod(sizes[:first]), self.world)

    def _named(self, axis: str) -> tuple[str, ...]:
        """The axes that a name joins, innermost first."""
        wanted = axis.split(JOINED)
        known = tuple(name for name, _ in self.axes)
        if not set(wanted) <= set(known):
            raise ValueError(f"axis {axis!r}; the mesh has {', '.join(known)}, and neighbours joined by {JOINED!r}")
        return tuple(name for name in known if name in wanted)


def tiers_along(placement: Placement, tiers: Tiers) -> tuple[Tier, ...]:
    """The network as one group of a placement sees it, while its siblings do the same at the same time.

    A tier joins as many ranks of a group as lie in its block. A link that serves a block of B ranks is shared evenly by
    all groups that have a rank behind it: min(stride, B) of them. So the groups of a node's 8 ranks with a partner each
    in other nodes get an eighth of its NICs each, while ranks keep their own links inside the node to themselves.

    Raises:
        ValueError: groups that straddle blocks, of which some would be slower than others.
    """
    if placement.stride == 1 and placement.size == placement.world:
        return tuple(tiers)
    seen, block = [], 1
    for tier in tiers:
        for part in (placement.stride, placement.span):
            joined = tier.ranks < placement.world and part < placement.world
            if joined and max(part, tier.ranks) % min(part, tier.ranks):
                raise ValueError(
                    f"groups of {part} consecutive ranks straddle {tier.name!r} blocks of {tier.ranks};"
                    " allowed: a divisor or a multiple of that"
                )
        shared = min(placement.stride, block)
        seen.append(replace(tier, ranks=max(1, tier.ranks // placement.stride), bytes_per_s=tier.bytes_per_s / shared))
        block = tier.ranks
    return tuple(seen)
