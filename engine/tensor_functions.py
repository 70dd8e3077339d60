"""How activations pass between what tensor ranks share and what they have cut, forward and backward.

Shoeybi et al. 2019 (Megatron-LM), section 3, call the two ends of a region that is cut f and g: `enter` and `leave`.
With sequence parallelism (Korthikanti et al. 2022, section 4.2.2) activations outside of the regions are cut along the
sequence, and the two ends are

             forward          backward               with sequence parallelism
    enter    as it is         all-reduce             all-gather       reduce-scatter
    leave    all-reduce       as it is               reduce-scatter   all-gather

All ranks of a group run the same modules in the same order, so they issue the same collectives, in forward, in backward
and in a recomputation. Activations are [..., S, D] with S the sequence; t ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .communicator import Communicator
from .randomness import Randomness


@dataclass(frozen=True, eq=False)
class TensorRanks:
    """The ranks that share each layer of a model, and how they do.

    Attributes:
        group: the ranks.
        randomness: what they draw.
        sequence_parallel: activations between the regions are cut along the sequence.
        keeps_products: a recomputation keeps results of matrix products, which so must not be overwritten.
    """

    group: Communicator
    randomness: Randomness
    sequence_parallel: bool = False
    keeps_products: bool = False


def enter(x: Tensor, ranks: TensorRanks) -> Tensor:
    """Into a region: [..., S, D] on all ranks, from the same, or from [..., S / t, D] with sequence parallelism."""
    ranks.randomness.enter()
    return _applied(_GatherSequence if ranks.sequence_parallel else _SumGradients, x, ranks)


def leave(x: Tensor, ranks: TensorRanks) -> Tensor:
    """Out of a region: the sum of the ranks' terms [..., S, D], or this rank's [..., S / t, D] of it.

    `x` may be overwritten.
    """
    ranks.randomness.leave()
    return _applied(_ScatterSum if ranks.sequence_parallel else _Sum, x, ranks)


def total(x: Tensor, ranks: TensorRanks) -> Tensor:
    """The sum of the ranks' terms, whole on each of them, whose gradient is the same on all; `x` may be overwritten."""
    return _applied(_Sum, x, ranks)


def split(x: Tensor, ranks: TensorRanks) -> Tensor:
    """This rank's part [..., S / t, D] of what all ranks have: the beginning of what is cut along the sequence.

    Raises:
        ValueError: S that the ranks do not divide.
    """
    ranks.randomness.separate()
    return _applied(_Split, x, ranks)


def gather_features(x: Tensor, ranks: TensorRanks) -> Tensor:
    """Whole features [..., F] from equal parts [..., F / t]; what follows must be the same on all ranks."""
    return _applied(_GatherFeatures, x, ranks)


def _applied(function: type[Function], x: Tensor, ranks: TensorRanks) -> Tensor:
    result: Tensor = function.apply(x, ranks)
    return result


# What is sent #


def _summed(x: Tensor, group: Communicator, label: str) -> Tensor:
    """The sum over the ranks, in place where the memory of `x` allows it."""
    flat = x.detach().contiguous()
    group.all_reduce(flat.view(-1), label).wait()
    return flat


def _gathered(x: Tensor, group: Communicator, dim: int, label: str) -> Tensor:
    """The ranks' parts, one after the other along a dimension."""
    rows = x.new_empty(group.world, *x.shape)
    rows[group.rank].copy_(x)
    group.all_gather(rows.view(-1), label).wait()
    return rows.movedim(0, dim).flatten(dim, dim + 1)


def _scattered_sum(x: Tensor, group: Communicator, label: str) -> Tensor:
    """This rank's part of the sum over the ranks along the sequence; `x` may be overwritten."""
    dim = x.dim() - 2
    rows = x.detach().unflatten(dim, (group.world, -1)).movedim(dim, 0).contiguous()
    group.reduce_scatter(rows.view(-1), label).wait()
    return rows[group.rank].clone()  # a view would keep the memory of all parts


def _part(x: Tensor, group: Communicator) -> Tensor:
    dim = x.dim() - 2
    if x.shape[dim] % group.world:
        raise ValueError(
            f"a sequence of {x.shape[dim]} tokens cannot be cut among {group.world} tensor ranks; pad it to a multiple"
            f" of {group.world}, or set parallel.sequence_parallel = false"
        )
    return x.unflatten(dim, (group.world, -1)).select(dim, group.rank)


# What autograd sees #


class _SumGradients(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.group = ranks.group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group, "activation gradients of a region"), None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorRanks) -> Tensor:
        if ranks.keeps_products or not x.is_contiguous():
            return _summed(x.clone(memory_format=torch.contiguous_format), ranks.group, "activations of a region")
        ctx.mark_dirty(x)
        ranks.group.all_reduce(x.detach().view(-1), "activations of a region").wait()
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _GatherSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.group = ranks.group
        return _gathered(x, ranks.group, x.dim() - 2, "activations of a region")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _scattered_sum(gradients[0], ctx.group, "activation gradients of a region"), None


class _ScatterSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.group = ranks.group
        return _scattered_sum(x.clone() if ranks.keeps_products else x, ranks.group, "activations of a region")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        return _gathered(gradient, ctx.group, gradient.dim() - 2, "activation gradients of a region"), None


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.group = ranks.group
        return _part(x, ranks.group).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        return _gathered(gradient, ctx.group, gradient.dim() - 2, "activation gradients of the first region"), None


class _GatherFeatures(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: TensorRanks) -> Tensor:
        ctx.group, ctx.features = ranks.group, x.shape[-1]
        return _gathered(x, ranks.group, x.dim() - 1, "logits")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        start = ctx.group.rank * ctx.features
        return gradients[0].narrow(-1, start, ctx.features).contiguous(), None
