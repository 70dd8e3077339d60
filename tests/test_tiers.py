"""Closed-form ring times against a count of steps, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.program import Send, chunk_bounds
from windtunnel.collectives.ring import RING
from windtunnel.collectives.tiers import Tier, ring_seconds, slowest_hop

latencies = st.floats(0.0, 1e-3)
bandwidths = st.floats(1e6, 1e12)


@st.composite
def ladders(draw: st.DrawFn) -> list[Tier]:
    """One to three tiers, each joining more ranks than the one before."""
    ranks, tiers = 1, []
    for level in range(draw(st.integers(1, 3))):
        ranks *= draw(st.integers(2, 8))
        tiers.append(Tier(name=f"tier {level}", ranks=ranks, latency_s=draw(latencies), bytes_per_s=draw(bandwidths)))
    return tiers


ROUNDING = 1e-12
"""Relative: a sum of up to 1,000 equal terms against a product, in float64."""


@given(kind=st.sampled_from(list(RING)), tiers=ladders(), chunk=st.integers(0, 10**6), data=st.data())
def test_seconds_are_those_of_the_steps(kind: str, tiers: list[Tier], chunk: int, data: st.DataObject) -> None:
    """Of the tiers crossed, a step takes the worst latency, plus its message at the worst bandwidth."""
    group = data.draw(st.integers(1, tiers[-1].ranks))
    crossed = [tier for number, tier in enumerate(tiers) if number == 0 or tiers[number - 1].ranks < group]
    bounds = chunk_bounds(chunk * group, group)
    seconds = 0.0
    for step in RING[kind].program(0, group):
        nbytes = sum(bounds[op.chunk][1] - bounds[op.chunk][0] for op in step if isinstance(op, Send))
        seconds += max(t.latency_s for t in crossed) + nbytes / min(t.bytes_per_s for t in crossed)
    assert ring_seconds(kind, chunk * group, group, tiers) == pytest.approx(seconds, rel=ROUNDING, abs=0.0)


@given(tiers=ladders(), nbytes=st.floats(0, 1e12), data=st.data())
def test_an_all_reduce_costs_its_two_halves(tiers: list[Tier], nbytes: float, data: st.DataObject) -> None:
    group = data.draw(st.integers(1, tiers[-1].ranks))
    halves = [ring_seconds(kind, nbytes, group, tiers) for kind in ("reduce_scatter", "all_gather")]
    assert ring_seconds("all_reduce", nbytes, group, tiers) == pytest.approx(sum(halves), rel=ROUNDING, abs=0.0)


@given(tiers=ladders(), data=st.data())
def test_slowest_hop_takes_the_worst_of_each(tiers: list[Tier], data: st.DataObject) -> None:
    group = data.draw(st.integers(1, tiers[-1].ranks))
    hop = slowest_hop(group, tiers)
    outermost = next(number for number, tier in enumerate(tiers) if tier.ranks >= group)
    assert hop.latency_s == max(tier.latency_s for tier in tiers[: outermost + 1])
    assert hop.bytes_per_s == min(tier.bytes_per_s for tier in tiers[: outermost + 1])
    assert hop.name == tiers[outermost].name


def test_a_group_of_one_takes_no_time() -> None:
    tier = Tier(name="node", ranks=8, latency_s=1.0, bytes_per_s=1.0)
    assert ring_seconds("all_reduce", math.inf, 1, [tier]) == 0.0


def test_a_group_that_no_tier_joins() -> None:
    tier = Tier(name="node", ranks=8, latency_s=0.0, bytes_per_s=1.0)
    with pytest.raises(ValueError, match="group = 9 ranks, but the tiers join at most 8"):
        ring_seconds("all_reduce", 1.0, 9, [tier])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ranks", 0, "ranks of tier 'node' must be >= 1, got 0"),
        ("latency_s", -1e-6, "latency_s of tier 'node' must be >= 0, got -1e-06"),
        ("bytes_per_s", 0.0, "bytes_per_s of tier 'node' must be > 0, got 0.0"),
    ],
)
def test_bad_tiers(field: str, value: float, message: str) -> None:
    good = {"name": "node", "ranks": 8, "latency_s": 0.0, "bytes_per_s": 1.0}
    with pytest.raises(ValueError, match=message):
        Tier(**{**good, field: value})
