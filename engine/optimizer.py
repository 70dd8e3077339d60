"""The optimizer on shards: any optimizer of engine/optim.py, one unit at a time.

Each parameter's piece of a shard is a tensor of its own to the optimizer, with its own state. So a parameter without a
gradient is left alone exactly as torch would leave it, and the units step one after another while the gathers of those
before are on their way.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD

from .chunks import Chunk, chunks, whole_of
from .loss_scale import LossScaler
from .one_pass import PieceToStep, rule_of, step_pieces
from .optim import FUSED, Lamb, check_shardable
from .partition import Part
from .placement import Placement, offloaded
from .tier import StateLayout, state_layout
from .unit import FlatUnit, Piece, wide_dtype
from .zero import ZeroRuntime, reduce_order

log = logging.getLogger(__name__)

SOME_NORM = 1e15
"""The gradient norm of a flight, which has no values: finite, and so large that it is clipped."""


class Verdict(NamedTuple):
    """What all ranks agree on before a step.

    Attributes:
        missed: whether any of them has parameters without a gradient.
        norm: of all gradients, without the loss scale; inf or nan if any of them is, 0 if nobody asked for it.
    """

    missed: bool
    norm: float


@dataclass(frozen=True, slots=True)
class Held:
    """A range of a flattened parameter that this rank keeps.

    Attributes:
        name: of the parameter.
        parameter: it, or this rank's part of it.
        first, elements: the range, in elements of that.
        unit, start: where the range begins in the shard of its unit.
        tensor: [elements] what is stepped, a range of the unit's master (with no elements while that rests in a file);
            None if it is frozen.
        group: number of the parameter group, -1 if it is frozen.
    """

    name: str
    parameter: nn.Parameter
    first: int
    elements: int
    unit: FlatUnit
    start: int
    tensor: Tensor | None
    group: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return whole_of(self.name, self.parameter).shape

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """What the range is of the whole parameter: boxes of it; none for padding.

        Raises:
            ValueError: a parameter that is cut, and nobody said how.
        """
        whole = whole_of(self.name, self.parameter)
        return chunks(whole, self.parameter.shape, self.first, self.first + self.elements)


def layouts(pattern: torch.optim.Optimizer, parts: Sequence[Part], placement: Placement) -> dict[Part, StateLayout]:
    """What the optimizer keeps per element, for each part whose optimizer state rests off the device.

    Raises:
        ValueError: an optimizer that asks other ranks in its step, which a host beside the device cannot.
    """
    if placement.optimizer == "device":
        return {}
    kind = type(pattern)
    if kind is Lamb:
        raise ValueError(
            "optimizer Lamb and zero_optimization.offload_optimizer: its norms are of parameters over all ranks, which"
            " the device reduces; allowed: an element-wise optimizer, or no offload_optimizer"
        )
    trainable = sorted((part for part in parts if part.trainable), key=reduce_order)
    flags = offloaded([sum(slot.parameter.numel() for slot in part.slots) for part in trainable], placement.ratio)
    return {
        part: state_layout(
            kind, _arguments(kind, _hyper(pattern.param_groups[part.slots[0].group])), wide_dtype(part.dtype)
        )
        for part, flag in zip(trainable, flags, strict=True)
        if flag
    }


class ShardedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose parameters are this rank's pieces.

    `param_groups` are the pattern's: a learning-rate schedule writes there. `step` divides by the loss scale and clips
    (in one pass), steps unit by unit, and starts to publish each unit as soon as it is stepped. A step with a gradient
    that is not finite is skipped, on all ranks, if the scaler's policy says so.

    Attributes:
        kind: torch's class, of which each unit has one.
        scaler: the loss scale.
        overflow: whether the last step was skipped.
        one_pass: gradients are widened, scaled and applied, and new parameters rounded, in one pass over memory.
        gradient_norm: global norm at the last step before clipping, of gradients without the loss scale; None where it
            is not needed, for clipping or to see an overflow.
    """

    def __init__(
        self,
        pattern: torch.optim.Optimizer,
        runtime: ZeroRuntime,
        *,
        clip: float,
        scaler: LossScaler,
        one_pass: bool = False,
    ) -> None:
        check_shardable(pattern)
        self.one_pass = one_pass
        for group in pattern.param_groups if one_pass else ():
            rule_of(type(pattern), group)
        self.runtime, self.clip, self.scaler = runtime, clip, scaler
        self.kind, self.overflow = type(pattern), False
        self.gradient_norm: float | None = None
        self.units = [unit for unit in runtime.units if unit.trainable]
        self._pieces = {unit: [(piece, unit.master_piece(piece)) for piece in unit.pieces()] for unit in self.units}
        groups = [
            {
                **_hyper(group),
                "params": [t for unit in self.units if unit.group == number for _, t in self._pieces[unit]],
            }
            for number, group in enumerate(pattern.param_groups)
        ]
        super().__init__(groups, dict(pattern.defaults))
        self._steppers = {
            unit: self._stepper(type(pattern), unit)
            for unit in self.units
            if self._pieces[unit] or type(pattern) is Lamb
        }
        if runtime.host_steps is not None:
            runtime.host_steps.serve(self)

    def _stepper(self, kind: Callable[..., torch.optim.Optimizer], unit: FlatUnit) -> torch.optim.Optimizer:
        """torch's optimizer for the pieces of one unit; its state is kept in ours."""
        hyper = _hyper(self.param_groups[unit.group])
        fusible = kind in FUSED and unit.master.device.type != "meta"
        if fusible and not any(hyper.get(flag) for flag in ("foreach", "fused", "differentiable", "capturable")):
            hyper["fused"] = True
        stepper = kind([{**hyper, "params": [tensor for _, tensor in self._pieces[unit]]}], **_arguments(kind, hyper))
        stepper.state = self.state
        if isinstance(stepper, Lamb) and (self.runtime.zero.optimizer or unit.part.role.whole is not None):
            stepper.complete = partial(self._whole_norms, unit)
        return stepper

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip by the global norm, step every unit's pieces, and publish the new parameters; or skip all of that.

        Raises:
            ValueError: a closure is given; gradients here are reduced ones, which a closure cannot renew.
            LossScaleError: an overflow at the smallest loss scale; the step was skipped.
        """
        if closure is not None:
            raise ValueError("step(closure) is not supported on shards: call engine.step()")
        verdict = self._agree()
        self.overflow = self.scaler.policy.skip and not math.isfinite(verdict.norm)
        if self.overflow:
            self._skip()
            return
        used = self.runtime.used_anywhere(verdict.missed)
        multiplier = self._multiplier(verdict.norm)
        host_steps = self.runtime.host_steps
        if host_steps is not None:
            host_steps.start_others(used, multiplier)
        for unit in self.units:
            self.enter("update", unit)
            if unit.rest is None:
                if not self.step_unit(unit, used, multiplier, self.hyper(unit)):
                    unit.renew()
            elif host_steps is None or not host_steps.finish(unit):
                continue
            unit.publish()
        self.runtime.end_step()
        self.scaler.update(overflow=False)

    def hyper(self, unit: FlatUnit) -> dict[str, Any]:
        """What the unit's parameter group says now."""
        return _hyper(self.param_groups[unit.group], without=("fused", "foreach"))

    def step_unit(self, unit: FlatUnit, used: set, multiplier: float, hyper: dict[str, Any]) -> bool:
        """Step the unit's master by `multiplier` times its gradient shard, wherever the two rest.

        Returns:
            Whether the parameters that are computed with have the new values already, wherever they wait to be sent.
        """
        if self.one_pass and unit in self._steppers:
            return self._step_in_one_pass(unit, used, multiplier, hyper)
        gradient = unit.gradient_shard
        if gradient.dtype != unit.master.dtype:
            gradient = gradient.to(unit.master.dtype)
        if multiplier != 1.0:
            gradient.mul_(multiplier)
        if unit not in self._steppers:
            return False
        stepper = self._steppers[unit]
        stepper.param_groups[0].update(hyper)
        due = [(piece, tensor) for piece, tensor in self._pieces[unit] if piece.parameter in used]
        for pieces in self._rounds(due):
            for piece, tensor in pieces:
                tensor.grad = gradient[piece.start : piece.stop]
            with self._keeping():
                stepper.step()
            for _, tensor in pieces:
                tensor.grad = None
        if unit.rest is not None:
            for piece, tensor in self._pieces[unit]:
                unit.rest.keep(piece.start, self.state[tensor])
        return False

    def _step_in_one_pass(self, unit: FlatUnit, used: set, multiplier: float, hyper: dict[str, Any]) -> bool:
        """`step_unit`, but gradient, master and copy are read and written once."""
        copies = unit.narrow
        due = [(piece, tensor) for piece, tensor in self._pieces[unit] if piece.parameter in used]
        pieces = [
            PieceToStep(
                tensor,
                unit.gradient_shard[piece.start : piece.stop],
                None if copies is None else copies[piece.start : piece.stop],
                self.state[tensor],
            )
            for piece, tensor in due
        ]
        stepper = self._steppers[unit]
        with self._keeping():
            step_pieces(self.kind, hyper, pieces, multiplier, stepper.complete if isinstance(stepper, Lamb) else None)
        if copies is not None:
            self._copy_others(unit, copies, due)
        if unit.rest is not None:
            for piece, tensor in self._pieces[unit]:
                unit.rest.keep(piece.start, self.state[tensor])
        return copies is not None

    def _copy_others(self, unit: FlatUnit, copies: Tensor, stepped: list[tuple[Piece, Tensor]]) -> None:
        """What lies between the stepped pieces: parameters that were not used, frozen ones, padding."""
        start = 0
        for stop, after in [*((piece.start, piece.stop) for piece, _ in stepped), (copies.numel(), copies.numel())]:
            if start < stop:
                copies[start:stop].copy_(unit.master[start:stop])
            start = after

    def _rounds(self, pieces: list[tuple[Piece, Tensor]]) -> list[list[tuple[Piece, Tensor]]]:
        """Pieces that torch steps in one call: its fused SGD wants a momentum for all of them or for none."""
        begun = [self.state.get(tensor, {}).get("momentum_buffer") is not None for _, tensor in pieces]
        if self.kind is not SGD or all(begun) or not any(begun):
            return [pieces]
        return [[pair for pair, has in zip(pieces, begun, strict=True) if has is wanted] for wanted in (True, False)]

    # What ranks agree on #

    def _agree(self) -> Verdict:
        """Everything that a step depends on, by one reduction of two numbers."""
        needed = self.clip > 0 or self.scaler.policy.skip
        squares = self._sum_of_squares() if needed else self._scalar(0.0)
        both = torch.stack([squares, self._scalar(float(self.runtime.missing))])
        self.runtime.deciding.all_reduce(both, "gradient check", scalar=True).wait()
        self.runtime.observer.synchronized()
        # In a flight every parameter is used.
        total, missed = (SOME_NORM**2, 0.0) if both.device.type == "sim" else both.tolist()
        norm = math.sqrt(total) / self.scaler.scale
        self.gradient_norm = norm if needed else None
        return Verdict(missed > 0, norm)

    def _sum_of_squares(self) -> Tensor:
        """This rank's part of the squared global norm, a scalar; not finite if a gradient here is not.

        Gradients that several ranks have count on each of them as its share.
        """
        squares = self._scalar(0.0)
        for unit in self.units:
            self.enter("norm", unit)
            squares += unit.gradient_norm(squares.dtype).square() / unit.holders
        self.runtime.observer.enter("norm.end", -1)
        lost = self.runtime.groups.overflow()
        return squares if lost is None else torch.where(lost, math.inf, squares)

    def _scalar(self, value: float) -> Tensor:
        unit = self.units[0]
        return torch.full((), value, dtype=unit.master.dtype, device=unit.full.device)

    def _multiplier(self, norm: float) -> float:
        """What gradients are multiplied by: 1 / loss scale, and min(1, clip / (norm + 1e-6)) where they are clipped.

        The latter as torch.nn.utils.clip_grad_norm_ has it: a norm of nan makes every gradient nan.
        """
        coefficient = self.clip / (norm + 1e-6) if self.clip > 0 else 1.0
        return (1.0 if coefficient > 1.0 else coefficient) / self.scaler.scale

    def _skip(self) -> None:
        """Drop the gradients and leave all else as it is."""
        self.runtime.drop_step()
        before = self.scaler.scale
        self.scaler.update(overflow=True)
        if self.runtime.deciding.rank == 0:
            log.warning(
                "step skipped: a gradient is inf or nan at loss scale %g; the next scale is %g",
                before,
                self.scaler.scale,
            )

    def _whole_norms(self, unit: FlatUnit, tensors: Sequence[Tensor], squares: Tensor) -> Tensor:
        """The squared norms [n, 2] of the whole parameters that `tensors`, pieces in this rank's shard, are parts of.

        Args:
            squares: [n, 2] those of the pieces.
        """
        mine = dict(zip(map(id, tensors), squares, strict=True))
        rows = {piece.parameter: mine[id(tensor)] for piece, tensor in self._pieces[unit] if id(tensor) in mine}
        nothing = torch.zeros(2, dtype=unit.master.dtype, device=unit.master.device)
        whole = torch.stack([rows.get(parameter, nothing) for parameter in unit.parameters])
        groups, role = self.runtime.groups, unit.part.role
        holders = [groups.shard] if self.runtime.zero.optimizer else []
        holders += [groups.axis(name) for name in role.cut if role.whole is not None]
        for group in holders:
            group.all_reduce(whole.view(-1), f"parameter norms of {unit.label}", scalar=True).wait()
        numbers = [number for number, parameter in enumerate(unit.parameters) if parameter in rows]
        return torch.stack([whole[number] for number in numbers]) if numbers else whole[:0]

    def enter(self, key: str, unit: FlatUnit) -> None:
        self.runtime.observer.enter(key if unit.block >= 0 else f"{key}.root", unit.block)

    def _keeping(self) -> AbstractContextManager[None]:
        """What torch's optimizer allocates inside is its state."""
        return self.runtime.observer.category("optimizer")

    # What this rank keeps, by parameter: the door for checkpoints #

    def held(self) -> Iterator[Held]:
        """Every range of a parameter that this rank keeps, those of frozen ones too; it takes all ranks to make all."""
        for unit in self.runtime.units:
            kept: dict[Piece, Tensor] = dict(self._pieces.get(unit, ()))
            names = {slot.parameter: slot.name for slot in unit.part.slots}
            for piece in unit.pieces():
                first = unit.bounds[0] + piece.start - unit.views[piece.parameter][0]
                group = unit.group if unit.trainable else -1
                length = piece.stop - piece.start
                own = piece.parameter
                yield Held(names[own], own, first, length, unit, piece.start, kept.get(piece), group)

    def values(self, held: Held) -> dict[str, Any]:
        """What is stepped under "parameter", and its state in the optimizer by name: living tensors, or what was read.

        Before the first step of a parameter it has no state. A state tensor has a value per element, or is a scalar.
        """
        unit = held.unit
        with unit.present():
            mine = unit.own_values()[held.start : held.start + held.elements]
            values = {"parameter": mine, **({} if held.tensor is None else self.state.get(held.tensor, {}))}
            if unit.rest is None or not unit.rest.in_file:
                return values
            return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}

    @torch.no_grad()
    def put(self, held: Held, values: Mapping[str, Any]) -> None:
        """Replace what `values` gives; state that it does not name is forgotten. Then call `publish`."""
        unit = held.unit
        if held.tensor is None:
            mine = unit.own_values()
            mine[held.start : held.start + held.elements].copy_(values["parameter"])
            if unit.away is not None:
                unit.away.store_down(mine)
            return
        with unit.present(changed=True):
            held.tensor.copy_(values["parameter"])
            self.state.pop(held.tensor, None)
            state = self._placed(held, held.tensor, values)
            if state:
                self.state[held.tensor] = state
            if unit.rest is not None:
                unit.rest.keep(held.start, state)

    def _placed(self, held: Held, tensor: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
        """State as the optimizer wants it: values per element where the parameter is, scalars where it reads them."""
        group = self.param_groups[held.group]
        # As torch.optim.Optimizer.load_state_dict: step counts stay on the host unless the step itself reads them.
        on_host = not (group.get("capturable") or group.get("fused") or self.kind in FUSED)
        return {
            name: value.to(torch.device("cpu") if on_host and not value.dim() else tensor.device)
            if isinstance(value, Tensor)
            else value
            for name, value in values.items()
            if name != "parameter"
        }

    @torch.no_grad()
    def publish(self) -> None:
        """Masters have new values: let the parameters follow, as after a step. All ranks must take part."""
        for unit in self.runtime.units:
            if unit.trainable:
                unit.show_master()
            unit.publish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: a step leaves no gradients behind.

        Raises:
            RuntimeError: after a backward and before its step, where gradients would be lost.
        """
        if accumulated := self.runtime.micro_step + bool(self.runtime.backwards):
            raise RuntimeError(
                f"zero_grad() after {accumulated} of {self.runtime.accumulation} micro-steps would drop"
                " their gradients; call it after the step, or not at all"
            )


def _hyper(group: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params" and name not in without}


def _arguments(kind: Callable[..., torch.optim.Optimizer], hyper: dict[str, Any]) -> dict[str, Any]:
    """Those of a group's values that the constructor takes (some optimizers add derived ones to their groups)."""
    import inspect

    accepted = inspect.signature(kind).parameters
    return {name: value for name, value in hyper.items() if name in accepted}
