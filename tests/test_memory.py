"""Memory against walks by hand and by brute force."""

from dataclasses import replace

import pytest
from hand_made import PROCESSOR, kernel, steps_of
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.trace import CATEGORIES, Alloc, Call, Free, Op, Phase, Ref, Trace
from windtunnel.sim.memory import Excess, Memory, memory_timeline, replay_memory
from windtunnel.sim.storages import MOST_REPEATS

STATE = ("parameters", "gradients", "optimizer")


def free(op: int, key: str = "forward", age: int = 0, block: int = 0) -> Free:
    return Free(Ref(key, block, True, age, op))


def peak_of(memory: Memory) -> dict[str, int]:
    return {name: nbytes for name, nbytes in memory.peak.items() if nbytes}


def test_the_peak_by_category_is_that_of_one_instant() -> None:
    # 10, 110, 10, 60, 65, 15: at the peak there are 100 bytes of activations, though buffers come to 50 later.
    memory = replay_memory(
        steps_of(
            Alloc(10, "gradients"),
            Alloc(100, "activations"),
            kernel(1),
            free(1),
            Alloc(50, "buffers"),
            Alloc(5, "temporary"),
            free(4),
            free(5),
            free(0),
        ),
        PROCESSOR,
    )
    assert peak_of(memory) == {"gradients": 10, "activations": 100}
    assert memory.total_bytes == 110
    assert [nbytes for _, nbytes in memory.events[:8]] == [10, 110, 10, 60, 65, 15, 10, 0]
    assert memory.events[2] == (4, 10)  # the fourth op of the program


def test_what_is_left_at_the_end_is_the_state_and_counters_are_not_in_it() -> None:
    segments = (
        (Alloc(100, "parameters"), Alloc(50, "gradients"), Alloc(200, "optimizer"), Alloc(4, "counters")),
        (Alloc(1000, "activations"), free(0)),
    )
    phases = (Phase("initialize", 0, (Call(0, "initialize", -1),)), Phase("update", 1, (Call(1, "forward", -1),)))
    memory = replay_memory(Trace({"data": 2}, 0, segments, phases), PROCESSOR)
    assert memory.state == {"parameters": 100, "gradients": 50, "optimizer": 200}
    assert peak_of(memory) == {"parameters": 100, "gradients": 50, "optimizer": 204, "activations": 1000}


def test_sizes_are_rounded_as_the_allocator_does() -> None:
    memory = replay_memory(
        steps_of(Alloc(1, "activations"), Alloc(513, "buffers"), free(0), free(1)),
        replace(PROCESSOR, allocation_bytes=512),
    )
    assert peak_of(memory) == {"activations": 512, "buffers": 1024}


MIB = 1 << 20


@pytest.mark.parametrize(
    ("sizes", "reserved", "segments"),
    [
        ((1,), 2 * MIB, 1),
        ((MIB, MIB), 2 * MIB, 1),
        ((MIB, MIB, 1), 4 * MIB, 2),
        ((MIB + 1,), 20 * MIB, 1),
        ((MIB + 1, 1), 22 * MIB, 2),
        ((20 * MIB + 1,), 22 * MIB, 1),
    ],
)
def test_a_gpu_reserves_whole_segments(sizes: tuple[int, ...], reserved: int, segments: int) -> None:
    ops = [Alloc(size, "activations") for size in sizes] + [free(number) for number in range(len(sizes))]
    gpu = replace(PROCESSOR, memory_bytes=1 << 40)
    memory = replay_memory(steps_of(*ops), gpu)
    assert (memory.reserved_bytes, memory.segments) == (reserved, segments)
    assert memory.fragmentation_bytes == reserved - sum(sizes)
    assert memory.excess is None
    on_cpu = replay_memory(steps_of(*ops), replace(gpu, kind="cpu"))
    assert on_cpu.reserved_bytes == on_cpu.total_bytes == on_cpu.allocated_bytes == sum(sizes)


def test_what_the_building_of_the_model_took_went_back() -> None:
    """100 MiB were used to build; of the 40 MiB that stay, the step takes 30 more."""
    segments = (
        (Alloc(100 * MIB, "parameters"), Alloc(40 * MIB, "parameters"), free(0, key="initialize")),
        (Alloc(30 * MIB, "activations"), free(0)),
    )
    phases = (Phase("initialize", 0, (Call(0, "initialize", -1),)), Phase("update", 1, (Call(1, "forward", -1),)))
    memory = replay_memory(Trace({"data": 2}, 0, segments, phases), replace(PROCESSOR, memory_bytes=1 << 40))
    assert memory.reserved_bytes == memory.total_bytes == 70 * MIB


