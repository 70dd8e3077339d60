"""GPTs of 1.7 B to 1 T parameters on 32 to 3,072 GPUs: weak scaling of tensor and pipeline parallelism (SC '21)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_csv
from .models import load_model
from .papers import Job, errors_said, job_of, published_rows, simulated_row
from .reproduce import Item, Say

FILE, GROUP = "megatron_sc21_a100.csv", "SC21 Table 1"

LARGER = {
    "megatron-310.1b": {"gpus": 1920, "pp": 16, "interleave": 2, "global_batch": 2160},
    "megatron-529.6b": {"gpus": 2520, "pp": 35, "interleave": 3, "global_batch": 2520},
    "megatron-1008b": {"gpus": 3072, "pp": 64, "interleave": 1, "global_batch": 3072},
}
"""Jobs of the same table without a published time here. Layouts: Narayanan et al. 2021, Table 1, and the paper's
scripts (Megatron-LM, examples/sc21/run_table_1.sh), which say micro-batches and virtual stages."""


def jobs() -> list[Job]:
    """By size."""
    published = [job_of(row) for row in published_rows(FILE, GROUP)]
    known = {job.options["gpus"] for job in published}
    alike = {"tp": 8, "micro_batch": 1, "recompute": "full", "precision": "fp16"}
    larger = [
        Job(model=load_model(name), cluster="dgx-a100", options={**alike, **options})
        for name, options in LARGER.items()
        if options["gpus"] not in known
    ]
    return [*published, *larger]


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows show."""
    first, last = rows[0], rows[-1]
    return (
        f"{errors_said(rows)}; from {first['gpus']:,} GPUs and {first['parameters'] / 1e9:.1f} B parameters to"
        f" {last['gpus']:,} and {last['parameters'] / 1e9:,.0f} B, each GPU is simulated to do"
        f" {first['simulated_tflops']:.0f} and {last['simulated_tflops']:.0f} TFLOP/s, recomputation counted"
    )


def reproduce(folder: Path, say: Say) -> Item:
    """The table as rows, a picture and a sentence."""
    rows = []
    for job in jobs():
        say(f"{job.model.name} on {job.options['gpus']:,} GPUs")
        rows.append(simulated_row(job))
    return Item(
        name="megatron_weak_scaling",
        plot=plot(rows, folder / "megatron_weak_scaling.png"),
        csv=write_csv(folder / "megatron_weak_scaling.csv", rows),
        rows=rows,
        sentence=sentence(rows),
    )


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """TFLOP/s of each GPU and seconds of a step, published and simulated, against the number of GPUs."""
    from matplotlib import pyplot

    from .plots import MEASURED, PREDICTED, STYLE, save  # matplotlib loads slowly

    gpus = [row["gpus"] for row in rows]
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 2, figsize=(12.4, 4.8))
        for axes, what in zip(panels, ("tflops", "s"), strict=True):
            known = [row for row in rows if row[f"published_{what}"] is not None]
            axes.plot(gpus, [row[f"simulated_{what}"] for row in rows], "o-", color=PREDICTED, label="simulated")
            points = [row[f"published_{what}"] for row in known]
            axes.plot([row["gpus"] for row in known], points, "D", ms=7, color=MEASURED, label="published")
            axes.set_xscale("log", base=2)
            axes.set_xticks(gpus, [f"{count:,}" for count in gpus], rotation=60)
            axes.minorticks_off()
            axes.set_xlabel("GPUs (A100)")
        speed, time = panels
        for row in rows:
            place = (row["gpus"], row["simulated_tflops"])
            size = f"{row['parameters'] / 1e9:.0f}B" if row["parameters"] > 1e10 else f"{row['parameters'] / 1e9:.1f}B"
            speed.annotate(size, place, (0, 9), textcoords="offset points", ha="center", fontsize=8)
        speed.set_ylim(0, 1.25 * max(row["simulated_tflops"] for row in rows))
        speed.set(ylabel="TFLOP/s per GPU, recomputation counted", title="Weak scaling from 1.7 B parameters to 1 T")
        time.set(ylabel="seconds per step", title="Time of a step")
        time.set_ylim(bottom=0)
        speed.legend(frameon=False, loc="lower left")
        return save(figure, path)
