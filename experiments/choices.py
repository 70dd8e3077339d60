"""Which algorithm is fastest at which size on a cluster: as rows, as a table, as a picture."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..collectives.algorithms import KINDS
from ..collectives.choice import candidates, choose, crossovers, size_name
from ..collectives.costs import seconds
from ..collectives.tiers import Tiers
from ..sim.hardware import load_cluster
from .files import write_csv
from .reproduce import Item, Say
from .tables import seconds as time_name
from .tables import table

if TYPE_CHECKING:
    from rich.table import Table

SIZES = tuple(1 << power for power in range(10, 31))
"""Bytes at which algorithms are drawn: 1 KiB to 1 GiB."""

CLUSTER, GPUS = "dgx-a100", (8, 1024)
"""What `reproduce choices` shows."""

MOST_DRAWN = 6
"""Algorithms that are drawn besides those that are chosen somewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An algorithm that is the fastest from a size on.

    Attributes:
        seconds: at `from_bytes`.
        ring_seconds: of a flat ring there, or None where rings do not do this kind.
    """

    kind: str
    from_bytes: int
    algorithm: str
    seconds: float
    ring_seconds: float | None


def selection_table(cluster_name: str, gpus: int, kinds: Iterable[str] = KINDS) -> list[Row]:
    """The crossover points of a job on a cluster of the catalogue, or of a file.

    Raises:
        ValueError: no such cluster, or it has fewer GPUs.
    """
    tiers = load_cluster(cluster_name).tiers(gpus)
    rows = []
    for kind in kinds:
        ring = "ring" in candidates(kind, gpus, tiers)
        for start, name in crossovers(kind, gpus, tiers):
            rows.append(
                Row(
                    kind=kind,
                    from_bytes=start,
                    algorithm=name,
                    seconds=seconds(kind, name, start, gpus, tiers),
                    ring_seconds=seconds(kind, "ring", start, gpus, tiers) if ring else None,
                )
            )
    return rows


def choices_table(cluster_name: str, gpus: int) -> "Table":
    """The rows for a terminal."""
    cells = [
        (
            row.kind if row.from_bytes == 0 else "",
            size_name(row.from_bytes),
            row.algorithm,
            time_name(row.seconds),
            "-" if row.ring_seconds is None else time_name(row.ring_seconds),
        )
        for row in selection_table(cluster_name, gpus)
    ]
    columns = ("collective", "from", "algorithm", "takes there", "a ring")
    return table(f"the fastest algorithm on {gpus:,} GPUs of {cluster_name}", columns, cells)


def reproduce(folder: Path, say: Say) -> Item:
    """The crossover points for one node and for many, and a picture for many."""
    rows = [
        {"cluster": CLUSTER, "gpus": gpus, **asdict(row)} for gpus in GPUS for row in selection_table(CLUSTER, gpus)
    ]
    chosen = "; ".join(
        f"on {gpus:,} GPUs " + ", ".join(f"{row['algorithm']} from {size_name(row['from_bytes'])}" for row in some)
        for gpus in GPUS
        if (some := [row for row in rows if row["gpus"] == gpus and row["kind"] == "all_reduce"])
    )
    return Item(
        name="choices",
        plot=plot_choices(CLUSTER, GPUS[-1], folder / "choices.png"),
        csv=write_csv(folder / "choices.csv", rows),
        rows=rows,
        sentence=f"the fastest all-reduce on {CLUSTER}, of all that can be priced: {chosen}",
        tables=tuple(choices_table(CLUSTER, gpus) for gpus in GPUS),
    )


def plot_choices(cluster_name: str, gpus: int, path: Path, kinds: Sequence[str] = ("all_reduce", "all_gather")) -> Path:
    """Seconds against size, a panel per kind and a line per algorithm; where the fastest changes, a mark and its size.

    Of an algorithm in several pieces only the number is drawn that is best somewhere, else the best at 1 GiB.
    """
    from matplotlib import pyplot

    from .plots import FAMILIES, INK, STYLE, save  # matplotlib loads slowly, and a table needs none of it

    tiers = load_cluster(cluster_name).tiers(gpus)
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(kinds), figsize=(6.2 * len(kinds), 4.8), squeeze=False)
        for axes, kind in zip(panels.flat, kinds, strict=True):
            rows = [(start, name) for start, name in crossovers(kind, gpus, tiers) if start <= SIZES[-1]]
            names = _drawn(kind, gpus, tiers, [name for _, name in rows])
            for number, name in enumerate(names):
                colour = FAMILIES.get(name.partition("/")[0], INK)
                chosen = name in {row_name for _, row_name in rows}
                times = [seconds(kind, name, nbytes, gpus, tiers) for nbytes in SIZES]
                dashes = "-" if chosen else "--"
                axes.plot(
                    SIZES, times, dashes, color=colour, lw=2 if chosen else 1.2, label=name, zorder=3 - number / 99
                )
            _mark(axes, kind, gpus, tiers, [row for row in rows if row[0] >= SIZES[0]])
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(SIZES[::4], [size_name(size) for size in SIZES[::4]])
            axes.set(xlabel="buffer", ylabel="seconds", title=f"{kind} on {gpus:,} GPUs of {cluster_name}")
            axes.legend(frameon=False, fontsize=8, loc="upper left", title="solid: fastest somewhere", title_fontsize=8)
        return save(figure, path)


def _drawn(kind: str, gpus: int, tiers: Tiers, chosen: Sequence[str]) -> list[str]:
    """Those that are chosen, then of every other family the best at the largest size."""
    names = list(dict.fromkeys(chosen))
    families: dict[str, list[str]] = {}
    for name in candidates(kind, gpus, tiers):
        families.setdefault(name.partition("/")[0], []).append(name)
    for family, members in families.items():
        if not any(name.partition("/")[0] == family for name in names):
            names.append(choose(kind, SIZES[-1], gpus, tiers, members).name)
    return names[: len(dict.fromkeys(chosen)) + MOST_DRAWN]


def _mark(axes: Any, kind: str, gpus: int, tiers: Tiers, rows: Sequence[tuple[int, str]]) -> None:
    """A dot and the size where another algorithm becomes the fastest."""
    for start, name in rows:
        taken = seconds(kind, name, start, gpus, tiers)
        axes.plot(start, taken, "o", color="black", markersize=5, zorder=5)
        axes.annotate(
            size_name(start), (start, taken), xytext=(4, -14), textcoords="offset points", fontsize=8, zorder=5
        )
