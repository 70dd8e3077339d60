"""Figures of published tables, each beside what predicts it: times, rates, memory, collectives, scaling.

A figure is a number that somebody measured (or, for ZeRO's and Korthikanti's memory, derived), its unit, and a function
that simulates the same thing. Rows that no simulation can be held against are listed with the reason.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..collectives.trace import Collective
from ..collectives.zero import UnitSize, Zero, model_state_bytes, padded
from ..sim.hardware import load_cluster
from ..sim.network import collective_seconds
from ..sim.result import StepResult
from .fit_network import Measured, curve, single_node
from .published_rows import ExcludedError, Job, Row, read_job
from .simulate import simulate

PUBLISHED = Path(__file__).parent / "published"

TIME, RATE, MEMORY, COLLECTIVE, SCALING, BYTES = KINDS = (
    "iteration time", "throughput", "memory", "collective", "scaling", "bytes",
)  # fmt: skip
"""What figures are of; bytes, sent and kept, are compared on this machine alone, and have to be equal."""

GIB, GB = float(1 << 30), 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A published number and how it is predicted.

    Attributes:
        name: the row's id, and what of it where a row has several figures.
        kind: one of KINDS.
        predict: simulates it; in the same unit.
    """

    name: str
    source: str
    kind: str
    published: float
    unit: str
    predict: Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """A row that is in no comparison, and why."""

    name: str
    source: str
    reason: str


@lru_cache(maxsize=1024)
def run(job: Job) -> StepResult:
    """The job's step; a row with several figures is simulated once."""
    return simulate(job.spec, job.cluster, **dict(job.options))


def rows_of(file: str) -> list[Row]:
    """Lines of a table in published/."""
    with (PUBLISHED / f"{file}.csv").open(newline="") as opened:
        return list(csv.DictReader(opened))


# Times and rates #


def step_figure(source: str, row: Row) -> Figure:
    """The time of a step, or the rate that a row prints instead.

    Raises:
        ExcludedError: neither, or a rate in FLOPs whose formula is not known.
    """
    job = read_job(row)
    name, batch = row["row_id"], int(row["global_batch"])
    if row["target_iter_time_s"]:
        seconds = float(row["target_iter_time_s"])
        return Figure(
            name=name, source=source, kind=TIME, published=seconds, unit="s", predict=lambda: run(job).step_time_s
        )
    if row["samples_per_s"]:
        return Figure(
            name=name,
            source=source,
            kind=RATE,
            published=float(row["samples_per_s"]),
            unit="samples/s",
            predict=lambda: batch / run(job).step_time_s,
        )
    if row["tflops_per_gpu"]:
        flops = _counted_flops(row, job)
        return Figure(
            name=name,
            source=source,
            kind=RATE,
            published=float(row["tflops_per_gpu"]),
            unit="TFLOP/s per GPU",
            predict=lambda: flops / int(row["n_gpus"]) / run(job).step_time_s / 1e12,
        )
    raise ExcludedError("neither the time of a step nor a rate")


def _counted_flops(row: Row, job: Job) -> float:
    """FLOPs of a step as the source counts them.

    96 B s l h^2 (1 + s / 6h + V / 16lh) with the recomputed forward, 72 without (Narayanan et al. 2021, equation 3).
    """
    said, spec = row["tflops_convention"], job.spec
    if said.startswith("per paper"):
        raise ExcludedError("TFLOP/s by a formula that the source does not give; its scaling is compared")
    recomputed = "recompute" in said or (said.startswith("not stated") and "full" in row["act_recompute"])
    factor = 96 if recomputed else 72
    layers, h, s, V = spec.layers, spec.hidden, int(row["seq"]), spec.vocab
    return factor * int(row["global_batch"]) * s * layers * h**2 * (1 + s / (6 * h) + V / (16 * layers * h))


def scaling_figures(source: str, rows: Sequence[Row]) -> Iterator[Figure]:
    """Of jobs that differ in the number of GPUs alone: the rate of a GPU, relative to that in the smallest job."""
    groups: dict[tuple[Any, ...], list[tuple[Row, Job]]] = {}
    for row in rows:
        try:
            job = read_job(row)
        except ExcludedError:
            continue
        if row["target_iter_time_s"]:
            same = tuple((key, value) for key, value in job.options if key not in ("gpus", "global_batch", "engine"))
            groups.setdefault((row["group"], row["framework"], row["notes"][:40], job.spec, same), []).append(
                (row, job)
            )
    for members in groups.values():
        members.sort(key=lambda member: int(member[0]["n_gpus"]))
        (first, base), *others = members
        for row, job in others:
            if int(row["n_gpus"]) > int(first["n_gpus"]):
                yield Figure(
                    name=f"{row['row_id']} beside {first['row_id']}",
                    source=source,
                    kind=SCALING,
                    published=_rate(row) / _rate(first),
                    unit="rate of a GPU",
                    predict=partial(_predicted_ratio, job, base),
                )


