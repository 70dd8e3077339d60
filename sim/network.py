"""Seconds and bytes of a collective on a cluster."""

from dataclasses import replace
from functools import lru_cache
from math import prod

from ..collectives.algorithms import algorithm, names
from ..collectives.choice import choose, native
from ..collectives.costs import overhead_seconds, seconds
from ..collectives.groups import Placement, tiers_along
from ..collectives.program import Send
from ..collectives.shift import SHIFT, shift_seconds
from ..collectives.tiers import Tier, Tiers
from ..collectives.trace import Collective
from .groups import play_groups
from .topology import Topology, of_tiers

DTYPE_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}

FIDELITIES = ("closed_form", "events")

MOST_COUNTED = 1024
"""Programs whose sends are counted, all of them; of more ranks that are not alike,"""

FEW_COUNTED = 64
"""about so many are counted: making the programs of all would take longer than all the rest of a simulation."""


def collective_bytes(collective: Collective) -> int:
    """Size of the whole buffer."""
    return collective.elements * DTYPE_BYTES[collective.dtype]


def collective_seconds(
    collective: Collective, group: int | Placement, network: Topology | Tiers, fidelity: str
) -> float:
    """How long a collective takes on an otherwise idle network.

    A collective that forces no algorithm is the backend's own: of the algorithms that NCCL has, the fastest in closed
    form.

    Args:
        group: how the groups lie that do it, all at the same time; a number: one group, of so many first ranks.
        fidelity: "closed_form" for the alpha-beta formula, "events" to play every message.

    Raises:
        ValueError: no such algorithm, more ranks than the network joins, groups that straddle nodes, or "events" with
            more messages than are worth playing.
    """
    placed = _placed(group)
    if placed.size == 1:
        return 0.0
    kind, nbytes = collective.kind, collective_bytes(collective)
    if kind == SHIFT.kind:
        return _shifted(nbytes, placed, network, fidelity)
    name = _name(collective, placed, network)
    if fidelity == "closed_form":
        return _computed(kind, name, nbytes, placed.size, _seen(placed, _tiers(network)))
    return _played(kind, name, nbytes, placed, network if isinstance(network, Topology) else of_tiers(network))


def _shifted(nbytes: int, placed: Placement, network: Topology | Tiers, fidelity: str) -> float:
    seen = _seen(placed, _tiers(network))
    if fidelity == "closed_form":
        return shift_seconds(nbytes, placed.size, seen)
    topology = network if isinstance(network, Topology) else of_tiers(network)
    return shift_seconds(0, placed.size, [replace(tier, latency_s=0) for tier in seen]) + play_groups(
        SHIFT, placed, 2 * nbytes, topology
    )


def sent_bytes(collective: Collective, group: int | Placement, network: Topology | Tiers | None = None) -> int:
    """Bytes that a rank sends in a collective of a group, in the mean over the ranks, all chunks being equal.

    Where more than MOST_COUNTED ranks differ from each other, it is the mean over a sample of them.

    Args:
        network: on which an algorithm is chosen, if the collective forces none; None: the first of those that do this
            kind, a ring where there is one.
    """
    placed = _placed(group)
    if placed.size == 1:
        return 0
    if collective.kind == SHIFT.kind:
        return collective_bytes(collective)
    forced = collective.algorithm not in (None, "native")
    name = names(collective.kind)[0] if network is None and not forced else _name(collective, placed, network or ())
    sent, chunks = _sent_chunks(collective.kind, name, placed.size)
    return round(collective_bytes(collective) * sent / chunks)


def _placed(group: int | Placement) -> Placement:
    return Placement(group, 1, group) if isinstance(group, int) else group


def _name(collective: Collective, placed: Placement, network: Topology | Tiers) -> str:
    """The algorithm that does a collective."""
    if collective.algorithm is None or collective.algorithm == "native":
        return _chosen(collective.kind, collective_bytes(collective), placed.size, _seen(placed, _tiers(network)))
    return collective.algorithm


def _tiers(network: Topology | Tiers) -> tuple[Tier, ...]:
    return network.tiers if isinstance(network, Topology) else tuple(network)


@lru_cache(maxsize=4096)
def _seen(placed: Placement, tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
    return tiers_along(placed, tiers)


@lru_cache(maxsize=4096)
def _chosen(kind: str, nbytes: int, group: int, tiers: tuple[Tier, ...]) -> str:
    return choose(kind, nbytes, group, tiers, native(kind, group, tiers)).name


@lru_cache(maxsize=4096)
def _computed(kind: str, name: str, nbytes: int, group: int, tiers: tuple[Tier, ...]) -> float:
    return seconds(kind, name, nbytes, group, tiers)


@lru_cache(maxsize=4096)
def _played(kind: str, name: str, nbytes: int, placed: Placement, network: Topology) -> float:
    overhead_s = overhead_seconds(kind, nbytes, placed.size, _seen(placed, network.tiers))
    return overhead_s + play_groups(algorithm(kind, name), placed, nbytes, network)


@lru_cache(maxsize=4096)
def _sent_chunks(kind: str, name: str, group: int) -> tuple[int, int]:
    """(chunks that the ranks of one period send, chunks that they hold together), or some ranks all over the period."""
    used = algorithm(kind, name)
    period = used.period(group)
    # An odd stride takes ranks from all levels of a tree.
    ranks = range(0, period, 1 if period <= MOST_COUNTED else period // FEW_COUNTED | 1)
    programs = (used.program(rank, group) for rank in ranks)
    sent = sum(op.count for program in programs for step in program for op in step if isinstance(op, Send))
    return sent, len(ranks) * prod(used.cut(group))
