"""A ring on tiers against a recurrence that follows every rank and step, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.tiers import RING_STEPS, Tier, crossed, ring_seconds

latencies = st.floats(0.0, 1e-3)
bandwidths = st.floats(1e6, 1e12)

ROUNDING = 1e-11
"""Relative: a sum of up to 100 terms against a product, in float64."""


@st.composite
def ladders(draw: st.DrawFn, tiers: tuple[int, int] = (1, 3)) -> list[Tier]:
    """Some tiers, each joining more ranks than the one before; groups stay below 60 ranks."""
    ranks, made = 1, []
    for level in range(draw(st.integers(*tiers))):
        ranks *= draw(st.integers(2, 4))
        made.append(Tier(name=f"tier {level}", ranks=ranks, latency_s=draw(latencies), bytes_per_s=draw(bandwidths)))
    return made


def followed(steps: int, chunk_bytes: float, group: int, tiers: list[Tier]) -> float:
    """Seconds of a ring: a rank's step ends when its own chunk has left and its left neighbour's has arrived."""

    def hop(rank: int) -> Tier:
        right = (rank + 1) % group
        return next(tier for tier in tiers if rank // tier.ranks == right // tier.ranks)

    hops = [hop(rank) for rank in range(group)]
    now = [0.0] * group
    for _ in range(steps):
        leaves = [start + chunk_bytes / tier.bytes_per_s for start, tier in zip(now, hops, strict=True)]
        now = [max(leaves[rank], leaves[rank - 1] + hops[rank - 1].latency_s) for rank in range(group)]
    return max(now)


@given(kind=st.sampled_from(list(RING_STEPS)), tiers=ladders((1, 2)), chunk=st.floats(0, 1e9), data=st.data())
def test_a_ring_takes_what_its_ranks_do_step_by_step(
    kind: str, tiers: list[Tier], chunk: float, data: st.DataObject
) -> None:
    inner = tiers[0].ranks
    blocks = data.draw(st.integers(1, tiers[-1].ranks // inner))
    group = data.draw(st.integers(1, inner)) if blocks == 1 else blocks * inner
    seconds = followed(RING_STEPS[kind] * (group - 1), chunk, group, tiers)
    assert ring_seconds(kind, chunk * group, group, tiers) == pytest.approx(seconds, rel=ROUNDING, abs=1e-300)


@given(kind=st.sampled_from(list(RING_STEPS)), tiers=ladders(), chunk=st.floats(0, 1e9), data=st.data())
def test_elsewhere_it_is_an_upper_bound(kind: str, tiers: list[Tier], chunk: float, data: st.DataObject) -> None:
    group = data.draw(st.integers(1, tiers[-1].ranks))
    seconds = followed(RING_STEPS[kind] * (group - 1), chunk, group, tiers)
    assert ring_seconds(kind, chunk * group, group, tiers) >= seconds * (1 - ROUNDING)


def test_an_all_reduce_costs_its_two_halves_on_one_tier() -> None:
    tier = [Tier(name="node", ranks=8, latency_s=2e-6, bytes_per_s=1e9)]
    halves = sum(ring_seconds(kind, 8e6, 8, tier) for kind in ("reduce_scatter", "all_gather"))
    assert ring_seconds("all_reduce", 8e6, 8, tier) == pytest.approx(halves) == pytest.approx(14 * (2e-6 + 1e-3))


def test_a_published_simulator_of_a_ring() -> None:
    # An independent simulator gives 41.2 and 101.6 us for 8 and 64 ranks at 1 MiB, and 35.01 and 39.44 ms at 1 GiB.
    tier = [Tier(name="switch", ranks=64, latency_s=5e-7, bytes_per_s=50 * 2.0**30)]
    for ranks, nbytes, seconds in (
        (8, 2**20, 41.2e-6),
        (64, 2**20, 101.6e-6),
        (8, 2**30, 35.01e-3),
        (64, 2**30, 39.44e-3),
    ):
        assert ring_seconds("all_reduce", nbytes, ranks, tier) == pytest.approx(seconds, rel=0.002)


def test_a_group_crosses_the_tiers_up_to_the_one_that_joins_it() -> None:
    tiers = [
        Tier(name=name, ranks=ranks, latency_s=0, bytes_per_s=1)
        for name, ranks in zip("abcd", (1, 4, 4, 8), strict=True)
    ]
    names = [[tier.name for tier in crossed(group, tiers)] for group in (1, 2, 4, 5, 8)]
    assert names == [[], ["b"], ["b"], ["b", "d"], ["b", "d"]]


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
        ("start_s", -1e-6, "start_s of tier 'node' must be >= 0, got -1e-06"),
        ("bytes_per_s", 0.0, "bytes_per_s of tier 'node' must be > 0, got 0.0"),
        ("local_bytes_per_s", 0.0, "local_bytes_per_s of tier 'node' must be > 0, got 0.0"),
    ],
)
def test_bad_tiers(field: str, value: float, message: str) -> None:
    good = {"name": "node", "ranks": 8, "latency_s": 0.0, "bytes_per_s": 1.0}
    with pytest.raises(ValueError, match=message):
        Tier(**{**good, field: value})
