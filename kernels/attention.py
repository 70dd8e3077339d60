"""Attention in blocks of keys: each block's output with its log-sum-exp, two of them merged, and the backward of one.

Softmax over all keys is had from blocks of them by keeping, beside each block's output, the logarithm of the sum of its
exponentials (Milakov and Gimelshein 2018, Online normalizer calculation for softmax; Dao 2023, FlashAttention-2,
section 3.1). Backward needs no more than the merged output and log-sum-exp: with P = exp(Q K^T scale - lse) of a block
and D = rowsum(dO * O) over the whole output, dV = P^T dO, dS = P * (dO V^T - D), dQ = dS K scale, dK = dS^T Q scale
(section 3.1.2), and blocks add up.

Shapes: B batch, H query heads, K key and value heads, each serving H / K neighbouring query heads, S queries, T keys,
E head size. Log-sum-exps are fp32, or float64 for float64. `causal` hides key t from query s where t > s.
"""

from typing import NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


class Block(NamedTuple):
    """Output [B, H, S, E] and log-sum-exp [B, H, S] of the softmax over a block's keys."""

    output: Tensor
    logsumexp: Tensor


class Gradients(NamedTuple):
    """Of query [B, H, S, E], key [B, K, T, E] and value [B, K, T, E]."""

    query: Tensor
    key: Tensor
    value: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """dtype of what is summed over blocks: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def merge(first: Block, second: Block) -> Block:
    """The softmax over the keys of both blocks; outputs in the `wide` dtype, a row that saw no key has -inf as lse."""
    logsumexp = torch.logaddexp(first.logsumexp, second.logsumexp)
    dtype = wide(first.output.dtype)
    return Block(
        first.output.to(dtype) * (first.logsumexp - logsumexp).exp()[..., None]
        + second.output.to(dtype) * (second.logsumexp - logsumexp).exp()[..., None],
        logsumexp,
    )


def plain_block(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Block:
    """The reference: scores in full, in the `wide` dtype."""
    key, value = shared(key, query), shared(value, query)
    scores = _scores(query, key, causal=causal, scale=scale)
    logsumexp = scores.logsumexp(-1)
    return Block(((scores - logsumexp[..., None]).exp() @ value.to(scores.dtype)).to(query.dtype), logsumexp)


def plain_block_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Block, *, causal: bool, scale: float
) -> Gradients:
    """A block's part of the gradients, given what attention over all keys returned; the reference."""
    many_key, many_value = shared(key, query), shared(value, query)
    scores = _scores(query, many_key, causal=causal, scale=scale)
    dtype = scores.dtype
    weights = (scores - whole.logsumexp[..., None]).exp()
    gradient = gradient.to(dtype)
    share = (gradient * whole.output.to(dtype)).sum(-1, keepdim=True)
    of_scores = weights * (gradient @ many_value.to(dtype).mT - share) * scale
    return Gradients(
        (of_scores @ many_key.to(dtype)).to(query.dtype),
        unshared(of_scores.mT @ query.to(dtype), key).to(key.dtype),
        unshared(weights.mT @ gradient, value).to(value.dtype),
    )


def block(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Block:
    """As `plain_block`, by torch's fused kernel where it has one for the device and dtype."""
    if query.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, shared(key, query), shared(value, query), 0.0, causal, scale=scale
        )
        return Block(*found)
    if _has_flash(query):
        output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, shared(key, query), shared(value, query), 0.0, causal, False, scale=scale
        )
        return Block(output, logsumexp)
    return plain_block(query, key, value, causal=causal, scale=scale)


def block_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Block, *, causal: bool, scale: float
) -> Gradients:
    """As `plain_block_backward`, by torch's fused kernel where it has one for the device and dtype."""
    if query.device.type != "cpu" and not _has_flash(query):
        return plain_block_backward(gradient, query, key, value, whole, causal=causal, scale=scale)
    many = (shared(key, query), shared(value, query))
    output = whole.output.to(query.dtype)
    if query.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, *many, output, whole.logsumexp, 0.0, causal, scale=scale
        )
    else:
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            gradient, query, *many, output, whole.logsumexp, None, None, query.shape[2], key.shape[2], 0.0, causal,
            no_dropout, no_dropout, scale=scale,
        )  # fmt: skip
    return Gradients(found[0], unshared(found[1], key), unshared(found[2], value))


def _has_flash(query: Tensor) -> bool:
    """Whether FlashAttention does it: halves, heads that need no padding (Dao 2023: up to 256)."""
    size = query.shape[-1]
    return query.device.type == "cuda" and query.dtype in HALF and size % 8 == 0 and size <= 256


def _scores(query: Tensor, key: Tensor, *, causal: bool, scale: float) -> Tensor:
    dtype = wide(query.dtype)
    scores = query.to(dtype) @ key.to(dtype).mT * scale
    if not causal:
        return scores
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(hidden, float("-inf"))


def shared(grouped: Tensor, query: Tensor) -> Tensor:
    """Keys or values [B, K, T, E] once for each query head, [B, H, T, E]."""
    times = query.shape[1] // grouped.shape[1]
    return grouped if times == 1 else grouped.repeat_interleave(times, dim=1)


def unshared(gradient: Tensor, grouped: Tensor) -> Tensor:
    """The adjoint of `shared`: gradients of the query heads [B, H, T, E], summed to those of `grouped`'s K heads."""
    if gradient.shape[1] == grouped.shape[1]:
        return gradient
    return gradient.unflatten(1, (grouped.shape[1], -1)).sum(2)
