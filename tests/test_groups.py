"""Groups of a mesh: that they partition the ranks, and what their collectives cost on the links that they share."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.algorithms import algorithm
from windtunnel.collectives.costs import seconds
from windtunnel.collectives.groups import Mesh, Placement, tiers_along
from windtunnel.collectives.ring import RING
from windtunnel.collectives.tiers import Tier
from windtunnel.collectives.trace import Collective
from windtunnel.sim.groups import play_groups
from windtunnel.sim.hardware import Wiring, load_cluster
from windtunnel.sim.network import collective_seconds, sent_bytes
from windtunnel.sim.topology import of_tiers, topology

ROUNDING = 1e-9
"""Played times are sums of floats, each rounded to 1e-16."""

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
MESHES = SIZES.map(lambda sizes: Mesh(tuple((f"axis {number}", size) for number, size in enumerate(sizes))))


# Who is with whom #


@given(mesh=MESHES, data=st.data())
def test_any_axes_partition_the_ranks(mesh: Mesh, data: st.DataObject) -> None:
    names = [name for name, _ in mesh.axes]
    joined = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    groups = mesh.groups("*".join(joined))
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))  # disjoint and complete
    assert {len(group) for group in groups} == {prod(mesh.sizes[name] for name in joined)}
    for group in groups:
        assert list(group) == sorted(group)
        others = [{n: place for n, place in mesh.position(rank).items() if n not in joined} for rank in group]
        assert all(each == others[0] for each in others)


@given(mesh=MESHES, data=st.data())
def test_neighbouring_axes_have_a_stride(mesh: Mesh, data: st.DataObject) -> None:
    names = [name for name, _ in mesh.axes]
    first = data.draw(st.integers(0, len(names) - 1))
    axis = "*".join(names[first : data.draw(st.integers(first + 1, len(names)))])
    placement = mesh.placement(axis)
    assert placement.world == mesh.world
    for group in mesh.groups(axis):
        for rank in group:
            assert placement.group(rank) == group


@given(mesh=MESHES)
def test_positions_number_the_ranks_innermost_first(mesh: Mesh) -> None:
    for rank in range(mesh.world):
        place, stride = 0, 1
        for name, size in mesh.axes:
            place, stride = place + mesh.position(rank)[name] * stride, stride * size
        assert place == rank


def test_shards_are_neighbours_and_replicas_are_apart() -> None:
    mesh = Mesh.of({"shard": 2, "replica": 4})
    assert mesh.groups("shard") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.groups("replica") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert mesh.groups("shard*replica") == (tuple(range(8)),)
    assert mesh.placement("replica") == Placement(size=4, stride=2, world=8)


@pytest.mark.parametrize(
    ("axes", "words"),
    [({}, r"axes = \[\]"), ({"a*b": 2}, r"without '\*'"), ({"": 2}, "different names"), ({"a": 0}, "'a' has size 0")],
)
def test_a_mesh_needs_axes_with_names_and_sizes(axes: Mapping[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mesh.of(axes)


def test_unknown_and_parted_axes_are_refused() -> None:
    mesh = Mesh.of({"tensor": 2, "data": 2, "pipeline": 2})
    with pytest.raises(ValueError, match=r"axis 'dta'; the mesh has tensor, data, pipeline"):
        mesh.groups("dta")
    assert len(mesh.groups("tensor*pipeline")) == 2
    with pytest.raises(ValueError, match="joins axes that are not neighbours"):
        mesh.placement("tensor*pipeline")


# What it costs #


NODE = Tier(name="intra_node", ranks=8, latency_s=1e-6, bytes_per_s=100e9)
NODES = Tier(name="inter_node", ranks=64, latency_s=5e-6, bytes_per_s=20e9)


def collective(kind: str, nbytes: int, name: str | None = "ring") -> Collective:
    return Collective(kind, "replica", nbytes // 4, "fp32", name, "gradients")


def test_replicas_of_a_node_share_its_links() -> None:
    """By hand: eight rings of eight ranks, one rank of each ring in every node. Each gets an eighth of the node."""
    placement, nbytes = Placement(size=8, stride=8, world=64), 8 << 20
    by_hand = 2 * 7 * (5e-6 + (1 << 20) / (20e9 / 8))
    for fidelity in ("closed_form", "events"):
        taken = collective_seconds(collective("all_reduce", nbytes), placement, [NODE, NODES], fidelity)
        assert taken == pytest.approx(by_hand, rel=ROUNDING)


def test_shard_groups_keep_inside_their_node() -> None:
    placement, nbytes = Placement(size=4, stride=1, world=64), 4 << 20
    for fidelity in ("closed_form", "events"):
        taken = collective_seconds(collective("all_gather", nbytes), placement, [NODE, NODES], fidelity)
        assert taken == pytest.approx(3 * (1e-6 + (1 << 20) / 100e9), rel=ROUNDING)


POWERS = st.sampled_from([1, 2, 4, 8])


@given(
    inside=POWERS,
    size=st.sampled_from([2, 4, 8]),
    outside=POWERS,
    kind=st.sampled_from(sorted(RING)),
    name=st.sampled_from(["ring", "halving_doubling"]),
    nbytes=st.sampled_from([4096, 1 << 20, 1 << 26]),
    node=st.sampled_from([1, 2, 4, 8]),
)
def test_played_groups_take_what_the_closed_form_says(
    inside: int, size: int, outside: int, kind: str, name: str, nbytes: int, node: int
) -> None:
    """An axis with others inside and outside of it, on nodes that nest with its groups: an exact closed form."""
    placement = Placement(size=size, stride=inside, world=inside * size * outside)
    tiers = (replace(NODE, ranks=node), replace(NODES, ranks=max(node, placement.world)))
    op = collective(kind, nbytes, name)
    events = collective_seconds(op, placement, tiers, "events")
    assert events == pytest.approx(collective_seconds(op, placement, tiers, "closed_form"), rel=ROUNDING)
    sizes = {sent_bytes(op, placement, tiers), sent_bytes(op, size)}
    assert len(sizes) == 1  # where ranks are does not change how much they send


@given(inside=POWERS, size=st.sampled_from([2, 4]), outside=POWERS, nics=st.sampled_from([1, 2, 4, 8]))
def test_one_block_of_groups_stands_for_all(inside: int, size: int, outside: int, nics: int) -> None:
    """Played with every rank as a program of its own, on nodes whose NICs are links of their own."""
    base = load_cluster("dgx-a100")
    assert base.inter_node is not None
    cluster = replace(base, nodes=None, fabric=Wiring(kind="flat"), inter_node=replace(base.inter_node, nics=nics))
    placement = Placement(size=size, stride=inside, world=inside * size * outside)
    network = topology(cluster, placement.world)
    folded, whole = (play_groups(RING["all_reduce"], placement, 1 << 20, network, fold=fold) for fold in (True, False))
    assert folded == pytest.approx(whole, rel=ROUNDING)


def test_an_axis_over_all_ranks_is_a_plain_group() -> None:
    tiers = (NODE, NODES)
    assert tiers_along(Placement(size=64, stride=1, world=64), tiers) == tiers
    for fidelity in ("closed_form", "events"):
        whole = collective_seconds(collective("all_reduce", 1 << 20), 64, tiers, fidelity)
        assert collective_seconds(collective("all_reduce", 1 << 20), Placement(64, 1, 64), tiers, fidelity) == whole


def test_an_algorithm_is_chosen_on_what_the_group_sees() -> None:
    """Between nodes a small all-reduce is a matter of latency; inside of one of two ranks it is not."""
    op = collective("all_reduce", 1 << 12, None)
    placement = Placement(size=8, stride=8, world=64)
    seen = tiers_along(placement, (NODE, NODES))
    chosen = collective_seconds(op, placement, (NODE, NODES), "closed_form")
    assert chosen == min(
        seconds("all_reduce", name, 1 << 12, 8, seen)
        for name in ("ring", *(f"double_binary_tree/{1 << power}" for power in range(7)))
    )


@pytest.mark.parametrize(("size", "stride", "part"), [(6, 1, 6), (2, 6, 6), (2, 3, 3), (4, 3, 3)])
def test_groups_that_straddle_nodes_are_refused(size: int, stride: int, part: int) -> None:
    placement = Placement(size=size, stride=stride, world=24)
    with pytest.raises(ValueError, match=rf"groups of {part} consecutive ranks straddle 'intra_node' blocks of 8"):
        collective_seconds(collective("all_reduce", 1 << 20), placement, (NODE, NODES), "closed_form")


def test_too_many_messages_are_refused() -> None:
    placement = Placement(size=4096, stride=2, world=8192)
    with pytest.raises(ValueError, match="fidelity = 'events' plays every message"):
        play_groups(algorithm("all_reduce", "ring"), placement, 1 << 20, of_tiers((replace(NODES, ranks=8192),)))
