"""A pipelined job simulated: each distinct rank flown once, and a step composed of them by the schedule's plan."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from math import prod

from ..collectives.groups import Mesh
from ..collectives.job_file import Job
from ..collectives.pipeline import Plan as PipelinePlan
from ..collectives.pipeline_messages import prefetch, with_communication
from ..collectives.pipeline_schedules import SCHEDULES
from ..collectives.trace import SHALLOWEST, Trace, stretch
from ..engine.pilot import Plan, StageToFly
from ..sim.hardware import Cluster
from ..sim.network import DTYPE_BYTES
from ..sim.pipeline import PipelineStep
from ..sim.rank_classes import as_job
from ..sim.remembered import Remembered
from ..sim.result import StepResult
from ..sim.stages import Stage, compose_stages, price_pipeline, price_stage
from ..sim.uneven_pipeline import compose_uneven
from .flights import flown
from .layout import Layout, computes_in, counts_blocks, engine_config, kinds_of, with_positions
from .models import ModelSpec

Part = tuple[int, bool, bool]
"""What a chunk of the model is: how many blocks, whether the embedding comes before, whether the head follows."""


def simulate_pipeline(spec: ModelSpec, layout: Layout, machine: Cluster, since: float) -> StepResult:
    """As `simulate`, of a layout with pipeline stages.

    Args:
        since: `perf_counter` when the work on this answer began.
    """
    plan, stages, step = composed(spec, layout, machine)
    result = price_pipeline(
        plan,
        stages,
        machine,
        mesh_of(layout),
        message_bytes=message_bytes(spec, layout),
        precision=computes_in(layout),
        tokens_per_step=layout.global_batch * layout.seq,
        layout=asdict(layout),
        expandable_segments=layout.expandable_segments,
        since=since,
        step=step,
    )
    ranks = kinds_of(layout, machine)
    return result if ranks.even_on(machine) else as_job(result, ranks, computes_in(layout))


def pipeline_job(spec: ModelSpec, layout: Layout) -> Job:
    """The layout with the traces of its distinct ranks."""
    parts = parts_of(spec.layers, schedule_plan(layout))
    distinct = list(dict.fromkeys(parts))
    return Job(
        layout=asdict(layout),
        precision=computes_in(layout),
        tokens_per_step=layout.global_batch * layout.seq,
        message_bytes=message_bytes(spec, layout),
        traces=tuple(stage_flight(spec, layout, parts.index(own), tuple(parts)) for own in distinct),
        stages=tuple(distinct.index(own) for own in parts),
    )


def composed(spec: ModelSpec, layout: Layout, machine: Cluster) -> tuple[PipelinePlan, Sequence[Stage], PipelineStep]:
    """The layout's plan with its messages, what the pipeline ranks' work costs, and the step that they make."""
    plan = _with_messages(layout.schedule, layout.pp, layout.accumulation, layout.interleave)
    stage_on = stage_pricer(spec, layout, plan)
    mesh, nbytes, ranks = mesh_of(layout), message_bytes(spec, layout), kinds_of(layout, machine)
    if ranks.even_on(machine):
        stages = [stage_on(rank, machine) for rank in range(plan.ranks)]
        return plan, stages, compose_stages(plan, stages, machine, mesh, nbytes)
    uneven = compose_uneven(plan, stage_on, machine, mesh, ranks, nbytes)
    return plan, uneven.stages, uneven.step


def stage_pricer(spec: ModelSpec, layout: Layout, plan: PipelinePlan) -> Callable[[int, Cluster], Stage]:
    """What prices a pipeline rank on a cluster; ranks with the same chunks are flown once."""
    parts = tuple(parts_of(spec.layers, plan))
    stages: dict[tuple[tuple[Part, ...], Cluster], Stage] = {}

    def stage_on(rank: int, machine: Cluster) -> Stage:
        if (parts[rank], machine) not in stages:
            trace = stage_flight(spec, layout, rank, parts)
            stages[parts[rank], machine] = price_stage(
                trace, machine, plan, layout.fidelity, layout.fusion, overlap=layout.overlap
            )
        return stages[parts[rank], machine]

    return stage_on


def message_bytes(spec: ModelSpec, layout: Layout) -> int:
    """What a stage hands to the next one of a micro-batch, and gets back."""
    return sum(prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in handed_on(spec, layout))


@lru_cache(maxsize=64)
def _with_messages(schedule: str, ranks: int, micro_batches: int, chunks: int) -> PipelinePlan:
    return prefetch(with_communication(_plan(schedule, ranks, micro_batches, chunks)))


@lru_cache(maxsize=64)
def _plan(schedule: str, ranks: int, micro_batches: int, chunks: int) -> PipelinePlan:
    return SCHEDULES[schedule].plan(ranks, micro_batches, chunks)


def schedule_plan(layout: Layout) -> PipelinePlan:
    """Who computes what in a step, without messages."""
    return _plan(layout.schedule, layout.pp, layout.accumulation, layout.interleave)


def parts_of(layers: int, plan: PipelinePlan) -> list[tuple[Part, ...]]:
    """By pipeline rank, what its chunks are: blocks in parts as equal as can be, the larger ones in the middle.

    The ends of the model have the embedding and the head besides, so they come last where blocks are left over.
    """
    least, more = divmod(layers, plan.stages)
    middle_first = sorted(range(plan.stages), key=lambda stage: abs(2 * stage + 1 - plan.stages))
    larger = set(middle_first[:more])
    parts = [(least + (stage in larger), stage == 0, stage == plan.stages - 1) for stage in range(plan.stages)]
    return [tuple(parts[plan.stage(rank, chunk)] for chunk in range(plan.chunks)) for rank in range(plan.ranks)]


def layers_by_stage(parts: Sequence[tuple[Part, ...]], plan: PipelinePlan) -> list[int]:
    """By virtual stage, its layers as the model counts them (engine/stages.py): embedding and head are one each."""
    places = (plan.place(stage) for stage in range(plan.stages))
    return [blocks + first + last for blocks, first, last in (parts[place.rank][place.chunk] for place in places)]


def mesh_of(layout: Layout) -> Mesh:
    """The whole job's axes, as the engine lays them out by default."""
    data = {"data": layout.dp} if layout.ep == 1 else {"expert": layout.ep, "expert_data": layout.dp // layout.ep}
    sizes = {"tensor": layout.tp, "context": layout.cp, **data, "pipeline": layout.pp}
    return Mesh.of({axis: size for axis, size in sizes.items() if size > 1 or axis in data})


def handed_on(spec: ModelSpec, layout: Layout) -> tuple[tuple[tuple[int, ...], str], ...]:
    """(shape, dtype) of what a rank hands to the next stage: hidden states of a micro-batch, cut along the sequence
    where they are, and the sum of the balance losses of experts.
    """
    cut = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    hidden = ((layout.micro_batch, layout.seq // cut, spec.hidden), layout.precision)
    return (hidden,) if spec.experts is None else (hidden, ((1,), "fp32"))


_DERIVED: Remembered[Trace] = Remembered(256)
"""Deep stages from shallow flights, and flights in the whole job's mesh."""


def stage_flight(spec: ModelSpec, layout: Layout, rank: int, parts: Sequence[tuple[Part, ...]]) -> Trace:
    """The trace of a pipeline rank: its chunks one micro-batch at a time, of each class of micro-batches.

    It flies in a pipeline of at most three ranks, the first, itself and the last, because what it does does not depend
    on how many others there are or how deep those are. A deep stage of a single chunk is flown shallow and stretched.
    """
    outer = [0, len(parts) - 1]
    crew = sorted({*outer, rank if rank not in outer else min(1, len(parts) - 1)})
    place, few = crew.index(rank), tuple(parts[member] for member in crew)
    counted = counts_blocks(engine_config(layout))
    whole = few if counted else tuple(own if n == place else _at_most(1, own) for n, own in enumerate(few))
    shallow = layout.interleave == 1 and layout.schedule != "zb-v" and not counted
    trace = _fly(spec, layout, place, tuple(_at_most(SHALLOWEST, own) for own in whole) if shallow else whole)
    if shallow:
        flown_low, blocks = trace, parts[rank][0][0]
        try:
            trace = _DERIVED.of(flown_low, blocks, lambda: stretch(flown_low, blocks))
        except ValueError:  # its blocks do not all do the same, so no block can stand for others
            trace = _fly(spec, layout, place, whole)
    sizes = mesh_of(layout).sizes
    return _DERIVED.of(trace, tuple(sizes.items()), lambda: replace(trace, world=sizes))


def _at_most(blocks: int, own: tuple[Part, ...]) -> tuple[Part, ...]:
    """Chunks with no more blocks than that."""
    return tuple((min(number, blocks), first, last) for number, first, last in own)


def _fly(spec: ModelSpec, layout: Layout, rank: int, parts: tuple[tuple[Part, ...], ...]) -> Trace:
    ranks = len(parts)
    layers = sum(blocks for own in parts for blocks, *_ in own)
    plan = _plan(layout.schedule, ranks, ranks, layout.interleave)
    config = engine_config(layout)
    config["parallel"] |= {"pipeline": ranks}
    config["pipeline"] |= {"partition": "layers", "layers": layers_by_stage(parts, plan)}
    return flown(
        Plan(
            factory="windtunnel.experiments.transformer:for_flight",
            arguments={
                "spec": replace(with_positions(spec, layout), layers=layers),
                "batch": layout.micro_batch,
                "seq": layout.seq,
            },
            config=config,
            world=layout.gpus // layout.pp * ranks,
            micro_steps=layout.accumulation,
            stage=StageToFly(
                rank=rank,
                blocks=sum(blocks for blocks, *_ in parts[rank]),
                hands_on=handed_on(spec, layout),
                tokens=layout.seq,
            ),
        )
    )
