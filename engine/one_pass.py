"""The pieces of a unit stepped in one pass over memory (kernels/one_pass.py), in the place of a torch optimizer.

State is that of torch's optimizers, under their names, so that a checkpoint of one may be read by the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from ..kernels import adamw, lamb, lion, sgd
from ..kernels.one_pass import HasMoments, Rule, Shards
from .device import optimizer_step
from .optim import Lamb, Lion

REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")
"""Options of torch's optimizers that no rule has."""


Complete = Callable[[Sequence[Tensor], Tensor], Tensor]
"""Makes the squared norms [n, 2] of n pieces those of the parameters that they are pieces of."""


def rule_of(kind: Callable[..., torch.optim.Optimizer], hyper: Mapping[str, Any]) -> Rule | lamb.Lamb:
    """One step of an optimizer of class `kind` with the values of a parameter group.

    Raises:
        ValueError: an optimizer, or an option of one, that is not done in one pass.
    """
    for option in REFUSED:
        if hyper.get(option):
            raise ValueError(
                f"kernels.fused 'optimizer' with {option} = true; allowed: leave that out, or take 'optimizer' out of"
                " kernels.fused"
            )
    some, lr = partial(_some, hyper), float(hyper.get("lr", 0.0))
    if kind in (Adam, AdamW):
        decoupled = kind is AdamW or bool(hyper.get("decoupled_weight_decay"))
        return adamw.AdamW(lr=lr, decoupled=decoupled, **some("betas", "eps", "weight_decay"))
    if kind is SGD:
        return sgd.Sgd(lr=lr, **some("momentum", "dampening", "weight_decay", "nesterov"))
    if kind is Lion:
        return lion.Lion(lr=lr, **some("betas", "weight_decay"))
    if kind is Lamb:
        return lamb.Lamb(lr=lr, **some("betas", "eps", "weight_decay", "min_coeff", "max_coeff"))
    raise ValueError(
        f"kernels.fused 'optimizer' with {getattr(kind, '__name__', kind)}; allowed: Adam, AdamW, SGD, Lion, Lamb, or"
        " take 'optimizer' out of kernels.fused"
    )


def _some(hyper: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: hyper[name] for name in names}


@dataclass(frozen=True, slots=True)
class PieceToStep:
    """Alike in elements: what is stepped, its gradient, where the new values go in another dtype, and its state."""

    master: Tensor
    gradient: Tensor
    copy: Tensor | None
    state: dict[str, Any]


def step_pieces(
    kind: Callable[..., torch.optim.Optimizer],
    hyper: Mapping[str, Any],
    pieces: Sequence[PieceToStep],
    multiplier: float,
    complete: Complete | None = None,
) -> None:
    """Step pieces by `multiplier` times their gradients; state that they do not have yet begins here.

    Args:
        complete: for LAMB alone, which calls it even if there are no pieces.
    """
    rule = rule_of(kind, hyper)
    if isinstance(rule, lamb.Lamb):
        for piece in pieces:
            _begin(rule, piece)
        assert complete is not None
        _step_lamb(rule, pieces, multiplier, complete)
        return
    fresh = [piece for piece in pieces if _begin(rule, piece)]
    if isinstance(rule, sgd.Sgd) and rule.momentum and fresh:
        begun = {id(piece) for piece in fresh}
        _step(replace(rule, first=True), fresh, multiplier)
        pieces = [piece for piece in pieces if id(piece) not in begun]
    _step(rule, pieces, multiplier)


def _begin(rule: HasMoments, piece: PieceToStep) -> bool:
    """Give a piece the state that it lacks; whether it lacked any moments."""
    if not isinstance(rule, sgd.Sgd | lion.Lion) and "step" not in piece.state:
        on_host = isinstance(rule, lamb.Lamb)
        piece.state["step"] = torch.zeros(
            (), dtype=torch.float64 if on_host else torch.float32, device="cpu" if on_host else piece.master.device
        )
    missing = [name for name in rule.moments if piece.state.get(name) is None]
    for name in missing:
        piece.state[name] = torch.zeros_like(piece.master)
    return bool(missing)


def _shards(rule: HasMoments, pieces: Sequence[PieceToStep]) -> Shards:
    """The pieces, whose steps count one more."""
    steps = [piece.state["step"] for piece in pieces if "step" in piece.state]
    if steps:
        torch._foreach_add_(steps, 1.0)
    return Shards(
        [piece.master for piece in pieces],
        [piece.gradient for piece in pieces],
        tuple([piece.state[name] for piece in pieces] for name in rule.moments),
        steps,
        [piece.copy for piece in pieces if piece.copy is not None],
    )


def _step(rule: Rule, pieces: Sequence[PieceToStep], multiplier: float) -> None:
    if pieces:
        kernel = type(rule).__name__.lower()
        step = optimizer_step(kernel, pieces[0].master.device)
        step(rule, _shards(rule, pieces), multiplier=multiplier)


def _step_lamb(rule: lamb.Lamb, pieces: Sequence[PieceToStep], multiplier: float, complete: Complete) -> None:
    shards = _shards(rule, pieces)
    squares, _ = lamb.lamb_squares_(rule, shards, multiplier=multiplier)
    ratios = lamb.trust_ratios(complete(shards.masters, squares), min_coeff=rule.min_coeff, max_coeff=rule.max_coeff)
    lamb.lamb_apply_(rule, shards, ratios)