def test_the_first_request_too_many() -> None:
    micro_step = (
        Alloc(30 * MIB, "activations"),
        kernel(1, "linear"),
        Alloc(20 * MIB, "temporary"),
        kernel(1, "softmax"),
        free(2),
        Alloc(40 * MIB, "activations"),
        kernel(1, "gelu"),
        free(5),
        free(0),
    )
    update = (Alloc(90 * MIB, "temporary"), kernel(1, "addcdiv"), free(0, key="update"))
    phases = (
        Phase("micro-step first", 1, (Call(0, "forward", 3),)),
        Phase("micro-step middle", 1, (Call(0, "forward", 3),), repeat=4),
        Phase("micro-step last", 1, (Call(0, "forward", 3),)),
        Phase("update", 1, (Call(1, "update", -1),)),
    )
    trace = Trace({"data": 2}, 4, (micro_step, update), phases)

    def excess(limit: int) -> Excess | None:
        return replay_memory(trace, replace(PROCESSOR, memory_bytes=limit + 5, framework_bytes=5)).excess

    # 30 and 20 are held; 40 do not fit in the 20 that come back, which go to the device for them.
    assert excess(90 * MIB) is None
    assert excess(70 * MIB - 1) == Excess(
        phase="micro-step first",
        micro_batch=0,
        block=3,
        segment="forward",
        op="gelu",
        category="activations",
        requested_bytes=40 * MIB,
        live_bytes={**dict.fromkeys(CATEGORIES, 0), "activations": 30 * MIB},
        reserved_bytes=30 * MIB,
        limit_bytes=70 * MIB - 1,
    )
    in_update = excess(90 * MIB - 1)
    assert in_update is not None
    assert (in_update.phase, in_update.micro_batch, in_update.block) == ("update", None, None)
    assert (in_update.op, in_update.reserved_bytes) == ("addcdiv", 0)
    on_cpu = replay_memory(trace, replace(PROCESSOR, kind="cpu", memory_bytes=70 * MIB - 1)).excess
    assert on_cpu is not None
    assert (on_cpu.op, on_cpu.reserved_bytes) == ("gelu", 30 * MIB)


@pytest.mark.parametrize(("name", "number"), [("first", 0), ("middle", 1), ("last", 5)])
def test_the_micro_batch_of_the_first_request_too_many(name: str, number: int) -> None:
    def micro_step(nbytes: int) -> tuple[Op, ...]:
        return Alloc(nbytes, "activations"), kernel(1), free(0)

    repeats = {"first": 1, "middle": 4, "last": 1}
    segments = tuple(micro_step(200 if name == each else 100) for each in repeats)
    phases = tuple(
        Phase(f"micro-step {each}", 1, (Call(place, "forward", -1),), repeats[each])
        for place, each in enumerate(repeats)
    )
    trace = Trace({"data": 2}, 0, segments, phases)
    excess = replay_memory(trace, replace(PROCESSOR, kind="cpu", memory_bytes=150)).excess
    assert excess is not None
    assert (excess.phase, excess.micro_batch, excess.requested_bytes) == (f"micro-step {name}", number, 200)


def test_what_training_begins_with_may_be_too_much() -> None:
    segments = ((Alloc(100, "parameters"),), (Alloc(30, "activations"), free(0)))
    phases = (Phase("initialize", 0, (Call(0, "initialize", -1),)), Phase("update", 1, (Call(1, "forward", -1),)))
    excess = replay_memory(Trace({"data": 2}, 0, segments, phases), PROCESSOR).excess  # of a segment of 2 MiB
    assert excess is not None
    assert (excess.phase, excess.requested_bytes, excess.live_bytes["parameters"]) == ("initialize", 0, 100)


def test_the_course_of_the_bytes() -> None:
    ops = (Alloc(10, "parameters"), Alloc(4, "counters"), kernel(1), Alloc(5, "activations"), free(3))
    trace = Trace({"data": 2}, 0, (ops,), (Phase("micro-step last", 1, (Call(0, "forward", -1),)),))
    course = memory_timeline(replay_memory(trace, PROCESSOR))
    assert course.ops == (1, 2, 4, 5)
    assert course.bytes_by_category["parameters"] == (10, 10, 10, 10)
    assert course.bytes_by_category["optimizer"] == (0, 4, 4, 4)
    assert course.bytes_by_category["activations"] == (0, 0, 5, 0)
    assert set(course.bytes_by_category) == set(CATEGORIES)
    assert course.marks == ((1, "micro-step last"),)


