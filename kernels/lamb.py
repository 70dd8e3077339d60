"""LAMB: Adam whose every tensor moves by a share of its own norm (You et al. 2020, Large Batch Optimization for Deep
Learning: Training BERT in 76 Minutes).

Algorithm 2 there, for one tensor x with gradient g in step t, learning rate a, decoupled weight decay w:

    m <- b1 m + (1 - b1) g                       v <- b2 v + (1 - b2) g^2
    r = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    u = r + w x                                  x <- x - a phi u,  phi = ||x|| / ||u||

phi is clamped to [`min_coeff`, `max_coeff`] and is 1 where either norm is 0, as in DeepSpeed. Only phi needs the tensor
as a whole, and of it only two squared norms, which are sums: pieces of a tensor on several ranks add theirs up.

In one pass over memory (kernels/one_pass.py) it takes two: `lamb_squares_` moves the moments on and leaves the norms,
`lamb_apply_` makes u again from what is then in memory, instead of keeping 4 bytes more per parameter in between.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .one_pass import Shards, check, multiplied

CHUNK = 1 << 16
"""Elements at a time on a CPU: six fp32 values of each are 1.5 MiB, about what a core's second-level cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lamb:
    """The values of one step."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    min_coeff: float = 0.01
    max_coeff: float = 10.0

    @property
    def moments(self) -> tuple[str, ...]:
        return ("momentum", "variance")


def lamb_direction_(
    parameter: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    variance: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Tensor:
    """u of a tensor or of a piece of it, of the same shape; `momentum` and `variance` move on in place.

    Args:
        parameter, gradient, momentum, variance: alike in shape and floating dtype; the latter two begin as zeros.
        step: t as a scalar in float64, which 1 - b2^t needs: in fp32 it would lose three of seven digits at t = 1.
    """
    lamb_moments_(gradient, momentum, variance, betas=betas)
    return lamb_direction(parameter, momentum, variance, step, betas=betas, eps=eps, weight_decay=weight_decay)


def lamb_moments_(gradient: Tensor, momentum: Tensor, variance: Tensor, *, betas: tuple[float, float]) -> None:
    """m and v take the gradient in, in place."""
    momentum.lerp_(gradient, 1 - betas[0])
    variance.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])


def lamb_direction(
    parameter: Tensor,
    momentum: Tensor,
    variance: Tensor,
    step: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Tensor:
    """u of moments that have moved on."""
    spread = (variance / (1 - betas[1] ** step)).sqrt_().add_(eps)
    direction = (momentum / (1 - betas[0] ** step)).div_(spread)
    return direction.add_(parameter, alpha=weight_decay) if weight_decay else direction


def squared_norms(parameter: Tensor, direction: Tensor) -> Tensor:
    """[2]: ||x||^2 and ||u||^2 of a tensor or a piece of one, in its dtype (fp32 at least)."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(tensor, dtype=wide) for tensor in (parameter, direction)]
    return torch.stack(norms).square_()


def trust_ratios(squares: Tensor, *, min_coeff: float, max_coeff: float) -> Tensor:
    """phi [n] from the squared norms [n, 2] of n whole tensors."""
    parameter, direction = squares.sqrt().unbind(1)
    known = (parameter > 0) & (direction > 0)
    return torch.where(known, (parameter / direction).clamp(min_coeff, max_coeff), 1.0)


# In chunks #


def lamb_squares_(
    rule: Lamb, shards: Shards, *, multiplier: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The moments of `shards` take their gradients, times `multiplier`, in.

    Args:
        chunk: elements at a time; by default what a core's cache holds, and all where there is none to fill.

    Returns:
        ||x||^2 and ||u||^2 [n, 2] of the n tensors, and the sum of squares of the multiplied gradients, a scalar: in
        the dtype of the masters.

    Raises:
        ValueError: a dtype or a layout that is not allowed.
    """
    check(rule, shards)
    like = shards.masters[0] if shards.masters else torch.empty(0)
    squares, of_gradients = like.new_zeros(len(shards.masters), 2), like.new_zeros(())
    for number, where in _pieces(shards, chunk):
        master, (momentum, variance) = _cut(shards, number, where)
        gradient = multiplied(shards.gradients[number].view(-1)[where], master.dtype, multiplier)
        of_gradients += torch.linalg.vector_norm(gradient).square()
        lamb_moments_(gradient, momentum, variance, betas=rule.betas)
        squares[number] += squared_norms(master, _direction(rule, shards, number, where))
    return squares, of_gradients


def lamb_apply_(rule: Lamb, shards: Shards, ratios: Tensor, *, chunk: int | None = None) -> None:
    """Step the masters of `shards`, whose moments have moved on, by phi u, and write their copies.

    Args:
        ratios: phi [n], of the whole parameters that the n tensors are pieces of.
    """
    for number, where in _pieces(shards, chunk):
        master, _ = _cut(shards, number, where)
        master.add_(_direction(rule, shards, number, where).mul_(ratios[number]), alpha=-rule.lr)
        if shards.copies:
            shards.copies[number].view(-1)[where].copy_(master)


def _pieces(shards: Shards, chunk: int | None) -> Iterator[tuple[int, slice]]:
    for number, master in enumerate(shards.masters):
        size = chunk or (CHUNK if master.device.type == "cpu" else max(1, master.numel()))
        for start in range(0, master.numel(), size):
            yield number, slice(start, start + size)


def _cut(shards: Shards, number: int, where: slice) -> tuple[Tensor, list[Tensor]]:
    """A piece of a master, and of its moments."""
    return shards.masters[number].view(-1)[where], [moment[number].view(-1)[where] for moment in shards.moments]


def _direction(rule: Lamb, shards: Shards, number: int, where: slice) -> Tensor:
    master, (momentum, variance) = _cut(shards, number, where)
    return lamb_direction(
        master, momentum, variance, shards.steps[number].double(),
        betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay,
    )  # fmt: skip
