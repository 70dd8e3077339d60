"""Traces as data: walking, repeating a phase, and stretching a shallow one, on a flight written by hand."""

import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.trace import (
    SHALLOWEST,
    Alloc,
    Call,
    Collective,
    Free,
    Kernel,
    Op,
    Phase,
    Ref,
    Segment,
    Synchronize,
    Trace,
    Wait,
    repeat_phase,
    stretch,
    walk,
)

Seen = tuple[str, int, str, int, int, Op]


def spelled_out(trace: Trace) -> list[Seen]:
    return [(phase.name, phase.step, call.key, call.block, at, op) for phase, call, at, op in walk(trace)]


def kernel(name: str) -> Kernel:
    return Kernel(name, "memory", 0.0, 8, 8, "fp32", (2,))


GATHER = Collective("all_gather", "data", 16, "fp32", None, "parameters")
REDUCE = Collective("reduce_scatter", "data", 16, "fp32", None, "gradients")


def forward(block: int, blocks: int) -> Segment:
    """Block b has its activation, asks for block b + 1 and waits for what block b - 1 asked for."""
    ops: list[Op] = [Alloc(64, "activations")]
    ops.append(Wait(Ref("forward", -1, True, 0, 2)) if block > 0 else Wait(Ref("input", -1, False, 0, 1)))
    if block < blocks - 1:
        ops.append(GATHER)
    ops.append(kernel("forward"))
    return tuple(ops)


def backward(block: int, blocks: int) -> Segment:
    """Block b frees its activation, starts a reduction, and waits for the one that block b + 2 started."""
    ops: list[Op] = [kernel("backward"), REDUCE, Free(Ref("forward", 0, True, 0, 0))]
    if block + 2 < blocks:
        ops.append(Wait(Ref("backward", 2, True, 0, 1)))
    return tuple(ops)


def flight(blocks: int, middle_name: str = "forward") -> Trace:
    """An imaginary model of `blocks` blocks; the root refers to the last blocks and to the first ones absolutely."""
    segments: dict[Segment, int] = {}

    def call(key: str, block: int, *ops: Op) -> Call:
        return Call(segments.setdefault(ops, len(segments)), key, block)

    def micro_step() -> tuple[Call, ...]:
        calls = [call("input", -1, Alloc(8, "activations"), GATHER)]
        for block in range(blocks):
            ops = forward(block, blocks)
            if block == 3:
                ops = (*ops[:-1], kernel(middle_name))
            calls.append(call("forward", block, *ops))
            calls.append(call("forward.after", block, kernel("after")))
        calls.append(call("forward.after", -1, kernel("loss"), Free(Ref("input", -1, True, 0, 0))))
        calls += [call("backward", block, *backward(block, blocks)) for block in reversed(range(blocks))]
        last, first = Wait(Ref("backward", 0, False, 0, 1)), Wait(Ref("backward", 1, False, 0, 1))
        calls.append(call("backward.end", -1, last, first))
        return tuple(calls)

    kept = [call("initialize", block, Alloc(16, "parameters")) for block in range(blocks)]
    update = [call("update", block, kernel("adam")) for block in range(blocks)]
    seen_at_end = call("update.end", -1, Free(Ref("initialize", blocks - 1, False, 0, 0)), Synchronize())
    phases = (
        Phase("initialize", 0, tuple(kept)),
        Phase("micro-step first", 1, micro_step()),
        Phase("micro-step middle", 1, micro_step(), repeat=2),
        Phase("micro-step last", 1, micro_step()),
        Phase("update", 1, (*update, seen_at_end)),
    )
    return Trace({"data": 4}, blocks, tuple(segments), phases)


def test_walk_spells_out_repetition() -> None:
    a, b, c = kernel("a"), kernel("b"), kernel("c")
    trace = Trace(
        {"data": 1},
        2,
        ((a, b), (c,)),
        (Phase("one", 1, (Call(0, "x", 0), Call(1, "y", -1)), repeat=2), Phase("two", 1, (Call(1, "y", 1),))),
    )
    twice = [("one", 1, "x", 0, 0, a), ("one", 1, "x", 0, 1, b), ("one", 1, "y", -1, 0, c)] * 2
    assert spelled_out(trace) == [*twice, ("two", 1, "y", 1, 0, c)]


@given(times=st.integers(0, 7), name=st.sampled_from(["micro-step middle", "update", "nothing"]))
def test_repeat_phase(times: int, name: str) -> None:
    trace = flight(8)
    counts = {phase.name: phase.repeat for phase in repeat_phase(trace, name, times).phases}
    expected = {phase.name: times if phase.name == name else phase.repeat for phase in trace.phases}
    assert counts == {phase: count for phase, count in expected.items() if count}
    once = [seen for seen in spelled_out(repeat_phase(trace, name, 1)) if seen[0] == name]
    assert [seen for seen in spelled_out(repeat_phase(trace, name, times)) if seen[0] == name] == once * times


@given(flown=st.integers(SHALLOWEST, 12), more=st.integers(0, 30))
def test_a_stretched_flight_is_the_deep_one(flown: int, more: int) -> None:
    stretched, deep = stretch(flight(flown), flown + more), flight(flown + more)
    assert stretched.blocks == deep.blocks
    assert spelled_out(stretched) == spelled_out(deep)


def test_stretching_adds_no_segment() -> None:
    """A deep trace is as small as a shallow one."""
    assert len(stretch(flight(8), 96).segments) == len(flight(8).segments)


def test_middle_blocks_that_differ() -> None:
    odd = flight(8, middle_name="something else")
    assert stretch(odd, 8) is odd
    with pytest.raises(
        ValueError, match="blocks 3 and 2 of the flight differ in 'forward': fly the model at full depth"
    ):
        stretch(odd, 9)


def test_middle_blocks_of_different_length() -> None:
    trace = flight(8)
    middle = Call(0, "extra", 3)
    phases = []
    for phase in trace.phases:
        after = next((n for n, call in enumerate(phase.calls) if call[1:] == ("forward.after", 3)), None)
        calls = phase.calls if after is None else (*phase.calls[: after + 1], middle, *phase.calls[after + 1 :])
        phases.append(replace(phase, calls=calls))
    with pytest.raises(ValueError, match="differ in 'their number of segments'"):
        stretch(replace(trace, phases=tuple(phases)), 9)


@pytest.mark.parametrize(("flown", "wanted"), [(SHALLOWEST - 1, 20), (12, 11)])
def test_what_cannot_be_stretched(flown: int, wanted: int) -> None:
    with pytest.raises(ValueError, match=f"a flight of at least {SHALLOWEST} blocks to more, got {flown} to {wanted}"):
        stretch(flight(flown), wanted)


@given(here=st.integers(0, 99), block=st.integers(-2, 2))
def test_a_reference_seen_from_a_block(here: int, block: int) -> None:
    assert Ref("forward", block, True, 0, 0).block_from(here) == here + block
    assert Ref("forward", block, False, 0, 0).block_from(here) == block


def test_pickle_round_trip() -> None:
    trace = flight(9)
    assert pickle.loads(pickle.dumps(trace)) == trace
