"""Mixture of experts: a layer for any model, and expert parallelism, where ranks have different experts.

    MixtureOfExperts(gate, bank, top_k=2)      in a model: tokens -> (what their experts made of them, balance loss)
    {"parallel": {"expert": e}}                in the config: e neighbouring data-parallel ranks have E / e experts each

Each rank lays its tokens out by expert, C for each of the E (kernels/gating.py), and the all-to-all of these equal
parts takes them to the ranks that have the experts, and back. The ranks remain data-parallel in all else. Gradients of
an expert are summed over the ranks that have it (axis "expert_data"); those of tokens from other ranks of the axis
"expert" are in them already. Capacity is per rank and micro-step, so one process imitates n ranks by n micro-steps.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..collectives.experts import ExpertsSize
from ..kernels.attention import wide
from ..kernels.gating import combine, dispatch, route
from .communicator import Communicator, SoloCommunicator
from .roles import Role, Whole, give_role


class ExpertLinear(nn.Module):
    """A linear layer for each of E experts: [E, C, inputs] -> [E, C, outputs]. Starts as nn.Linear does."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.bmm(x, self.weight.mT)
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class MixtureOfExperts(nn.Module):
    """Every token visits `top_k` of E experts.

    Args:
        gate: from tokens to E logits; computed in fp32 at least (Fedus et al. 2022, section 2.4).
        experts: a module [E, C, D] -> [E, C, D] whose parameters all have E as first dimension.
        top_k: experts that each token visits.
        capacity_factor: see ExpertsSize.

    Raises:
        ValueError: more visits than experts, a capacity factor of 0 or less, or a parameter of another shape.
    """

    def __init__(self, gate: nn.Linear, experts: nn.Module, *, top_k: int, capacity_factor: float = 1.25) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts
        self.number, self.top_k, self.capacity_factor = gate.out_features, top_k, capacity_factor
        self.group: Communicator = SoloCommunicator("expert")
        if not 1 <= top_k <= self.number:
            raise ValueError(f"top_k = {top_k}; allowed: 1 to {self.number}, the outputs of the gate")
        if not capacity_factor > 0:
            raise ValueError(
                f"capacity_factor = {capacity_factor}; allowed: a number > 0, where 1 is room for even choices"
            )
        for name, parameter in experts.named_parameters():
            if parameter.shape[:1] != (self.number,):
                raise ValueError(
                    f"parameter {name!r} of the experts has shape {list(parameter.shape)}; allowed: first dimension"
                    f" {self.number}, the outputs of the gate"
                )

    def size(self, tokens: int) -> ExpertsSize:
        """Of this layer, for so many tokens of a rank."""
        return ExpertsSize(
            tokens=tokens,
            experts=self.number,
            top_k=self.top_k,
            capacity_factor=self.capacity_factor,
            width=self.gate.in_features,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(result of the shape of x [..., D], zero for tokens that were dropped; balance loss [], in fp32 at least)."""
        tokens = x.flatten(0, -2)
        routing = route(self._logits(tokens), self.top_k, self.size(tokens.shape[0]).capacity)
        by_expert = dispatch(tokens, routing, self.number)
        results = self._elsewhere(by_expert) if self.group.world > 1 else self.experts(by_expert)
        return combine(results, routing, tokens.shape[0]).view(x.shape).to(x.dtype), routing.balance

    def _logits(self, tokens: Tensor) -> Tensor:
        dtype = wide(tokens.dtype)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = tokens.to(dtype) @ self.gate.weight.to(dtype).mT
            return logits if self.gate.bias is None else logits + self.gate.bias.to(dtype)

    def _elsewhere(self, by_expert: Tensor) -> Tensor:
        """[E, C, D] by way of the ranks that have the experts: E' = E / e of them, with C tokens of each of e ranks."""
        ranks, capacity = self.group.world, by_expert.shape[1]
        mine: Tensor = Exchange.apply(by_expert.unflatten(0, (ranks, -1)), self.group)
        results = self.experts(mine.transpose(0, 1).flatten(1, 2))
        back: Tensor = Exchange.apply(results.unflatten(1, (ranks, capacity)).transpose(0, 1), self.group)
        return back.flatten(0, 1)


class Exchange(torch.autograd.Function):
    """Part r of a tensor [e, ...] goes to rank r, and what that one has for this rank takes its place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Communicator) -> Tensor:
        ctx.group = group
        return _exchanged(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradient, ctx.group), None


def _exchanged(tensor: Tensor, group: Communicator) -> Tensor:
    buffer = tensor.clone(memory_format=torch.contiguous_format)
    group.all_to_all(buffer.view(-1), "tokens for experts").wait()
    return buffer


def spread_experts(model: nn.Module, group: Communicator) -> None:
    """Keep this rank's experts of every MixtureOfExperts in a model; the parameters stay the same objects.

    Raises:
        ValueError: there is none, or its experts do not divide by the ranks.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}
    if not layers:
        raise ValueError(
            f"parallel.expert = {group.world}, but the model has no MixtureOfExperts (engine/experts.py); allowed: 1"
        )
    for name, layer in layers.items():
        if layer.number % group.world:
            raise ValueError(
                f"parallel.expert = {group.world} does not divide the {layer.number} experts of {name or 'the model'};"
                f" allowed: {', '.join(str(n) for n in range(1, layer.number + 1) if layer.number % n == 0)}"
            )
        layer.group = group
        mine = layer.number // group.world
        here = (group.rank * mine, (group.rank + 1) * mine)
        for parameter in layer.experts.parameters():
            whole = Whole(tuple(parameter.shape), 0, (here,))
            parameter.data = parameter.data[slice(*here)].clone()
            give_role(parameter, Role(cut=("expert",), whole=whole))
