"""How a buffer is cut, what a program sends, and how programs look."""

import gc
from itertools import pairwise
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.program import Recv, Reduce, Send, between, chunk_bounds, post, sent_elements, show, span
from windtunnel.collectives.ring import RING


@given(elements=st.integers(0, 10_000), parts=st.integers(1, 100))
def test_chunks_partition_the_buffer_evenly(elements: int, parts: int) -> None:
    bounds = chunk_bounds(elements, parts)
    assert len(bounds) == parts
    assert bounds[0][0] == 0
    assert bounds[-1][1] == elements
    assert all(before[1] == after[0] for before, after in pairwise(bounds))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(elements=st.integers(0, 2000), parts=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_a_nested_cut_cuts_every_part_of_the_outer_one(elements: int, parts: list[int]) -> None:
    outer, inner = chunk_bounds(elements, *parts[:-1]), chunk_bounds(elements, *parts)
    last = parts[-1]
    assert len(inner) == prod(parts)
    for number, (start, stop) in enumerate(outer):
        pieces = inner[number * last : (number + 1) * last]
        assert pieces == tuple((start + a, start + b) for a, b in chunk_bounds(stop - start, last))


@given(start=st.integers(0, 5), count=st.integers(1, 5))
def test_a_run_spans_its_chunks(start: int, count: int) -> None:
    bounds = chunk_bounds(101, 10)
    (op,) = post(Recv, 3, between(start, start + count))
    assert op == Recv(3, start, count)
    assert span(bounds, op) == (bounds[start][0], bounds[start + count - 1][1])


def test_a_runs_name() -> None:
    assert [str(op) for op in post(Send, 1, ((3, 1), (4, 2)))] == ["c3->1", "c4-5->1"]
    assert str(Reduce(0, 2, 3)) == "c2-4+<0"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.data())
def test_sent_elements_counts_sends_only(sizes: list[int], data: st.DataObject) -> None:
    starts = [sum(sizes[:position]) for position in range(len(sizes) + 1)]
    bounds = tuple(pairwise(starts))
    chunk = st.integers(0, len(sizes) - 1)
    op = st.builds(Send, st.just(1), chunk) | st.builds(Recv, st.just(1), chunk) | st.builds(Reduce, st.just(1), chunk)
    program = data.draw(st.lists(st.lists(op, max_size=4).map(tuple), max_size=5).map(tuple))
    sent = 0
    for step in program:
        for op in step:
            if type(op) is Send:
                sent += sizes[op.chunk]
    assert sent_elements(program, bounds) == sent


def test_diagram() -> None:
    assert show(RING["all_reduce"].programs(3)) == "\n".join(
        (
            "rank 0: c2->1 c1+<2 | c1->1 c0+<2 | c0->1 c2<-2 | c2->1 c1<-2",
            "rank 1: c0->2 c2+<0 | c2->2 c1+<0 | c1->2 c0<-0 | c0->2 c2<-0",
            "rank 2: c1->0 c0+<1 | c0->0 c2+<1 | c2->0 c1<-1 | c1->0 c0<-1",
        )
    )


def test_diagram_of_a_group_of_one_is_empty() -> None:
    assert show(RING["all_gather"].programs(1)) == "rank 0:"


@pytest.mark.parametrize("op", [Send(1, 2), Recv(1, 2), Reduce(1, 2)])
def test_ops_are_values(op: Send | Recv | Reduce) -> None:
    assert op == type(op)(1, 2)
    assert len({op, type(op)(1, 2), type(op)(2, 1)}) == 2


@pytest.mark.parametrize("collecting", [True, False])
def test_all_programs_leave_the_collector_as_it_was(collecting: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        RING["all_reduce"].programs(4)
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if was else gc.disable)()
