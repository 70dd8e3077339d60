"""Dropout of what is added to a residual; the mask is a function of a seed and is not kept (kernels/philox.py).

Element i is kept where word i of the seed's stream is below (1 - p) 2^32 (Srivastava et al. 2014, scaled in training):
with probability 1 - p to within 2^-32, the same in forward, backward and recomputation and on every device.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatch import TRITON, chosen
from .in_cache import PIECE, check_floating
from .philox import words


def kept(seed: int, shape: torch.Size, p: float, device: torch.device) -> Tensor:
    """The mask, in the order of a contiguous tensor: the reference."""
    return (words(seed, 0, shape.numel(), device) < threshold(p)).view(shape)


def threshold(p: float) -> int:
    """Words below it are kept."""
    return round((1 - p) * 2**32)


def plain_dropout(x: Tensor, p: float, seed: int, residual: Tensor | None = None) -> Tensor:
    """The reference of `dropout`."""
    dropped = torch.where(kept(seed, x.shape, p, x.device), x / (1 - p), 0.0)
    return dropped if residual is None else residual + dropped


def dropout(x: Tensor, p: float, seed: Tensor, residual: Tensor | None = None) -> Tensor:
    """residual + dropout(x), or dropout(x) alone, of tensors alike in shape and dtype.

    Args:
        p: 0 <= p < 1, the share that becomes 0; what is kept is divided by 1 - p.
        seed: a scalar int64 on the CPU.

    Raises:
        ValueError: p, or a dtype or shape, that is not allowed.
    """
    check_floating("x", x)
    if not 0 <= p < 1:
        raise ValueError(f"p = {p}; allowed: from 0 to below 1")
    if residual is None:
        return _dropout(x, p, seed)
    check_floating("residual", residual, x)
    if residual.shape != x.shape:
        raise ValueError(f"residual is {tuple(residual.shape)}; allowed: {tuple(x.shape)}, as x")
    return _dropout_residual(x, residual, p, seed)


def draw_seed() -> Tensor:
    """A seed from torch's generator on the CPU, whose state a recomputation restores."""
    return torch.randint(1 << 62, (), device="cpu")


@torch.library.custom_op("windtunnel::dropout", mutates_args=())
def _dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return _applied(x, None, p, int(seed))


@torch.library.custom_op("windtunnel::dropout_residual", mutates_args=())
def _dropout_residual(x: Tensor, residual: Tensor, p: float, seed: Tensor) -> Tensor:
    return _applied(x, residual, p, int(seed))


def _applied(x: Tensor, residual: Tensor | None, p: float, seed: int) -> Tensor:
    if chosen("dropout_residual", x.device.type) == TRITON:
        from .triton_activations import dropout_forward

        return dropout_forward(x, residual, p, seed)
    made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, target = x.reshape(-1), made.view(-1)
    added = None if residual is None else residual.reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE]
        mask = words(seed, start, piece.numel(), x.device) < threshold(p)
        values = torch.where(mask, piece / (1 - p), 0.0)
        target[start : start + PIECE] = values if added is None else added[start : start + PIECE] + values
    return made


@_dropout.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_dropout_residual.register_fake
def _(x: Tensor, residual: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.p = inputs[-2]
    ctx.save_for_backward(inputs[-1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _dropout(gradient, ctx.p, *ctx.saved_tensors), None, None


def _backward_with_residual(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _dropout(gradient, ctx.p, *ctx.saved_tensors), gradient, None, None


_dropout.register_autograd(_backward, setup_context=_save)
_dropout_residual.register_autograd(_backward_with_residual, setup_context=_save)
