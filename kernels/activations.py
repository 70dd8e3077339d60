"""SwiGLU, bias + GELU, and rotary positions: one operator forward and one backward each, which keep their inputs only.

    SwiGLU        y = silu(g) u            dg = dy u s (1 + g (1 - s)), s = sigmoid(g)          du = dy g s
                  (Shazeer 2020, GLU Variants Improve Transformer, equation 6)
    bias + GELU   z = x + b                y = z (1 + tanh(k)) / 2, k = sqrt(2 / pi) (z + 0.044715 z^3)
                  (Hendrycks and Gimpel 2016, Gaussian Error Linear Units, section 2)
    rotary        of halves (x1, x2): (x1 c - x2 s, x2 c + x1 s); backward turns the other way
                  (Su et al. 2021, RoFormer, equation 34, with the halves of a head as pairs)

Values are computed in fp32 or wider and rounded once.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .dispatch import TRITON, chosen
from .in_cache import check_floating, element_wise, row_pieces, rows_of, wide

ROOT, CUBIC = math.sqrt(2 / math.pi), 0.044715


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The reference of `swiglu`."""
    dtype = wide(gate.dtype)
    return (functional.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of tensors alike in shape and dtype.

    Raises:
        ValueError: shapes or dtypes that differ or are not allowed.
    """
    check_floating("gate", gate)
    check_floating("up", up, gate)
    if up.shape != gate.shape:
        raise ValueError(f"up is {tuple(up.shape)}; allowed: {tuple(gate.shape)}, as gate")
    return _swiglu(gate, up)


def plain_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """The reference of `bias_gelu`."""
    dtype = wide(x.dtype)
    return functional.gelu(x.to(dtype) + bias.to(dtype), approximate="tanh").to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh's approximation) of x [..., D] + bias [D], of one dtype.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    check_floating("x", x)
    check_floating("bias", bias, x)
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias is {tuple(bias.shape)}; allowed: {tuple(x.shape[-1:])}, the last dimension of x")
    return _bias_gelu(x, bias)


def plain_rotary(x: Tensor, table: Tensor) -> Tensor:
    """The reference of `rotary`."""
    cosine, sine = table.to(wide(x.dtype)).unbind(0)
    values = x.to(cosine.dtype)
    first, second = values.chunk(2, dim=-1)
    return (values * cosine + torch.cat((-second, first), dim=-1) * sine).to(x.dtype)


def rotary(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + E/2]) of heads x [..., S, E] by the angles whose cosines and sines `table` has.

    Args:
        table: [2, S, E], the same in both halves of E.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    check_floating("x", x)
    check_floating("table", table, x)
    if table.shape != (2, *x.shape[-2:]) or x.shape[-1] % 2:
        raise ValueError(
            f"table is {tuple(table.shape)} for heads {tuple(x.shape)}; allowed: {(2, *x.shape[-2:])}, of even width"
        )
    return _rotary(x, table, False)


# The operators #


@torch.library.custom_op("windtunnel::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    made = _like(gate)
    if chosen("swiglu", gate.device.type) == TRITON:
        from .triton_activations import swiglu_forward

        return swiglu_forward(gate, up, made)
    element_wise(lambda g, u: [functional.silu(g).mul_(u)], [gate, up], [made])
    return made


@torch.library.custom_op("windtunnel::swiglu_backward", mutates_args=())
def _swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    made = _like(gate), _like(up)
    if chosen("swiglu", gate.device.type) == TRITON:
        from .triton_activations import swiglu_backward

        return swiglu_backward(gradient, gate, up, *made)
    element_wise(_swiglu_gradients, [gradient, gate, up], made)
    return made


def _swiglu_gradients(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(gradient * up, gate), functional.silu(gate).mul_(gradient)


@torch.library.custom_op("windtunnel::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    made = _like(x)
    if chosen("bias_gelu", x.device.type) == TRITON:
        from .triton_activations import bias_gelu_forward

        return bias_gelu_forward(x, bias, made)
    _by_rows(lambda rows: functional.gelu(rows.to(wide(x.dtype)) + bias, approximate="tanh"), x, made)
    return made


@torch.library.custom_op("windtunnel::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(gradient: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """dx [..., D], and db [D], its sum over rows."""
    made, width, dtype = _like(x), x.shape[-1], wide(x.dtype)
    if chosen("bias_gelu", x.device.type) == TRITON:
        from .triton_activations import bias_gelu_backward

        bias_gelu_backward(gradient, x, bias, made)
        return made, rows_of(made).sum(0, dtype=dtype).to(bias.dtype)
    of_bias = torch.zeros(width, dtype=dtype, device=x.device)
    rows, gradients, target = map(rows_of, (x, gradient, made))
    for piece in row_pieces(rows):
        of_rows = torch.ops.aten.gelu_backward(
            gradients[piece].to(dtype), rows[piece].to(dtype) + bias, approximate="tanh"
        )
        target[piece].copy_(of_rows)
        of_bias += of_rows.sum(0)
    return made, of_bias.to(bias.dtype)


@torch.library.custom_op("windtunnel::rotary", mutates_args=())
def _rotary(x: Tensor, table: Tensor, back: bool) -> Tensor:
    made, half = _like(x), x.shape[-1] // 2
    count = math.prod(x.shape[:-2])
    heads, target = x.reshape(count, *x.shape[-2:]), made.view(count, *x.shape[-2:])
    cosine, sine = table.to(wide(x.dtype)).unbind(0)
    if back:  # turned by the negative angle
        sine = -sine
    for piece in row_pieces(heads.flatten(1)):
        values = heads[piece].to(cosine.dtype)
        first, second = values[..., :half], values[..., half:]
        target[piece, :, :half] = first * cosine[:, :half] - second * sine[:, :half]
        target[piece, :, half:] = second * cosine[:, half:] + first * sine[:, half:]
    return made


def _by_rows(formula: Callable[[Tensor], Tensor], x: Tensor, made: Tensor) -> None:
    rows, target = rows_of(x), rows_of(made)
    for piece in row_pieces(rows):
        target[piece].copy_(formula(rows[piece]))


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_swiglu.register_fake(lambda gate, up: _like(gate))
_swiglu_backward.register_fake(lambda gradient, gate, up: (_like(gate), _like(up)))
_bias_gelu.register_fake(lambda x, bias: _like(x))
_bias_gelu_backward.register_fake(lambda gradient, x, bias: (_like(x), _like(bias)))
_rotary.register_fake(lambda x, table, back: _like(x))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _save_table(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


_swiglu.register_autograd(
    lambda ctx, gradient: _swiglu_backward(gradient, *ctx.saved_tensors), setup_context=_save_inputs
)
_bias_gelu.register_autograd(
    lambda ctx, gradient: _bias_gelu_backward(gradient, *ctx.saved_tensors), setup_context=_save_inputs
)
_rotary.register_autograd(
    lambda ctx, gradient: (_rotary(gradient, *ctx.saved_tensors, True), None, None), setup_context=_save_table
)
