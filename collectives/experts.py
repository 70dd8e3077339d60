"""Mixture of experts in numbers: how many tokens an expert takes, and what the exchange of tokens sends.

Every rank has room for C of its own tokens at each of the E experts, whoever has them, so that all sizes are known
beforehand: per layer and micro-step two all-to-alls forward (there, and back) and two backward, of E C D elements each,
of which (e-1)/e leave the rank (GShard, Lepikhin et al. 2021, section 3.2).
"""

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSize:
    """One mixture-of-experts layer, as the formulas see it.

    Attributes:
        tokens: of one rank in a micro-step, T.
        experts: on all ranks together.
        top_k: experts that each token visits.
        capacity_factor: room for tokens, in shares of what even choices would need.
        width: elements of a token, D.
    """

    tokens: int
    experts: int
    top_k: int
    capacity_factor: float
    width: int

    @property
    def capacity(self) -> int:
        """Tokens of one rank that an expert takes: ceil(factor k T / E), but no more than there are.

        Fedus et al. 2022, equation 3; of the rank's own tokens, so that no rank need know of another's choices.
        """
        return max(1, min(self.tokens, ceil(self.capacity_factor * self.top_k * self.tokens / self.experts)))


def exchanged_elements(size: ExpertsSize) -> int:
    """Elements of the four all-to-alls of a layer and micro-step, as a ledger counts them."""
    return 4 * size.experts * size.capacity * size.width


def exchanged_bytes(size: ExpertsSize, ranks: int, element_bytes: int) -> int:
    """Bytes of them that one of `ranks` expert-parallel ranks sends."""
    return exchanged_elements(size) * element_bytes * (ranks - 1) // ranks
