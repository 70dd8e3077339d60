"""Pictures of results. matplotlib draws them without a display."""

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from ..collectives.choice import size_name
from ..sim.failures import Saving, play
from ..sim.result import StepResult
from .files import write_whole

if TYPE_CHECKING:
    from .convergence import Outcome
    from .curves import Point
    from .demo import Run, ScalingPoint

mpl.use("Agg")

from matplotlib import pyplot

INK = "#1f2933"
MEASURED, PREDICTED = "#c8553d", "#2b6f8f"
CAUSES = {
    "compute": "#2b6f8f",
    "exposed_communication": "#e0a458",
    "bubble": "#8d99ae",
    "host": "#b8c4bb",
    "offload": "#6d597a",
}

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def plot_demo(runs: "Sequence[Run]", points: "Sequence[ScalingPoint]", path: Path) -> Path:
    """Step times predicted beside measured, bytes by their witnesses, and the scaling of the flown program."""
    with mpl.rc_context(STYLE):
        figure, (time, sent, scale) = pyplot.subplots(1, 3, figsize=(13, 4), width_ratios=(1, 1, 1.2))
        names = [f"ZeRO {run.zero}" for run in runs]
        _pairs(time, names, [run.measured_step_s * 1e3 for run in runs], [run.predicted_step_s * 1e3 for run in runs])
        time.set(ylabel="ms per step", title="A step on this machine, 2 ranks")
        mega = 1e6
        _pairs(
            sent,
            names,
            [run.measured_bytes / mega for run in runs],
            [(run.predicted_bytes or 0) / mega for run in runs],
        )
        sent.set(ylabel="MB sent per rank and step", title="Bytes, counted by the kernel")
        gpus = [point.gpus for point in points]
        scale.plot(gpus, [point.tflops_per_gpu for point in points], "o-", color=PREDICTED)
        scale.set(xlabel="simulated GPUs", ylabel="model TFLOP/s per GPU")
        scale.set_ylim(0, 1.15 * max(point.tflops_per_gpu for point in points))
        scale.set_xscale("log", base=2)
        scale.set_xticks(gpus, [f"{count:,}" for count in gpus], rotation=45)
        scale.set_title("The same program, flown at ZeRO 3")
        return save(figure, path)


def _pairs(axes: Any, names: list[str], measured: list[float], predicted: list[float]) -> None:
    places = range(len(names))
    axes.bar([place - 0.2 for place in places], measured, 0.4, color=MEASURED, label="measured")
    axes.bar([place + 0.2 for place in places], predicted, 0.4, color=PREDICTED, label="predicted")
    axes.set_xticks(list(places), names)
    axes.margins(y=0.25)
    axes.legend(frameon=False, loc="upper left", ncols=2)


def plot_scaling(results: Sequence[StepResult], path: Path) -> Path:
    """Where the time of a step goes, and the model FLOP/s per GPU, against the number of GPUs."""
    with mpl.rc_context(STYLE):
        figure, (where, speed) = pyplot.subplots(1, 2, figsize=(11, 4.2))
        names = [f"{result.layout['gpus']:,}" for result in results]
        floor = [0.0] * len(results)
        for cause, colour in CAUSES.items():
            seconds = [result.breakdown_s[cause] for result in results]
            if any(seconds):
                where.bar(names, seconds, bottom=floor, color=colour, label=cause.replace("_", " "), width=0.65)
                floor = [low + more for low, more in zip(floor, seconds, strict=True)]
        layout = results[0].layout
        where.set(
            xlabel="GPUs",
            ylabel="seconds per step",
            title=f"{layout['model']} on {layout['cluster']}, ZeRO {layout['zero']}",
        )
        where.margins(y=0.2)
        where.legend(frameon=False, loc="upper left", ncols=2)
        speed.plot(names, [result.tflops_per_gpu for result in results], "o-", color=PREDICTED)
        too_big = [(name, result) for name, result in zip(names, results, strict=True) if not result.fits]
        if too_big:
            speed.plot(
                [name for name, _ in too_big],
                [result.tflops_per_gpu for _, result in too_big],
                "x",
                color=MEASURED,
                markersize=10,
                label="does not fit in memory",
            )
            speed.legend(frameon=False, loc="lower left")
        speed.set(xlabel="GPUs", ylabel="model TFLOP/s per GPU", title="Speed of each GPU")
        speed.set_ylim(0, 1.15 * max(result.tflops_per_gpu for result in results))
        return save(figure, path)


