"""The loss of a linear layer's outputs on the `sim` device: one operator, with the memory of its chunk of logits."""

import torch
from torch import Tensor

from ..kernels.linear_cross_entropy import CHUNK_BYTES, Found, Vocabulary


@torch.library.custom_op("windtunnel::linear_cross_entropy", mutates_args=())
def _op(
    hidden: Tensor, weight: Tensor, targets: Tensor, of_hidden: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], gradients of hidden states [N, D] and weights [V, D], those that nobody asks for empty. Shapes only."""
    raise NotImplementedError("windtunnel::linear_cross_entropy exists on the sim device only")


@_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, of_hidden: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if of_hidden else (0,)),
        weight.new_empty(weight.shape if of_weight else (0,), dtype=wide),
    )


def in_one(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary, ignored: int, gradients: tuple[bool, bool]
) -> Found:
    """As `in_chunks` of kernels/linear_cross_entropy.py, for a vocabulary that is whole."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    elements = min(CHUNK_BYTES // wide.itemsize, hidden.shape[0] * weight.shape[0])
    logits = [torch.empty(elements, dtype=dtype, device=hidden.device) for dtype in {wide, hidden.dtype}]
    loss, of_hidden, of_weight = _op(hidden, weight, targets, *gradients)
    del logits
    return Found(loss, of_hidden if gradients[0] else None, of_weight if gradients[1] else None)
