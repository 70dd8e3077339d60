"""The optimizer on shards: any element-wise `torch.optim` optimizer, one unit at a time.

Each parameter's piece of a shard is a tensor of its own to the optimizer, with its own state. So a parameter without a
gradient is left alone exactly as torch would leave it, and the units step one after another while the gathers of those
before are on their way.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .communicator import Communicator
from .config import OptimizerSection, optimizer_name
from .unit import FlatUnit
from .zero import ZeroRuntime

ELEMENT_WISE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
"""Optimizers whose update of an element needs that element alone: a shard steps as the whole would."""

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers that torch can run as one pass over memory."""


def unsharded(parameters: Any, section: OptimizerSection | None) -> torch.optim.Optimizer:
    """The configured optimizer on whole parameters: what one process would use, and the pattern for the shards.

    Raises:
        ValueError: an unknown type or argument.
    """
    if section is None:
        raise ValueError("no optimizer: pass optimizer=..., or an 'optimizer' section in config")
    name = optimizer_name(section)
    try:
        return getattr(torch.optim, name)(parameters, **section.params)
    except TypeError as error:
        raise ValueError(f"optimizer.params for {name}: {error}") from None


class ShardedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose parameters are this rank's pieces.

    `param_groups` are the pattern's: a learning-rate schedule writes there. `step` clips, steps unit by unit, and
    starts to publish each unit as soon as it is stepped.

    Attributes:
        gradient_norm: global norm before clipping at the last step, a scalar tensor; None where nothing is clipped.
    """

    def __init__(self, pattern: torch.optim.Optimizer, runtime: ZeroRuntime, *, clip: float, loss_scale: float) -> None:
        if type(pattern) not in ELEMENT_WISE:
            allowed = ", ".join(kind.__name__ for kind in ELEMENT_WISE)
            raise ValueError(f"optimizer {type(pattern).__name__} is not known to be element-wise; allowed: {allowed}")
        self.runtime, self.clip, self.loss_scale = runtime, clip, loss_scale
        self.communicator: Communicator = runtime.communicator
        self.gradient_norm: Tensor | None = None
        self.units = [unit for unit in runtime.units if unit.trainable]
        self._pieces = {
            unit: [(piece, unit.master[piece.start : piece.stop]) for piece in unit.pieces()] for unit in self.units
        }
        groups = [
            {
                **_hyper(group),
                "params": [t for unit in self.units if unit.group == number for _, t in self._pieces[unit]],
            }
            for number, group in enumerate(pattern.param_groups)
        ]
        super().__init__(groups, dict(pattern.defaults))
        self._steppers = {unit: self._stepper(type(pattern), unit) for unit in self.units if self._pieces[unit]}

    def _stepper(self, kind: Callable[..., torch.optim.Optimizer], unit: FlatUnit) -> torch.optim.Optimizer:
        """torch's optimizer for the pieces of one unit; its state is kept in ours."""
        hyper = _hyper(self.param_groups[unit.group])
        if kind in FUSED and not any(hyper.get(flag) for flag in ("foreach", "fused", "differentiable", "capturable")):
            hyper["fused"] = True
        stepper = kind([{**hyper, "params": [tensor for _, tensor in self._pieces[unit]]}], **_arguments(kind, hyper))
        stepper.state = self.state
        return stepper

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip by the global norm, step every unit's pieces, and publish the new parameters.

        Raises:
            ValueError: a closure is given; gradients here are reduced ones, which a closure cannot renew.
        """
        if closure is not None:
            raise ValueError("step(closure) is not supported on shards: call engine.step()")
        used = self.runtime.used_anywhere()
        scale = 1.0 / self.loss_scale
        coefficient = self._clip_coefficient(scale) if self.clip > 0 else None
        for unit in self.units:
            self._enter("update", unit)
            self._step_unit(unit, used, scale, coefficient)
            unit.publish()
        self.runtime.end_step()

    def _step_unit(self, unit: FlatUnit, used: set, scale: float, coefficient: Tensor | None) -> None:
        gradient = unit.gradient_shard
        if gradient.dtype != unit.master.dtype:
            gradient = gradient.to(unit.master.dtype)
        if scale != 1.0:
            gradient.mul_(scale)
        if coefficient is not None:
            gradient.mul_(coefficient)
        if unit not in self._steppers:
            return
        for piece, tensor in self._pieces[unit]:
            tensor.grad = gradient[piece.start : piece.stop] if piece.parameter in used else None
        stepper = self._steppers[unit]
        stepper.param_groups[0].update(_hyper(self.param_groups[unit.group], without=("fused", "foreach")))
        with self._keeping():
            stepper.step()
        for _, tensor in self._pieces[unit]:
            tensor.grad = None
        if unit.master is not unit.shard:
            unit.shard.copy_(unit.master)

    def _clip_coefficient(self, scale: float) -> Tensor:
        """min(1, clip / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_; the norm is over all ranks' shards."""
        squares = torch.zeros((), dtype=self.units[0].master.dtype, device=self.units[0].full.device)
        for unit in self.units:
            self._enter("norm", unit)
            squares += torch.linalg.vector_norm(unit.gradient_shard, dtype=squares.dtype).square()
        self.runtime.observer.enter("norm.end", -1)
        if self.runtime.zero.optimizer:
            total = squares.view(1)
            self.communicator.all_reduce(total, "gradient norm", scalar=True).wait()
        self.gradient_norm = squares.sqrt() * scale
        return (self.clip / (self.gradient_norm + 1e-6)).clamp(max=1.0)

    def _enter(self, key: str, unit: FlatUnit) -> None:
        self.runtime.observer.enter(key if unit.block >= 0 else f"{key}.root", unit.block)

    def _keeping(self) -> AbstractContextManager[None]:
        """What torch's optimizer allocates inside is its state."""
        return self.runtime.observer.category("optimizer")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: a step leaves no gradients behind.

        Raises:
            RuntimeError: after a backward and before its step, where gradients would be lost.
        """
        if self.runtime.micro_step:
            raise RuntimeError(
                f"zero_grad() after {self.runtime.micro_step} of {self.runtime.accumulation} micro-steps would drop"
                " their gradients; call it after the step, or not at all"
            )


def _hyper(group: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params" and name not in without}


def _arguments(kind: Callable[..., torch.optim.Optimizer], hyper: dict[str, Any]) -> dict[str, Any]:
    """Those of a group's values that the constructor takes (some optimizers add derived ones to their groups)."""
    import inspect

    accepted = inspect.signature(kind).parameters
    return {name: value for name, value in hyper.items() if name in accepted}
