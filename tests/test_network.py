"""Seconds and bytes of a collective: which algorithm is priced, played or computed, and what another simulator says."""

from dataclasses import replace
from math import inf, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_topology import fabric
from windtunnel.collectives.algorithms import KINDS, algorithm, algorithms
from windtunnel.collectives.choice import choose, native
from windtunnel.collectives.costs import overhead_seconds, seconds
from windtunnel.collectives.program import sent_elements
from windtunnel.collectives.ring import RING
from windtunnel.collectives.tiers import RING_STEPS, Tier, ring_seconds
from windtunnel.collectives.trace import Collective
from windtunnel.sim.hardware import Wiring, load_cluster
from windtunnel.sim.messages import MOST_MESSAGES
from windtunnel.sim.network import DTYPE_BYTES, collective_bytes, collective_seconds, sent_bytes
from windtunnel.sim.program import play
from windtunnel.sim.topology import of_tiers, topology

RINGS = sorted(RING)

ROUNDING = 1e-9
"""Played times are sums of up to 2 n floats, each rounded to 1e-16: far below this."""


def collective(kind: str, elements: int, dtype: str = "fp32", algorithm: str | None = "ring") -> Collective:
    return Collective(kind, "data", elements, dtype, algorithm, "gradients")


def one_tier(latency_s: float = 3e-6, bytes_per_s: float = 2e9) -> tuple[Tier, ...]:
    return (Tier(name="intra_node", ranks=1024, latency_s=latency_s, bytes_per_s=bytes_per_s),)


# What takes how long #


