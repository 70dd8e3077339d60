"""Lion: the sign of an interpolated momentum (Chen et al. 2023, Symbolic Discovery of Optimization Algorithms).

Algorithm 2 there, with parameters x, gradient g, momentum m, learning rate a, decoupled weight decay w:

    c <- b1 m + (1 - b1) g
    x <- x - a (sign(c) + w x)
    m <- b2 m + (1 - b2) g

An element's update needs that element alone, and m is all that is kept: 4 bytes per parameter in fp32, half of Adam's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .one_pass import Shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Lion:
    """The values of one step."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    @property
    def moments(self) -> tuple[str, ...]:
        return ("momentum",)

    def plain_(self, master: Tensor, gradient: Tensor, moments: Sequence[Tensor], step: float) -> None:
        (momentum,) = moments
        update = torch.sign(self.betas[0] * momentum + (1 - self.betas[0]) * gradient)
        master -= self.lr * (update + self.weight_decay * master)
        momentum.copy_(self.betas[1] * momentum + (1 - self.betas[1]) * gradient)

    def fused_(self, shards: Shards) -> None:
        lion_(
            list(shards.masters), list(shards.gradients), list(shards.moments[0]),
            lr=self.lr, betas=self.betas, weight_decay=self.weight_decay,
        )  # fmt: skip


def lion_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """One step, in place on `parameters` and `momenta`, in five operators however many tensors there are.

    Args:
        parameters, gradients, momenta: tensors of any shapes, alike in all three, of one floating dtype. Momenta begin
            as zeros.
    """
    if not parameters:
        return
    update = torch._foreach_lerp(momenta, gradients, 1 - betas[0])
    torch._foreach_sign_(update)
    if weight_decay:
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
    torch._foreach_add_(parameters, update, alpha=-lr)
    torch._foreach_lerp_(momenta, gradients, 1 - betas[1])
