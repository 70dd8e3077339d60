"""The whole model on every rank, one parameter at a time: its shards, its parts, its stages put together.

A parameter is gathered over the ranks that shard its unit, then over those that have parts of it, then told to the
other stages of the pipeline. What several stages have, as tied embeddings, comes from the first one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from . import run_state
from .agreement import everyones
from .chunks import reassemble, whole_of
from .partition import Slot
from .roles import Whole, role_of
from .unit import FlatUnit

if TYPE_CHECKING:
    from .engine import Engine

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listed:
    """A parameter of the whole model.

    Attributes:
        names: in the model, its own first; tied ones have more.
        shape: of the whole parameter.
        dtype: of the parameter.
        width: dtype of the values that come.
        stage: of the pipeline, that it comes from.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    width: torch.dtype
    stage: int


@dataclass(frozen=True, slots=True)
class Source:
    """What there is of each unit: `take` shows it whole [S] while it lasts, all ranks that shard it taking part."""

    take: Callable[[FlatUnit], AbstractContextManager[Tensor]]
    dtype: Callable[[FlatUnit], torch.dtype]


@contextmanager
def _parameters(unit: FlatUnit) -> Iterator[Tensor]:
    unit.gather()
    unit.arrive()
    yield unit.full
    unit.free()


@contextmanager
def _masters(unit: FlatUnit) -> Iterator[Tensor]:
    yield unit.gathered_master()


PARAMETERS = Source(_parameters, lambda unit: unit.full.dtype)
"""What the next forward computes with."""

MASTERS = Source(_masters, lambda unit: unit.wide if unit.trainable else unit.full.dtype)
"""What the optimizer steps, and frozen parameters."""


def of_all_stages(engine: "Engine", mine: T, label: str) -> list[T]:
    """What each stage of the pipeline has, by stage. All ranks must take part."""
    return _told(engine, "pipeline", mine, label)


def listing(engine: "Engine", source: Source) -> list[Listed]:
    """Every parameter of the whole model, stage by stage, in the order of the units. All ranks must take part.

    Raises:
        ValueError: a parameter that is cut, and nobody said how.
    """
    names, stage = run_state.every_name(engine), engine.groups.axis("pipeline").rank
    mine = [
        Listed(names[slot.parameter], run_state.whole_shape(slot), slot.parameter.dtype, source.dtype(unit), stage)
        for unit in engine.runtime.units
        for slot in unit.part.slots
    ]
    found: dict[str, Listed] = {}
    for stages in of_all_stages(engine, mine, "parameters of stages"):
        for each in stages:
            first = found.setdefault(each.names[0], each)
            found[each.names[0]] = replace(first, names=tuple(dict.fromkeys(first.names + each.names)))
    return list(found.values())


def whole_values(engine: "Engine", source: Source, listed: list[Listed]) -> Iterator[Tensor]:
    """The values of a listing, in its order, on every rank: one parameter, and one unit, in memory at a time.

    All ranks must take part, to the end.
    """
    pipeline = engine.groups.axis("pipeline")
    mine = _of_this_stage(engine, source, {each.names[0] for each in listed if each.stage == pipeline.rank})
    for each in listed:
        if each.stage == pipeline.rank:
            value = next(mine).contiguous()
        else:
            value = torch.empty(each.shape, dtype=each.width, device=engine.device)
        if pipeline.world > 1 and value.numel():
            pipeline.broadcast(value.view(-1), f"parameter {each.names[0]}", root=each.stage).wait()
        yield value
    for _ in mine:  # to the end, where it frees the last unit
        pass


def _of_this_stage(engine: "Engine", source: Source, wanted: set[str]) -> Iterator[Tensor]:
    """Whole values of this stage's parameters, in the order of the units."""
    places = _places(engine)
    for unit in engine.runtime.units:
        with source.take(unit) as flat:
            for slot in unit.part.slots:
                start, stop = unit.views[slot.parameter]
                if slot.name in wanted:
                    part = flat[start:stop].view(slot.parameter.shape)
                    yield _put_together(engine, slot, part, places.get(slot.name))


Place = tuple[Whole, tuple[int, ...]]
"""Which part of the whole a rank has, and the shape of it."""


def _places(engine: "Engine") -> dict[str, tuple[str, list[Place]]]:
    """The axis along which a parameter is cut, and where the parts of the ranks along it lie, by name."""
    mine: dict[str, dict[str, Place]] = {}
    for slot in run_state.slots(engine):
        axis = _axis_of_cut(engine, slot.name, slot.parameter)
        if axis is not None:
            place = whole_of(slot.name, slot.parameter), tuple(slot.parameter.shape)
            mine.setdefault(axis, {})[slot.name] = place
    found: dict[str, tuple[str, list[Place]]] = {}
    for axis, own in mine.items():
        everywhere = _told(engine, axis, own, "places of parts")
        found |= {name: (axis, [each[name] for each in everywhere]) for name in own}
    return found


def _axis_of_cut(engine: "Engine", name: str, parameter: nn.Parameter) -> str | None:
    axes = [axis for axis in role_of(parameter).cut if engine.groups.axis(axis).world > 1]
    if len(axes) > 1:
        raise ValueError(f"parameter {name} is cut along {' and '.join(axes)}; allowed: along one of them")
    return axes[0] if axes else None


def _put_together(engine: "Engine", slot: Slot, part: Tensor, places: tuple[str, list[Place]] | None) -> Tensor:
    """The whole parameter, of which `part` is this rank's."""
    if places is None:
        whole = whole_of(slot.name, slot.parameter)
        return reassemble([part], [whole]) if part.dim() and tuple(part.shape) != whole.shape else part
    axis, parts = places
    group = engine.groups.axis(axis)
    rows = part.new_zeros(group.world, max(prod(shape) for _, shape in parts))
    rows[group.rank, : part.numel()] = part.reshape(-1)
    group.all_gather(rows.view(-1), f"parts of {slot.name}").wait()
    values = [row[: prod(shape)].view(shape) for row, (_, shape) in zip(rows, parts, strict=True)]
    return reassemble(values, [whole for whole, _ in parts])


def _told(engine: "Engine", axis: str, mine: T, label: str) -> list[T]:
    """What all ranks along an axis say, by rank.

    Raises:
        ValueError: on the sim device, where other ranks say nothing.
    """
    group = engine.groups.axis(axis)
    if group.world > 1 and engine.device.type == "sim":
        raise ValueError(f"{label}: a model on the sim device has shapes and no values; use cpu or cuda")
    return everyones(group, mine, label, engine.device)


def full_state_dict(engine: "Engine") -> dict[str, Tensor]:
    """See Engine.full_state_dict."""
    aside = run_state.buffers(engine)
    mine: dict[str, Any] = {name: aside.get(name) for name in engine.own_state()}
    stages = of_all_stages(engine, {name: _on_host(value) for name, value in mine.items()}, "buffers of stages")
    shown = {name: value for stage in reversed(stages) for name, value in stage.items()}
    for each, value in full_parameters(engine).items():
        shown |= {name: value for name in each.names if name in shown}
    return shown


def full_parameters(engine: "Engine") -> dict[Listed, Tensor]:
    """Every parameter whole, on the host. All ranks must take part."""
    listed = listing(engine, PARAMETERS)
    with engine.groups.uncompressed():
        values = whole_values(engine, PARAMETERS, listed)
        return {each: value.cpu().clone() for each, value in zip(listed, values, strict=True)}


def _on_host(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
