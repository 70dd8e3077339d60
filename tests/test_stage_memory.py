"""Pipeline ranks' memory: hand-made flights played in the order of plans, against counting by hand."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hand_made import PROCESSOR, kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.collectives.pipeline import FORWARD, WEIGHT, Action, Plan, kept, peak_in_flight, phase_name
from windtunnel.collectives.pipeline_messages import prefetch, with_communication
from windtunnel.collectives.pipeline_rehearsal import rehearsal
from windtunnel.collectives.pipeline_schedules import SCHEDULES
from windtunnel.collectives.trace import Alloc, Call, Free, Op, Phase, Ref, Trace
from windtunnel.sim.stage_memory import StageFlight, hungriest, rank_memory, read_flight, received_at_once, shortened

STATE, KEPT, SCRATCH, GRADIENT, UPDATE = 1000, 100, 30, 45, 7
MESSAGE = 11
CPU = replace(PROCESSOR, kind="cpu", memory_bytes=1 << 40)


def posted(plan: Plan) -> Plan:
    return prefetch(with_communication(plan))


def free(op: int, key: str, age: int = 0) -> Free:
    return Free(Ref(key, 0, True, age, op))


def ops_of(action: Action, splits: bool) -> tuple[Op, ...]:
    """A forward keeps activations until the last part of its backward; each part has its scratch."""
    key, own = f"forward {action.chunk}", f"{action.kind} {action.chunk}"
    if action.kind == FORWARD:
        return (
            Alloc(KEPT * (action.chunk + 1), "activations"),
            Alloc(SCRATCH, "temporary"),
            kernel(1),
            free(1, key),
        )
    ends = (free(0, key),) if action.kind == WEIGHT or not splits else ()
    return (Alloc(GRADIENT, "temporary"), kernel(1), *ends, free(0, own))


def flight(plan: Plan, rank: int = 0) -> Trace:
    """Two steps as a stage is flown: up to three micro-batches, one after the other."""
    flown = min(plan.micro_batches_per_step, 3)
    order = list(rehearsal(plan, flown).actions(rank))
    splits = any(action.kind == WEIGHT for action in order)
    segments: list[tuple[Op, ...]] = [
        (Alloc(STATE, "parameters"),),
        (Alloc(UPDATE, "temporary"), kernel(1), free(0, "update")),
    ]
    phases = [Phase("initialize", 0, (Call(0, "initialize", -1),))]
    for step in (1, 2):
        for action in order:
            name = f"forward {action.chunk}" if action.kind == FORWARD else f"{action.kind} {action.chunk}"
            segments.append(ops_of(action, splits))
            phases.append(Phase(phase_name(action, flown), step, (Call(len(segments) - 1, name, -1),)))
        phases.append(Phase("update", step, (Call(1, "update", -1),)))
    return Trace({"data": 2}, 0, tuple(segments), tuple(phases))


def peak_by_hand(plan: Plan, rank: int) -> int:
    """The most bytes of activations and scratch at once."""
    now = most = 0
    for action in plan.actions(rank):
        own = KEPT * (action.chunk + 1)
        scratch = SCRATCH if action.kind == FORWARD else GRADIENT
        most = max(most, now + scratch + own * (kept(action) > 0))
        now += kept(action) * own
    assert now == 0
    return most


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    name = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "sequential"]))
    ranks = draw(st.integers(2, 5))
    fewest, most = SCHEDULES[name].chunks
    chunks = draw(st.integers(fewest, 3 if most is None else most))
    return SCHEDULES[name].plan(ranks, ranks * draw(st.integers(1, 6)), chunks)


@settings(max_examples=40, deadline=None)
@given(plans(), st.data())
def test_a_rank_holds_what_its_plan_keeps(plan: Plan, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.ranks - 1))
    read = read_flight(flight(plan, rank), plan.chunks)
    assert read.kept_bytes == tuple(KEPT * (chunk + 1) for chunk in range(plan.chunks))
    with_messages = posted(plan)
    memory = rank_memory(with_messages, rank, read, CPU, MESSAGE)
    flown = received_at_once(posted(rehearsal(plan, min(plan.micro_batches_per_step, 3))), rank)
    landing = MESSAGE * max(0, received_at_once(with_messages, rank) - flown)
    assert memory.total_bytes == STATE + landing + peak_by_hand(plan, rank)
    assert memory.left["activations"] == landing
    assert memory.state == {"parameters": STATE, "gradients": 0, "optimizer": 0}
    on_gpu = rank_memory(with_messages, rank, read, replace(CPU, kind="gpu"), MESSAGE)
    assert on_gpu.peak == memory.peak
    assert on_gpu.reserved_bytes >= on_gpu.total_bytes


@given(plans(), st.data())
def test_few_micro_batches_show_what_many_do(plan: Plan, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.ranks - 1))
    short = shortened(plan, rank)
    assert short.micro_batches <= plan.micro_batches
    assert peak_in_flight(short)[rank] == peak_in_flight(plan)[rank]
    assert peak_by_hand(short, rank) == peak_by_hand(plan, rank)


def test_a_plan_of_many_micro_batches_is_shortened() -> None:
    assert shortened(SCHEDULES["1f1b"].plan(4, 512), 1).micro_batches == 8
    assert shortened(SCHEDULES["interleaved"].plan(4, 512, 2), 1).micro_batches == 8
    assert shortened(SCHEDULES["gpipe"].plan(4, 512), 1).micro_batches == 512  # all of them are in flight


def test_the_first_of_equal_ranks_keeps_most() -> None:
    plan = posted(SCHEDULES["1f1b"].plan(6, 12))
    assert hungriest(plan, [1, 2, 3, 4], read_flight(flight(plan), 1), MESSAGE) == 1
    few = posted(SCHEDULES["1f1b"].plan(6, 3))  # of which the first two ranks keep as many
    assert hungriest(few, [0, 1, 2], read_flight(flight(few), 1), MESSAGE) == 1


@pytest.mark.parametrize(("rank", "expected"), [(0, 2), (1, 5), (3, 2)])
def test_messages_land_in_buffers_that_are_used_again(rank: int, expected: int) -> None:
    """1F1B with four ranks. On rank 1, three activations are in flight, one is coming, and a gradient is in use; rank 0
    has gradients alone, one in use and one that is coming; rank 3 activations alone."""
    assert received_at_once(posted(SCHEDULES["1f1b"].plan(4, 16)), rank) == expected


def test_the_first_request_too_many_names_the_action() -> None:
    plan = posted(SCHEDULES["1f1b"].plan(3, 9))
    read = read_flight(flight(plan), 1)
    needed = rank_memory(plan, 0, read, CPU, MESSAGE).total_bytes
    assert rank_memory(plan, 0, read, replace(CPU, memory_bytes=needed), MESSAGE).excess is None
    excess = rank_memory(plan, 0, read, replace(CPU, memory_bytes=needed - 1), MESSAGE).excess
    assert excess is not None
    assert (excess.phase, excess.micro_batch, excess.op) == ("backward first 0", 0, "kernel")
    assert excess.live_bytes["activations"] == 3 * KEPT + MESSAGE  # of which one more comes
    assert excess.live_bytes["parameters"] == STATE


def handing_over() -> StageFlight:
    """Each backward leaves a bucket behind that the next one takes back; the update takes the last."""

    def backward(takes_back: bool) -> Iterator[Op]:
        yield Alloc(50, "buffers")
        yield kernel(1)
        if takes_back:
            yield free(0, "B 0", age=1)

    plan = SCHEDULES["1f1b"].plan(2, 6)
    plain = flight(plan)
    segments, phases = list(plain.segments), []
    for phase in plain.phases:
        if phase.name.startswith("backward"):
            segment = (*backward("first" not in phase.name), free(0, "forward 0"))
            segments.append(segment)
            phase = replace(phase, calls=(Call(len(segments) - 1, "B 0", -1),))
        if phase.name == "update":
            segments.append((free(0, "B 0"),))
            phase = replace(phase, calls=(*phase.calls, Call(len(segments) - 1, "end", -1)))
        phases.append(phase)
    return read_flight(replace(plain, segments=tuple(segments), phases=tuple(phases)), 1)


def test_what_one_micro_batch_leaves_to_the_next_is_there_once_or_twice() -> None:
    plan = SCHEDULES["1f1b"].plan(2, 6)
    memory = rank_memory(posted(plan), 0, handing_over(), CPU, MESSAGE)
    assert memory.peak["buffers"] == 100  # the new one comes before the old one goes
    assert memory.left["buffers"] == 0


def test_the_oldest_micro_batch_goes_first() -> None:
    """The first micro-batch keeps 40 bytes, the others 100: when it is done, two others are in flight, then three."""
    plan = SCHEDULES["1f1b"].plan(3, 9)
    plain = flight(plan)
    segments, phases = list(plain.segments), []
    for phase in plain.phases:
        if phase.name == "forward first 0":
            segments.append((Alloc(40, "activations"), *segments[phase.calls[0].segment][1:]))
            phase = replace(phase, calls=(phase.calls[0]._replace(segment=len(segments) - 1),))
        phases.append(phase)
    trace = replace(plain, segments=tuple(segments), phases=tuple(phases))
    memory = rank_memory(posted(plan), 0, read_flight(trace, 1), CPU, MESSAGE)
    assert memory.total_bytes == STATE + MESSAGE + 3 * KEPT + GRADIENT


def test_what_a_flight_never_gives_back_is_there_once() -> None:
    plan = SCHEDULES["1f1b"].plan(3, 9)
    plain = flight(plan)
    made = len(plain.segments)
    phases = tuple(
        replace(phase, calls=(*phase.calls, Call(made, "reduction", -1)))
        if phase.name == "backward middle 0"
        else phase
        for phase in plain.phases
    )
    trace = replace(plain, segments=(*plain.segments, (Alloc(8, "buffers"),)), phases=phases)
    memory = rank_memory(posted(plan), 0, read_flight(trace, 1), CPU, MESSAGE)
    assert memory.left["buffers"] == 8 + 8  # of the first step, which is as flown, and of the second


def test_activations_that_rest_on_the_host_are_counted_there() -> None:
    plan = SCHEDULES["1f1b"].plan(3, 9)
    plain = flight(plan)
    segments = tuple(
        tuple(Alloc(op.nbytes, op.category, "host") if op == Alloc(KEPT, "activations") else op for op in segment)
        for segment in plain.segments
    )
    memory = rank_memory(posted(plan), 0, read_flight(replace(plain, segments=segments), 1), CPU, MESSAGE)
    assert memory.elsewhere == {"host": 3 * KEPT, "nvme": 0}
    assert memory.peak["activations"] == MESSAGE


def test_older_versions_of_the_parameters_are_kept() -> None:
    plan = SCHEDULES["pipedream-2bw"].plan(2, 4)
    memory = rank_memory(posted(plan), 0, read_flight(flight(plan), 1), CPU, MESSAGE)
    assert memory.peak["parameters"] == SCHEDULES["pipedream-2bw"].weight_versions * STATE
    assert memory.left["activations"] == MESSAGE