FAMILIES = {
    "ring": "#2b6f8f",
    "bidirectional_ring": "#7fb3c8",
    "halving_doubling": "#6d597a",
    "recursive_doubling": "#b08bb5",
    "binomial_tree": "#b8c4bb",
    "double_binary_tree": "#5b8c5a",
    "direct": "#e0a458",
    "hierarchical": "#8d99ae",
}
"""Colours of the algorithms, by the name without its parameters."""


def plot_goodput(savings: Mapping[int, Saving], layout: Mapping[str, Any], path: Path) -> Path:
    """Share of progress against the number of GPUs, and against the interval between checkpoints; months played."""
    with mpl.rc_context(STYLE):
        figure, (sizes, intervals) = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
        gpus = list(savings)
        sizes.plot(gpus, [saving.share for saving in savings.values()], "-", color=PREDICTED, label="expected")
        months = [play(saving).share for saving in savings.values()]
        sizes.plot(gpus, months, "o", color=MEASURED, label="a month played")
        sizes.set_xscale("log", base=2)
        sizes.set_xticks(gpus, [f"{count:,}" for count in gpus], rotation=45)
        sizes.set(xlabel="GPUs", ylabel="goodput", title=f"{layout['model']} on {layout['cluster']} with failures")
        sizes.legend(frameon=False, loc="lower left")
        shortest, longest = (pick(saving.interval_s for saving in savings.values()) for pick in (min, max))
        span = 100 * longest / shortest
        around = [shortest / 10 * span ** (step / 60) for step in range(61)]
        for place, (count, saving) in enumerate(savings.items()):
            shares = [replace(saving, interval_s=interval_s).share for interval_s in around]
            shade = 0.3 + 0.7 * (place + 1) / len(savings)
            intervals.plot(
                [each / 60 for each in around], shares, color=PREDICTED, alpha=shade, label=f"{count:,} GPUs"
            )
            intervals.plot(saving.interval_s / 60, saving.share, "o", color=INK, markersize=4)
        intervals.set_xscale("log")
        intervals.set(xlabel="minutes of work between checkpoints", title="Dots: Daly's interval", ylim=(0, 1.2))
        intervals.set_yticks([step / 5 for step in range(6)])
        intervals.legend(frameon=False, loc="upper left", ncols=3, fontsize=8)
        return save(figure, path)


def plot_curves(points: "Sequence[Point]", path: Path) -> Path:
    """Bus bandwidth against size, a panel for each network: lines are prices, markers are what was observed."""
    networks = list(dict.fromkeys(point.network for point in points))
    with mpl.rc_context(STYLE):
        figure, grid = pyplot.subplots(2, 2, figsize=(12, 8.5))
        for axes, network in zip(grid.flat, networks, strict=True):
            _curves(axes, [point for point in points if point.network == network])
            axes.set_title(f"{network} (lines: priced)")
        return save(figure, path)


