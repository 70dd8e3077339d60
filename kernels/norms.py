"""RMSNorm, with a residual added before it, and LayerNorm: one operator forward and one backward each.

Of x [..., D], with r = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, equation 4) or, for LayerNorm, x less its
mean first (Ba, Kiros and Hinton 2016, equation 3), and h = r x:

    y = h w (+ b)       dx = r (g - h mean(g h)), g = dy w, for LayerNorm less mean(g) too       dw = sum(dy h)

The sums are over D, that of dw over all rows. Statistics are fp32, or float64 for float64; y is rounded once. Backward
keeps x and r of each row, no normalised values.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .dispatch import TRITON, chosen
from .in_cache import check_floating, row_pieces, rows_of, wide


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reference of `rms_norm`."""
    total = x if residual is None else x + residual
    values = total.to(wide(x.dtype))
    scale = (values.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (values * scale * weight.to(values.dtype)).to(x.dtype), total


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(RMSNorm of the sum, the sum) of x [..., D] and, where given, a residual alike; without one the sum is x itself.

    Args:
        weight: [D], in the dtype of `x`.

    Raises:
        ValueError: dtypes or shapes that do not go together.
    """
    check_floating("x", x)
    check_floating("weight", weight, x)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)}; allowed: {tuple(x.shape[-1:])}, the last dimension of x")
    if residual is None:
        return _rms_norm(x, weight, eps)[0], x
    check_floating("residual", residual, x)
    if residual.shape != x.shape:
        raise ValueError(f"residual is {tuple(residual.shape)}; allowed: {tuple(x.shape)}, as x")
    normed, total, _ = _add_rms_norm(x, residual, weight, eps)
    return normed, total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of x [..., D]: torch's operator, which is one forward and one backward on every device."""
    check_floating("x", x)
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def plain_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The reference of `layer_norm`."""
    values = x.to(wide(x.dtype))
    values = values - values.mean(-1, keepdim=True)
    values = values * (values.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        values = values * weight
    return (values if bias is None else values + bias).to(x.dtype)


# The operators: (x, weight, eps) -> (y, r), the same with a residual, and their backward #


@torch.library.custom_op("windtunnel::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [..., D] and r [rows] in fp32 or wider."""
    if chosen("rms_norm", x.device.type) == TRITON:
        from .triton_norms import rms_norm_forward

        return rms_norm_forward(x, None, weight, eps)[:2]
    y, scales = _outputs(x)
    rows, made = rows_of(x), rows_of(y)
    for piece in row_pieces(rows):
        _normalise(rows[piece], weight, eps, made[piece], scales[piece])
    return y, scales


@torch.library.custom_op("windtunnel::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., D], x + residual alike, and r [rows]."""
    if chosen("rms_norm", x.device.type) == TRITON:
        from .triton_norms import rms_norm_forward

        y, scales, total = rms_norm_forward(x, residual, weight, eps)
        return y, total, scales
    y, scales = _outputs(x)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, added, sums, made = map(rows_of, (x, residual, total, y))
    for piece in row_pieces(rows):
        torch.add(rows[piece], added[piece], out=sums[piece])
        _normalise(sums[piece], weight, eps, made[piece], scales[piece])
    return y, total, scales


@torch.library.custom_op("windtunnel::rms_norm_backward", mutates_args=())
def _rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """dx [..., D] and dw [D]."""
    if chosen("rms_norm", x.device.type) == TRITON:
        from .triton_norms import rms_norm_backward

        return rms_norm_backward(gradient, x, weight, scales)
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dtype, width = scales.dtype, x.shape[-1]
    of_weight, factor = torch.zeros(width, dtype=dtype, device=x.device), weight.to(dtype)
    rows, gradients, made = map(rows_of, (x, gradient, of_x))
    for piece in row_pieces(rows):
        scale = scales[piece, None]
        normed, given = rows[piece].to(dtype) * scale, gradients[piece].to(dtype)
        of_weight += (given * normed).sum(0)
        given = given * factor
        made[piece].copy_((given - normed * (given * normed).mean(-1, keepdim=True)) * scale)
    return of_x, of_weight.to(weight.dtype)


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(rows, dtype=wide(x.dtype), device=x.device),
    )


def _normalise(rows: Tensor, weight: Tensor, eps: float, made: Tensor, scales: Tensor) -> None:
    values = rows.to(scales.dtype)
    torch.rsqrt(values.square().mean(-1).add_(eps), out=scales)
    made.copy_((values * scales[:, None]).mul_(weight))


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _outputs(x)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, scales = _outputs(x)
    return y, torch.empty(x.shape, dtype=x.dtype, device=x.device), scales


@_rms_norm_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None
    return (*_rms_norm_backward(gradient, *ctx.saved_tensors), None)


_rms_norm.register_autograd(_backward, setup_context=_save)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward_of_sum(ctx: Any, gradient: Tensor | None, of_total: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return of_total, of_total, None, None
    of_x, of_weight = _rms_norm_backward(gradient, *ctx.saved_tensors)
    if of_total is not None:
        of_x = of_x + of_total
    return of_x, of_x, of_weight, None


_add_rms_norm.register_autograd(_backward_of_sum, setup_context=_save_sum)
