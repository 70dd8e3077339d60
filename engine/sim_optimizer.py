"""An optimizer's pass on the `sim` device, as the one operator that it is in memory traffic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.one_pass import Rule, Shards


@torch.library.custom_op("windtunnel::optimizer_step", mutates_args=("masters", "moments", "copies"))
def optimizer_step(
    masters: Sequence[Tensor], gradients: Sequence[Tensor], moments: Sequence[Tensor], copies: Sequence[Tensor]
) -> None:
    """Masters, gradients and moments are read, masters, moments and copies are written. Shapes only."""
    raise NotImplementedError("windtunnel::optimizer_step exists on the sim device only")


@optimizer_step.register_fake
def _(
    masters: Sequence[Tensor], gradients: Sequence[Tensor], moments: Sequence[Tensor], copies: Sequence[Tensor]
) -> None:
    pass


def step_(rule: Rule, shards: Shards, *, multiplier: float = 1.0) -> None:
    """`plain_step_` of kernels/one_pass.py, without values."""
    flat = [tensor for moment in shards.moments for tensor in moment]
    optimizer_step(list(shards.masters), list(shards.gradients), flat, list(shards.copies))


def nothing(rule: Rule, shards: Shards, *, multiplier: float = 1.0) -> None:
    """On the host of a flight, whose work is written down as a whole."""
