"""Diagrams: what one would draw, as golden texts."""

from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.algorithms import KINDS, algorithm, algorithms
from windtunnel.collectives.diagram import draw
from windtunnel.collectives.program import Send

GOLDEN = {
    ("all_reduce", "ring", 3): """
        ring all_reduce of 3 ranks
        round  | 0           | 1           | 2           | 3
        rank 0 | c2->1 c1+<2 | c1->1 c0+<2 | c0->1 c2<-2 | c2->1 c1<-2
        rank 1 | c0->2 c2+<0 | c2->2 c1+<0 | c1->2 c0<-0 | c0->2 c2<-0
        rank 2 | c1->0 c0+<1 | c0->0 c2+<1 | c2->0 c1<-1 | c1->0 c0<-1
        """,
    ("all_reduce", "double_binary_tree/1", 6): """
        double_binary_tree/1 all_reduce of 6 ranks
        tree of c0
          3
            1
              0
              2
            5
              4
        tree of c1
          2
            0
              1
            4
              3
              5
        round  | 0                 | 1           | 2           | 3
        rank 0 | c0->1 c1+<1       | c1->2       | c1<-2       | c0<-1 c1->1
        rank 1 | c0+<0 c0+<2 c1->0 | c0->3       | c0<-3       | c0->0 c0->2 c1<-0
        rank 2 | c0->1             | c1+<0 c1+<4 | c1->0 c1->4 | c0<-1
        rank 3 | c1->4             | c0+<1 c0+<5 | c0->1 c0->5 | c1<-4
        rank 4 | c0->5 c1+<3 c1+<5 | c1->2       | c1<-2       | c0<-5 c1->3 c1->5
        rank 5 | c0+<4 c1->4       | c0->3       | c0<-3       | c0->4 c1<-4
        """,
    ("all_reduce", "halving_doubling", 5): """
        halving_doubling all_reduce of 5 ranks
        round  | 0               | 1       | 2               | 3           | 4           | 5               | 6
        rank 0 | c2-3->1 c0-1+<1 | c2-3<-1 | c2-3->2 c0-1+<2 | c1->3 c0+<3 | c0->3 c1<-3 | c0-1->2 c2-3<-2 | c0-3->1
        rank 1 | c0-1->0 c2-3+<0 | c2-3->0 |                 |             |             |                 | c0-3<-0
        rank 2 |                 |         | c0-1->0 c2-3+<0 | c3->4 c2+<4 | c2->4 c3<-4 | c2-3->0 c0-1<-0
        rank 3 | c2-3->4 c0-1+<4 |         |                 | c0->0 c1+<0 | c1->0 c0<-0 | c0-1->4 c2-3<-4
        rank 4 | c0-1->3 c2-3+<3 |         |                 | c2->2 c3+<2 | c3->2 c2<-2 | c2-3->3 c0-1<-3
        """,
    ("all_reduce", "hierarchical/2x3", 6): """
        hierarchical/2x3 all_reduce of 6 ranks
        tier 0: 0 1 | 2 3 | 4 5
        tier 1: 0 2 4 | 1 3 5
        phases: reduce_scatter in tier 0, then all_reduce in tier 1, then all_gather in tier 0
        round  | 0               | 1           | 2           | 3           | 4           | 5
        rank 0 | c3-5->1 c0-2+<1 | c2->2 c1+<4 | c1->2 c0+<4 | c0->2 c2<-4 | c2->2 c1<-4 | c0-2->1 c3-5<-1
        rank 1 | c0-2->0 c3-5+<0 | c5->3 c4+<5 | c4->3 c3+<5 | c3->3 c5<-5 | c5->3 c4<-5 | c3-5->0 c0-2<-0
        rank 2 | c3-5->3 c0-2+<3 | c0->4 c2+<0 | c2->4 c1+<0 | c1->4 c0<-0 | c0->4 c2<-0 | c0-2->3 c3-5<-3
        rank 3 | c0-2->2 c3-5+<2 | c3->5 c5+<1 | c5->5 c4+<1 | c4->5 c3<-1 | c3->5 c5<-1 | c3-5->2 c0-2<-2
        rank 4 | c3-5->5 c0-2+<5 | c1->0 c0+<2 | c0->0 c2+<2 | c2->0 c1<-2 | c1->0 c0<-2 | c0-2->5 c3-5<-5
        rank 5 | c0-2->4 c3-5+<4 | c4->1 c3+<3 | c3->1 c5+<3 | c5->1 c4<-3 | c4->1 c3<-3 | c3-5->4 c0-2<-4
        """,
    ("all_to_all", "pairwise", 3): """
        pairwise all_to_all of 3 ranks
        round  | 0           | 1           | 2
        rank 0 |             | c1->1 c1<-1 | c2->2 c2<-2
        rank 1 | c2->2 c2<-2 | c0->0 c0<-0
        rank 2 | c1->1 c1<-1 |             | c0->0 c0<-0
        """,
    ("reduce", "binomial_tree", 5): """
        binomial_tree reduce of 5 ranks
        tree
          0
            1
            2
              3
            4
        round  | 0     | 1     | 2
        rank 0 | c0+<1 | c0+<2 | c0+<4
        rank 1 | c0->0
        rank 2 | c0+<3 | c0->0
        rank 3 | c0->2
        rank 4 |       |       | c0->0
        """,
    ("broadcast", "chain/3", 4): """
        chain/3 broadcast of 4 ranks
        round  | 0     | 1           | 2           | 3           | 4
        rank 0 | c0->1 | c1->1       | c2->1
        rank 1 | c0<-0 | c0->2 c1<-0 | c1->2 c2<-0 | c2->2
        rank 2 |       | c0<-1       | c0->3 c1<-1 | c1->3 c2<-1 | c2->3
        rank 3 |       |             | c0<-2       | c1<-2       | c2<-2
        """,
}


@pytest.mark.parametrize(("kind", "name", "world"), GOLDEN)
def test_golden(kind: str, name: str, world: int) -> None:
    assert draw(algorithm(kind, name), world) == dedent(GOLDEN[kind, name, world]).strip()


@given(kind=st.sampled_from(KINDS), world=st.integers(1, 8), data=st.data())
def test_every_message_stands_once_in_the_column_of_its_receive(kind: str, world: int, data: st.DataObject) -> None:
    one = data.draw(st.sampled_from(algorithms(kind, world)))
    table = [line.split(" | ") for line in draw(one, world).splitlines()[-world:]]
    drawn = 0
    for rank, (_, *cells) in enumerate(table):
        for number, cell in enumerate(cells):
            for op in cell.split():
                if "->" in op:
                    chunks, peer = op.split("->")
                    met = [other.strip() for other in table[int(peer)][number + 1].split()]
                    assert kind == "all_to_all" or f"{chunks}<-{rank}" in met or f"{chunks}+<{rank}" in met
                    drawn += 1
    sends = [op for program in one.programs(world) for step in program for op in step if isinstance(op, Send)]
    assert drawn == len(sends)


def test_a_world_of_one_has_nothing_to_do() -> None:
    assert draw(algorithm("all_gather", "ring"), 1).splitlines()[-1] == "rank 0"