@pytest.mark.parametrize(
    ("nbytes", "world", "published_s"),
    [
        (2**20, 8, 41.2e-6),
        (2**20, 64, 101.6e-6),
        (2**20, 512, 550.9e-6),
        (2**30, 8, 35.01e-3),
        (2**30, 64, 39.44e-3),
        (2**30, 512, 40.44e-3),
    ],
)
def test_a_ring_all_reduce_takes_what_another_simulator_says(nbytes: int, world: int, published_s: float) -> None:
    network = one_tier(latency_s=500e-9, bytes_per_s=50 * 2**30)
    played = collective_seconds(collective("all_reduce", nbytes // 4), world, network, "events")
    assert played == pytest.approx(published_s, rel=0.002)  # its figures have three or four digits
    whole = play(RING["all_reduce"], world, nbytes, of_tiers(network), fold=False)
    assert played == pytest.approx(whole, rel=ROUNDING)


@pytest.mark.parametrize("kind", RINGS)
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
    kind=st.sampled_from(RINGS),
    per_node=st.integers(1, 4),
    nodes=st.integers(2, 4),
    nbytes=st.integers(1, 10**9),
    latencies_s=st.tuples(st.floats(0, 1e-3), st.floats(0, 1e-3)),
    rates=st.tuples(st.floats(1e3, 1e12), st.floats(1e3, 1e12)),
)
def test_a_ring_over_two_tiers(
    kind: str, per_node: int, nodes: int, nbytes: int, latencies_s: tuple[float, float], rates: tuple[float, float]
) -> None:
    world = per_node * nodes
    tiers = [
        Tier(name=name, ranks=ranks, latency_s=latency_s, bytes_per_s=rate)
        for name, ranks, latency_s, rate in zip(("in", "out"), (per_node, world), latencies_s, rates, strict=True)
    ]
    played = play(RING[kind], world, nbytes, of_tiers(tiers))
    assert played == pytest.approx(ring_seconds(kind, nbytes, world, tiers), rel=ROUNDING)
    # no ring is faster than its chunks through the tier between nodes, one after the other
    assert played >= RING_STEPS[kind] * nbytes / world / rates[1] * (1 - ROUNDING)


def test_both_fidelities_count_what_a_collective_costs_besides_its_messages() -> None:
    plain = [replace(tier, start_s=0.0, local_bytes_per_s=inf) for tier in load_cluster("dgx-a100").tiers(8)]
    slower = [replace(tier, start_s=1e-3, local_bytes_per_s=1e9) for tier in plain]
    op = collective("all_reduce", 10**6)
    for fidelity in ("closed_form", "events"):
        more = collective_seconds(op, 8, slower, fidelity) - collective_seconds(op, 8, plain, fidelity)
        assert more == pytest.approx(overhead_seconds("all_reduce", 4e6, 8, slower)) == pytest.approx(1e-3 + 8e-3)


def test_contention_shows_in_events_alone() -> None:
    op = collective("all_reduce", 4000, algorithm="hierarchical/4x8")
    wirings = [None, *(Wiring(kind="leaf_spine", nodes_per_leaf=2, oversubscription=over) for over in (1.0, 2.0, 8.0))]
    networks = [topology(fabric(wiring), 32) for wiring in wirings]
    (computed,) = {collective_seconds(op, 32, network, "closed_form") for network in networks}
    fat, full, double, eightfold = (collective_seconds(op, 32, network, "events") for network in networks)
    assert fat == pytest.approx(computed, rel=ROUNDING)
    assert fat == pytest.approx(full, rel=ROUNDING)  # two NICs of two GPUs each, or one link of four GPUs
    assert full == pytest.approx(double, rel=ROUNDING)  # one node of a leaf sends up at a time: half of it is enough
    assert eightfold > 1.1 * double


@pytest.mark.parametrize("wiring", [None, Wiring(kind="leaf_spine", nodes_per_leaf=16, oversubscription=4.0)])
def test_sixteen_thousand_gpus_are_played(wiring: Wiring | None) -> None:
    network = topology(replace(load_cluster("dgx-a100"), fabric=wiring), 16_384)
    op = collective("all_reduce", 2**28, algorithm="hierarchical/8x2048")
    events = collective_seconds(op, 16_384, network, "events")
    # a ring round the nodes sends one message at a time over a leaf's link, which has four nodes' bandwidth
    assert events == pytest.approx(collective_seconds(op, 16_384, network, "closed_form"), rel=ROUNDING)


def test_more_messages_than_are_worth_playing_are_refused() -> None:
    op = collective("all_reduce", 2**20, algorithm="double_binary_tree/512")
    wanted = rf"double_binary_tree/512 .* 1024 ranks has about [0-9,]*; allowed: {MOST_MESSAGES:,}: use 'closed_form'"
    with pytest.raises(ValueError, match=wanted):
        collective_seconds(op, 1024, one_tier(), "events")
    assert collective_seconds(op, 1024, one_tier(), "closed_form") > 0


# Which algorithm #


@pytest.mark.parametrize("fidelity", ["closed_form", "events"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fastest_native_algorithm_is_taken_unless_one_is_forced(kind: str, fidelity: str) -> None:
    tiers = load_cluster("dgx-a100").tiers(32)
    for elements in (32, 32 * 2**20):
        best = choose(kind, 4 * elements, 32, tiers, native(kind, 32, tiers))
        chosen = collective_seconds(collective(kind, elements, algorithm=None), 32, tiers, fidelity)
        assert chosen == collective_seconds(collective(kind, elements, algorithm="native"), 32, tiers, fidelity)
        assert chosen == collective_seconds(collective(kind, elements, algorithm=best.name), 32, tiers, fidelity)
        sent = sent_bytes(collective(kind, elements, algorithm=None), 32, tiers)
        assert sent == sent_bytes(collective(kind, elements, algorithm=best.name), 32, tiers)
        if fidelity == "closed_form":
            assert chosen == best.seconds
        for other in algorithms(kind, 32):
            forced = collective(kind, elements, algorithm=other.name)
            if fidelity == "closed_form":
                assert collective_seconds(forced, 32, tiers, fidelity) == seconds(
                    kind, other.name, 4 * elements, 32, tiers
                )


def test_an_algorithm_that_does_not_exist_is_refused() -> None:
    for fidelity in ("closed_form", "events"):
        with pytest.raises(ValueError, match="algorithm = 'rng'"):
            collective_seconds(collective("all_reduce", 64, algorithm="rng"), 4, one_tier(), fidelity)
    with pytest.raises(ValueError, match=r"tiers? joins? .*1024"):
        collective_seconds(collective("all_reduce", 64), 1025, one_tier(), "events")


# Bytes #


@given(
    kind=st.sampled_from(RINGS),
    world=st.integers(1, 300),
    chunk=st.integers(0, 10**6),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
)
def test_a_rank_sends_its_share_of_the_padded_buffer(kind: str, world: int, chunk: int, dtype: str) -> None:
    op = collective(kind, chunk * world, dtype, algorithm=None)
    sent = sent_bytes(op, world)
    assert sent * world == (2 if kind == "all_reduce" else 1) * (world - 1) * collective_bytes(op)


@given(data=st.data(), kind=st.sampled_from(KINDS), world=st.integers(2, 24))
def test_sent_bytes_are_the_mean_over_the_programs(data: st.DataObject, kind: str, world: int) -> None:
    used = data.draw(st.sampled_from(algorithms(kind, world)))
    elements = 8 * prod(used.cut(world))
    sent = [sent_elements(program, used.bounds(elements, world)) for program in used.programs(world)]
    assert sent_bytes(collective(kind, elements, algorithm=used.name), world) == round(4 * sum(sent) / world)


def test_of_very_many_ranks_some_are_counted() -> None:
    world = 4096
    alike = collective("all_reduce", 2**20, algorithm="halving_doubling")
    assert sent_bytes(alike, world) == 2 * (world - 1) * 2**22 // world
    tree = collective("all_reduce", 2**20, algorithm="double_binary_tree/4")
    assert sent_bytes(tree, world) == pytest.approx(2 * (world - 1) / world * 2**22, rel=0.15)  # about 64 ranks


def test_one_rank_sends_nothing_and_takes_no_time() -> None:
    for fidelity in ("closed_form", "events"):
        assert collective_seconds(collective("all_reduce", 100), 1, one_tier(), fidelity) == 0.0
    assert sent_bytes(collective("all_reduce", 100), 1) == 0
    assert algorithm("all_reduce", "ring").programs(1) == [()]
