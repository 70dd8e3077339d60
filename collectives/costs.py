"""Seconds of every algorithm in closed form, without its program: a price takes microseconds at any number of ranks.

Thakur, Rabenseifner and Gropp (2005), Rabenseifner (2004), Chan, Heimlich, Purkayastha and van de Geijn (2007),
Patarasuk and Yuan (2009) and Sanders, Speck and Traff (2009) count steps and bytes on one tier; here every step is put
on the tier that it crosses, and lanes that share a block's link share its bandwidth. How exact that is:

| algorithm          | one tier                  | several tiers                                      |
|--------------------|---------------------------|----------------------------------------------------|
| ring               | exact                     | exact on two that the group fills, else a bound    |
| chain              | exact                     | exact                                              |
| direct             | exact                     | exact                                              |
| pairwise           | exact if even             | a bound                                            |
| halving_doubling   | exact for powers of two   | exact for powers of two; broadcast a bound         |
| recursive_doubling | exact for powers of two   | exact for powers of two                            |
| binomial_tree      | exact for powers of two   | exact for powers of two                            |
| hierarchical       | exact; a bound in pieces  | exact where the grid is that of the tiers, so too  |
| bidirectional_ring | exact                     | a bound: every step at the slowest hop             |
| double_binary_tree | a bound                   | a bound: every round at the pace of the busiest    |

A bound is an upper one. Where numbers of ranks are no powers of two it holds, too, for messages that share a link with
those of ranks that are a step ahead. Where the blocks of the tiers and the group or the grid do not nest (20 ranks on
nodes of 8, pairs on nodes of 3) it is an estimate: messages may meet in more ways than are counted.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from .tiers import Tier, Tiers, crossed, ring_seconds

Network = tuple[tuple[int, Tier], ...]
"""(ranks of a block that has a link into the tier, the tier) for the tiers that a group crosses, innermost first."""


def seconds(kind: str, name: str, nbytes: float, group: int, tiers: Tiers) -> float:
    """Seconds of algorithm `name` for a collective of `kind` on a whole buffer of `nbytes` bytes.

    Args:
        group: how many ranks, consecutive, from the first of a block on.

    Raises:
        ValueError: no tier joins the group, the algorithm does not do this collective, or its grid is of other ranks.
    """
    if group == 1:
        return 0.0
    family, options = _parsed(name)
    price = _PRICES.get((family, kind)) or _PRICES.get((family, "any"))
    if price is None:
        raise ValueError(f"algorithm = {name!r} has no price for {kind}; priced: {', '.join(priced(kind))}")
    network = _network(group, tuple(tiers))
    return overhead_seconds(kind, nbytes, group, tiers) + price(kind, nbytes, group, network, options)


def overhead_seconds(kind: str, nbytes: float, group: int, tiers: Tiers) -> float:
    """What a collective takes besides its messages, by whatever algorithm: its start, and its pass over local memory.

    A rank reads its input once and writes its result once: 2 n bytes in an all-reduce of n, n + n / ranks where one of
    the two is a rank's part.
    """
    if group == 1:
        return 0.0
    met = [tier for _, tier in _network(group, tuple(tiers))]
    start_s = max(tier.start_s for tier in met)
    return start_s + _LOCAL[kind](group) * nbytes / min(tier.local_bytes_per_s for tier in met)


_LOCAL: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda group: 2,
    "reduce_scatter": lambda group: 1 + 1 / group,
    "all_gather": lambda group: 1 + 1 / group,
    "broadcast": lambda group: 1,
    "reduce": lambda group: 2,
    "all_to_all": lambda group: 2,
}
"""Bytes that a rank reads and writes outside its messages, per byte of the whole buffer."""


def priced(kind: str) -> tuple[str, ...]:
    """The families that have a price for a collective."""
    return tuple(dict.fromkeys(family for family, does in _PRICES if does in (kind, "any")))


@lru_cache(maxsize=1024)
def _parsed(name: str) -> tuple[str, tuple[tuple[int, ...], int]]:
    """Family, grid (empty without one) and pieces of an algorithm's name."""
    family, *options = name.split("/")
    grid = tuple(map(int, options.pop(0).split("x"))) if family == "hierarchical" and options else ()
    return family, (grid, int(options[0]) if options else 1)


@lru_cache(maxsize=1024)
def _network(group: int, tiers: tuple[Tier, ...]) -> Network:
    met = crossed(group, tiers)
    return tuple(zip((1, *(tier.ranks for tier in met)), met, strict=False))


