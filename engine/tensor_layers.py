"""Layers whose weights tensor ranks have cut among them, and the loss of logits that nobody holds whole.

A layer takes over the parameters of the one that it stands for, which have been cut in place (engine/tensor_plan.py),
under the same names. Weights are [out, in], or [in, out] where `transposed`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from .tensor_functions import TensorRanks, enter, gather_features, leave, total

IGNORED = -100
"""Target of a token that does not count, as in torch."""


@dataclass(frozen=True, slots=True)
class Rows:
    """This rank's rows of a vocabulary.

    Attributes:
        first: number of its first row.
        count: rows that it has of the vocabulary, at least one; padding follows.
        whole: rows of the vocabulary.
    """

    first: int
    count: int
    whole: int


class CutLinear(nn.Module):
    """A linear layer of which this rank has a part."""

    bias: nn.Parameter | None

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, ranks: TensorRanks, *, transposed: bool
    ) -> None:
        super().__init__()
        self.weight, self.ranks, self.transposed = weight, ranks, transposed
        self.register_parameter("bias", bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, ranks={self.ranks.group.world}"

    @property
    def multiplied_bias(self) -> nn.Parameter | None:
        """The bias, if it is part of the product."""
        return self.bias

    def product(self, x: Tensor) -> Tensor:
        """[..., out] of [..., in]; pipelines may put another one in its place (engine/deferred.py)."""
        return functional.linear(x, self.weight.t() if self.transposed else self.weight, self.multiplied_bias)


class ColumnLinear(CutLinear):
    """A linear layer cut along its outputs: [..., S, in] to [..., S, out / t].

    Args:
        enters: its input comes from outside of the region; else a module around it has entered.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        ranks: TensorRanks,
        *,
        transposed: bool = False,
        enters: bool = True,
    ) -> None:
        super().__init__(weight, bias, ranks, transposed=transposed)
        self.enters = enters

    def forward(self, x: Tensor) -> Tensor:
        return self.product(enter(x, self.ranks) if self.enters else x)


class RowLinear(CutLinear):
    """A linear layer cut along its inputs: [..., S, in / t] to the sum over the ranks [..., S, out], of which each has
    [..., S / t, out] with sequence parallelism. The bias is whole and added once, to the sum.
    """

    @property
    def multiplied_bias(self) -> None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        summed = leave(self.product(x), self.ranks)
        return summed if self.bias is None else summed + self.bias.to(summed.dtype)  # fp32 under autocast


class VocabEmbedding(nn.Module):
    """An embedding cut along the vocabulary: tokens [...] to the whole [..., D] on all ranks.

    Args:
        padding_idx: the row of the whole vocabulary that gets no gradient.
    """

    def __init__(self, weight: nn.Parameter, rows: Rows, ranks: TensorRanks, padding_idx: int | None = None) -> None:
        super().__init__()
        self.weight, self.rows, self.ranks = weight, rows, ranks
        here = padding_idx is not None and 0 <= padding_idx - rows.first < rows.count
        self.padding_idx = padding_idx - rows.first if padding_idx is not None and here else None

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.rows.first
        elsewhere = (local < 0) | (local >= self.rows.count)
        found = functional.embedding(local.masked_fill(elsewhere, 0), self.weight, self.padding_idx)
        return total(found.masked_fill(elsewhere[..., None], 0.0), self.ranks)


class VocabHead(CutLinear):
    """Logits [..., S, V / t] cut along the vocabulary, with padding.

    Args:
        enters: as for ColumnLinear.

    Attributes:
        keeps_cut: return them so; else they are gathered: [..., S, V] on all ranks.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        rows: Rows,
        ranks: TensorRanks,
        *,
        enters: bool = True,
    ) -> None:
        super().__init__(weight, bias, ranks, transposed=False)
        self.rows, self.enters, self.keeps_cut = rows, enters, False

    def forward(self, x: Tensor) -> Tensor:
        logits = self.product(enter(x, self.ranks) if self.enters else x)
        self.ranks.randomness.leave()
        return logits if self.keeps_cut else whole_logits(logits, self.rows, self.ranks)


def whole_logits(logits: Tensor, rows: Rows, ranks: TensorRanks) -> Tensor:
    """[..., V] of [..., V / t], without padding."""
    return gather_features(logits, ranks)[..., : rows.whole]


def vocabulary_cross_entropy(
    logits: Tensor, targets: Tensor, rows: Rows, ranks: TensorRanks, *, ignored: int = IGNORED
) -> Tensor:
    """Cross-entropy of each token, from logits that are cut along the vocabulary; 0 where the target is `ignored`.

    With m the largest logit of a token: log sum exp(logit - m) - (logit of the target - m), of which the maximum, the
    sum and the target's logit are reduced over the ranks (Shoeybi et al. 2019, section 3): 3 numbers per token.

    Args:
        logits: [N, V / t], in the precision in which the loss is to be.
        targets: [N], in numbers of the whole vocabulary.

    Returns:
        [N], the same on all ranks.
    """
    losses: Tensor = _CrossEntropy.apply(logits, targets, rows, ranks, ignored)
    return losses


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rows: Rows, ranks: TensorRanks, ignored: int) -> Tensor:
        largest = logits[:, : rows.count].amax(-1)
        ranks.group.all_reduce(largest, "largest logits", largest=True).wait()
        powers = logits - largest[:, None]
        powers[:, rows.count :] = -torch.inf
        local = targets - rows.first
        here = (local >= 0) & (local < rows.count)
        local = local.clamp(0, rows.count - 1)[:, None]
        chosen = powers.gather(1, local).squeeze(1).masked_fill(~here, 0.0)
        powers.exp_()
        sums = torch.stack((chosen, powers.sum(-1)))
        ranks.group.all_reduce(sums.view(-1), "sums of exponentials").wait()
        chosen, denominator = sums.unbind(0)
        counts = targets != ignored
        ctx.save_for_backward(powers.div_(denominator[:, None]), local, here, counts)
        return (denominator.log() - chosen).masked_fill(~counts, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, local, here, counts = ctx.saved_tensors
        scale = gradients[0].masked_fill(~counts, 0.0)
        result = probabilities * scale[:, None]
        result.scatter_add_(1, local, -scale.masked_fill(~here, 0.0)[:, None])
        return result, None, None, None, None


def mean_loss(
    logits: Tensor,
    targets: Tensor,
    rows: Rows,
    ranks: TensorRanks,
    *,
    ignored: int = IGNORED,
    count: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy (a scalar, fp32 or wider) of logits [..., V / t] and targets [...].

    Args:
        count: what to divide the sum by; else the tokens that are not ignored.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)  # a loss in 16 bits would not see small steps
    flat = targets.flatten()
    losses = vocabulary_cross_entropy(logits.to(wide).flatten(0, -2), flat, rows, ranks, ignored=ignored)
    return losses.sum() / ((flat != ignored).sum() if count is None else count)
