"""A step of a pipelined job: the traces of its chunks priced action by action, and composed by the plan.

Each *distinct* chunk of the model is flown once (engine/flight.py): its forward and its backward, as phases of their
own, for the first, a middle and the last micro-batch, and the update that follows. The plan says how often and in which
order a rank does them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from ..collectives.groups import Mesh, tiers_along
from ..collectives.pipeline import UPDATE, Action, Plan, phase_name, sent_messages
from ..collectives.trace import Trace
from .framework import framework_bytes
from .hardware import Cluster
from .memory import Memory
from .pipeline import ActionPrice, LinkSeconds, PipelineStep, StagePrice, compose
from .remembered import Remembered
from .replay import Replay, flops, replay, sent_bytes_by_axis
from .result import BACKWARD_OVER_FORWARD, StepResult, peak_memory
from .stage_memory import StageFlight, hungriest, rank_memory, read_flight
from .topology import topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a pipeline rank's work costs.

    Attributes:
        replay: of the flight, whose sums are of a whole step.
        flight: what it takes and gives back of memory.
        framework_bytes: that its process takes outside of the allocator.
    """

    replay: Replay
    flight: StageFlight
    framework_bytes: int

    def seconds(self, action: Action, micro_batches: int) -> Mapping[str, float]:
        """By cause, of an action in a step of so many micro-batches."""
        return dict(self.replay.phases_s)[phase_name(action, micro_batches)]

    def communication_s(self, name: str) -> Mapping[str, Mapping[str, float]]:
        """By axis, of a phase."""
        return dict(self.replay.phases_communication_s)[name]

    @property
    def update_s(self) -> Mapping[str, float]:
        return dict(self.replay.phases_s)[UPDATE]

    def with_update_of(self, other: "Stage") -> "Stage":
        """The same work, and another one's update."""
        phases = tuple(
            (name, dict(other.update_s) if name == UPDATE else spent) for name, spent in self.replay.phases_s
        )
        return replace(self, replay=replace(self.replay, phases_s=phases))

    def price(self, kind: str, chunk: int, micro_batches: int) -> ActionPrice:
        """Of an action on any micro-batch of a step."""

        def total(number: int) -> float:
            return sum(self.seconds(Action(kind, chunk, number), micro_batches).values())

        last = micro_batches - 1
        return ActionPrice(seconds=total(min(1, last)), first_s=total(0), last_s=total(last))


_REPLAYS: Remembered[Replay] = Remembered(256)
"""Steps of other numbers of micro-batches are made of the same flights."""

_FLIGHTS: Remembered[StageFlight] = Remembered(256)
_MEMORIES: Remembered[Memory] = Remembered(256)
"""Layouts that differ in what memory does not ask for are played once."""


def price_stage(
    trace: Trace, cluster: Cluster, plan: Plan, fidelity: str, fusion: str = "none", *, overlap: bool = True
) -> Stage:
    """Replay the flight of a rank.

    Args:
        fidelity, fusion, overlap: as for `replay`.
        trace: its phases have the names that `phase_name` gives, each once in each of two steps, and "update".
    """
    played = _REPLAYS.of(
        trace,
        (cluster, fidelity, fusion, overlap),
        lambda: replay(trace, cluster, fidelity=fidelity, fusion=fusion, overlap=overlap),
    )
    middles = max(1, plan.micro_batches_per_step - 2)
    phases = (replace(phase, repeat=middles if " middle " in phase.name else 1) for phase in trace.phases)
    counted = replace(trace, phases=tuple(phases))
    return Stage(
        replay=replace(
            played,
            sent_bytes=sent_bytes_by_axis(counted, topology(cluster, Mesh.of(trace.world).world)),
            forward_flops=flops(counted, forward_only=True),
            executed_flops=flops(counted, forward_only=False),
        ),
        # Traces of the same flight in other meshes have their segments in common.
        flight=_FLIGHTS.of(trace.segments, (trace.phases, plan.chunks), lambda: read_flight(trace, plan.chunks)),
        framework_bytes=framework_bytes(trace, cluster.processor),
    )