Options = tuple[tuple[int, ...], int]
Price = Callable[[str, float, int, Network, Options], float]


def _hop(nbytes: float, stride: int, span: int, network: Network, alone: bool = False) -> float:
    """The slowest message of a step in which ranks send `nbytes` bytes each to one `stride` away in their span.

    Args:
        span: ranks r and s may talk only if r // span == s // span.
        alone: one rank of a block talks, not all that could.
    """
    if not _nested(stride, span, network):
        return _any_hop(nbytes, network, alone)
    lanes = 1 if alone else stride
    return max(tier.hop_seconds(nbytes, min(block, lanes)) for block, tier in _between(stride, span, network))


def _any_hop(nbytes: float, network: Network, alone: bool = False) -> float:
    """The slowest message of a step in which all ranks of a block may send out of it, through any tier."""
    return max(tier.hop_seconds(nbytes, 1 if alone else block) for block, tier in network)


@lru_cache(maxsize=4096)
def _between(stride: int, span: int, network: Network) -> Network:
    """What messages cross whose ranks are `stride` or more apart and of the same span, if blocks and spans nest."""
    return tuple((block, tier) for block, tier in network if block < span and tier.ranks > stride)


@lru_cache(maxsize=4096)
def _nested(stride: int, span: int, network: Network) -> bool:
    """Whether every block is a whole number of strides and of spans, or the other way round."""
    return all(max(block, each) % min(block, each) == 0 for block, _ in network for each in (stride, span))


def _core(group: int) -> int:
    """The largest power of two that fits."""
    return 1 << (group.bit_length() - 1)


def _exchange(nbytes: float, distance: int, group: int, network: Network, alone: bool = False) -> float:
    """A step in which partners are `distance` apart; where the core's ranks have gaps, up to the whole group."""
    if group == _core(group):
        return _hop(nbytes, distance, 2 * distance, network, alone)
    return _any_hop(nbytes, network)


def _distances(core: int) -> Iterator[int]:
    return (1 << bit for bit in range(core.bit_length() - 1))


def _ring(kind: str, nbytes: float, group: int, network: Network, options: Options) -> float:
    return ring_seconds(kind, nbytes, group, [tier for _, tier in network])


def _bidirectional_ring(kind: str, nbytes: float, group: int, network: Network, options: Options) -> float:
    """As many steps as a ring; a rank's two half chunks share its link. Each rank waits for both its neighbours."""
    rounds = 2 if kind == "all_reduce" else 1
    return rounds * (group - 1) * max(tier.hop_seconds(nbytes / group) for _, tier in network)


def _chain(kind: str, nbytes: float, group: int, network: Network, options: Options) -> float:
    """The first piece takes every hop, the others follow at the pace of the slowest link."""
    pieces = options[1]
    piece = nbytes / pieces
    first = 0.0
    for block, tier in network:
        hops = (group - 1) // block - (group - 1) // tier.ranks
        first += hops * tier.hop_seconds(piece)
    return first + (pieces - 1) * max(piece / tier.bytes_per_s for _, tier in network)


def _direct(kind: str, nbytes: float, group: int, network: Network, options: Options) -> float:
    """One step: all messages of a block leave through its link; each carries a part, or all in an all-reduce."""
    part = nbytes if kind == "all_reduce" else nbytes / group
    slowest = 0.0
    for block, tier in network:
        joined = min(tier.ranks, group)
        inside = max((min(block, joined), joined % block), key=lambda ranks: ranks * (joined - ranks))
        slowest = max(slowest, tier.hop_seconds(part, inside * (joined - inside)))
    return slowest


def _pairwise(nbytes: float, stride: int, size: int, network: Network) -> float:
    """An all-to-all of `size` positions `stride` apart, in rounds of pairs.

    Even in number and inside one tier all are busy in each of size - 1 rounds, in step. Else somebody is in each of
    `size` rounds, some are ahead, and at most every other message finds its link half taken by one of these.
    """
    span = stride * size
    met = _between(stride, span, network) if _nested(stride, span, network) else network
    if size <= 2 or (size % 2 == 0 and len(met) == 1):
        return (size - 1) * _hop(nbytes / size, stride, span, network)
    busy = (3 * size + 1) / 2 * nbytes / size
    return max(size * tier.latency_s + busy * block / tier.bytes_per_s for block, tier in met)


def _pairwise_all_to_all(kind: str, nbytes: float, group: int, network: Network, options: Options) -> float:
    return _pairwise(nbytes, 1, group, network)


