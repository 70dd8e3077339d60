"""What of a run is not a parameter or its moments: steps, hyper-parameters, schedules, random states, buffers.

The record of the run is the same for all ranks and is saved by rank 0. The record of a rank (random states, errors that
compression carries on, buffers that differ from those saved for all) means something to the same rank of an equal mesh
only.
"""

import io
import random
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .chunks import whole_of
from .compressed import CompressedCommunicator
from .device import random_states, set_random_states
from .partition import Slot

if TYPE_CHECKING:
    from .engine import Engine

IMPLEMENTATION = ("params", "fused", "foreach", "capturable", "differentiable")
"""Entries of a parameter group that say how a step is done, not what it does: those of the run that loads stay."""


def to_bytes(thing: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> Any:
    """What `to_bytes` was given. It is unpickled: a checkpoint, as DCP's own metadata, is code to whoever loads it."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


# Buffers #


def buffers(engine: "Engine") -> dict[str, Any]:
    """What this rank keeps of the model's `state_dict` besides parameters: persistent buffers, extra state."""
    parameters = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in engine.own_state().items() if name not in parameters}


def split(values: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(those that are tensors, the others)"""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """CRC-32 of each tensor's bytes."""
    return {
        name: zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        if tensor.numel()
        else 0
        for name, tensor in tensors.items()
    }


# Parameters by the names of the whole model #


def slots(engine: "Engine") -> list[Slot]:
    """The parameters that this rank has, or has parts of, in the model's own order; a stage has some of them."""
    known = {slot.parameter: slot for unit in engine.runtime.units for slot in unit.part.slots}
    return [known[parameter] for parameter in engine.module.parameters() if parameter in known]


def whole_shape(slot: Slot) -> tuple[int, ...]:
    """Of the whole parameter.

    Raises:
        ValueError: it is cut, and nobody said how.
    """
    whole = whole_of(slot.name, slot.parameter)
    return whole.shape if slot.parameter.dim() else ()


def every_name(engine: "Engine") -> dict[nn.Parameter, tuple[str, ...]]:
    """The names of each parameter, its own first; tied ones have more."""
    names = {slot.parameter: [slot.name] for slot in slots(engine)}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if name not in names.get(parameter, [name]):
            names[parameter].append(name)
    return {parameter: tuple(found) for parameter, found in names.items()}


# The record of the run #


def group_names(engine: "Engine") -> list[list[str]]:
    """Names of the trainable parameters of each parameter group."""
    names: list[list[str]] = [[] for _ in engine.optimizer.param_groups]
    for unit in engine.runtime.units:
        if unit.trainable:
            names[unit.group] += [slot.name for slot in unit.part.slots]
    return names


def groups(engine: "Engine") -> list[dict[str, Any]]:
    """Names and hyper-parameters of this rank's parameter groups."""
    return [
        {"names": names, "values": {key: value for key, value in group.items() if key not in IMPLEMENTATION}}
        for names, group in zip(group_names(engine), engine.optimizer.param_groups, strict=True)
    ]


def run_record(
    engine: "Engine",
    groups: list[dict[str, Any]],
    extra_state: Mapping[str, Any],
    client_state: Mapping[str, Any],
) -> dict[str, Any]:
    """Of all ranks.

    Args:
        groups, extra_state: of all stages.
    """
    return {
        "global_steps": engine.global_steps,
        "groups": groups,
        "lr_scheduler": None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict(),
        "stateful": {name: thing.state_dict() for name, thing in engine.stateful.items()},
        "extra_state": dict(extra_state),
        "client_state": dict(client_state),
    }


def restore_groups(engine: "Engine", saved: list[dict[str, Any]]) -> None:
    """Give each parameter group the hyper-parameters that its parameters had, in whatever order the groups were.

    Raises:
        ValueError: its parameters were in groups that differ.
    """
    found = {name: group["values"] for group in saved for name in group["names"]}
    for number, (names, group) in enumerate(zip(group_names(engine), engine.optimizer.param_groups, strict=True)):
        candidates = [found[name] for name in names if name in found]
        if any(repr(each) != repr(candidates[0]) for each in candidates):
            raise ValueError(
                f"optimizer: parameter group {number} joins parameters that had different hyper-parameters in the"
                " checkpoint; allowed: groups that do not cross those, or load_optimizer_states=False"
            )
        if candidates:
            group.update(candidates[0])


def check_stateful(engine: "Engine", saved: Mapping[str, Any]) -> None:
    """Whether every object in `engine.stateful` has its state, and the other way round.

    Raises:
        ValueError: naming them.
    """
    if saved.keys() != engine.stateful.keys():
        raise ValueError(
            f"engine.stateful has {sorted(engine.stateful)}, the checkpoint {sorted(saved)}; allowed: the same names"
            " (put the objects there before loading), or load_module_only=True"
        )


# The record of a rank #


def mesh(engine: "Engine") -> list[Any]:
    """What must be equal for a rank to have the place in the run that it had: the ranks by kind of parallelism.

    Ranks that share samples may have to draw the same random numbers; at another place they would not.
    """
    return [*engine.settings.parallelism.sizes.items()]


def layout(engine: "Engine") -> list[Any]:
    """What must be equal, besides, for errors that a rank's compression carries on to mean the same."""
    axes = engine.settings.redundancy.mesh(engine.settings.sample_ranks).axes
    return [engine.settings.zero.stage, *axes, *((unit.label, unit.elements) for unit in engine.runtime.units)]


def rank_record(engine: "Engine", own_buffers: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "mesh": mesh(engine),
        "layout": layout(engine),
        "python": random.getstate(),
        "torch": random_states(engine.device),
        "communicators": [communicator.state_dict() for communicator in _compressed(engine)],
        "buffers": {name: tensor.detach().cpu() for name, tensor in own_buffers.items()},
    }


def restore_rank(engine: "Engine", saved: Mapping[str, Any]) -> None:
    random.setstate(saved["python"])
    set_random_states(saved["torch"], engine.device)
    communicators = _compressed(engine)
    if saved["layout"] == layout(engine) and len(communicators) == len(saved["communicators"]):
        for communicator, state in zip(communicators, saved["communicators"], strict=True):
            communicator.load_state_dict(state, engine.device)


def _compressed(engine: "Engine") -> list[CompressedCommunicator]:
    return [group for group in engine.groups.each() if isinstance(group, CompressedCommunicator)]
