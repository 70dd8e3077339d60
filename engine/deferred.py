"""Linear layers whose weight gradients are computed after backward: the split that zero-bubble schedules need.

Backward of such a layer computes the gradient of its input, which the stage before waits for, and keeps (input,
gradient of the output); the gradients of weight and bias follow when they are asked for (Qi et al. 2024, Zero Bubble
Pipeline Parallelism, section 2.1). All other operators do both at once.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .tensor_layers import CutLinear


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Where a layer multiplies: x W^T + b with x [..., i], W [o, i] (or [i, o] where `transposed`), b [o] or None.

    Attributes:
        replace: has the layer call a function of x for it.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool
    replace: Callable[[Callable[[Tensor], Tensor]], None]

    @property
    def matrix(self) -> Tensor:
        """[o, i]"""
        return self.weight.t() if self.transposed else self.weight

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def gradients(self, inputs: Tensor, gradient: Tensor) -> list[Tensor]:
        """Those of `parameters`, from inputs [..., i] and gradients of outputs [..., o]."""
        rows, flat = inputs.flatten(0, -2), gradient.flatten(0, -2)
        rows = rows.to(flat.dtype)
        of_weight = (rows.T @ flat if self.transposed else flat.T @ rows).to(self.weight.dtype)
        return [of_weight] if self.bias is None else [of_weight, flat.sum(0).to(self.bias.dtype)]


def products(module: nn.Module, together: Callable[[Iterable[nn.Parameter]], bool]) -> Iterator[Product]:
    """Those of the linear layers in a module whose parameters belong `together`: plain ones, and those that tensor
    ranks have cut; not layers with a forward of their own.
    """
    for layer in module.modules():
        found = _product(layer)
        if found is not None and together(found.parameters):
            yield found


def _product(layer: nn.Module) -> Product | None:
    if isinstance(layer, CutLinear):
        return Product(layer.weight, layer.multiplied_bias, layer.transposed, partial(setattr, layer, "product"))
    if type(layer).forward is nn.Linear.forward and "forward" not in vars(layer):
        assert isinstance(layer, nn.Linear)
        assert isinstance(layer.weight, nn.Parameter)
        return Product(layer.weight, layer.bias, False, partial(setattr, layer, "forward"))
    return None


class _Pending(NamedTuple):
    """What the gradients of one call need: input [..., i] and gradient of the output [..., o]."""

    product: Product
    inputs: Tensor
    gradient: Tensor


class DeferredWeights:
    """The weight gradients that the linear layers of one chunk owe.

    Attributes:
        micro_batch: whose backward runs, if its weight gradients are to wait; None: they are computed in backward.
    """

    def __init__(self, replaced: Iterable[Product]) -> None:
        self.micro_batch: int | None = None
        self._pending: dict[int, list[_Pending]] = {}
        for product in replaced:
            product.replace(_Forward(self, product))

    def owe(self, product: Product, inputs: Tensor, gradient: Tensor) -> None:
        assert self.micro_batch is not None
        self._pending.setdefault(self.micro_batch, []).append(_Pending(product, inputs, gradient))

    def pay(self, micro_batch: int, weights: Container[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What is owed of a micro-batch to the layers of these weights, computed: (parameter, gradient)."""
        rest = []
        for pending in self._pending.pop(micro_batch, ()):
            if pending.product.weight not in weights:
                rest.append(pending)
                continue
            found = pending.product.gradients(pending.inputs, pending.gradient)
            yield from zip(pending.product.parameters, found, strict=True)
        if rest:
            self._pending[micro_batch] = rest


class _Forward:
    """What a layer calls in the place of its product."""

    def __init__(self, store: DeferredWeights, product: Product) -> None:
        self._store, self._product = store, product

    def __call__(self, inputs: Tensor) -> Tensor:
        product = self._product
        if not torch.is_grad_enabled() or inputs.dim() < 2:
            return functional.linear(inputs, product.matrix, product.bias)
        output: Tensor = _Linear.apply(self._store, product, inputs, product.weight, product.bias)
        return output


class _Linear(torch.autograd.Function):
    """A product whose weight gradients may wait."""

    @staticmethod
    def forward(
        ctx: Any, store: DeferredWeights, product: Product, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.store, ctx.product = store, product
        return functional.linear(inputs, product.matrix, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor | None, Tensor | None, Tensor | None]:
        (gradient,), (inputs,) = gradients, ctx.saved_tensors
        store, product = ctx.store, ctx.product
        wide = product.matrix.to(gradient.dtype)
        before = (gradient @ wide).to(inputs.dtype) if ctx.needs_input_grad[2] else None
        if store.micro_batch is not None:
            store.owe(product, inputs, gradient)
            return None, None, before, None, None
        found = product.gradients(inputs, gradient)
        return None, None, before, found[0], found[1] if len(found) > 1 else None