def _halving_doubling(kind: str, nbytes: float, group: int, network: Network, options: Options) -> float:
    """Halvings and doublings in the core, after and before those who stand aside give and get.

    Thakur et al. 2005, section 4: log2 n latencies and (n - 1) / n of the buffer each way.
    """
    core = _core(group)

    def one_way(network: Network, alone: bool = False) -> float:
        if kind == "all_reduce":  # neighbours exchange most
            sizes = {distance: nbytes / (2 * distance) for distance in _distances(core)}
        elif kind in ("reduce_scatter", "all_gather"):  # the farthest do; a position stands for one rank's part, or two
            sizes = {d: nbytes * min(2 * d, d + group - core) / group for d in _distances(core)}
        else:
            sizes = {distance: nbytes * distance / core for distance in _distances(core)}
        return sum(_exchange(size, distance, group, network, alone) for distance, size in sizes.items())

    there, back = one_way(network), 0.0
    if kind == "all_reduce":
        back = there
    elif kind in ("broadcast", "reduce"):
        back = one_way(network, alone=True)
    return there + back + _aside(kind, nbytes, group, network, one_way)


def _aside(kind: str, nbytes: float, group: int, network: Network, early: Callable[[Network], float]) -> float:
    """What an odd rank gives to the even one before it, in two halves if it must be added up, and gets back.

    Args:
        early: of a network, what the core sends before the even ranks are ready for it: it shares their links.
    """
    if group == _core(group):
        return 0.0
    part = nbytes / group
    given = {"all_gather": [part], "broadcast": []}.get(kind, [nbytes / 2, nbytes / 2])
    got = {"reduce_scatter": [part], "reduce": []}.get(kind, [nbytes])
    late = early(_without_latency(network)) if given else 0.0
    return late + sum(_exchange(size, 1, group, network) for size in given + got)


@lru_cache(maxsize=1024)
def _without_latency(network: Network) -> Network:
    return tuple((block, replace(tier, latency_s=0.0)) for block, tier in network)


def _recursive_doubling(kind: str, nbytes: float, group: int, network: Network, options: Options) -> float:
    """Log2 n exchanges of the whole buffer, and two more for those who stand aside."""

    def inside(network: Network) -> float:
        return sum(_exchange(nbytes, distance, group, network) for distance in _distances(_core(group)))

    if group == _core(group):
        return inside(network)
    return inside(network) + 2 * _exchange(nbytes, 1, group, network) + inside(_without_latency(network))


def _binomial(nbytes: float, group: int, network: Network, stride: int = 1, parts: bool = False) -> float:
    """A binomial broadcast, or with `parts` scatter, from the first of `group` ranks `stride` apart; backwards too.

    Rank r is reached by a message for each bit set in r, the highest first, and waits for one that its parent sends
    elsewhere for each bit that is not. The longest way goes along the last rank's bits, waits instead of taking one of
    them, and takes every one below: past there no subtree is cut short.
    """
    span = stride * group
    if _nested(stride, span, network):
        network = _between(stride, span, network)
    last, longest, along = group - 1, 0.0, 0.0
    below = [0.0]
    for bit in range(last.bit_length()):
        size = nbytes * (1 << bit) / group if parts else nbytes
        below.append(below[-1] + _hop(size, stride << bit, stride << bit + 1, network, alone=True))
    for bit in reversed(range(last.bit_length())):
        if last >> bit & 1:
            size = nbytes * (last % (1 << bit) + 1) / group if parts else nbytes
            hop = _hop(size, stride << bit, stride << bit + 1, network, alone=True)
            wait = min(hop, max(size / tier.bytes_per_s for _, tier in network))
            longest = max(longest, along + wait + below[bit])
            along += hop
    return max(longest, along)


def _binomial_tree(kind: str, nbytes: float, group: int, network: Network, options: Options) -> float:
    whole = _binomial(nbytes, group, network)
    match kind:
        case "broadcast" | "reduce":
            return whole
        case "all_reduce":
            return 2 * whole
        case _:
            return whole + _binomial(nbytes, group, network, parts=True)


