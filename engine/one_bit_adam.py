"""1-bit Adam: plain Adam first, then its variance is frozen and only the momentum travels, one bit per element.

Tang et al. 2021 (1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed), algorithm 1.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .communicator import Communicator
from .compressed import CompressedCommunicator
from .compression import OneBit


class OneBitAdam(torch.optim.Optimizer):
    """Data-parallel Adam that reduces gradients itself: each rank steps the whole model from its own gradients.

    Two departures from the paper's algorithm 1. Both phases correct the bias of the moments, as Adam does. And an
    element whose variance is zero at the end of the warm-up stays as it is: a sign says nothing of how small its
    momentum is, and divided by nothing it would be moved without bound.

    Attributes:
        compressed: carries the momentum, and holds what its compression has lost.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        communicator: Communicator,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        warm_up_steps: int,
        block: int = 256,
    ) -> None:
        """`warm_up_steps` of plain Adam come first, until the variance has settled; `block` elements share a scale."""
        if warm_up_steps < 1:
            raise ValueError(f"warm_up_steps = {warm_up_steps}; allowed: at least 1, or there is no variance to freeze")
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        if len(self.param_groups) > 1:
            raise ValueError(f"{len(self.param_groups)} parameter groups; allowed: 1, whose momentum travels together")
        self.communicator, self.warm_up_steps = communicator, warm_up_steps
        self.compressed = CompressedCommunicator(communicator, gradients=OneBit(block=block), min_elements=0)
        self.steps = 0
        like = self._flat_gradients()
        self.momentum, self.variance = torch.zeros_like(like), torch.zeros_like(like)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Average over the ranks and step. All ranks must call it."""
        if closure is not None:
            raise ValueError("step(closure) is not supported: gradients are reduced here, which a closure cannot renew")
        group = self.param_groups[0]
        slow, slower = group["betas"]
        self.steps += 1
        gradient = self._flat_gradients() / self.communicator.world
        if self.steps <= self.warm_up_steps:
            self.communicator.all_reduce(gradient, "gradients").wait()
            self.momentum.lerp_(gradient, 1 - slow)
            self.variance.lerp_(gradient.square(), 1 - slower)
        else:
            # The momentum is the same on all ranks: each puts its 1/n of it and its own gradient into the sum.
            self.momentum.mul_(slow / self.communicator.world).add_(gradient, alpha=1 - slow)
            self.compressed.all_reduce(self.momentum, "momentum").wait()
        frozen = min(self.steps, self.warm_up_steps)
        scale = (self.variance / (1 - slower**frozen)).sqrt() + group["eps"]
        update = self.momentum / scale / (1 - slow**self.steps)
        self._apply(torch.where(self.variance > 0, update, 0.0), group["lr"])

    def _flat_gradients(self) -> Tensor:
        """All gradients end to end, fp32; zeros where there is none."""
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.param_groups[0]["params"]]
        return torch.cat([part.detach().float().view(-1) for part in parts])

    def _apply(self, update: Tensor, lr: float) -> None:
        parameters = self.param_groups[0]["params"]
        for parameter, piece in zip(parameters, update.split([p.numel() for p in parameters]), strict=True):
            parameter.add_(piece.view_as(parameter), alpha=-lr)
