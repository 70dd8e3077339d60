"""Published jobs beside simulated ones: rows of a CSV as models and layouts, and what the simulator says of each."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .models import ModelSpec
from .simulate import simulate

PUBLISHED = Path(__file__).parent / "published"

CLUSTERS = {"A100-SXM4-80GB": "dgx-a100"}
"""The catalogue's name of a cluster of such GPUs, eight in a node with a NIC for each."""

RECOMPUTE = {"none": "none", "full": "full", "selective (attention core only)": "attention"}
"""As the CSV files have it, and as the option has it."""

GPT: dict[str, Any] = {
    "mlp": "gelu",
    "norm": "layernorm",
    "positions": "learned",
    "attention": "causal",
    "tied": True,
    "bias": True,
    "dropout": 0.1,
    "attention_kernel": "plain",
}
"""What all GPTs of these papers have in common; they are older than fused attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training job of a paper.

    Attributes:
        options: of `simulate`.
        published_s: seconds of a step; None where no figure is at hand, so that the simulator's stands alone.
    """

    model: ModelSpec
    cluster: str
    options: Mapping[str, Any]
    published_s: float | None = None


def published_rows(file: str, group: str) -> list[dict[str, str]]:
    """The rows of a file whose group begins so, as they are written; an empty cell is unknown.

    Raises:
        ValueError: there is none.
    """
    with (PUBLISHED / file).open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["group"].startswith(group)]
    if not rows:
        raise ValueError(f"{file}: no row of group {group!r}")
    return rows


def job_of(row: Mapping[str, str]) -> Job:
    """A row of a GPT as a job.

    Raises:
        ValueError: a cell that a job needs is empty or of an unknown kind.
    """
    for name, known in (("gpu", CLUSTERS), ("act_recompute", RECOMPUTE)):
        if row[name] not in known:
            raise ValueError(f"row {row['row_id']}: {name} = {row[name]!r}; allowed: {', '.join(known)}")
    sizes: dict[str, Any] = {name: int(row[name]) for name in ("layers", "hidden", "heads", "vocab", "seq")}
    numbers = ("dp", "tp", "pp", "micro_batch", "global_batch")
    return Job(
        model=ModelSpec(name=row["model"], **sizes, **GPT),
        cluster=CLUSTERS[row["gpu"]],
        options={
            **{name: int(row[name]) for name in numbers},
            "gpus": int(row["n_gpus"]),
            "interleave": int(row["interleave"] or 1),
            "zero": int(row["zero_stage"] or 0),
            "recompute": RECOMPUTE[row["act_recompute"]],
            "sequence_parallel": row["seq_parallel"] == "yes",
            "precision": "fp16",
        },
        published_s=float(row["target_iter_time_s"]) if row["target_iter_time_s"] else None,
    )


def convention_flops(model: ModelSpec, samples: int) -> float:
    """FLOPs of a step as the papers on Megatron count them, full recomputation included.

    Narayanan et al. 2021 (SC '21), equation 3: 96 B s l h^2 (1 + s / (6 h) + V / (16 l h)).
    """
    s, h, layers = model.seq, model.hidden, model.layers
    return 96.0 * samples * s * layers * h**2 * (1 + s / (6 * h) + model.vocab / (16 * layers * h))


def simulated_row(job: Job) -> dict[str, Any]:
    """A row of a reproduction: the job, and its step as published and as simulated.

    `*_tflops` count recomputation (`convention_flops`); `error` is simulated over published, less one.
    """
    result = simulate(job.model, job.cluster, **job.options)
    gpus, samples = result.layout["gpus"], result.layout["global_batch"]
    per_gpu = convention_flops(job.model, samples) / gpus / 1e12
    published = job.published_s
    return {
        "model": job.model.name,
        "parameters": job.model.parameters,
        "gpus": gpus,
        **{name: result.layout[name] for name in ("zero", "dp", "tp", "pp", "interleave", "micro_batch")},
        "global_batch": samples,
        "recompute": result.layout["recompute"],
        "published_s": published,
        "simulated_s": result.step_time_s,
        "error": None if published is None else result.step_time_s / published - 1,
        "published_tflops": None if published is None else per_gpu / published,
        "simulated_tflops": per_gpu / result.step_time_s,
        "fits": result.fits,
    }


def errors_said(rows: Sequence[Mapping[str, Any]]) -> str:
    """The mean error of the rows that have one, and the largest."""
    known = [row for row in rows if row["error"] is not None]
    mean = statistics.fmean(abs(row["error"]) for row in known)
    worst = max(known, key=lambda row: abs(row["error"]))
    return (
        f"step times of {len(known)} published jobs are met within {mean:.1%} in the mean, {worst['error']:+.1%} at"
        f" worst ({worst['model']} on {worst['gpus']:,} GPUs)"
    )