def _double_binary_tree(kind: str, nbytes: float, group: int, network: Network, options: Options) -> float:
    """Each round at the pace of the busiest rank (Sanders et al. 2009, section 3, with rounds that wait for messages).

    A rank works in one tree, where it has two children, and is a leaf in the other: in a round it sends 2 messages each
    way. Of a block of ranks no more than 4 leave each way if blocks are powers of two, as whole subtrees lie inside;
    else up to two for each height of each tree. An all-reduce goes up, then both ways, then down.
    """
    pieces = options[1]
    height = (group if kind == "all_reduce" else 2 * (group - 1)).bit_length() - 1

    def round_seconds(ways: int) -> float:
        slowest = 0.0
        for block, tier in network:
            whole = block == _core(block) and group % block == 0
            leaving = ways * min(block * min(2, group - 1), 4 if whole else 4 * (height + 1))
            slowest = max(slowest, tier.hop_seconds(nbytes / (2 * pieces), leaving))
        return slowest

    if kind == "all_reduce":
        return (2 * height - 1) * round_seconds(1) + pieces * round_seconds(2)
    return (height + pieces - 1) * round_seconds(1 if group > 2 else 2)


def _hierarchical(kind: str, nbytes: float, group: int, network: Network, options: Options) -> float:
    """Phase after phase; with pieces, those that meet share the links of their tier, and the slowest sets the pace."""
    grid, pieces = options
    if math.prod(grid) != group:
        raise ValueError(f"a grid of {'x'.join(map(str, grid))} is for {math.prod(grid)} ranks, not for {group}")
    strides = [math.prod(grid[:tier]) for tier in range(len(grid) + 1)]
    tiers = list(zip(grid, strides, strides[1:], strict=False))
    match kind:
        case "all_to_all":
            return sum(_pairwise(nbytes, stride, size, network) for size, stride, _ in tiers)
        case "broadcast" | "reduce":
            return sum(_binomial(nbytes, size, network, stride) for size, stride, _ in tiers)
    once = [(size - 1, stride, span) for size, stride, span in tiers]
    if kind == "all_reduce":
        last, stride, span = once[-1]
        once = [*once[:-1], (2 * last, stride, span), *reversed(once[:-1])]
    if pieces == 1:
        return sum(steps * _hop(nbytes / span, stride, span, network) for steps, stride, span in once)
    return _overlapped(nbytes / pieces, pieces, once, network)


def _overlapped(nbytes: float, pieces: int, phases: list[tuple[int, int, int]], network: Network) -> float:
    """Pieces that start the longest phase's steps apart: between two changes of phase all steps cost the same."""
    distance = max(steps for steps, _, _ in phases)
    starts, at = [], 0
    for steps, _, _ in phases:
        starts.append(at)
        at += steps
    running = [
        (piece * distance + start, piece * distance + start + steps, stride, span)
        for piece in range(pieces)
        for start, (steps, stride, span) in zip(starts, phases, strict=True)
    ]
    changes = sorted({moment for start, stop, _, _ in running for moment in (start, stop)})
    total = 0.0
    for start, stop in pairwise(changes):
        meeting: dict[tuple[int, int], int] = {}
        for begins, ends, stride, span in running:
            if begins <= start and ends >= stop:
                meeting[stride, span] = meeting.get((stride, span), 0) + 1
        hops = [_hop(count * nbytes / span, stride, span, network) for (stride, span), count in meeting.items()]
        total += (stop - start) * (max(hops) if _apart(meeting, network) else sum(hops))
    return total


def _apart(spans: Collection[tuple[int, int]], network: Network) -> bool:
    """Whether phases that run at once use different links: each has tiers of its own."""
    used = [tier.name for stride, span in spans for _, tier in _between(stride, span, network)]
    return len(used) == len(set(used)) and all(_nested(stride, span, network) for stride, span in spans)


_PRICES: dict[tuple[str, str], Price] = {
    **{("ring", kind): _ring for kind in ("all_reduce", "reduce_scatter", "all_gather")},
    **{("bidirectional_ring", kind): _bidirectional_ring for kind in ("all_reduce", "reduce_scatter", "all_gather")},
    **{
        ("halving_doubling", kind): _halving_doubling
        for kind in ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce")
    },
    ("recursive_doubling", "all_reduce"): _recursive_doubling,
    **{
        ("binomial_tree", kind): _binomial_tree
        for kind in ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce")
    },
    **{("direct", kind): _direct for kind in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")},
    ("pairwise", "all_to_all"): _pairwise_all_to_all,
    **{("chain", kind): _chain for kind in ("broadcast", "reduce")},
    **{("double_binary_tree", kind): _double_binary_tree for kind in ("all_reduce", "broadcast", "reduce")},
    ("hierarchical", "any"): _hierarchical,
}
"""By family and collective."""
