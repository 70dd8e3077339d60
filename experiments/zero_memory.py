"""Memory of a model's state by ZeRO stage and number of ranks: the table and the first figure of ZeRO (SC '20)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..sim.hardware import load_cluster
from ..sim.memory import replay_memory
from .files import write_csv
from .layout import Options, resolve
from .models import ModelSpec, load_model
from .papers import published_rows
from .reproduce import Item, Say
from .simulate import flight

FILE, GROUP = "zero_sc20_memory.csv", "ZeRO Table 1"

CLUSTER = "dgx-a100"
"""Any will do: state between steps is the program's, not the device's."""

FLOWN = {
    "7.5B": load_model("megatron-7.5b"),
    "128B": replace(load_model("megatron-145.6b"), layers=70),
    "1T": load_model("megatron-1008b"),
}
"""Real models near the sizes of the table, which has round numbers and no models."""

CATEGORIES = ("parameters", "gradients", "optimizer")

SHOWN, SHOWN_RANKS = "7.5B", 64
"""Of the paper's first figure."""

FLOWN_SEQ = 64
"""Tokens per sequence of the flights; state does not depend on it."""


def flown_state(model: ModelSpec, stage: int, ranks: int) -> dict[str, float]:
    """Bytes per parameter of the model and rank, by category, after a flown step in fp16 with Adam."""
    cluster = load_cluster(CLUSTER)
    layout = resolve(Options(gpus=ranks, zero=stage, precision="fp16", seq=FLOWN_SEQ), model, cluster)
    state = replay_memory(flight(model, layout), cluster.processor).state
    return {category: state[category] / model.parameters for category in CATEGORIES}


def row_of(name: str, nominal: float, stage: int, ranks: int, published_gb: float | None) -> dict[str, Any]:
    """An entry of the table: what was flown, for the nominal number of parameters.

    Args:
        nominal: parameters of the table's model.
        published_gb: decimal GB; None of an entry that the table does not have.
    """
    state = {category: each * nominal / 1e9 for category, each in flown_state(FLOWN[name], stage, ranks).items()}
    total = sum(state.values())
    return {
        "model": name,
        "zero": stage,
        "ranks": ranks,
        "published_gb": published_gb,
        "simulated_gb": total,
        "error": None if published_gb is None else total / published_gb - 1,
        **{f"{category}_gb": gigabytes for category, gigabytes in state.items()},
    }


def same_digits(row: Mapping[str, Any]) -> bool:
    """Whether a simulated figure has the published digits: within one of the last digit of three."""
    return abs(row["simulated_gb"] - row["published_gb"]) <= 10 ** -_decimals(row["published_gb"])


def _decimals(figure: float) -> int:
    """Decimals that a figure is printed with."""
    text = f"{figure:g}"
    return len(text.partition(".")[2])


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows show."""
    known = [row for row in rows if row["published_gb"] is not None]
    met = sum(same_digits(row) for row in known)
    shown = sorted((row for row in rows if _is_shown(row)), key=lambda row: row["zero"])
    said = ", ".join(f"{row['simulated_gb']:.3g} GB at stage {row['zero']}" for row in shown)
    worst = max(known, key=lambda row: abs(row["error"]))
    others = "" if met == len(known) else f", the others within {abs(worst['error']):.1%}"
    return (
        f"{met} of {len(known)} entries of the table come out of flown steps to the last digit that is printed{others};"
        f" {SHOWN} parameters take {said} on {SHOWN_RANKS} ranks"
    )


def _is_shown(row: Mapping[str, Any]) -> bool:
    return row["model"] == SHOWN and row["ranks"] == SHOWN_RANKS


def reproduce(folder: Path, say: Say) -> Item:
    """Table and figure."""
    rows: list[dict[str, Any]] = [row_of(SHOWN, 7.5e9, 0, SHOWN_RANKS, None)]
    for entry in published_rows(FILE, GROUP):
        name, stage, ranks = entry["model"], int(entry["zero_stage"]), int(entry["n_gpus"])
        if ranks == 1:
            say(f"{name}, ZeRO {stage}")
        rows.append(row_of(name, float(entry["params_b"]) * 1e9, stage, ranks, float(entry["other_value"])))
    return Item(
        name="zero_memory",
        plot=plot(rows, folder / "zero_memory.png"),
        csv=write_csv(folder / "zero_memory.csv", rows),
        rows=rows,
        sentence=sentence(rows),
    )


COLOURS = {"parameters": "#2b6f8f", "gradients": "#e0a458", "optimizer": "#3f8f5f"}
STAGES = {1: "#8d99ae", 2: "#e0a458", 3: "#c8553d"}


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """The figure (bars by category) and the table (lines simulated, points published)."""
    from matplotlib import pyplot

    from .plots import INK, STYLE, save  # matplotlib loads slowly

    with pyplot.rc_context(STYLE):
        figure, (bars, lines) = pyplot.subplots(1, 2, figsize=(12.4, 4.8), width_ratios=(1, 1.4))
        shown = sorted((row for row in rows if _is_shown(row)), key=lambda row: row["zero"])
        names = [f"ZeRO {row['zero']}" for row in shown]
        floor = [0.0] * len(shown)
        for category, colour in COLOURS.items():
            tall = [row[f"{category}_gb"] for row in shown]
            bars.bar(names, tall, bottom=floor, color=colour, width=0.6, label=category)
            floor = [low + more for low, more in zip(floor, tall, strict=True)]
        for place, (row, top) in enumerate(zip(shown, floor, strict=True)):
            bars.annotate(f"{top:.3g}", (place, top), (0, 4), textcoords="offset points", ha="center")
            if row["published_gb"] is not None:
                bars.plot(place, row["published_gb"], "D", mfc="none", mec=INK, ms=7)
        bars.plot([], [], "D", ls="none", mfc="none", mec=INK, ms=7, label="published")
        bars.set(ylabel="GB of model state per GPU", title=f"{SHOWN} parameters on {SHOWN_RANKS} GPUs")
        bars.legend(frameon=False)
        for (model, stage), line in _lines(rows).items():
            ranks = [row["ranks"] for row in line]
            style = dict(zip(FLOWN, ("-", "--", ":"), strict=True))[model]
            lines.plot(ranks, [row["simulated_gb"] for row in line], style, color=STAGES[stage], lw=1.5)
            lines.plot(ranks, [row["published_gb"] for row in line], "D", color=STAGES[stage], mfc="none", ms=5)
            if stage == 1:
                lines.annotate(model, (ranks[-1], line[-1]["simulated_gb"]), (6, -3), textcoords="offset points")
        for stage, colour in STAGES.items():
            lines.plot([], [], color=colour, label=f"ZeRO {stage}")
        lines.plot([], [], "D", ls="none", mfc="none", mec=INK, ms=5, label="published")
        lines.set_xscale("log", base=2)
        lines.set_yscale("log")
        ticks = sorted({row["ranks"] for row in rows})
        lines.set_xticks(ticks, [f"{count:,}" for count in ticks])
        lines.minorticks_off()
        lines.set(xlabel="GPUs", ylabel="GB of model state per GPU", title="Simulated (lines) and published (points)")
        lines.legend(frameon=False, loc="lower left")
        return save(figure, path)


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """By model and stage, the published entries by number of ranks."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["published_gb"] is not None:
            found.setdefault((row["model"], row["zero"]), []).append(row)
    return found
