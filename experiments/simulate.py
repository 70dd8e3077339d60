"""`simulate`: one training step of a model on a cluster, without the cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from ..collectives.job_file import Job, dumps, loads
from ..collectives.trace import DEEPER, MIDDLE, SHALLOWEST, Trace, repeat_phase, stretch
from ..engine.pilot import Plan
from ..sim.hardware import Cluster, load_cluster
from ..sim.job import price_job, record_job
from ..sim.rank_classes import as_job, seen_by
from ..sim.result import StepResult, price
from ..sim.timeline import to_json
from .flights import flown
from .layout import (
    OFFLOAD_KEYS,
    Layout,
    Options,
    as_slowest_sees,
    computes_in,
    counts_blocks,
    engine_config,
    from_deepspeed,
    kinds_of,
    resolve,
    with_positions,
)
from .models import ModelSpec, load_model
from .own_models import OwnModel, is_own, look_at, own_flight, with_sample
from .pipeline import pipeline_job, simulate_pipeline

SECONDS_PER_DAY = 86_400


def find_model(model: str | ModelSpec | OwnModel) -> ModelSpec | OwnModel:
    """The model of a catalogue name, a TOML file or MODULE:FUNCTION.

    Raises:
        ValueError: there is none.
    """
    if isinstance(model, ModelSpec | OwnModel):
        return model
    return look_at(model) if is_own(model) else load_model(model)


def simulate(
    model: str | ModelSpec | OwnModel,
    cluster: str | Cluster,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    **options: Any,
) -> StepResult:
    """Simulate one steady training step.

    Args:
        model: a catalogue name, a TOML file, MODULE:FUNCTION (which returns a module and a sample micro-batch), or
            what `find_model` made of one.
        cluster: a catalogue name, a TOML file or a Cluster.
        config: a DeepSpeed JSON file, or its dict, for what `options` leave open; the engine that is flown honours it.
        options: fields of experiments.layout.Options: gpus, dp, zero, micro_batch, global_batch, seq, recompute, ...

    Raises:
        ValueError: an option, a file or a combination that cannot be; one line.
    """
    began = perf_counter()
    spec = find_model(model)
    machine = cluster if isinstance(cluster, Cluster) else load_cluster(cluster)
    chosen = Options(**options)
    if isinstance(spec, OwnModel):
        chosen, config = with_sample(spec, chosen, config)
    layout = resolve(from_deepspeed(config, chosen) if config is not None else chosen, spec, machine)
    if layout.pp > 1 and isinstance(spec, ModelSpec):
        return simulate_pipeline(spec, layout, machine, began)
    trace, ranks = flight(spec, layout), kinds_of(layout, machine)
    result = price(
        trace,
        machine if ranks.even_on(machine) else seen_by(machine, ranks.kinds),
        precision=computes_in(layout),
        tokens_per_step=layout.global_batch * layout.seq,
        layout=asdict(layout),
        fidelity=layout.fidelity,
        expandable_segments=layout.expandable_segments,
        fusion=layout.fusion,
        overlap=layout.overlap,
        since=began,
    )
    return result if ranks.even_on(machine) else as_job(result, ranks, computes_in(layout))


def notes(model: ModelSpec | OwnModel) -> tuple[str, ...]:
    """What a reader should know of a model that is in no catalogue."""
    return (model.described,) if isinstance(model, OwnModel) else ()


def scaling(
    model: str | ModelSpec | OwnModel, cluster: str | Cluster, gpus: Sequence[int], **options: Any
) -> tuple[StepResult, ...]:
    """`simulate` at several sizes. A global batch that is given stays (strong scaling), else it grows with them."""
    return tuple(simulate(model, cluster, gpus=count, **options) for count in gpus)


def flight(spec: ModelSpec | OwnModel, layout: Layout) -> Trace:
    """The trace of a layout; a deep model of the catalogue is flown shallow and stretched."""
    if isinstance(spec, OwnModel):
        return own_flight(spec, layout)
    spec, config, accumulation = with_positions(spec, layout), engine_config(layout), layout.accumulation
    deeper = DEEPER if any(key in config["zero_optimization"] for key in OFFLOAD_KEYS) else 0
    shallow = spec if counts_blocks(config) else replace(spec, layers=min(spec.layers, SHALLOWEST + deeper))
    plan = Plan(
        factory="windtunnel.experiments.transformer:for_flight",
        arguments={"spec": shallow, "batch": layout.micro_batch, "seq": layout.seq},
        config=config,
        world=layout.gpus,
        micro_steps=accumulation,
    )
    trace = flown(plan)
    try:
        trace = stretch(trace, spec.layers, MIDDLE + deeper // 2)
    except ValueError:  # its blocks do not all do the same, so no block can stand for others
        trace = flown(replace(plan, arguments={**plan.arguments, "spec": spec}))
    return repeat_phase(trace, "micro-step middle", max(0, accumulation - 2))


def job(model: str | ModelSpec | OwnModel, result: StepResult) -> Job:
    """The job of `result`: its layout and its traces, all that is needed to price it on another cluster."""
    spec = find_model(model)
    layout = Layout(**result.layout)
    if layout.pp > 1 and isinstance(spec, ModelSpec):
        return pipeline_job(spec, layout)
    return Job(
        layout=asdict(layout),
        precision=computes_in(layout),
        tokens_per_step=layout.global_batch * layout.seq,
        message_bytes=0,
        traces=(flight(spec, layout),),
        stages=(0,),
    )


def load_job(path: str | Path) -> Job:
    """The job in a file that `saved_trace` wrote.

    Raises:
        ValueError: the file cannot be read, or is none.
    """
    try:
        return loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"trace = {path}: {error}") from None


def simulate_trace(saved: str | Path | Job, cluster: str | Cluster, *, fidelity: str = "closed_form") -> StepResult:
    """As `simulate`, of a saved trace on any cluster: nothing is flown, so no torch is needed.

    Raises:
        ValueError: the file is no trace, or the cluster cannot run the job.
    """
    machine = cluster if isinstance(cluster, Cluster) else load_cluster(cluster)
    return price_job(saved if isinstance(saved, Job) else load_job(saved), machine, fidelity=fidelity)


def timeline(model: str | ModelSpec | OwnModel, cluster: str | Cluster, result: StepResult) -> str:
    """The job of `result` as a Perfetto file."""
    return timeline_of(job(model, result), cluster, result.layout["fidelity"])


def timeline_of(what: Job, cluster: str | Cluster, fidelity: str) -> str:
    """A job as a Perfetto file; where its ranks differ, as it would be if all were as slow as the slowest."""
    machine = cluster if isinstance(cluster, Cluster) else load_cluster(cluster)
    machine = as_slowest_sees(Layout(**what.layout), machine)
    return to_json(record_job(what, machine, fidelity=fidelity).timeline)


def saved_trace(model: str | ModelSpec | OwnModel, result: StepResult) -> str:
    """The job of `result` as a JSON file: its layout, and the traces of all ranks that differ."""
    return dumps(job(model, result))


def to_rows(results: Sequence[StepResult]) -> list[dict[str, Any]]:
    """One row per result for a table: the numbers of the step, where its time goes, memory and bytes."""
    return [
        {
            "gpus": result.layout["gpus"],
            "global_batch": result.layout["global_batch"],
            "step_time_s": result.step_time_s,
            "tokens_per_s": result.tokens_per_s,
            "tflops_per_gpu": result.tflops_per_gpu,
            "hardware_tflops_per_gpu": result.hardware_tflops_per_gpu,
            "mfu": result.mfu,
            **{f"{cause}_s": seconds for cause, seconds in result.breakdown_s.items()},
            "peak_memory_bytes": result.peak_memory_bytes["total"],
            "fits": result.fits,
            "bytes_sent_per_gpu": result.bytes_sent_per_gpu["total"],
        }
        for result in results
    ]


def to_dict(result: StepResult) -> dict[str, Any]:
    """The contract's JSON object; the model states, which are in the peak by category, are for Python callers."""
    answer = {name: dict(value) if isinstance(value, Mapping) else value for name, value in asdict(result).items()}
    del answer["model_state_bytes"]
    return answer


def training_days(result: StepResult, tokens: float) -> dict[str, float]:
    """How long `tokens` tokens take at the simulated speed, and the GPU hours they use."""
    seconds = tokens / result.tokens_per_s
    return {"days": seconds / SECONDS_PER_DAY, "gpu_hours": seconds / 3600 * result.layout["gpus"]}
