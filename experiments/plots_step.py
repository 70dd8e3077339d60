"""Pictures of one step: where its time goes, what its memory holds, what the ranks of a pipeline do."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from ..collectives.pipeline import BACKWARD, FORWARD, INPUT, WEIGHT, Plan
from ..sim.pipeline import PipelineStep
from ..sim.pipeline_timeline import updates
from ..sim.recording import MemoryTrack
from ..sim.result import StepResult
from .plots import CAUSES, INK, MEASURED, STYLE, save
from .tables import seconds as time_name

mpl.use("Agg")

from matplotlib import pyplot

GIGA = 1e9

CATEGORIES = {
    "parameters": "#2b6f8f",
    "gradients": "#e0a458",
    "optimizer": "#6d597a",
    "activations": "#5b8c5a",
    "buffers": "#8d99ae",
    "temporary": "#c8b6a6",
}

KINDS = {
    FORWARD: ("forward", "#2b6f8f"),
    BACKWARD: ("backward", "#c8793d"),
    INPUT: ("backward, input", "#c8793d"),
    WEIGHT: ("backward, weights", "#5b8c5a"),
}
UPDATE_COLOUR = "#8d99ae"

SHADES = 4
"""Neighbouring micro-batches differ in lightness; the fifth looks like the first."""

MOST_TAKEN = 0.35
"""Where a step takes less than this share of the capacity, the capacity is said and not drawn."""

DIGIT = 0.0065
"""Width of a digit as a share of a pipeline's picture."""

LEAST_SHOWN = 0.002
"""Causes with less than this share of the longest bar are too thin to be seen."""

SMALLEST_LABEL = 0.045
"""Parts of a bar that are shorter than this share of the longest bar have no percentage."""


PARALLEL = ("tp", "pp", "cp", "ep")
DERIVED = {"dp", "accumulation"}
"""Of a layout, what follows from the rest."""


def differing(layouts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells layouts apart, a line for each; all the same (or one alone) are told by their parallelism."""
    keys = [key for key in layouts[0] if any(layout[key] != layouts[0][key] for layout in layouts)]
    if not keys:
        keys = ["gpus", *(key for key in (*PARALLEL, "zero") if layouts[0][key] > (key != "zero"))]
    derived = DERIVED | ({"global_batch"} if "gpus" in keys else set())
    kept = [key for key in keys if key not in derived] or keys
    return [_told(layout, kept) for layout in layouts]


def _told(layout: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The values of these keys; what is not done (parallelism of one, an option that is off) only if it is all."""
    done = [key for key in keys if layout[key] is not False and not (key in PARALLEL and layout[key] == 1)]
    parts = ((key.replace("_", "-"), layout[key]) for key in done or keys)
    return ", ".join(name if value is True else f"{name} {value}" for name, value in parts)


def plot_breakdown(results: Sequence[StepResult], path: Path) -> Path:
    """A bar per layout: the step of its slowest rank by cause, with shares, its time and its MFU."""
    names = differing([result.layout for result in results])
    longest = max(result.step_time_s for result in results)
    with mpl.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(9.5, 1.7 + 0.55 * len(results)))
        left = [0.0] * len(results)
        for cause, colour in CAUSES.items():
            parts = [result.breakdown_s[cause] for result in results]
            if not any(part > LEAST_SHOWN * longest for part in parts):
                continue
            axes.barh(range(len(names)), parts, left=left, color=colour, height=0.62, label=cause.replace("_", " "))
            for row, (part, start) in enumerate(zip(parts, left, strict=True)):
                if part > SMALLEST_LABEL * longest:
                    share = f"{part / results[row].step_time_s:.0%}"
                    axes.text(start + part / 2, row, share, ha="center", va="center", color=_on(colour), fontsize=9)
            left = [start + part for start, part in zip(left, parts, strict=True)]
        for row, result in enumerate(results):
            total = f"  {time_name(result.step_time_s)}, MFU {result.mfu:.0%}" + ("" if result.fits else ", too large")
            axes.text(left[row], row, total, va="center", fontsize=9)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, 1.32 * longest)
        axes.invert_yaxis()
        layouts = [result.layout for result in results]
        places = " on ".join(layouts[0][key] for key in ("model", "cluster") if len({one[key] for one in layouts}) == 1)
        axes.set(xlabel="seconds per step", title=f"{places}: where a step goes".removeprefix(": "))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(CAUSES), frameon=False)
        return save(figure, path)


