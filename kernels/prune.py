"""Magnitude pruning: which weights, rows or heads are kept, and how many at which step.

The smallest by magnitude go (Han et al. 2015, Learning both Weights and Connections, section 3); of rows and heads
those of smallest 2-norm (Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.1, take the 1-norm). Of n,
exactly round(sparsity n) are pruned; of equal ones the later. A nan counts as largest: it is never pruned away unseen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .in_cache import check_floating


@dataclass(frozen=True, slots=True)
class CubicSchedule:
    """Sparsity that grows fast while much is redundant, and ever slower (Zhu and Gupta 2017, To Prune, equation 1).

    Attributes:
        final, initial: shares of what is pruned, at `last_step` and after it, and at `first_step` and before it.
    """

    final: float
    first_step: int
    last_step: int
    initial: float = 0.0

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            _check_sparsity(getattr(self, name), name)
        if self.last_step <= self.first_step:
            raise ValueError(f"last_step = {self.last_step}; allowed: above first_step = {self.first_step}")

    def sparsity(self, step: int) -> float:
        """s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3."""
        left = 1 - (step - self.first_step) / (self.last_step - self.first_step)
        return self.final + (self.initial - self.final) * min(1.0, max(0.0, left)) ** 3


def kept_weights(weight: Tensor, sparsity: float) -> Tensor:
    """A bool for each weight of a tensor of any shape: whether it is kept."""
    check_floating("weight", weight)
    return _largest(weight.detach().abs().flatten(), sparsity).view(weight.shape)


def kept_rows(weight: Tensor, sparsity: float) -> Tensor:
    """[R] bool for the rows of a weight [R, ...]: a whole output of a layer goes or stays."""
    check_floating("weight", weight)
    return _largest(_norms(weight.detach().flatten(1)), sparsity)


def kept_heads(weight: Tensor, sparsity: float, head_size: int, dim: int = 0) -> Tensor:
    """[H] bool for the heads that lie side by side along dimension `dim` of a weight [H E, D] or [D, H E].

    Raises:
        ValueError: a dimension that is not a multiple of `head_size`.
    """
    check_floating("weight", weight)
    if weight.shape[dim] % head_size:
        raise ValueError(
            f"head_size = {head_size}; allowed: a divisor of {weight.shape[dim]}, which dimension {dim} has"
        )
    heads = weight.detach().movedim(dim, 0).reshape(weight.shape[dim] // head_size, -1)
    return _largest(_norms(heads), sparsity)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))


def _largest(magnitudes: Tensor, sparsity: float) -> Tensor:
    """[n] bool: all but the round(sparsity n) smallest of `magnitudes` [n]."""
    _check_sparsity(sparsity, "sparsity")
    order = magnitudes.nan_to_num(nan=torch.inf).argsort(descending=True, stable=True)
    kept = torch.zeros_like(magnitudes, dtype=torch.bool)
    kept[order[: magnitudes.numel() - round(sparsity * magnitudes.numel())]] = True
    return kept


def _check_sparsity(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value}; allowed: from 0 (all are kept) to 1 (none is)")
