"""LAMB: Adam whose every tensor moves by a share of its own norm (You et al. 2020, Large Batch Optimization for Deep
Learning: Training BERT in 76 Minutes).

Algorithm 2 there, for one tensor x with gradient g in step t, learning rate a, decoupled weight decay w:

    m <- b1 m + (1 - b1) g                       v <- b2 v + (1 - b2) g^2
    r = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    u = r + w x                                  x <- x - a phi u,  phi = ||x|| / ||u||

phi is clamped to [`min_coeff`, `max_coeff`] and is 1 where either norm is 0, as in DeepSpeed. Only phi needs the tensor
as a whole, and of it only two squared norms, which are sums: pieces of a tensor on several ranks add theirs up.
"""

import torch
from torch import Tensor


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
    momentum.lerp_(gradient, 1 - betas[0])
    variance.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
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
