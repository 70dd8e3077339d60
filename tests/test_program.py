"""How a buffer is cut, what a program sends, and how programs look."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.program import Recv, Reduce, Send, chunk_bounds, sent_elements, show
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
