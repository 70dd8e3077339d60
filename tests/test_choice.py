"""The choice of an algorithm: never dearer than any other, and crossover points where two prices meet."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.collectives.algorithms import KINDS, algorithm
from windtunnel.collectives.choice import (
    CROSSOVER_SHARE,
    LARGEST_BYTES,
    Selection,
    candidates,
    choose,
    crossovers,
    native,
    select,
    size_name,
    tier_grid,
)
from windtunnel.collectives.costs import seconds
from windtunnel.collectives.tiers import Tier

NODE = Tier(name="intra_node", ranks=8, latency_s=2e-6, bytes_per_s=3e11)
NODES = Tier(name="inter_node", ranks=4096, latency_s=1e-5, bytes_per_s=5e10)

networks = st.tuples(st.floats(1e-7, 1e-3), st.floats(1e6, 1e12), st.floats(1e-7, 1e-3), st.floats(1e6, 1e12)).map(
    lambda drawn: (
        Tier(name="in", ranks=4, latency_s=drawn[0], bytes_per_s=drawn[1]),
        Tier(name="out", ranks=64, latency_s=drawn[2], bytes_per_s=drawn[3]),
    )
)


@settings(max_examples=40)
@given(kind=st.sampled_from(KINDS), nbytes=st.integers(0, 1 << 34), group=st.integers(1, 64), tiers=networks)
def test_nothing_allowed_is_cheaper(kind: str, nbytes: int, group: int, tiers: tuple[Tier, ...]) -> None:
    choice = choose(kind, nbytes, group, tiers)
    assert choice.seconds == seconds(kind, choice.name, nbytes, group, tiers)
    for name in candidates(kind, group, tiers):
        assert choice.seconds <= seconds(kind, name, nbytes, group, tiers) * (1 + 1e-8)  # equals differ by rounding


@given(kind=st.sampled_from(KINDS), group=st.integers(2, 64), tiers=networks)
@settings(max_examples=40)
def test_candidates_exist_and_fit(kind: str, group: int, tiers: tuple[Tier, ...]) -> None:
    for name in candidates(kind, group, tiers):
        assert len(algorithm(kind, name).program(0, group)) > 0
    assert set(native(kind, group, tiers)) <= set(candidates(kind, group, tiers))
    assert native(kind, group, tiers)


def test_equals_go_to_the_simpler() -> None:
    # Of two ranks every all-reduce in two steps costs the same; the ring is named first.
    names = ("ring", "bidirectional_ring", "halving_doubling")
    assert len({seconds("all_reduce", name, 4e6, 2, [NODE]) for name in names}) == 1
    assert choose("all_reduce", 4e6, 2, [NODE], names).name == "ring"
    assert choose("all_reduce", 4e6, 2, [NODE], names[::-1]).name == "halving_doubling"


def test_latency_decides_at_first_and_bandwidth_at_last() -> None:
    assert choose("all_reduce", 8, 64, [NODE, NODES]).name == "recursive_doubling"
    assert choose("all_reduce", 1 << 34, 64, [NODE, NODES], ("ring", "recursive_doubling")).name == "ring"
    assert choose("broadcast", 8, 8, [NODE]).name == "binomial_tree"
    assert choose("broadcast", 1 << 34, 8, [NODE], ("binomial_tree", "chain/64")).name == "chain/64"


@pytest.mark.parametrize(("group", "grid"), [(8, ""), (5, ""), (20, ""), (16, "8x2"), (4096, "8x512")])
def test_grids_follow_the_tiers(group: int, grid: str) -> None:
    assert tier_grid(group, [NODE, NODES]) == grid
    named = [name for name in candidates("all_reduce", group, [NODE, NODES]) if name.startswith("hierarchical")]
    assert bool(named) == bool(grid)
    three = [NODE, Tier(name="pod", ranks=64, latency_s=0, bytes_per_s=1), NODES]
    assert tier_grid(4096, three) == "8x8x64"


def test_all_messages_at_once_are_for_few_ranks() -> None:
    assert "direct" in candidates("all_gather", 8, [NODE])
    assert "direct" in candidates("all_reduce", 2, [NODE])
    assert "direct" not in candidates("all_reduce", 3, [NODE])  # ranks would differ in the last bits
    assert "direct" not in candidates("all_gather", 16, [NODE, NODES])
    assert candidates("all_to_all", 20, [NODE, NODES]) == ("direct", "pairwise")


@settings(max_examples=25)
@given(tiers=networks, group=st.sampled_from([2, 4, 7, 16, 64]), kind=st.sampled_from(KINDS))
def test_crossovers_are_where_the_choice_changes(tiers: tuple[Tier, ...], group: int, kind: str) -> None:
    names = [name for name in candidates(kind, group, tiers) if name.count("/") < 2]
    rows = crossovers(kind, group, tiers, names)
    assert rows[0][0] == 0
    for start, name in rows:
        assert choose(kind, start, group, tiers, names).name == name
    for (_, before), (start, name) in pairwise(rows):
        assert before != name
        # At some size close below `start` the one before was the best, and prices grow at most in proportion to size.
        last, least = start - 1, start - max(1, CROSSOVER_SHARE * start)
        price = seconds(kind, before, last, group, tiers)
        assert price <= choose(kind, last, group, tiers, names).seconds * (last / least if last else 1) * (1 + 1e-8)
    selection = select(group, tiers, [kind], {kind: names})
    for power in range(LARGEST_BYTES.bit_length()):
        assert selection.name(kind, 1 << power) == choose(kind, 1 << power, group, tiers, names).name


def test_a_crossover_by_hand() -> None:
    # direct: 1 latency, 7 n / b; halving_doubling: 6 latencies, 2 * 7/8 n / b: they meet at n = 5 a b / 5.25
    meet = 5 * NODE.latency_s * NODE.bytes_per_s / 5.25
    (_, first), (start, second) = crossovers("all_reduce", 8, [NODE], ("halving_doubling", "direct"))
    assert (first, second) == ("direct", "halving_doubling")
    assert start == pytest.approx(meet, rel=CROSSOVER_SHARE)


def test_a_selection_is_looked_up_by_size() -> None:
    selection = Selection({"all_reduce": ((0, "native"), (4096, "recursive_doubling"), (1 << 20, "ring"))})
    looked_up = [selection.name("all_reduce", nbytes) for nbytes in (0, 4095, 4096, (1 << 20) - 1, 1 << 20, 1 << 40)]
    assert looked_up == ["native", "native", "recursive_doubling", "recursive_doubling", "ring", "ring"]
    assert str(selection) == "all_reduce: native, from 4 KiB recursive_doubling, from 1 MiB ring"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of 'all_reduce' must ascend from 0 bytes, got \[0, 5, 5\]"):
        Selection({"all_reduce": ((0, "a"), (5, "b"), (5, "c"))})
    with pytest.raises(ValueError, match=r"must ascend from 0 bytes, got \[1\]"):
        Selection({"all_reduce": ((1, "a"),)})
    with pytest.raises(ValueError, match="kind = 'reduce': an algorithm was selected for all_reduce only"):
        Selection({"all_reduce": ((0, "a"),)}).name("reduce", 5)
    with pytest.raises(ValueError, match="kind = 'gossip' is no collective; allowed: all_reduce, "):
        candidates("gossip", 4, [NODE])
    with pytest.raises(ValueError, match="leaves no algorithm for all_reduce"):
        choose("all_reduce", 1.0, 4, [NODE], ())


def test_sizes_have_names() -> None:
    assert [size_name(n) for n in (0, 17, 1 << 10, 3 << 19, 5 << 30)] == ["0 B", "17 B", "1 KiB", "1.5 MiB", "5 GiB"]
