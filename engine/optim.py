"""Optimizers by name: torch's that go with shards, and Lion and LAMB. `windtunnel.optim.Adam(parameters, lr=...)`.

What makes an optimizer fit for shards is that a piece of a parameter can be stepped without the rest of it: all are
element-wise, but LAMB, which needs two sums over each whole parameter.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from ..kernels.lamb import lamb_direction_, squared_norms, trust_ratios
from ..kernels.lion import lion_
from ..reading import nearest
from .sections import OptimizerSection

__all__ = [
    "ASGD", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Lamb", "Lion", "NAdam", "RAdam", "RMSprop",
    "Rprop",
]  # fmt: skip


class Lion(Optimizer):
    """Lion (kernels/lion.py). Wants a learning rate 3 to 10 times smaller than Adam's, and as much more decay."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        _check(lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient are left alone."""
        _refuse_closure(closure)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if parameter not in self.state:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            lion_(
                parameters,
                [p.grad for p in parameters if p.grad is not None],
                [self.state[p]["momentum"] for p in parameters],
                lr=group["lr"],
                betas=group["betas"],
                weight_decay=group["weight_decay"],
            )


def _as_they_are(tensors: Sequence[Tensor], squares: Tensor) -> Tensor:
    return squares


class Lamb(Optimizer):
    """LAMB (kernels/lamb.py).

    Attributes:
        complete: makes the squared norms [n, 2] of n stepped tensors those of the parameters that they are pieces of.
            In one process they are whole already. It is called in every step, even if nothing has a gradient here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_coeff: float = 0.01,
        max_coeff: float = 10.0,
    ) -> None:
        _check(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
        if not 0 < min_coeff <= max_coeff:
            raise ValueError(f"min_coeff = {min_coeff}, max_coeff = {max_coeff}; allowed: 0 < min_coeff <= max_coeff")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "min_coeff": min_coeff, "max_coeff": max_coeff})
        self.complete: Callable[[Sequence[Tensor], Tensor], Tensor] = _as_they_are

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient are left alone."""
        _refuse_closure(closure)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            directions = [self._direction(p, group) for p in parameters]
            pairs = [squared_norms(p, u) for p, u in zip(parameters, directions, strict=True)]
            squares = self.complete(parameters, torch.stack(pairs) if pairs else torch.empty(0, 2))
            ratios = trust_ratios(squares, min_coeff=group["min_coeff"], max_coeff=group["max_coeff"])
            for parameter, direction, ratio in zip(parameters, directions, ratios, strict=True):
                parameter.add_(direction.mul_(ratio), alpha=-group["lr"])

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["momentum"], state["variance"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        assert parameter.grad is not None
        return lamb_direction_(
            parameter,
            parameter.grad,
            state["momentum"],
            state["variance"],
            state["step"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def _check(*, lr: float, betas: Sequence[float], weight_decay: float, eps: float = 0.0) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        if not value >= 0:
            raise ValueError(f"{name} = {value}; allowed: at least 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas = {tuple(betas)}; allowed: two numbers from 0 to below 1")


def _refuse_closure(closure: object) -> None:
    if closure is not None:
        raise ValueError("step(closure) is not supported: compute the loss and its gradients before the step")


# What goes with shards #

ELEMENT_WISE: tuple[type[Optimizer], ...] = (
    Adadelta, Adagrad, Adam, Adamax, AdamW, ASGD, Lion, NAdam, RAdam, RMSprop, Rprop, SGD,
)  # fmt: skip
"""Optimizers whose update of an element needs that element alone: a shard steps as the whole would."""

FUSED: tuple[type[Optimizer], ...] = (Adam, AdamW, SGD)
"""Optimizers that torch can run as one pass over memory."""

SHARDABLE = (*ELEMENT_WISE, Lamb)

_REDUCES = "it reduces gradients itself; communication_compression.gradients = 'one_bit' goes with any optimizer here"

_WHY_NOT = {
    "Adafactor": "its second moments are means over whole rows and columns of a matrix",
    "LBFGS": "it searches along a line with a closure, over products of all parameters",
    "Muon": "it makes whole matrices orthogonal",
    "SparseAdam": "it wants sparse gradients, and those of a flat unit are dense",
    **dict.fromkeys(("OneBitAdam", "OneBitLamb", "ZeroOneAdam"), _REDUCES),
}
"""Known optimizers that are refused, and why."""

BY_NAME: dict[str, type[Optimizer]] = {kind.__name__.lower(): kind for kind in SHARDABLE}
"""Optimizers by `optimizer.type`, which is case-insensitive as in DeepSpeed."""


def check_shardable(optimizer: Optimizer) -> None:
    """Raise a ValueError with the reason if pieces of parameters cannot be stepped by it."""
    if type(optimizer) in SHARDABLE:
        return
    name = type(optimizer).__name__
    why = _WHY_NOT.get(name, "whether it updates each element by itself is not known")
    raise ValueError(f"optimizer {name} cannot step shards: {why}; allowed: {_names()}")


def unsharded(parameters: Any, section: OptimizerSection | None) -> Optimizer:
    """The configured optimizer on whole parameters: what one process would use, and the pattern for the shards.

    As in DeepSpeed, "Adam" decays weights as AdamW does unless `adam_w_mode` is false. `torch_adam` says which of two
    equal implementations to take; here it is always torch's.

    Raises:
        ValueError: an unknown or refused type, or an argument that it does not have.
    """
    if section is None:
        raise ValueError("no optimizer: pass optimizer=..., or an 'optimizer' section in config")
    kind, arguments = _kind(section.type), dict(section.params)
    if kind in (Adam, AdamW):
        arguments.pop("torch_adam", None)
        decoupled = arguments.pop("adam_w_mode", True)
        if kind is Adam and decoupled:
            kind, arguments = AdamW, {"weight_decay": 0.0, **arguments}
    try:
        return kind(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.params for {section.type}: {error}") from None


def _kind(name: str) -> type[Optimizer]:
    if name.lower() in BY_NAME:
        return BY_NAME[name.lower()]
    for refused, why in _WHY_NOT.items():
        if refused.lower() == name.lower():
            raise ValueError(f"optimizer.type = {name!r} cannot step shards: {why}; allowed: {_names()}")
    names = [kind.__name__ for kind in SHARDABLE]
    raise ValueError(f"optimizer.type = {name!r}; allowed: {_names()}{nearest(name, names)}")


def _names() -> str:
    return ", ".join(sorted(kind.__name__ for kind in SHARDABLE))