def _curves(axes: Any, points: "Sequence[Point]") -> None:
    observed = {point.algorithm for point in points if point.witness != "priced"}
    for witness, algorithm in dict.fromkeys((point.witness, point.algorithm) for point in points):
        line = [point for point in points if (point.witness, point.algorithm) == (witness, algorithm)]
        style, label = _curve_style(witness, algorithm)
        if witness == "priced" and algorithm in observed - {"NCCL"}:
            label = "_"  # its markers are in the legend
        axes.plot([p.nbytes for p in line], [p.bus_bytes_per_s / 1e9 for p in line], label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(top=12 * max(point.bus_bytes_per_s for point in points) / 1e9)  # room for the legend
    sizes = sorted({point.nbytes for point in points})
    ticks = [size for size in sizes if size & (size - 1) == 0][:: 2 if len(sizes) > 8 else 1]
    axes.set_xticks(ticks, [size_name(tick) for tick in ticks])
    axes.set(xlabel="buffer", ylabel="bus bandwidth, GB/s")
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _curve_style(witness: str, algorithm: str) -> tuple[dict[str, Any], str]:
    """How a line looks, and what the legend calls it; a measured algorithm shares the colour of its price."""
    colour = FAMILIES.get(algorithm.partition("/")[0], INK)
    if witness == "published":
        return {"marker": "o", "linestyle": "", "color": MEASURED}, f"published ({algorithm})"
    if witness == "measured":
        looks = {"marker": "s" if algorithm == "native" else "o", "linestyle": "", "markersize": 5}
        return {**looks, "color": MEASURED if algorithm == "native" else colour}, f"{algorithm}, measured"
    if algorithm == "NCCL":
        return {"color": INK, "linewidth": 3, "alpha": 0.35}, "NCCL's choice, priced"
    return {"color": colour, "linewidth": 1.2}, f"{algorithm}, priced"


def plot_losses(losses: Mapping[str, Sequence[float]], ratios: Mapping[str, float], path: Path) -> Path:
    """Loss against step of compressed runs beside the first (uncompressed) one, and how far above it each ends.

    Args:
        losses: of every step, by the name of the run.
        ratios: how many times fewer bytes each run sent.
    """
    names = list(losses)
    plain = _last_mean(losses[names[0]])
    with mpl.rc_context(STYLE):
        figure, (curve, final) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=(1.4, 1))
        palette = mpl.colormaps["turbo"].resampled(len(names))
        colours = {name: INK if name == names[0] else palette(number) for number, name in enumerate(names)}
        for name, values in losses.items():
            first = name == names[0]
            curve.plot(_smooth(values), color=colours[name], linewidth=2.5 if first else 1.2, zorder=3 if first else 2)
        curve.set(xlabel="step", ylabel="loss (median of 10 steps)", title="Training under compressed communication")
        above = [_last_mean(losses[name]) - plain for name in names]
        final.barh(names, above, color=[colours[name] for name in names])
        final.set_yticks(range(len(names)), [f"{name}   {ratios[name]:.3g}x" for name in names])
        final.invert_yaxis()
        final.axvline(0, color=INK, linewidth=1)
        final.set(xlabel="loss above the uncompressed run's, last 10 steps", title="Fewer bytes, and what they cost")
        return save(figure, path)


def plot_convergence(found: "Mapping[str, Mapping[str, Outcome]]", panels: Mapping[str, str], path: Path) -> Path:
    """Loss against step, a row for each task and a column for each kind of case, the first case in all of them.

    Args:
        found: outcomes by task and case.
        panels: the column of each case.
    """
    columns = list(dict.fromkeys(panels.values()))
    with mpl.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            len(found), len(columns), figsize=(4.6 * len(columns), 3.1 * len(found)), sharex=True, sharey="row",
            squeeze=False,
        )  # fmt: skip
        for row, (task, outcomes) in zip(axes, found.items(), strict=True):
            plain = next(iter(outcomes))
            for axis, column in zip(row, columns, strict=True):
                mine = [name for name in outcomes if panels[name] == column and name != plain]
                palette = mpl.colormaps["turbo"].resampled(len(mine) + 2)
                for number, name in enumerate(mine):
                    axis.plot(_smooth(outcomes[name].losses), color=palette(number + 1), linewidth=1.3, label=name)
                axis.plot(_smooth(outcomes[plain].losses), color=INK, linewidth=2.2, label=plain, zorder=1)
                axis.set(yscale="log", title=f"{task}: {column}")
                if task == next(iter(found)):
                    axis.legend(fontsize=7, frameon=False)
            row[0].set_ylabel("loss (median of 10 steps)")
        for axis in axes[-1]:
            axis.set_xlabel("step")
        return save(figure, path)


def _smooth(values: Sequence[float]) -> list[float]:
    return [statistics.median(values[max(0, end - 10) : end]) for end in range(1, len(values) + 1)]


def _last_mean(losses: Sequence[float]) -> float:
    return statistics.fmean(losses[-10:])


def save(figure: Any, path: Path) -> Path:
    """Write a figure as the kind of picture that the name of the path says, and let go of it."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lstrip(".") or "png")
    pyplot.close(figure)
    return write_whole(path, picture.getvalue())
