"""One step of SGD with momentum, as torch has it (Sutskever et al. 2013, section 2, with the rate outside of the sum).

With parameters x, gradient g, momentum m, learning rate a, weight decay w, dampening d:

    g <- g + w x            m <- mu m + (1 - d) g, in the first step m <- g
    x <- x - a m            (Nesterov: x <- x - a (g + mu m);  without momentum: x <- x - a g)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .one_pass import Shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Sgd:
    """The values of one step; torch's defaults.

    Attributes:
        first: the momenta have no value yet and take the gradient.
    """

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    first: bool = False

    @property
    def moments(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def plain_(self, master: Tensor, gradient: Tensor, moments: Sequence[Tensor], step: float) -> None:
        direction = gradient + self.weight_decay * master
        for momentum in moments:
            momentum.copy_(direction if self.first else self.momentum * momentum + (1 - self.dampening) * direction)
            direction = direction + self.momentum * momentum if self.nesterov else momentum
        master -= self.lr * direction

    def fused_(self, shards: Shards) -> None:
        torch._fused_sgd_(
            list(shards.masters), list(shards.gradients), list(shards.moments[0]) if shards.moments else [],
            weight_decay=self.weight_decay, momentum=self.momentum, lr=self.lr, dampening=self.dampening,
            nesterov=self.nesterov, maximize=False, is_first_step=self.first,
        )  # fmt: skip
