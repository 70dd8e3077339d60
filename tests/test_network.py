"""Collectives on a network: messages played one by one against the closed form, and bytes against theirs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.ring import RING
from windtunnel.collectives.tiers import RING_STEPS, Tier, ring_seconds
from windtunnel.collectives.trace import Collective
from windtunnel.sim.network import DTYPE_BYTES, MOST_RANKS_PLAYED, collective_bytes, collective_seconds, sent_bytes
from windtunnel.sim.program import play, tier_between

KINDS = sorted(RING)

ROUNDING = 1e-9
"""Played times are sums of up to 2 n floats, each rounded to 1e-16: far below this."""


def collective(kind: str, elements: int, dtype: str = "fp32") -> Collective:
    return Collective(kind, "data", elements, dtype, None, "gradients")


def one_tier(latency_s: float = 3e-6, bytes_per_s: float = 2e9) -> tuple[Tier, ...]:
    return (Tier(name="intra_node", ranks=1024, latency_s=latency_s, bytes_per_s=bytes_per_s),)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [*range(2, 18), 64])
def test_played_messages_take_what_the_closed_form_says(kind: str, world: int) -> None:
    op = collective(kind, 1000 * world)
    events = collective_seconds(op, world, one_tier(), "events")
    assert events == pytest.approx(ring_seconds(kind, 4000 * world, world, one_tier()), rel=ROUNDING)
    # by hand: rounds of world - 1 messages of 4000 bytes, each a latency late
    rounds = 2 if kind == "all_reduce" else 1
    assert events == pytest.approx(rounds * (world - 1) * (3e-6 + 4000 / 2e9), rel=ROUNDING)
    assert collective_seconds(op, world, one_tier(), "closed_form") == pytest.approx(events, rel=ROUNDING)


@given(
    kind=st.sampled_from(KINDS),
    world=st.integers(2, 12),
    nbytes=st.integers(0, 10**9),
    latency_s=st.floats(0, 1e-3),
    bytes_per_s=st.floats(1e3, 1e12),
)
def test_they_agree_on_any_network_of_one_tier(
    kind: str, world: int, nbytes: int, latency_s: float, bytes_per_s: float
) -> None:
    tiers = one_tier(latency_s, bytes_per_s)
    played = play([RING[kind].program(rank, world) for rank in range(world)], nbytes, tiers)
    assert played == pytest.approx(ring_seconds(kind, nbytes, world, tiers), rel=ROUNDING, abs=1e-300)


@given(
    kind=st.sampled_from(KINDS),
    per_node=st.integers(1, 4),
    nodes=st.integers(2, 4),
    nbytes=st.integers(1, 10**9),
    latencies_s=st.tuples(st.floats(0, 1e-3), st.floats(0, 1e-3)),
    rates=st.tuples(st.floats(1e3, 1e12), st.floats(1e3, 1e12)),
)
def test_the_closed_form_bounds_a_ring_over_two_tiers(
    kind: str, per_node: int, nodes: int, nbytes: int, latencies_s: tuple[float, float], rates: tuple[float, float]
) -> None:
    # The closed form gives every hop the worse latency and the worse bandwidth of the tiers that the ring crosses.
    world = per_node * nodes
    tiers = [
        Tier(name=name, ranks=ranks, latency_s=latency_s, bytes_per_s=rate)
        for name, ranks, latency_s, rate in zip(("in", "out"), (per_node, world), latencies_s, rates, strict=True)
    ]
    played = play([RING[kind].program(rank, world) for rank in range(world)], nbytes, tiers)
    assert played <= ring_seconds(kind, nbytes, world, tiers) * (1 + ROUNDING)
    # and no ring is faster than its chunks through the tier between nodes, one after the other
    assert played >= RING_STEPS[kind] * nbytes / world / rates[1] * (1 - ROUNDING)


def test_a_hop_takes_the_innermost_tier_that_joins_its_ranks() -> None:
    near, far = (Tier(name=name, ranks=ranks, latency_s=0, bytes_per_s=1) for name, ranks in (("in", 4), ("out", 8)))
    assert [tier_between(source, source + 1, (near, far)).name for source in range(7)] == ["in"] * 3 + ["out"] + [
        "in"
    ] * 3
    assert tier_between(7, 0, (near, far)).name == "out"
    with pytest.raises(ValueError, match="no tier joins ranks 7 and 8: the widest joins 8 ranks"):
        tier_between(7, 8, (near, far))


@given(
    kind=st.sampled_from(KINDS),
    world=st.integers(1, 300),
    chunk=st.integers(0, 10**6),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
)
def test_a_rank_sends_its_share_of_the_padded_buffer(kind: str, world: int, chunk: int, dtype: str) -> None:
    op = collective(kind, chunk * world, dtype)
    sent = sent_bytes(op, world)
    assert sent * world == (2 if kind == "all_reduce" else 1) * (world - 1) * collective_bytes(op)


def test_one_rank_sends_nothing_and_takes_no_time() -> None:
    for fidelity in ("closed_form", "events"):
        assert collective_seconds(collective("all_reduce", 100), 1, one_tier(), fidelity) == 0.0


def test_too_many_ranks_to_play_are_refused() -> None:
    op = collective("all_gather", 4 * MOST_RANKS_PLAYED)
    wanted = rf"fidelity = 'events' .* {MOST_RANKS_PLAYED + 1} ranks; allowed: at most {MOST_RANKS_PLAYED} ranks"
    with pytest.raises(ValueError, match=wanted):
        collective_seconds(op, MOST_RANKS_PLAYED + 1, one_tier(), "events")
    assert collective_seconds(op, MOST_RANKS_PLAYED + 1, one_tier(), "closed_form") > 0
