"""Blocks of attention on the `sim` device: the shapes and the fused operators of kernels/attention.py."""

from torch import Tensor

from ..kernels.attention import Block, Gradients
from .sim_device import attention, attention_backward


def block(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Block:
    return Block(*attention(query, key, value, None, causal))


def block_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Block, *, causal: bool, scale: float
) -> Gradients:
    return Gradients(*attention_backward(gradient, query, key, value, whole.output, whole.logsumexp, causal))
