"""A shift: every rank of a ring hands a buffer to the next one, all at once. One step, of ring attention above all.

It stands outside the catalogue of algorithms.py: there is one way to do it, and nothing to choose.
"""

from .program import Algorithm, Program, Recv, Send
from .tiers import Tiers, crossed

KIND = "shift"
"""What a trace calls it; its elements are those that a rank sends."""


def shift_program(rank: int, world: int) -> Program:
    """Chunk 0 goes to the next rank, chunk 1 comes from the one before."""
    return ((Send((rank + 1) % world, 0), Recv((rank - 1) % world, 1)),)


def _two_halves(world: int) -> tuple[int, ...]:
    return (2,)


def _all_alike(world: int) -> int:
    return 1


SHIFT = Algorithm(KIND, "p2p", shift_program, _two_halves, _all_alike)


def shift_seconds(nbytes: float, group: int, tiers: Tiers) -> float:
    """Seconds of a shift of `nbytes` bytes per rank over `group` consecutive ranks: its slowest hop, alpha + n / beta.

    Each link is one rank's: of a block of ranks only the last one's message leaves, and only the first one's comes.

    Raises:
        ValueError: no tier joins all ranks.
    """
    if group == 1:
        return 0.0
    met = crossed(group, tiers)
    return max(tier.start_s for tier in met) + max(tier.hop_seconds(nbytes) for tier in met)