def stage_memories(
    plan: Plan, stages: Sequence[Stage], cluster: Cluster, message_bytes: int, *, expandable_segments: bool = False
) -> list[Memory]:
    """Of each distinct stage, what the rank uses that keeps most in flight; arguments as for `price_pipeline`."""
    ranks: dict[int, list[int]] = {}
    for rank, stage in enumerate(stages):
        ranks.setdefault(id(stage.flight), []).append(rank)
    named = (plan.schedule, plan.ranks, plan.micro_batches, plan.chunks)  # which is all that tells plans apart

    def of(alike: list[int]) -> Memory:
        stage, processor = stages[alike[0]], cluster.processor

        def play() -> Memory:
            return rank_memory(
                plan,
                hungriest(plan, alike, stage.flight, message_bytes),
                stage.flight,
                processor,
                message_bytes,
                framework_bytes=stage.framework_bytes,
                expandable_segments=expandable_segments,
            )

        asked = (named, tuple(alike), processor, message_bytes, stage.framework_bytes, expandable_segments)
        return _MEMORIES.of(stage.flight, asked, play)

    return [of(alike) for alike in ranks.values()]


def price_pipeline(
    plan: Plan,
    stages: Sequence[Stage],
    cluster: Cluster,
    mesh: Mesh,
    *,
    message_bytes: int,
    precision: str,
    tokens_per_step: int,
    layout: Mapping[str, Any],
    expandable_segments: bool = False,
    since: float | None = None,
    step: PipelineStep | None = None,
) -> StepResult:
    """What a step of a pipelined job costs.

    Args:
        plan: with its messages.
        stages: by pipeline rank.
        mesh: of the whole job, with an axis "pipeline".
        message_bytes: what a rank sends of a micro-batch to the next stage, and back.
        precision, tokens_per_step, layout, expandable_segments, since: as for `price`.
        step: what the stages make of the plan, if it is known.
    """
    began = perf_counter() if since is None else since
    step = step or compose_stages(plan, stages, cluster, mesh, message_bytes)
    memories = stage_memories(plan, stages, cluster, message_bytes, expandable_segments=expandable_segments)
    memory = max(memories, key=lambda one: one.total_bytes)
    model_flops = (1 + BACKWARD_OVER_FORWARD) * sum(stage.replay.forward_flops for stage in stages) / plan.ranks
    executed_flops = sum(stage.replay.executed_flops for stage in stages) / plan.ranks
    processor = cluster.processor
    sent = [sent_by_axis(plan, rank, stage, message_bytes) for rank, stage in enumerate(stages)]
    return StepResult(
        step_time_s=step.step_s,
        tokens_per_s=tokens_per_step / step.step_s,
        tflops_per_gpu=model_flops / step.step_s / 1e12,
        hardware_tflops_per_gpu=executed_flops / step.step_s / 1e12,
        mfu=model_flops / step.step_s / processor.peak_flops[precision],
        breakdown_s=_breakdown(plan, step, stages),
        communication_s=_communication(
            plan, step, stages, link_seconds(cluster, mesh, message_bytes)("activation", 0, 1)
        ),
        peak_memory_bytes=peak_memory(memory),
        fits=all(one.excess is None for one in memories),
        first_to_exceed=next((one.excess for one in memories if one.excess is not None), None),
        bytes_sent_per_gpu={
            "total": round(sum(sum(one.values()) for one in sent) / plan.ranks),
            "max": max(sum(one.values()) for one in sent),
            "by_axis": {axis: round(nbytes / plan.ranks) for axis, nbytes in sum(sent, Counter()).items()},
        },
        model_state_bytes=max(sum(one.state.values()) for one in memories),
        offloaded_bytes_per_node=_offloaded(memories, cluster, mesh),
        wall_s=perf_counter() - began,
        events=step.events + sum(stage.replay.events for stage in {id(each): each for each in stages}.values()),
        layout={**layout, "gpus": mesh.world},
    )


def compose_stages(
    plan: Plan, stages: Sequence[Stage], cluster: Cluster, mesh: Mesh, message_bytes: int
) -> PipelineStep:
    """The step that the stages make of a plan; arguments as for `price_pipeline`."""
    prices = [stage_price(plan, rank, stage) for rank, stage in enumerate(stages)]
    return compose(plan, prices, link_seconds(cluster, mesh, message_bytes))


