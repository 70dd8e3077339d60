"""The core of attention in separate kernels, as before it was fused: products of heads, and a masked softmax.

Megatron-LM's core attention (Shoeybi et al. 2019) is a batched product for the scores, one kernel that scales, masks
and normalises them, dropout, and a batched product with the values. Each is one operator here, so that the recorder
sees the kernels that such a program starts. In torch's own operators the heads of a batch would be copied before each
product and the mask would take a pass of its own.

Shapes: B batch, H heads, S queries, T keys, E head size.
"""

import math
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("windtunnel::head_products", mutates_args=())
def head_products(left: Tensor, right: Tensor) -> Tensor:
    """[B, H, S, T] of [B, H, S, E] and [B, H, E, T], wherever the heads lie in memory."""
    return torch.matmul(left, right)


@head_products.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty((*left.shape[:-1], right.shape[-1]))


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _products_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    left, right = ctx.saved_tensors
    return head_products(gradient, right.mT), head_products(left.mT, gradient)


head_products.register_autograd(_products_backward, setup_context=_keep_factors)


@torch.library.custom_op("windtunnel::masked_softmax", mutates_args=())
def masked_softmax(scores: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """softmax(scale * scores + bias) over keys, in fp32 or wider inside.

    Args:
        scores: [B, H, S, T]
        bias: [1, H, S, T] that holds the mask too, or None.
        causal: hide key t from query s where t > s.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    shown = scores.to(wide) * scale
    if bias is not None:
        shown = shown + bias.to(wide)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        shown = shown.masked_fill(hidden, -math.inf)
    return shown.softmax(-1).to(scores.dtype)


@masked_softmax.register_fake
def _(scores: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    return torch.empty_like(scores)


@torch.library.custom_op("windtunnel::masked_softmax_backward", mutates_args=())
def masked_softmax_backward(gradient: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    """Gradient of the scores: scale * p * (g - sum(p g)), which is 0 where a key was hidden."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    shares, arrived = probabilities.to(wide), gradient.to(wide)
    return (scale * shares * (arrived - (shares * arrived).sum(-1, keepdim=True))).to(gradient.dtype)


@masked_softmax_backward.register_fake
def _(gradient: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    return torch.empty_like(probabilities)


def _keep_probabilities(ctx: Any, inputs: tuple[Tensor, Tensor | None, bool, float], output: Tensor) -> None:
    ctx.scale = inputs[3]
    ctx.save_for_backward(output)


def _softmax_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    (probabilities,) = ctx.saved_tensors
    return masked_softmax_backward(gradient, probabilities, ctx.scale), None, None, None


masked_softmax.register_autograd(_softmax_backward, setup_context=_keep_probabilities)
