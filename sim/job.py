"""A whole job priced and recorded from its traces: what `simulate` does once the flights are over. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from time import perf_counter
from typing import Any

from ..collectives.groups import Mesh
from ..collectives.job_file import Job
from ..collectives.pipeline import Plan
from ..collectives.trace import Trace
from .hardware import Cluster
from .pipeline import PipelineStep
from .pipeline_timeline import StageRecord, rank_memory_track, step_timeline, updates
from .recording import MemoryTrack
from .replay import replay
from .result import StepResult, price
from .stages import compose_stages, link_seconds, price_pipeline, price_stage
from .timeline import Timeline, rank_timeline, steady_memory


def price_job(job: Job, cluster: Cluster, *, fidelity: str = "closed_form") -> StepResult:
    """A steady step of the job on a cluster, which need not be the one that it was laid out for.

    Raises:
        ValueError: the cluster has fewer GPUs, or cannot compute in the job's precision.
    """
    began = perf_counter()
    mesh = Mesh.of(job.traces[0].world)
    cluster.check_gpus(mesh.world)
    if job.precision not in cluster.processor.peak_flops:
        has = ", ".join(cluster.processor.peak_flops)
        raise ValueError(f"precision = {job.precision} of the job; {cluster.processor.name} computes in {has}")
    layout = {**job.layout, "cluster": cluster.name, "fidelity": fidelity}
    common: dict[str, Any] = {
        "precision": job.precision,
        "tokens_per_step": job.tokens_per_step,
        "layout": layout,
        "since": began,
    }
    if len(job.stages) == 1:
        return price(job.traces[0], cluster, **_said(price, layout) | common)
    plan, how = job.plan(), _said(price_stage, layout)
    distinct = [price_stage(trace, cluster, plan, **how) for trace in job.traces]
    stages = [distinct[number] for number in job.stages]
    about = _said(price_pipeline, layout) | common | {"message_bytes": job.message_bytes}
    return price_pipeline(plan, stages, cluster, mesh, **about)


def _said(function: Callable[..., Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """What a layout says of how its job is priced, of all that `function` lets one choose; not on which cluster."""
    return {name: layout[name] for name in signature(function).parameters if name in layout and name != "cluster"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """What ran when in a step, and the memory in use meanwhile.

    Attributes:
        rank: the pipeline rank whose memory it is: the one that has most in use.
        memory: by category over time.
        begin_s, end_s: of the steady step.
        skipped: micro-steps of it that are not drawn, because they repeat those that are.
        plan, step: of a pipelined job.
    """

    timeline: Timeline
    rank: int
    memory: MemoryTrack
    begin_s: float
    end_s: float
    skipped: int = 0
    plan: Plan | None = None
    step: PipelineStep | None = None


def record_job(job: Job, cluster: Cluster, *, fidelity: str = "closed_form") -> JobRecord:
    """Play the job again and keep what happens."""
    if len(job.stages) > 1:
        return _record_pipeline(job, cluster, fidelity)
    (trace,) = job.traces
    recorded = stage_record(job, trace, cluster, fidelity).replay
    memory, begin_s, end_s = steady_memory(trace, recorded, cluster.processor)
    drawn = sum(span.start_s >= begin_s for span in recorded.phase_spans)
    repeats = sum(phase.repeat for phase in trace.phases if phase.step == trace.phases[-1].step)
    return JobRecord(
        timeline=rank_timeline(trace, recorded, cluster.processor),
        rank=0,
        memory=memory,
        begin_s=begin_s,
        end_s=end_s,
        skipped=repeats - drawn,
    )


def stage_record(job: Job, trace: Trace, cluster: Cluster, fidelity: str) -> StageRecord:
    """A trace of the job played again, with its spans kept."""
    recorded = replay(trace, cluster, record=True, **_said(replay, {**job.layout, "fidelity": fidelity}))
    return StageRecord(trace, recorded, cluster.processor.allocation_bytes)


def _record_pipeline(job: Job, cluster: Cluster, fidelity: str) -> JobRecord:
    plan, mesh = job.plan(), Mesh.of(job.traces[0].world)
    layout = {**job.layout, "fidelity": fidelity}
    priced = [price_stage(trace, cluster, plan, **_said(price_stage, layout)) for trace in job.traces]
    step = compose_stages(plan, [priced[number] for number in job.stages], cluster, mesh, job.message_bytes)
    distinct = [stage_record(job, trace, cluster, fidelity) for trace in job.traces]
    stages = [distinct[number] for number in job.stages]
    tracks = [rank_memory_track(plan, step, rank, stage, job.message_bytes) for rank, stage in enumerate(stages)]
    fullest = max(range(plan.ranks), key=lambda rank: tracks[rank].peak_bytes)
    link = link_seconds(cluster, mesh, job.message_bytes)
    return JobRecord(
        timeline=step_timeline(plan, step, stages, tracks, link),
        rank=fullest,
        memory=tracks[fullest],
        begin_s=0.0,
        end_s=max(end_s for rank in range(plan.ranks) for _, end_s in updates(plan, step, rank)),
        plan=plan,
        step=step,
    )