def _on(colour: str) -> str:
    """White or ink, whichever can be read on a colour."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.55 else INK


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPicture:
    """What the memory of a step is drawn from.

    Attributes:
        begin_s, end_s: of the steady step; only what lies between is drawn.
        capacity_bytes: what the device has for the program, the framework's own part taken off.
        reserved_bytes: what the allocator holds at most.
        note: what the picture leaves out, if it does.
    """

    title: str
    track: MemoryTrack
    begin_s: float
    end_s: float
    capacity_bytes: int
    reserved_bytes: int
    note: str = ""


def plot_memory(picture: MemoryPicture, path: Path) -> Path:
    """Memory in use by category through a step, with the capacity and what the allocator reserves."""
    times, columns = _cut(picture)
    peak = float(sum(columns.values(), np.zeros(len(times))).max())
    highest = max(peak, picture.reserved_bytes / GIGA)
    capacity = picture.capacity_bytes / GIGA
    unit, factor = ("ms", 1e3) if times[-1] < 1 else ("s", 1.0)
    with mpl.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(9.5, 4.4))
        used = {name: column for name, column in columns.items() if column.max() > 1e-4 * peak}
        axes.stackplot(
            times * factor,
            *used.values(),
            labels=list(used),
            colors=[CATEGORIES[name] for name in used],
            step="post",
            linewidth=0,
        )
        axes.axhline(picture.reserved_bytes / GIGA, color=INK, linestyle=":", linewidth=1.2, label="reserved at most")
        said = f"capacity {capacity:.1f} GB"
        if highest > MOST_TAKEN * capacity:
            axes.axhline(capacity, color=MEASURED, linewidth=1.6, label=said)
            axes.set_ylim(0, 1.08 * max(capacity, highest))
        else:
            axes.set_ylim(0, 1.15 * highest)
            axes.text(
                0.99, 0.96, f"{said}, far above", transform=axes.transAxes, ha="right", color=MEASURED, fontsize=9
            )
        axes.set_xlim(0, times[-1] * factor)
        axes.set(
            xlabel=f"time since the step began, {unit}{picture.note}", ylabel="GB of device memory", title=picture.title
        )
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
        return save(figure, path)


def _cut(picture: MemoryPicture) -> tuple[Any, dict[str, Any]]:
    """(seconds since the step began, GB by category), what was in use at the beginning first."""
    times = np.asarray(picture.track.times_s)
    first = max(0, int(np.searchsorted(times, picture.begin_s, side="right")) - 1)
    last = int(np.searchsorted(times, picture.end_s, side="right"))
    inside = np.clip(times[first:last], picture.begin_s, picture.end_s) - picture.begin_s
    shown = np.append(inside, picture.end_s - picture.begin_s)
    columns = {}
    for name, values in picture.track.nbytes.items():
        own = np.asarray(values[first:last]) / GIGA
        columns[name] = np.append(own, own[-1])
    return shown, columns


def plot_pipeline(plan: Plan, step: PipelineStep, title: str, path: Path) -> Path:
    """The actions of each pipeline rank when the simulation has them: colours by kind, shades by micro-batch."""
    ranks = len(step.ranks)
    ends = [end_s for rank in range(ranks) for _, end_s in updates(plan, step, rank)]
    longest = max(ends)
    unit, factor = ("ms", 1e3) if longest < 1 else ("s", 1.0)
    with mpl.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(11, min(9.0, 1.6 + 0.42 * ranks)))
        for rank, lived in enumerate(step.ranks):
            for kind, (_, colour) in KINDS.items():
                own = [span for span in lived.spans if span.action.kind == kind]
                _boxes(
                    axes,
                    rank,
                    [(span.start_s * factor, (span.end_s - span.start_s) * factor) for span in own],
                    [_shade(colour, span.action.micro_batch, span.action.chunk) for span in own],
                )
            after = [(start_s * factor, (end_s - start_s) * factor) for start_s, end_s in updates(plan, step, rank)]
            _boxes(axes, rank, after, [to_rgb(UPDATE_COLOUR)] * len(after))
        _numbers(axes, step, factor, longest)
        axes.set_xlim(0, longest * factor)
        axes.set_ylim(ranks - 0.45, -0.55)
        axes.set_yticks(range(0, ranks, max(1, ranks // 16)))
        axes.set(xlabel=f"simulated time, {unit}", ylabel="pipeline rank", title=title)
        used = {span.action.kind for lived in step.ranks for span in lived.spans}
        named = [(colour, name) for kind, (name, colour) in KINDS.items() if kind in used]
        named += [(UPDATE_COLOUR, "update"), ("white", "idle")]
        handles = [Patch(facecolor=colour, edgecolor=INK, linewidth=0.4) for colour, _ in named]
        figure.legend(handles, [name for _, name in named], loc="outside lower center", ncols=len(named), frameon=False)
        return save(figure, path)


def _boxes(axes: Any, rank: int, places: Iterable[tuple[float, float]], colours: Sequence[Any]) -> None:
    axes.broken_barh(list(places), (rank - 0.4, 0.8), facecolors=colours, edgecolor="white", linewidth=0.3)


def _shade(colour: str, micro_batch: int, chunk: int) -> tuple[float, ...]:
    """Lighter from micro-batch to micro-batch, and for the second chunk of a rank lighter again."""
    white = 0.13 * (micro_batch % SHADES) + 0.12 * min(chunk, 2)
    return tuple(part + (1 - part) * white for part in to_rgb(colour))


def _numbers(axes: Any, step: PipelineStep, factor: float, longest: float) -> None:
    """The micro-batches in their boxes, of the kinds whose boxes are wide enough for the longest number."""
    spans = [(rank, span) for rank, lived in enumerate(step.ranks) for span in lived.spans]
    digits = len(str(max(span.action.micro_batch for _, span in spans)))
    for kind in KINDS:
        own = [(rank, span) for rank, span in spans if span.action.kind == kind]
        if not own or median(span.end_s - span.start_s for _, span in own) < DIGIT * digits * longest:
            continue
        for rank, span in own:
            place = (span.start_s + span.end_s) / 2 * factor, rank
            axes.text(*place, str(span.action.micro_batch), ha="center", va="center", fontsize=7, color="white")
