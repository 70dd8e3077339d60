"""ZeRO 3 alone against tensor, pipeline and data parallelism together, at a fixed batch, as GPUs grow (SC '21)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_csv
from .models import load_model
from .papers import Job, errors_said, job_of, published_rows, simulated_row
from .reproduce import Item, Say

FILE, GROUP = "megatron_sc21_a100.csv", "SC21 Table 2"

ZERO_3, THREE_D = "ZeRO 3", "3D"

LARGER = "megatron-529.6b"
LARGER_ZERO_3 = ((640, 4, 2560), (1120, 2, 2240), (2240, 1, 2240))
LARGER_3D = (560, 1120, 2240)
"""Jobs of the same table without a published time here: (GPUs, micro-batch, global batch), and GPUs at tensor 8,
pipeline 35, batch 2,240. Layouts: Narayanan et al. 2021, Table 2."""


def jobs() -> list[Job]:
    """Those of both models, by strategy and number of GPUs."""
    published = [job_of(row) for row in published_rows(FILE, GROUP)]
    known = {(job.model.layers, job.options["zero"], job.options["gpus"]) for job in published}
    return [*published, *(job for job in _larger() if _place(job) not in known)]


def _place(job: Job) -> tuple[int, int, int]:
    return job.model.layers, job.options["zero"], job.options["gpus"]


def _larger() -> Iterator[Job]:
    alike = {"recompute": "full", "precision": "fp16"}
    model = load_model(LARGER)
    for gpus, micro_batch, global_batch in LARGER_ZERO_3:
        sizes = {"gpus": gpus, "micro_batch": micro_batch, "global_batch": global_batch, "zero": 3}
        yield Job(model=model, cluster="dgx-a100", options={**alike, **sizes})
    for gpus in LARGER_3D:
        sizes = {"gpus": gpus, "micro_batch": 1, "global_batch": 2240, "zero": 0}
        yield Job(model=model, cluster="dgx-a100", options={**alike, **sizes, "tp": 8, "pp": 35})


def strategy(row: Mapping[str, Any]) -> str:
    """What a row's job divides: the model's state alone, or the model."""
    return ZERO_3 if row["zero"] == 3 else THREE_D


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], list[Mapping[str, Any]]]:
    """The rows by (parameters in B, strategy), each by number of GPUs."""
    found: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["parameters"], row["gpus"])):
        found.setdefault((round(row["parameters"] / 1e9), strategy(row)), []).append(row)
    return found


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the rows show: how much faster 3D is where both have most GPUs, and what is left per GPU."""
    found = curves(rows)
    said = []
    for billions in dict.fromkeys(size for size, _ in found):
        zero, three = found[billions, ZERO_3], found[billions, THREE_D]
        said.append(
            f"at {billions} B from {zero[0]['gpus']:,} to {zero[-1]['gpus']:,} GPUs ZeRO 3 keeps"
            f" {_kept(zero):.0%} of the speed of each and 3D {_kept(three):.0%}, which then is"
            f" {three[-1]['simulated_tflops'] / zero[-1]['simulated_tflops']:.1f} times as fast"
        )
    return f"simulated {'; '.join(said)}; {errors_said(rows)}"


def _kept(rows: Sequence[Mapping[str, Any]]) -> float:
    speed: float = rows[-1]["simulated_tflops"] / rows[0]["simulated_tflops"]
    return speed


def reproduce(folder: Path, say: Say) -> Item:
    """The table as rows, a picture and a sentence."""
    rows = []
    for job in jobs():
        say(f"{job.model.name}, ZeRO {job.options['zero']}, {job.options['gpus']:,} GPUs")
        rows.append(simulated_row(job))
    return Item(
        name="zero3_against_3d",
        plot=plot(rows, folder / "zero3_against_3d.png"),
        csv=write_csv(folder / "zero3_against_3d.csv", rows),
        rows=rows,
        sentence=sentence(rows),
    )


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """TFLOP/s of each GPU against the number of GPUs: lines simulated, points published, a panel for each model."""
    from matplotlib import pyplot

    from .plots import MEASURED, PREDICTED, STYLE, save  # matplotlib loads slowly

    found = curves(rows)
    sizes = list(dict.fromkeys(size for size, _ in found))
    colours = {ZERO_3: MEASURED, THREE_D: PREDICTED}
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(sizes), figsize=(6.2 * len(sizes), 4.6), squeeze=False, sharey=True)
        for size, axes in zip(sizes, panels[0], strict=True):
            ticks = sorted({row["gpus"] for (own, _), line in found.items() if own == size for row in line})
            for name, colour in colours.items():
                line = found[size, name]
                speeds = [row["simulated_tflops"] for row in line]
                axes.plot([row["gpus"] for row in line], speeds, "o-", ms=4, color=colour, label=f"{name}, simulated")
                known = [(row["gpus"], row["published_tflops"]) for row in line if row["published_tflops"] is not None]
                if known:
                    look = {"ls": "none", "marker": "D", "ms": 8, "mfc": "none", "mew": 1.6}
                    axes.plot(*zip(*known, strict=True), color=colour, label=f"{name}, published", **look)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{count:,}" for count in ticks], rotation=45)
            axes.minorticks_off()
            axes.set(xlabel="GPUs (A100), fixed batch", title=f"{size} B parameters")
            axes.set_ylim(0, 1.15 * max(row["simulated_tflops"] for row in rows))
            axes.legend(frameon=False, loc="lower left", fontsize=9)
        panels[0][0].set_ylabel("TFLOP/s per GPU, recomputation counted")
        return save(figure, path)