@pytest.mark.parametrize(
    "ops",
    [
        (free(0),),
        (Alloc(8, "buffers"), free(0), free(0)),
        (kernel(1), free(0)),
        (Alloc(8, "buffers"), free(0, key="backward")),
        (Alloc(8, "buffers"), free(0, age=1)),
        (Alloc(8, "buffers"), free(0, block=1)),
    ],
    ids=["nothing", "twice", "a kernel", "another segment", "an earlier run", "another block"],
)
def test_a_free_of_what_is_not_live_is_an_error(ops: tuple[Op, ...]) -> None:
    with pytest.raises(ValueError, match=r"segment 'forward' of block -1 frees Ref\(.*\), which is not live"):
        replay_memory(steps_of(*ops), PROCESSOR)


def test_a_free_reaches_an_earlier_run_of_its_own_segment() -> None:
    # Each run frees what the run before it made, so two are never live for longer than a moment.
    first, again = (Alloc(7, "activations"),), (Alloc(7, "activations"), free(0, age=1))
    phases = tuple(Phase("forward", step, (Call(min(step - 1, 1), "forward", -1),)) for step in (1, 2, 3))
    memory = replay_memory(Trace({"data": 2}, 0, (first, again), phases), PROCESSOR)
    assert [nbytes for _, nbytes in memory.events] == [7, 14, 7, 14, 7]


def test_a_phase_that_repeats_peaks_in_its_second_run() -> None:
    # Each run frees what the run before it made: 1 + 7 bytes in the first one, 7 + 7 from the second one on.
    segments = ((Alloc(1, "buffers"),), (Alloc(7, "buffers"), free(0, age=1)))
    before = Phase("before", 1, (Call(0, "forward", -1),))

    def memory(repeats: int, phases: int = 1) -> Memory:
        again = Phase("again", 1, (Call(1, "forward", -1),), repeats)
        return replay_memory(Trace({"data": 2}, 0, segments, (before, *[again] * phases)), PROCESSOR)

    assert [memory(repeats).total_bytes for repeats in (1, 2, 3, 1_000_000)] == [8, 14, 14, 14]
    assert memory(1_000_000).peak == memory(1, phases=10).peak
    assert memory(1_000_000) == memory(MOST_REPEATS)  # more are not walked


@st.composite
def programs(draw: st.DrawFn) -> list[Op]:
    """Storages that come and go in any order; some stay."""
    ops: list[Op] = []
    live: list[int] = []
    for kind in draw(st.lists(st.sampled_from(["alloc", "free", "kernel"]), max_size=30)):
        if kind == "alloc":
            live.append(len(ops))
            ops.append(Alloc(draw(st.integers(1, 5_000_000)), draw(st.sampled_from((*CATEGORIES, "counters")))))
        elif kind == "free" and live:
            ops.append(free(live.pop(draw(st.integers(0, len(live) - 1)))))
        else:
            ops.append(kernel(1))
    return ops


@given(programs(), st.sampled_from([1, 64, 512]))
def test_the_walk_agrees_with_counting_live_storages_after_each_op(ops: list[Op], rounding: int) -> None:
    trace = Trace({"data": 2}, 0, (tuple(ops),), (Phase("step", 1, (Call(0, "forward", -1),)),))
    memory = replay_memory(trace, replace(PROCESSOR, allocation_bytes=rounding))
    instants: list[dict[int, Alloc]] = [{}]
    for position, op in enumerate(ops):
        live = dict(instants[-1])
        if isinstance(op, Alloc):
            live[position] = op
        elif isinstance(op, Free):
            del live[op.ref.op]
        instants.append(live)

    def total(live: dict[int, Alloc], *names: str) -> int:
        return sum(-(-op.nbytes // rounding) * rounding for op in live.values() if not names or op.category in names)

    peak = max(instants, key=total)  # the first of equals, as the walk keeps it
    assert memory.total_bytes == total(peak)
    for name in CATEGORIES:
        assert memory.peak[name] == total(peak, name, *(["counters"] if name == "optimizer" else []))
    assert memory.state == {name: total(instants[-1], name) for name in STATE}
    assert memory.total_bytes >= sum(memory.state.values())
    assert memory.reserved_bytes >= memory.allocated_bytes >= memory.total_bytes
    course = memory_timeline(memory)
    assert [sum(column) for column in zip(*course.bytes_by_category.values(), strict=True)] == [
        total for _, total in memory.events
    ]
