"""A whole job priced and recorded from its traces: what `simulate` does once the flights are over. No torch."""

from collections.abc import Callable, Mapping, Sequence
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
from .rank_classes import RankKinds, as_job, rank_kinds, seen_by
from .recording import MemoryTrack
from .replay import replay
from .result import StepResult, price
from .stages import Stage, compose_stages, link_seconds, price_pipeline, price_stage
from .timeline import Timeline, rank_timeline, steady_memory
from .uneven_pipeline import compose_uneven
from .unlike import Stragglers


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
    ranks = _kinds(job, cluster)
    if len(job.stages) == 1:
        result = price(job.traces[0], _seen(cluster, ranks), **_said(price, layout) | common)
    else:
        plan, stages, step = _composed(job, cluster, fidelity)
        about = _said(price_pipeline, layout) | common | {"message_bytes": job.message_bytes, "step": step}
        result = price_pipeline(plan, stages, cluster, mesh, **about)
    return result if ranks.even_on(cluster) else as_job(result, ranks, job.precision)


def _kinds(job: Job, cluster: Cluster) -> RankKinds:
    """The kinds of the job's ranks on a cluster."""
    slow = Stragglers(
        ranks=job.layout.get("slow_ranks", 0),
        factor=job.layout.get("slow_factor", 1.0),
        seed=job.layout.get("slow_seed", 0),
    )
    return rank_kinds(cluster, Mesh.of(job.traces[0].world).world, slow)


def _seen(cluster: Cluster, ranks: RankKinds) -> Cluster:
    return cluster if ranks.even_on(cluster) else seen_by(cluster, ranks.kinds)


def _composed(job: Job, cluster: Cluster, fidelity: str) -> tuple[Plan, Sequence[Stage], PipelineStep]:
    """The job's plan, what its pipeline ranks' work costs, and the step that they make; of the slowest pipeline."""
    plan, mesh, ranks = job.plan(), Mesh.of(job.traces[0].world), _kinds(job, cluster)
    layout = {**job.layout, "fidelity": fidelity}
    priced: dict[tuple[int, Cluster], Stage] = {}

    def stage_on(rank: int, machine: Cluster) -> Stage:
        key = job.stages[rank], machine
        if key not in priced:
            priced[key] = price_stage(job.traces[key[0]], machine, plan, **_said(price_stage, layout))
        return priced[key]

    if not ranks.even_on(cluster):
        uneven = compose_uneven(plan, stage_on, cluster, mesh, ranks, job.message_bytes)
        return plan, uneven.stages, uneven.step
    stages = [stage_on(rank, cluster) for rank in range(plan.ranks)]
    return plan, stages, compose_stages(plan, stages, cluster, mesh, job.message_bytes)


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
    record = stage_record(job, trace, cluster, fidelity)
    recorded = record.replay
    memory, begin_s, end_s = steady_memory(trace, recorded, cluster.processor, record.fusion)
    drawn = sum(span.start_s >= begin_s for span in recorded.phase_spans)
    repeats = sum(phase.repeat for phase in trace.phases if phase.step == trace.phases[-1].step)
    return JobRecord(
        timeline=rank_timeline(trace, recorded, cluster.processor, record.fusion),
        rank=0,
        memory=memory,
        begin_s=begin_s,
        end_s=end_s,
        skipped=repeats - drawn,
    )


def stage_record(job: Job, trace: Trace, cluster: Cluster, fidelity: str) -> StageRecord:
    """A trace of the job played again, with its spans kept; where ranks differ, among members of all kinds."""
    machine = _seen(cluster, _kinds(job, cluster))
    recorded = replay(trace, machine, record=True, **_said(replay, {**job.layout, "fidelity": fidelity}))
    return StageRecord(trace, recorded, cluster.processor.allocation_bytes, job.layout.get("fusion", "none"))


def _record_pipeline(job: Job, cluster: Cluster, fidelity: str) -> JobRecord:
    plan, _, step = _composed(job, cluster, fidelity)
    mesh = Mesh.of(job.traces[0].world)
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
