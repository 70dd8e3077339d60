"""Cross-entropy of a linear layer's outputs, which are never in memory as a whole.

With hidden states H [N, D], weights W [V, D] and targets t, the logits H W^T are [N, V]: at V = 50,000 much more than
anything else of the model. Here they come for some tokens at a time, and their gradient is taken while they are there
(Hsu et al. 2024, Liger Kernel, section 3.2, "FusedLinearCrossEntropy"), so that nothing is multiplied twice: with
m = max_v l_v, e_v = exp(l_v - m), s = sum_v e_v of a token's logits l,

    loss = log s + m - l_t        d loss / d l_v = (e_v - s [v = t]) / s

Ranks that have V / t rows of the weights each
reduce m, and then s and l_t - m: 3 numbers per token (Shoeybi et al. 2019, section 3), as with whole logits.

Shapes: N tokens, D model width, V rows of the weights here, C tokens at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

CHUNK_BYTES = 1 << 26
"""Logits that are in memory at a time, in the dtype of the loss."""

IGNORED = -100
"""Target of a token that does not count, as in torch."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Found(NamedTuple):
    """The sum of the losses, a scalar in fp32 or wider, and what it gives the inputs, None where nobody asked.

    Attributes:
        hidden: [N, D] gradient, in the dtype of the hidden states.
        weight: [V, D] gradient, in fp32 or wider.
    """

    loss: Tensor
    hidden: Tensor | None
    weight: Tensor | None


class Vocabulary(Protocol):
    """The rows of a vocabulary that the weights here are, and the ranks that have the others.

    Attributes:
        first: number of the first row.
        count: rows here; padding follows.
    """

    first: int
    count: int

    def largest_(self, values: Tensor) -> None:
        """The largest over the ranks of each of `values` [n], in place."""

    def sum_(self, values: Tensor) -> None:
        """The sum over the ranks of each of `values` [n], in place."""


class Whole:
    """All rows are here."""

    def __init__(self, rows: int) -> None:
        self.first, self.count = 0, rows

    def largest_(self, values: Tensor) -> None:
        pass

    def sum_(self, values: Tensor) -> None:
        pass


Compute = Callable[..., Found]
"""What `in_chunks` is: (hidden, weight, targets, vocabulary, ignored, gradients) -> Found."""


def plain_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignored: int = IGNORED) -> Tensor:
    """The reference: the sum of the losses [] of whole logits, in fp32 or wider."""
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits.to(_wide(logits)), targets, ignore_index=ignored, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocabulary: Vocabulary | None = None,
    ignored: int = IGNORED,
    compute: Compute | None = None,
) -> Tensor:
    """The sum over tokens of the cross-entropy of `hidden @ weight.T`; a scalar in fp32 or wider, with a gradient.

    Under torch.autocast both are multiplied in its dtype, as torch's linear layer would.

    Args:
        hidden: [N, D]; with a `vocabulary` on several ranks the same on all of them. Its gradient is this rank's term.
        weight: [V, D], in the same dtype.
        targets: [N] int64, in numbers of the whole vocabulary.
        vocabulary: which rows the weights are; by default all.
        ignored: a target that does not count.
        compute: does what `in_chunks` does.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check(hidden, weight, targets)
    rows: Vocabulary = vocabulary or Whole(weight.shape[0])
    wanted = tuple(tensor.requires_grad and torch.is_grad_enabled() for tensor in (hidden, weight))
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(
            hidden, weight, partial(compute or in_chunks, targets=targets, vocabulary=rows, ignored=ignored), wanted
        )
    return loss


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, compute: Compute, wanted: tuple[bool, bool]) -> Tensor:
        found = compute(hidden.detach(), weight.detach(), gradients=wanted)
        ctx.save_for_backward(found.hidden, found.weight)
        ctx.dtype = weight.dtype
        return found.loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        scale = gradients[0]
        # Not in place: a graph that is retained comes here again.
        of_hidden = None if hidden is None else hidden * scale.to(hidden.dtype)
        of_weight = None if weight is None else torch.mul(weight, scale).to(ctx.dtype)
        return of_hidden, of_weight, None, None


def in_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: Vocabulary,
    ignored: int,
    gradients: tuple[bool, bool],
    chunk_bytes: int = CHUNK_BYTES,
) -> Found:
    """Loss and gradients (of hidden states and weights, each if asked for) from `chunk_bytes` of logits at a time."""
    wide = _wide(hidden)
    tokens = max(1, chunk_bytes // (max(1, weight.shape[0]) * wide.itemsize))
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    of_hidden = torch.empty_like(hidden) if gradients[0] else None
    of_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if gradients[1] else None
    for start in range(0, hidden.shape[0], tokens):
        here = slice(start, start + tokens)
        of_logits, losses = _of_logits(hidden[here], weight, targets[here], vocabulary, ignored, wide)
        loss += losses.sum()
        if of_hidden is None and of_weight is None:
            continue
        of_logits = of_logits.to(hidden.dtype)
        if of_hidden is not None:
            torch.mm(of_logits, weight, out=of_hidden[here])
        if of_weight is not None:
            _add_product_(of_weight, of_logits, hidden[here])
        del of_logits  # before the next ones are made
    return Found(loss, of_hidden, of_weight)


def _of_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary, ignored: int, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of C tokens: the gradient of the logits [C, V], and the losses [C]."""
    powers = (hidden @ weight.T).to(wide)
    largest = powers[:, : vocabulary.count].amax(-1)
    vocabulary.largest_(largest)
    powers.sub_(largest[:, None])
    counts = targets != ignored
    local = targets - vocabulary.first
    here = (local >= 0) & (local < vocabulary.count) & counts
    local = local.clamp(0, vocabulary.count - 1)[:, None]
    chosen = powers.gather(1, local).squeeze(1).masked_fill(~here, 0.0)
    powers.exp_()
    powers[:, vocabulary.count :] = 0.0
    sums = torch.stack((chosen, powers.sum(-1)))
    vocabulary.sum_(sums.view(-1))
    chosen, total = sums.unbind(0)
    powers.scatter_add_(1, local, -total.masked_fill(~here, 0.0)[:, None])
    powers.mul_(total.reciprocal().masked_fill(~counts, 0.0)[:, None])
    return powers, (total.log() - chosen).masked_fill(~counts, 0.0)


def _add_product_(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums [V, D] += left [C, V]^T right [C, D]; in 16 bits each product is rounded once, their sum is not."""
    if sums.dtype == left.dtype:
        sums.addmm_(left.T, right)
    else:
        sums += left.T @ right


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)  # a loss in 16 bits would not see small steps


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden states are {hidden.dtype} and weights {weight.dtype}; allowed: both the same of"
            f" {', '.join(map(str, DTYPES))}"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden states are {tuple(hidden.shape)} and weights {tuple(weight.shape)}; allowed: [N, D] and [V, D]"
        )
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets are {targets.dtype} {tuple(targets.shape)}; allowed: torch.int64 ({hidden.shape[0]},), one for"
            " each token"
        )