def _rate(row: Row) -> float:
    return int(row["global_batch"]) / int(row["n_gpus"]) / float(row["target_iter_time_s"])


def _predicted_ratio(job: Job, base: Job) -> float:
    def rate(one: Job) -> float:
        result = run(one)
        return float(result.layout["global_batch"]) / result.layout["gpus"] / result.step_time_s

    return rate(job) / rate(base)


def efficiency_figures(source: str, rows: Sequence[Row]) -> Iterator[Figure]:
    """Weak scaling over models of growing size: model FLOP/s of a GPU, relative to the row that is 100 %."""
    rows = [row for row in rows if row["other_metric"] == "weak_scaling_efficiency_pct"]
    base = next((read_job(row) for row in rows if float(row["other_value"]) == 100), None)
    for row in rows:
        job = read_job(row)
        if base is not None and job != base:
            yield Figure(
                name=row["row_id"],
                source=source,
                kind=SCALING,
                published=float(row["other_value"]) / 100,
                unit="FLOP/s of a GPU",
                predict=partial(_predicted_efficiency, job, base),
            )


def _predicted_efficiency(job: Job, base: Job) -> float:
    return run(job).tflops_per_gpu / run(base).tflops_per_gpu


# Memory #

MEASURES: tuple[tuple[str, float, str, Callable[[StepResult], float]], ...] = (
    ("parameters+gradients+optimizer", GIB, "GiB", lambda result: result.model_state_bytes),
    ("activations, first stage", GIB, "GiB", lambda result: result.peak_memory_bytes["activations"]),
    ("max reserved", GIB, "GiB", lambda result: result.peak_memory_bytes["reserved"]),
    ("peak memory as printed (GB)", GB, "GB", lambda result: result.peak_memory_bytes["total"]),
    ("nvidia-smi", GIB, "GiB", lambda result: _on_device(result)),
    ("GPU memory reported", GIB, "GiB", lambda result: _on_device(result)),
)
"""By how a row's `mem_kind` begins: bytes of its unit, the unit, and what of a result it is."""


def _on_device(result: StepResult) -> float:
    return result.peak_memory_bytes["reserved"] + result.peak_memory_bytes["framework"]


def memory_figures(source: str, row: Row) -> Iterator[Figure]:
    """What a row says of memory.

    Raises:
        ExcludedError: the job or what was measured is not known.
    """
    if row["other_metric"] == "model_state_memory_gb_decimal_per_gpu":
        yield _table_figure(source, row)
    elif row["other_metric"] == "activation_memory_pct_of_tp_baseline":
        yield _share_figure(source, row)
    elif row["mem_gib"]:
        found = next((measure for measure in MEASURES if row["mem_kind"].startswith(measure[0])), None)
        if found is None:
            raise ExcludedError(f"memory {row['mem_kind']!r}: it is not clear what was measured")
        _, size, unit, of_result = found
        job = read_job(row)
        yield Figure(
            name=f"{row['row_id']} memory",
            source=source,
            kind=MEMORY,
            published=float(row["mem_gib"]),
            unit=unit,
            predict=lambda: of_result(run(job)) / size,
        )


def _table_figure(source: str, row: Row) -> Figure:
    """Model states by the closed form that flights are held against; the tables give a number of parameters alone."""
    billions = float(row["params_b"])
    ranks, zero = int(row["dp"]), Zero.of_stage(int(row["zero_stage"]))

    def predict() -> float:
        unit = UnitSize(elements=padded(round(billions * 1e9), ranks), element_bytes=2)
        return sum(model_state_bytes([unit], zero, ranks, moments=2, master_bytes=4).values()) / GB

    return Figure(
        name=row["row_id"],
        source=source,
        kind=MEMORY,
        published=float(row["other_value"]),
        unit="GB",
        predict=predict,
    )


def _share_figure(source: str, row: Row) -> Figure:
    """Activations as a share of those of tensor parallelism alone."""
    job = read_job(row)
    alone = {**dict(job.options), "recompute": "none", "sequence_parallel": False}
    whole = replace(job, options=tuple(sorted(alone.items())))

    def predict() -> float:
        return 100 * run(job).peak_memory_bytes["activations"] / run(whole).peak_memory_bytes["activations"]

    return Figure(
        name=row["row_id"],
        source=source,
        kind=MEMORY,
        published=float(row["other_value"]),
        unit="% of activations",
        predict=predict,
    )


