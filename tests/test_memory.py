"""Memory against walks by hand and by brute force."""

from dataclasses import replace

import pytest
from hand_made import PROCESSOR, kernel, steps_of
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.trace import CATEGORIES, Alloc, Call, Free, Op, Phase, Ref, Trace
from windtunnel.sim.memory import MOST_REPEATS, SEGMENT_BYTES, SMALL_BYTES, Memory, replay_memory

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


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ((1,), SEGMENT_BYTES),
        ((SMALL_BYTES, SMALL_BYTES), SEGMENT_BYTES),
        ((SMALL_BYTES, SMALL_BYTES, 1), 2 * SEGMENT_BYTES),
        ((SMALL_BYTES + 1,), SEGMENT_BYTES),
        ((SMALL_BYTES + 1, 1), 2 * SEGMENT_BYTES),
        ((SEGMENT_BYTES + 1,), 2 * SEGMENT_BYTES),
    ],
)
def test_a_gpu_reserves_whole_segments(sizes: tuple[int, ...], reserved: int) -> None:
    ops = [Alloc(size, "activations") for size in sizes] + [free(number) for number in range(len(sizes))]
    assert replay_memory(steps_of(*ops), PROCESSOR).reserved_bytes == reserved
    on_cpu = replay_memory(steps_of(*ops), replace(PROCESSOR, kind="cpu"))
    assert on_cpu.reserved_bytes == on_cpu.total_bytes == sum(sizes)


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
    assert memory.reserved_bytes >= memory.total_bytes
