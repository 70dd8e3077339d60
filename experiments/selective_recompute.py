"""What selective recomputation and sequence parallelism save and cost, at 22 B and 175 B (Korthikanti et al. 2022)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..sim.hardware import load_cluster
from ..sim.memory import replay_memory
from .files import write_csv
from .layout import Options, resolve
from .models import ModelSpec
from .papers import Job, job_of, published_rows
from .reproduce import Item, Say
from .simulate import flight, simulate

FILE = "korthikanti_2022_selective_recompute.csv"
TIMES, MEMORY = "Korthikanti Table 5", "Korthikanti Fig 7"

STEP_S, ACTIVATIONS = "step_s", "activations_share"
"""What a row is of: seconds of a step, or the activations of a layer as a share of those with tensor parallelism alone
and no recomputation."""

DEPTHS = (8, 12)
"""Layers of two flights whose peaks differ by the activations of the layers between."""


def layer_activation_bytes(job: Job, *, recompute: str, sequence_parallel: bool) -> float:
    """What a layer keeps for its backward on a rank, of one micro-batch; stages change nothing about it."""
    alike = {name: job.options[name] for name in ("tp", "micro_batch", "precision")}
    options = {**alike, "gpus": job.options["tp"], "recompute": recompute, "sequence_parallel": sequence_parallel}
    few, more = (_peak_activations(replace(job.model, layers=layers), job.cluster, options) for layers in DEPTHS)
    return (more - few) / (DEPTHS[1] - DEPTHS[0])


def _peak_activations(model: ModelSpec, cluster: str, options: Mapping[str, Any]) -> int:
    machine = load_cluster(cluster)
    layout = resolve(Options(**options), model, machine)
    return replay_memory(flight(model, layout), machine.processor).peak["activations"]


def time_rows() -> list[dict[str, Any]]:
    """Seconds of a step, as published and as simulated."""
    rows = []
    for job in map(job_of, published_rows(FILE, TIMES)):
        result = simulate(job.model, job.cluster, **job.options)
        rows.append(_row(job, STEP_S, job.published_s, result.step_time_s))
    return rows


def memory_rows() -> list[dict[str, Any]]:
    """Activations of a layer as shares of the baseline's, as published (from formulas) and as simulated."""
    rows, baselines = [], {}
    for entry in published_rows(FILE, MEMORY):
        job = job_of(entry)
        if job.model not in baselines:
            baselines[job.model] = layer_activation_bytes(job, recompute="none", sequence_parallel=False)
        own = {name: job.options[name] for name in ("recompute", "sequence_parallel")}
        kept = layer_activation_bytes(job, **own) / baselines[job.model]
        rows.append(_row(job, ACTIVATIONS, float(entry["other_value"]) / 100, kept))
    return rows


def _row(job: Job, what: str, published: float | None, simulated: float) -> dict[str, Any]:
    return {
        "what": what,
        "model": job.model.name,
        "recompute": job.options["recompute"],
        "sequence_parallel": job.options["sequence_parallel"],
        "published": published,
        "simulated": simulated,
        "error": None if published is None else simulated / published - 1,
    }


def label(row: Mapping[str, Any]) -> str:
    """What distinguishes a row of a model."""
    return f"{row['recompute']}{' + sequence' if row['sequence_parallel'] else ''}"


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows show: time gained over full recomputation, what is kept, and the errors of both."""
    said = []
    for model in dict.fromkeys(row["model"] for row in rows):
        times = [row for row in rows if row["model"] == model and row["what"] == STEP_S]
        full, least = (pick(row["simulated"] for row in times) for pick in (max, min))
        published = max(row["published"] for row in times) / min(row["published"] for row in times) - 1
        kept = [
            row for row in rows if row["model"] == model and row["what"] == ACTIVATIONS and row["sequence_parallel"]
        ]
        smallest = min(row["simulated"] for row in kept)
        said.append(
            f"{model} is {full / least - 1:.0%} faster than with full recomputation (published {published:.0%}) and"
            f" keeps {smallest:.0%} of the activations"
        )
    errors = {
        what: [abs(row["error"]) for row in rows if row["what"] == what and row["error"] is not None]
        for what in (STEP_S, ACTIVATIONS)
    }
    mean = {what: sum(each) / len(each) for what, each in errors.items()}
    return (
        f"with selective recomputation and sequence parallelism {'; '.join(said)}; mean error of step times"
        f" {mean[STEP_S]:.1%}, of activations {mean[ACTIVATIONS]:.1%}"
    )


def reproduce(folder: Path, say: Say) -> Item:
    """Times and memory as rows, a picture and a sentence."""
    say("steps with full and with selective recomputation")
    rows = time_rows()
    say("activations of a layer")
    rows += memory_rows()
    return Item(
        name="selective_recompute",
        plot=plot(rows, folder / "selective_recompute.png"),
        csv=write_csv(folder / "selective_recompute.csv", rows),
        rows=rows,
        sentence=sentence(rows),
    )


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Bars simulated, points published: seconds of a step by model, and activations as shares of the baseline."""
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    from .plots import STYLE, save  # matplotlib loads slowly

    models = list(dict.fromkeys(row["model"] for row in rows))
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(models) + 1, figsize=(13, 4.6), width_ratios=[1] * len(models) + [2.2])
        for model, axes in zip(models, panels, strict=False):
            _bars(axes, [row for row in rows if row["model"] == model and row["what"] == STEP_S], with_model=False)
            axes.set(ylabel="seconds per step", title=model)
        shares = [row for row in rows if row["what"] == ACTIVATIONS]
        _bars(panels[-1], shares, with_model=True)
        panels[-1].yaxis.set_major_formatter(PercentFormatter(1.0))
        panels[-1].set_title("Activations of a layer, of those with tensor parallelism alone")
        panels[-1].legend(frameon=False)
        return save(figure, path)


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]], *, with_model: bool) -> None:
    from .plots import MEASURED, PREDICTED

    places = range(len(rows))
    axes.bar(places, [row["simulated"] for row in rows], 0.6, color=PREDICTED, label="simulated")
    axes.plot(places, [row["published"] for row in rows], "D", ms=7, color=MEASURED, label="published")
    names = [f"{row['model']}\n{label(row)}" if with_model else label(row) for row in rows]
    axes.set_xticks(places, [name.replace(" + ", "\n+ ") for name in names], fontsize=8)
    axes.margins(y=0.15)
