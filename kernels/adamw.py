"""One step of AdamW or Adam (Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, algorithm 2).

With parameters x, gradient g, step t, learning rate a, weight decay w:

    x <- x - a w x                   (Adam instead adds w x to the gradient)
    m <- b1 m + (1 - b1) g           v <- b2 v + (1 - b2) g^2
    x <- x - a / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .one_pass import Shards


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """The values of one step; torch's defaults.

    Attributes:
        decoupled: weights decay by themselves (AdamW); else their decay is part of the gradient (Adam).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    decoupled: bool = True

    @property
    def moments(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def plain_(self, master: Tensor, gradient: Tensor, moments: Sequence[Tensor], step: float) -> None:
        mean, square = moments
        if self.decoupled:
            master -= self.lr * self.weight_decay * master
        else:
            gradient = gradient + self.weight_decay * master
        mean.copy_(self.betas[0] * mean + (1 - self.betas[0]) * gradient)
        square.copy_(self.betas[1] * square + (1 - self.betas[1]) * gradient**2)
        spread = square.sqrt() / math.sqrt(1 - self.betas[1] ** step) + self.eps
        master -= self.lr / (1 - self.betas[0] ** step) * mean / spread

    def fused_(self, shards: Shards) -> None:
        fused = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        means, squares = map(list, shards.moments)
        fused(
            list(shards.masters), list(shards.gradients), means, squares, [], list(shards.steps),
            lr=self.lr, beta1=self.betas[0], beta2=self.betas[1], weight_decay=self.weight_decay, eps=self.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip
