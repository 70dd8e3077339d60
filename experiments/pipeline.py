"""A pipelined job simulated: each distinct rank flown once, and a step composed of them by the schedule's plan."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from math import prod

from ..collectives.groups import Mesh
from ..collectives.pipeline import Plan as PipelinePlan
from ..collectives.pipeline_messages import prefetch, with_communication
from ..collectives.pipeline_schedules import SCHEDULES
from ..collectives.trace import SHALLOWEST, Trace, stretch
from ..engine.pilot import Plan, StageToFly, fly
from ..sim.hardware import Cluster
from ..sim.network import DTYPE_BYTES
from ..sim.result import StepResult
from ..sim.stages import Stage, compose_stages, price_pipeline, price_stage
from ..sim.timeline import pipeline_spans, to_json
from .layout import Layout, computes_in, counts_blocks, engine_config, with_positions
from .models import ModelSpec

Part = tuple[int, bool, bool]
"""What a chunk of the model is: how many blocks, whether the embedding comes before, whether the head follows."""


def simulate_pipeline(spec: ModelSpec, layout: Layout, machine: Cluster, since: float) -> StepResult:
    """As `simulate`, of a layout with pipeline stages.

    Args:
        since: `perf_counter` when the work on this answer began.
    """
    plan = prefetch(with_communication(schedule_plan(layout)))
    return price_pipeline(
        plan,
        price_stages(spec, layout, machine, plan),
        machine,
        mesh_of(layout),
        message_bytes=message_bytes(spec, layout),
        precision=computes_in(layout),
        tokens_per_step=layout.global_batch * layout.seq,
        layout=asdict(layout),
        expandable_segments=layout.expandable_segments,
        since=since,
    )


def pipeline_timeline(spec: ModelSpec, layout: Layout, machine: Cluster) -> str:
    """The actions of every pipeline rank as a Perfetto file."""
    plan = prefetch(with_communication(schedule_plan(layout)))
    stages = price_stages(spec, layout, machine, plan)
    step = compose_stages(plan, stages, machine, mesh_of(layout), message_bytes(spec, layout))
    return to_json(pipeline_spans(step))


def price_stages(spec: ModelSpec, layout: Layout, machine: Cluster, plan: PipelinePlan) -> list[Stage]:
    """By pipeline rank, what its work costs; ranks with the same chunks are flown once."""
    parts = parts_of(spec.layers, plan)
    stages: dict[tuple[Part, ...], Stage] = {}
    for rank, own in enumerate(parts):
        if own not in stages:
            trace = stage_flight(spec, layout, rank, tuple(parts))
            stages[own] = price_stage(trace, machine, plan, layout.fidelity)
    return [stages[own] for own in parts]


def message_bytes(spec: ModelSpec, layout: Layout) -> int:
    """What a stage hands to the next one of a micro-batch, and gets back."""
    return prod(hidden_shape(spec, layout)) * DTYPE_BYTES[layout.precision]


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
    sizes = {"tensor": layout.tp, "context": layout.cp, "data": layout.dp, "pipeline": layout.pp}
    return Mesh.of({axis: size for axis, size in sizes.items() if size > 1 or axis == "data"})


def hidden_shape(spec: ModelSpec, layout: Layout) -> tuple[int, int, int]:
    """Of what a rank hands to the next stage: hidden states of a micro-batch, cut along the sequence where they are."""
    cut = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    return layout.micro_batch, layout.seq // cut, spec.hidden


def stage_flight(spec: ModelSpec, layout: Layout, rank: int, parts: Sequence[tuple[Part, ...]]) -> Trace:
    """The trace of a pipeline rank: its chunks one micro-batch at a time, of each class of micro-batches.

    It flies in a pipeline of at most three ranks, the first, itself and the last, because what it does does not depend
    on how many others there are. A deep stage of a single chunk is flown shallow and stretched.
    """
    outer = [0, len(parts) - 1]
    crew = sorted({*outer, rank if rank not in outer else min(1, len(parts) - 1)})
    few = [parts[member] for member in crew]
    place = crew.index(rank)
    shallow = layout.interleave == 1 and layout.schedule != "zb-v" and not counts_blocks(engine_config(layout))
    if shallow:
        flown = _fly(spec, layout, place, tuple(tuple((min(b, SHALLOWEST), *ends) for b, *ends in own) for own in few))
        try:
            trace = stretch(flown, parts[rank][0][0])
        except ValueError:  # its blocks do not all do the same, so no block can stand for others
            trace = _fly(spec, layout, place, tuple(few))
    else:
        trace = _fly(spec, layout, place, tuple(few))
    return replace(trace, world=mesh_of(layout).sizes)


@lru_cache(maxsize=64)
def _fly(spec: ModelSpec, layout: Layout, rank: int, parts: tuple[tuple[Part, ...], ...]) -> Trace:
    ranks = len(parts)
    layers = sum(blocks for own in parts for blocks, *_ in own)
    plan = _plan(layout.schedule, ranks, ranks, layout.interleave)
    config = engine_config(layout)
    config["parallel"] |= {"pipeline": ranks}
    config["pipeline"] |= {"partition": "layers", "layers": layers_by_stage(parts, plan)}
    return fly(
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
                shape=hidden_shape(spec, layout),
                dtype=layout.precision,
                tokens=layout.seq,
            ),
        )
    )
