"""Seconds and bytes of a collective on a cluster."""

from collections.abc import Sequence
from functools import lru_cache

from ..collectives.program import chunk_bounds, sent_elements
from ..collectives.ring import RING
from ..collectives.tiers import Tier, ring_seconds
from ..collectives.trace import Collective
from .program import play

DTYPE_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}

FIDELITIES = ("closed_form", "events")

MOST_RANKS_PLAYED = 512
"""A ring of n ranks has n (n - 1) messages per round: beyond this, playing each one takes minutes."""


def collective_bytes(collective: Collective) -> int:
    """Size of the whole buffer."""
    return collective.elements * DTYPE_BYTES[collective.dtype]


@lru_cache(maxsize=4096)
def sent_bytes(collective: Collective, group: int) -> int:
    """Bytes that rank 0 sends in a collective over `group` ranks: the sum over the sends of its ring program."""
    if group == 1:
        return 0
    program = RING[collective.kind].program(0, group)
    return sent_elements(program, chunk_bounds(collective.elements, group)) * DTYPE_BYTES[collective.dtype]


def collective_seconds(collective: Collective, group: int, tiers: Sequence[Tier], fidelity: str) -> float:
    """How long a collective takes on an otherwise idle network.

    Args:
        fidelity: "closed_form" for the alpha-beta formula, "events" to play every message of every rank.

    Raises:
        ValueError: "events" with more ranks than are worth playing.
    """
    nbytes = collective_bytes(collective)
    if fidelity == "closed_form" or group == 1:
        return ring_seconds(collective.kind, nbytes, group, tiers)
    if group > MOST_RANKS_PLAYED:
        raise ValueError(
            f"fidelity = 'events' plays every message of {group} ranks; allowed: at most {MOST_RANKS_PLAYED} ranks,"
            " use 'closed_form' for more"
        )
    return _played(collective.kind, nbytes, group, tuple(tiers))


@lru_cache(maxsize=4096)
def _played(kind: str, nbytes: int, group: int, tiers: tuple[Tier, ...]) -> float:
    return play([RING[kind].program(rank, group) for rank in range(group)], nbytes, tiers)