# Collectives #

CURVES = {
    "a100_1x8_azure": "dgx-a100",
    "a100_1x8_mleng": "dgx-a100",
    "a100_2x8_p4de": "aws-p4de",
    "h100_1x8_azure": "dgx-h100",
    "h100_1x8_p5": "dgx-h100",
}
"""Curves of nccl_curves.csv with sizes, and the cluster of each."""

NODES = {("a100", 2): "dgx-a100", ("a100", 4): "dgx-a100", ("a100", 8): "dgx-a100", ("v100", 8): "dgx-1"}
"""Of allreduce_single_node.csv: the cluster by GPU and number of GPUs."""


def collective_figure(source: str, name: str, point: Measured, cluster: str) -> Figure:
    op = Collective("all_reduce", "data", max(1, point.nbytes // 4), "fp32", None, "")
    return Figure(
        name=name,
        source=source,
        kind=COLLECTIVE,
        published=point.seconds,
        unit="s",
        predict=lambda: collective_seconds(op, point.gpus, load_cluster(cluster).tiers(point.gpus), "closed_form"),
    )


def node_figures(source: str) -> Iterator[Figure | Unusable]:
    """The all-reduces of allreduce_single_node.csv."""
    for number, point in enumerate(single_node(), 1):
        name = f"{source}-{number:03}"
        cluster = NODES.get((point.curve, point.gpus))
        if cluster is None:
            reason = f"a ring over {point.gpus} of the 8 GPUs of a hybrid mesh has fewer links than the cluster says"
            yield Unusable(name=name, source=source, reason=reason)
        else:
            yield collective_figure(source, name, point, cluster)


def curve_figures(source: str) -> Iterator[Figure | Unusable]:
    """The all-reduces of nccl_curves.csv."""
    for row in rows_of("nccl_curves"):
        if row["curve_id"] not in CURVES or not row["size_bytes"]:
            yield Unusable(name=row["row_id"], source=source, reason="a bus bandwidth without a size")
    for name, cluster in CURVES.items():
        for point in curve(name):
            yield collective_figure(source, f"{name} {point.nbytes} B", point, cluster)


# All of a table #


def table_figures(source: str, rows: Sequence[Row]) -> Iterator[Figure | Unusable]:
    """Every figure of some rows, in their order, and each row that has none."""
    for row in rows:
        found: list[Figure] = []
        reasons: list[str] = []
        for of_row in (_steps_of, memory_figures):
            try:
                found += of_row(source, row)
            except ExcludedError as error:
                reasons.append(str(error))
        yield from found
        if reasons and not found and not _has_efficiency(row):
            yield Unusable(name=row["row_id"], source=source, reason="; ".join(dict.fromkeys(reasons)))
        elif not reasons and not found:
            yield Unusable(name=row["row_id"], source=source, reason="no figure of a step, of memory or of scaling")
    yield from scaling_figures(source, rows)
    yield from efficiency_figures(source, rows)


def _has_efficiency(row: Row) -> bool:
    return row["other_metric"] == "weak_scaling_efficiency_pct"


def _steps_of(source: str, row: Row) -> Iterator[Figure]:
    if row["other_metric"].startswith("layer_"):
        raise ExcludedError("the time of one layer's forward or backward, not of a step")
    measured = (row["target_iter_time_s"], row["samples_per_s"], row["tflops_per_gpu"])
    if any(measured) or not (row["mem_gib"] or row["other_metric"]):
        yield step_figure(source, row)


def vtrain_row(row: Row, number: int) -> Row:
    """A line of vtrain_single_node_a100.csv with the columns of the other tables (published/README.md)."""
    given: Mapping[str, str] = {
        "row_id": f"vtrain-{number:03}", "group": "single node", "model": "GPT", "family": "GPT", "vocab": "51200",
        "gpu": "A100-SXM4-80GB", "n_gpus": row["gpus"], "precision": "fp16 mixed",
        "framework": "Megatron-DeepSpeed", "zero_stage": "0", "act_recompute": "full", "seq_parallel": "no",
        "target_iter_time_s": str(float(row["iteration_time_ms"]) / 1e3), "source": "vTrain",
    }  # fmt: skip
    shared = ("layers", "hidden", "heads", "seq", "tp", "dp", "pp", "micro_batch", "global_batch")
    empty = ("samples_per_s", "tflops_per_gpu", "mem_gib", "mem_kind", "other_metric", "other_value", "notes")
    return {**dict.fromkeys(empty, ""), **given, **{name: row[name] for name in shared}}