def stage_price(plan: Plan, rank: int, stage: Stage) -> StagePrice:
    """What the actions that a plan has for a rank take, and what follows them."""
    kinds = {(action.kind, action.chunk) for action in plan.actions(rank)}
    return StagePrice(
        actions={place: stage.price(*place, plan.micro_batches_per_step) for place in kinds},
        after_s=sum(stage.update_s.values()),
    )


def _busiest(plan: Plan, step: PipelineStep) -> int:
    """The rank that is idle least."""
    return min(range(plan.ranks), key=lambda number: step.ranks[number].bubble_s)


def _phases(plan: Plan, rank: int) -> Counter[str]:
    """How often a rank goes through each phase in all of the plan."""
    per_step = plan.micro_batches_per_step
    return Counter(
        phase_name(Action(action.kind, action.chunk, action.micro_batch % per_step), per_step)
        for action in plan.actions(rank)
    )


def _communication(
    plan: Plan, step: PipelineStep, stages: Sequence[Stage], message_s: float
) -> dict[str, dict[str, float]]:
    """Of the rank that is idle least, by axis.

    Args:
        message_s: of a message to the next stage. What a rank receives counts where it waits for it.
    """
    rank, steps = _busiest(plan, step), plan.micro_batches // plan.micro_batches_per_step
    found = {axis: dict(parts) for axis, parts in stages[rank].communication_s(UPDATE).items()}
    for name, times in _phases(plan, rank).items():
        for axis, parts in stages[rank].communication_s(name).items():
            for part, seconds in parts.items():
                found[axis][part] += times * seconds / steps
    messages = sum(sent_messages(plan, rank).values()) / steps
    exposed_s = step.ranks[rank].exposed_p2p_s
    return {**found, "pipeline": {"exposed_s": exposed_s, "hidden_s": max(0.0, messages * message_s - exposed_s)}}


def _breakdown(plan: Plan, step: PipelineStep, stages: Sequence[Stage]) -> dict[str, float]:
    """Of the rank that is idle least, by cause."""
    rank, steps = _busiest(plan, step), plan.micro_batches // plan.micro_batches_per_step
    causes = dict(stages[rank].update_s)
    phases = dict(stages[rank].replay.phases_s)
    for name, times in _phases(plan, rank).items():
        for cause, seconds in phases[name].items():
            causes[cause] += times * seconds / steps
    causes["exposed_communication"] += step.ranks[rank].exposed_p2p_s
    causes["bubble"] = step.step_s - sum(seconds for cause, seconds in causes.items() if cause != "bubble")
    return causes


def link_seconds(cluster: Cluster, mesh: Mesh, message_bytes: int) -> LinkSeconds:
    """Seconds of a message between pipeline ranks, while all ranks beside them send theirs."""
    tiers = tiers_along(mesh.placement("pipeline"), topology(cluster, mesh.world).tiers)

    def seconds(what: str, sender: int, receiver: int) -> float:
        joins = next(tier for tier in tiers if sender // tier.ranks == receiver // tier.ranks)
        return joins.latency_s + message_bytes / joins.bytes_per_s

    return seconds


def sent_by_axis(plan: Plan, rank: int, stage: Stage, message_bytes: int) -> Counter[str]:
    """Bytes that a rank sends in a step, by axis.

    Args:
        plan: with its messages.
        message_bytes: of each of them.
    """
    steps = plan.micro_batches // plan.micro_batches_per_step
    sent = Counter(stage.replay.sent_bytes)
    sent["pipeline"] += sum(sent_messages(plan, rank).values()) * message_bytes // steps
    return sent


def _offloaded(memories: Sequence[Memory], cluster: Cluster, mesh: Mesh) -> dict[str, int]:
    """Bytes off the devices of the fullest node, by tier."""
    ranks = min(cluster.gpus_per_node, mesh.world)
    return {tier: ranks * max(one.elsewhere[tier] for one in memories) for tier in memories[0].elsewhere}
