"""Linear layers whose weight gradients are computed after backward: the split that zero-bubble schedules need.

Backward of such a layer computes the gradient of its input, which the stage before waits for, and keeps (input,
gradient of the output); the gradients of weight and bias follow when they are asked for (Qi et al. 2024, Zero Bubble
Pipeline Parallelism, section 2.1). All other operators do both at once.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Pending(NamedTuple):
    """What the gradients of one call need: input [..., i] and gradient of the output [..., o]."""

    layer: nn.Linear
    inputs: Tensor
    gradient: Tensor


class DeferredWeights:
    """The weight gradients that the linear layers of one chunk owe.

    Attributes:
        micro_batch: whose backward runs, if its weight gradients are to wait; None: they are computed in backward.
    """

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        self.micro_batch: int | None = None
        self._pending: dict[int, list[_Pending]] = {}
        for layer in layers:
            module: nn.Module = layer
            module.forward = _Forward(self, layer)

    def owe(self, layer: nn.Linear, inputs: Tensor, gradient: Tensor) -> None:
        assert self.micro_batch is not None
        self._pending.setdefault(self.micro_batch, []).append(_Pending(layer, inputs, gradient))

    def pay(self, micro_batch: int, weights: Container[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What is owed of a micro-batch to the layers of these weights, computed: (parameter, gradient)."""
        rest = []
        for pending in self._pending.pop(micro_batch, ()):
            if pending.layer.weight not in weights:
                rest.append(pending)
                continue
            found = weight_gradients(pending.layer, pending.inputs, pending.gradient)
            yield from zip(pending.layer.parameters(recurse=False), found, strict=True)
        if rest:
            self._pending[micro_batch] = rest


def weight_gradients(layer: nn.Linear, inputs: Tensor, gradient: Tensor) -> list[Tensor]:
    """Those of weight [o, i] and, if there is one, bias [o]; from inputs [..., i] and gradients of outputs [..., o]."""
    flat = gradient.flatten(0, -2)
    found = [(flat.T @ inputs.flatten(0, -2).to(flat.dtype)).to(layer.weight.dtype)]
    return found if layer.bias is None else [*found, flat.sum(0).to(layer.bias.dtype)]


def deferrable(module: nn.Module, together: Callable[[Iterable[nn.Parameter]], bool]) -> Iterator[nn.Linear]:
    """The plain linear layers in a module whose parameters belong `together`; not those with a forward of their own."""
    for layer in module.modules():
        plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
        if plain and "forward" not in vars(layer) and together(layer.parameters(recurse=False)):
            assert isinstance(layer, nn.Linear)
            yield layer


class _Forward:
    """The forward of a linear layer."""

    def __init__(self, store: DeferredWeights, layer: nn.Linear) -> None:
        self._store, self._layer = store, layer

    def __call__(self, inputs: Tensor) -> Tensor:
        layer = self._layer
        if not torch.is_grad_enabled() or inputs.dim() < 2:
            return functional.linear(inputs, layer.weight, layer.bias)
        output: Tensor = _Linear.apply(self._store, layer, inputs, layer.weight, layer.bias)
        return output


class _Linear(torch.autograd.Function):
    """y = x W^T + b with x [..., i], W [o, i], b [o] or None."""

    @staticmethod
    def forward(
        ctx: Any, store: DeferredWeights, layer: nn.Linear, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.store, ctx.layer = store, layer
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor | None, Tensor | None, Tensor | None]:
        (gradient,), (inputs,) = gradients, ctx.saved_tensors
        store, layer = ctx.store, ctx.layer
        wide = layer.weight.to(gradient.dtype)
        before = (gradient @ wide).to(inputs.dtype) if ctx.needs_input_grad[2] else None
        if store.micro_batch is not None:
            store.owe(layer, inputs, gradient)
            return None, None, before, None, None
        found = weight_gradients(layer, inputs, gradient)
        return None, None, before, found[0], found[1] if len(found) > 1 else None
