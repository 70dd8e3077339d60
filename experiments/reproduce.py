"""Published tables and figures, made again: each with the published points, a picture, a CSV and a sentence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reading import nearest

if TYPE_CHECKING:
    from rich.table import Table

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One reproduction as it came out.

    Attributes:
        rows: of the CSV.
        sentence: what the comparison says, with its figures.
        tables: the rows for a terminal, where they can be read there.
    """

    name: str
    plot: Path
    csv: Path
    rows: Sequence[dict[str, Any]]
    sentence: str
    tables: "tuple[Table, ...]" = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Reproduction:
    """Something that can be made again: `module` of this room has a function `reproduce(folder, say) -> Item`."""

    title: str
    module: str

    def run(self, folder: Path, say: Say) -> Item:
        item: Item = import_module(f".{self.module}", __package__).reproduce(folder, say)
        return item


REPRODUCTIONS: dict[str, Reproduction] = {
    "collectives": Reproduction(
        "bus bandwidth against size: priced and published for A100 and V100 nodes, priced and measured here", "curves"
    ),
    "what_if": Reproduction("what one key of the config costs or saves, on a reference job", "what_if"),
    "choices": Reproduction("which all-reduce is the fastest, by size and number of GPUs", "choices"),
    "redundancy": Reproduction(
        "copies that step by themselves and agree always, now and then, or never: distance, loss, bytes", "redundancy"
    ),
    "pipeline_schedules": Reproduction(
        "idle share of a step and activations kept, by pipeline schedule and number of micro-batches", "pipelines"
    ),
    "zero_memory": Reproduction(
        "ZeRO's table of model state: 7.5 B, 128 B and 1 T parameters by stage and number of GPUs", "zero_memory"
    ),
    "megatron_weak_scaling": Reproduction(
        "GPTs of 1.7 B to 1 T parameters on 32 to 3,072 A100s: speed and time of a step", "weak_scaling"
    ),
    "selective_recompute": Reproduction(
        "selective recomputation and sequence parallelism: time of a step and activations kept", "selective_recompute"
    ),
    "zero3_against_3d": Reproduction(
        "ZeRO 3 against tensor, pipeline and data parallelism at 175 B and 530 B, as GPUs grow", "zero3_against_3d"
    ),
}


def listing() -> dict[str, str]:
    """What can be reproduced: name and title."""
    return {name: reproduction.title for name, reproduction in REPRODUCTIONS.items()}


def reproduce(
    names: Sequence[str] = (), out: str | Path = "out/reproduce", say: Say = lambda line: None
) -> tuple[Item, ...]:
    """Make the named reproductions, or all; pictures and tables go to `out`.

    Args:
        say: called with a line about what is under way.

    Raises:
        ValueError: an unknown name.
    """
    for name in names:
        if name not in REPRODUCTIONS:
            known = tuple(REPRODUCTIONS)
            raise ValueError(f"unknown reproduction {name!r}; there are {', '.join(known)}{nearest(name, known)}")
    return tuple(REPRODUCTIONS[name].run(Path(out), say) for name in names or REPRODUCTIONS)


def to_dict(items: Sequence[Item]) -> dict[str, Any]:
    """The contract's JSON object."""
    return {
        "items": [
            {
                "name": item.name,
                "plot": str(item.plot),
                "csv": str(item.csv),
                "rows": list(item.rows),
                "sentence": item.sentence,
            }
            for item in items
        ]
    }
