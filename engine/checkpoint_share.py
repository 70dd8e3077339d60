"""Which rank saves what, where ranks have different parameters: pipeline stages, and what some of them share.

Every rank tells the others what it has; all come to the same answer. What several stages have, as tied embeddings, is
saved by the first one: the shards of two stages are cut at different places, and would overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import run_state
from .chunks import whole_of

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True, slots=True)
class Assets:
    """What a rank has.

    Attributes:
        stage: its place along the pipeline.
        shapes: of the whole parameters that it has, or has parts of, by name.
        groups: names and hyper-parameters by parameter group.
        marks: fingerprints of its buffers, by name.
        extra_state: of its modules, by name.
    """

    stage: int
    shapes: dict[str, tuple[int, ...]]
    groups: list[dict[str, Any]]
    marks: dict[str, int]
    extra_state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """What a rank is to save.

    Attributes:
        elsewhere: names of parameters that it has, and that other ranks save.
        buffers: names of those that it saves for all.
        own_buffers: names of those that differ from what is saved for all.
        groups, extra_state: of all stages.
    """

    elsewhere: frozenset[str] = frozenset()
    buffers: tuple[str, ...] = ()
    own_buffers: tuple[str, ...] = ()
    groups: list[dict[str, Any]] = field(default_factory=list)
    extra_state: dict[str, Any] = field(default_factory=dict)


def assets(engine: "Engine") -> Assets:
    """Those of this rank.

    Raises:
        ValueError: a parameter that is cut, and nobody said how.
    """
    tensors, extra_state = run_state.split(run_state.buffers(engine))
    return Assets(
        engine.groups.axis("pipeline").rank,
        {slot.name: whole_of(slot.name, slot.parameter).shape for slot in run_state.slots(engine)},
        run_state.groups(engine),
        run_state.fingerprints(tensors),
        extra_state,
    )


def share(everyones: Sequence[Assets], rank: int) -> Task:
    """What `rank` saves, from what all ranks have, by rank.

    Raises:
        ValueError: ranks that know a parameter in different shapes.
    """
    homes: dict[str, int] = {}
    first: dict[str, int] = {}  # rank that has a buffer
    shapes: dict[str, tuple[int, ...]] = {}
    groups: list[dict[str, Any]] = []
    grouped: set[str] = set()
    for number, each in enumerate(everyones):
        for name, shape in each.shapes.items():
            homes[name] = min(homes.get(name, each.stage), each.stage)
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"parameter {name} has shape {shapes[name]} on another rank and {shape} on rank {number}; allowed:"
                    " the same, or Role(cut=..., whole=...) of parts of one whole"
                )
        for name in each.marks:
            first.setdefault(name, number)
        for group in each.groups:
            names = [name for name in group["names"] if name not in grouped]
            if names:
                groups.append({**group, "names": names})
                grouped.update(names)
    mine = everyones[rank]
    return Task(
        frozenset(name for name in mine.shapes if homes[name] != mine.stage),
        tuple(name for name in mine.marks if first[name] == rank),
        tuple(name for name, mark in mine.marks.items() if mark != everyones[first[name]].marks[name]),
        groups,
        {name: value for each in reversed(everyones) for name, value in each.extra_state.items()},
    )
