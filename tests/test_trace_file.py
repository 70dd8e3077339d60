"""Saved traces: what is written is what is read, and what is no trace is refused in one line."""

import json

import pytest
from hand_made import gather, kernel, steps_of, wait
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.trace import (
    CATEGORIES,
    FORMAT_VERSION,
    Alloc,
    Call,
    Collective,
    Free,
    Kernel,
    Phase,
    Ref,
    Synchronize,
    Trace,
    Wait,
)
from windtunnel.collectives.trace_file import dumps, loads

words = st.text(max_size=8)
sizes = st.integers(min_value=0, max_value=2**62)
refs = st.builds(Ref, words, st.integers(-200, 200), st.booleans(), st.integers(0, 9), st.integers(0, 999))
flops = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
shapes = st.lists(sizes, max_size=5).map(tuple)
ops = st.one_of(
    st.builds(Kernel, words, words, flops, sizes, sizes, words, shapes),
    st.builds(Collective, words, words, sizes, words, st.none() | words, words, st.booleans()),
    st.builds(Wait, refs),
    st.builds(Free, refs),
    st.builds(Alloc, sizes, st.sampled_from(CATEGORIES)),
    st.just(Synchronize()),
)
calls = st.builds(Call, st.integers(0, 5), words, st.integers(-1, 99))
phases = st.builds(Phase, words, st.integers(0, 2), st.lists(calls, max_size=3).map(tuple), st.integers(1, 99))
traces = st.builds(
    Trace,
    st.dictionaries(words, st.integers(1, 10**6), max_size=2),
    st.integers(0, 128),
    st.lists(st.lists(ops, max_size=4).map(tuple), max_size=3).map(tuple),
    st.lists(phases, max_size=3).map(tuple),
)


@given(traces)
def test_a_trace_comes_back_equal(trace: Trace) -> None:
    again = loads(dumps(trace))
    assert again == trace
    assert hash(again.segments) == hash(trace.segments)  # tuples all the way: a replay looks segments up


def test_another_version_is_refused_with_both_versions() -> None:
    data = json.loads(dumps(steps_of(kernel(1))))
    data["version"] = FORMAT_VERSION + 1
    with pytest.raises(ValueError, match=rf"version = {FORMAT_VERSION + 1} .* reads versions 1 to {FORMAT_VERSION}"):
        loads(json.dumps(data))


def without(field: str) -> str:
    data = json.loads(dumps(steps_of(kernel(1), gather(1), wait(1))))
    del data[field]
    return json.dumps(data)


def with_segments(segments: object) -> str:
    return json.dumps({**json.loads(dumps(steps_of(kernel(1)))), "segments": segments})


GARBAGE = {
    "nothing": "",
    "half a file": dumps(steps_of(kernel(1)))[:-20],
    "another list": "[]",
    "a number": "3",
    "null": "null",
    "another object": "{}",
    "no segments": without("segments"),
    "no phases": without("phases"),
    "no world": without("world"),
    "segments that are a number": with_segments(3),
    "an op that is a word": with_segments([["kernel"]]),
    "an op without a name": with_segments([[{"nbytes": 3}]]),
    "an unknown op": with_segments([[{"op": "Teleport"}]]),
    "an op without a field": with_segments([[{"op": "Alloc", "nbytes": 3}]]),
    "an op with a strange field": with_segments([[{"op": "Synchronize", "colour": "red"}]]),
    "a half reference": with_segments([[{"op": "Wait", "ref": ["forward", 0]}]]),
}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_no_trace(text: str) -> None:
    with pytest.raises(ValueError, match=r"^not a trace: \S[^\n]*$"):
        loads(text)
