"""Which links a message takes: on tiers, and on the fabrics that a cluster file describes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.tiers import Tier
from windtunnel.sim.hardware import Cluster, Wiring, load_cluster
from windtunnel.sim.topology import Topology, of_tiers, topology

TIERS = tuple(
    Tier(name=name, ranks=ranks, latency_s=latency_s, bytes_per_s=rate)
    for name, ranks, latency_s, rate in (("in", 4, 1e-6, 100.0), ("out", 16, 1e-5, 30.0), ("far", 64, 1e-4, 7.0))
)


def fabric(wiring: Wiring | None, *, per_node: int = 4, nics: int = 2) -> Cluster:
    """Nodes of GPUs of 100 bytes/s, and of NICs of 40 bytes/s together."""
    base = load_cluster("dgx-a100")
    assert base.inter_node is not None
    intra = replace(base.intra_node, bytes_per_s=100.0, efficiency=1.0, latency_s=1.0)
    inter = replace(base.inter_node, bytes_per_s=40.0, efficiency=1.0, latency_s=3.0, nics=nics)
    return replace(base, gpus_per_node=per_node, intra_node=intra, inter_node=inter, fabric=wiring)


def rates(network: Topology, source: int, target: int) -> list[float]:
    """Bandwidths of the links on the way."""
    return network.capacities(np.array(network.route(source, target))).tolist()


@given(st.integers(0, 63), st.integers(0, 63))
def test_a_message_takes_the_two_links_of_the_innermost_tier_that_joins_its_ranks(source: int, target: int) -> None:
    network = of_tiers(TIERS)
    tier = next(tier for tier in TIERS if source // tier.ranks == target // tier.ranks)
    assert network.latency(source, target) == tier.latency_s
    assert rates(network, source, target) == [tier.bytes_per_s] * 2


def test_links_belong_to_the_blocks_of_the_tier_below() -> None:
    network = of_tiers(TIERS)
    up, down = network.route(1, 6)
    assert network.route(3, 14) == (up, network.route(0, 12)[1])  # the node's link up, whoever sends
    assert network.route(8, 4) == (network.route(11, 5)[0], down)
    assert network.route(6, 1)[0] != down  # the other way is another link
    assert len({network.route(rank, (rank + 1) % 4)[0] for rank in range(4)}) == 4
    assert network.route(5, 60) == network.route(15, 48)


def test_ranks_that_no_tier_joins_are_refused() -> None:
    network = of_tiers(TIERS)
    assert network.route(63, 0)
    with pytest.raises(ValueError, match="no tier joins ranks 63 and 64: the widest joins 64 ranks"):
        network.route(63, 64)


WIRINGS = (
    None,
    Wiring(kind="flat"),
    Wiring(kind="leaf_spine", nodes_per_leaf=2),
    Wiring(kind="leaf_spine", nodes_per_leaf=2, oversubscription=4.0),
    Wiring(kind="rail", nodes_per_leaf=2),
    Wiring(kind="rail", nodes_per_leaf=2, oversubscription=2.0),
)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_inside_a_node_messages_go_from_port_to_port(wiring: Wiring | None) -> None:
    network = topology(fabric(wiring), 32)
    assert rates(network, 5, 6) == [100.0, 100.0]
    assert network.latency(5, 6) == 1.0
    assert network.latency(5, 9) == 3.0


def test_without_a_table_a_node_has_one_link() -> None:
    cluster = fabric(None)
    assert topology(cluster, 32) == of_tiers(cluster.tiers(32))
    assert rates(topology(cluster, 32), 0, 31) == [40.0, 40.0]


def test_gpus_share_the_nics_of_their_node_in_order() -> None:
    network = topology(fabric(Wiring(kind="flat")), 32)
    assert rates(network, 0, 31) == [20.0, 20.0]
    nics = [network.route(rank, 31)[0] for rank in range(8)]
    assert [len(set(nics[:2])), len(set(nics[2:4])), len(set(nics))] == [1, 1, 4]
    lone = topology(fabric(Wiring(kind="flat"), nics=8), 32)  # more NICs than GPUs: a GPU has two
    assert rates(lone, 0, 31) == [10.0, 10.0]
    assert len({lone.route(rank, 31)[0] for rank in range(4)}) == 4


def test_leaves_meet_in_the_spine() -> None:
    network = topology(fabric(Wiring(kind="leaf_spine", nodes_per_leaf=2, oversubscription=4.0)), 32)
    assert rates(network, 0, 7) == [20.0, 20.0]
    assert rates(network, 0, 8) == [20.0, 2 * 40 / 4, 2 * 40 / 4, 20.0]
    assert network.route(0, 8)[1] == network.route(7, 31)[1]
    assert network.route(0, 8)[2] == network.route(31, 15)[2]


def test_rails_meet_in_the_spine() -> None:
    network = topology(fabric(Wiring(kind="rail", nodes_per_leaf=2, oversubscription=2.0)), 32)
    assert rates(network, 0, 5) == [20.0, 20.0]  # the same rail of the same pod
    assert rates(network, 0, 6) == [20.0, 2 * 20 / 2, 2 * 20 / 2, 20.0]  # another rail
    assert rates(network, 0, 8) == [20.0, 20.0, 20.0, 20.0]  # another pod
    assert network.route(0, 6)[1] == network.route(5, 8)[1] != network.route(2, 8)[1]


@given(st.sampled_from(WIRINGS), st.integers(0, 31), st.integers(0, 31))
def test_a_route_takes_each_link_once(wiring: Wiring | None, source: int, target: int) -> None:
    assert max(Counter(topology(fabric(wiring), 32).route(source, target)).values()) == 1


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_network_looks_the_same_a_period_further(wiring: Wiring | None) -> None:
    network = topology(fabric(wiring), 32)
    period = network.period(32)
    assert period == (4 if wiring is None or wiring.kind == "flat" else 8)
    images: dict[int, int] = {}
    for source in range(32):
        for target in range(32):
            here, there = network.route(source, target), network.route((source + period) % 32, (target + period) % 32)
            assert rates(network, source, target) == network.capacities(np.array(there)).tolist()
            assert all(images.setdefault(link, image) == image for link, image in zip(here, there, strict=True))
    assert len(set(images.values())) == len(images)  # links change places, and none takes the place of two
    assert all(link != image for link, image in images.items())


def test_a_network_that_ends_inside_a_block_does_not_repeat() -> None:
    assert of_tiers(TIERS).period(10) == 10
    assert of_tiers(TIERS).period(3) == 1
    assert of_tiers(TIERS).period(16) == 4
    assert of_tiers(TIERS).period(48) == 16


def test_the_closed_forms_see_the_clusters_tiers() -> None:
    cluster = fabric(Wiring(kind="rail", nodes_per_leaf=2))
    assert topology(cluster, 30).tiers == cluster.tiers(30)
    with pytest.raises(ValueError, match="gpus = 9, but cluster"):
        topology(replace(cluster, nodes=2), 9)
