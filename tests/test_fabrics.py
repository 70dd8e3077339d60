"""Fabrics: one profile per kind of link, and what clusters make of them."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.costs import seconds
from windtunnel.sim.fabrics import Fabric, FabricProfile, FabricTable, build_fabric
from windtunnel.sim.hardware import cluster_names, fabric_names, load_cluster, load_fabric

NVLINK3 = Fabric(bytes_per_s=300e9, efficiency=0.941, latency_s=2.66e-6, start_s=33.5e-6, local_bytes_per_s=1.19e12)
HDR = Fabric(bytes_per_s=200e9, efficiency=0.96, latency_s=9.6e-6, nics=8)
PINNED = {
    "dgx-1": (
        Fabric(bytes_per_s=150e9, efficiency=0.941, latency_s=3.65e-6, start_s=24.7e-6, local_bytes_per_s=2.69e12),
        Fabric(bytes_per_s=50e9, efficiency=0.96, latency_s=9.6e-6, nics=4),
    ),
    "dgx-2": (
        Fabric(bytes_per_s=150e9, efficiency=0.8, latency_s=3.4e-6),
        Fabric(bytes_per_s=100e9, efficiency=0.96, latency_s=9.6e-6, nics=8),
    ),
    "dgx-a100": (NVLINK3, HDR),
    "dgx-a100-40gb": (NVLINK3, HDR),
    "dgx-h100": (
        Fabric(bytes_per_s=450e9, efficiency=0.815, latency_s=3.4e-6),
        Fabric(bytes_per_s=400e9, efficiency=0.94, latency_s=9.6e-6, nics=8),
    ),
    "aws-p4de": (NVLINK3, Fabric(bytes_per_s=50e9, efficiency=0.94, latency_s=66.4e-6, nics=4)),
}
"""What these clusters had when each gave its own figures: fitted ones, which profiles must not change."""

PROFILE = """
bytes_per_s = 1e10
latency_s = 1e-6
efficiency = 0.5
[sources]
bytes_per_s = "measured"
latency_s = "measured"
efficiency = "measured"
"""


@pytest.mark.parametrize("name", fabric_names())
def test_every_fabric_has_a_source_for_each_figure(name: str) -> None:
    fabric = load_fabric(name)
    assert fabric.name == name
    assert set(fabric.sources) == set(fabric.figures())
    assert all(len(source) >= 15 for source in fabric.sources.values())
    hash(fabric)


def test_the_catalogue_has_the_fabrics_of_the_field() -> None:
    nvlinks = {"nvlink2", "nvlink2-nvswitch", "nvlink3-nvswitch", "nvlink4-nvswitch", "nvlink5-nvswitch"}
    wide = {"infiniband-edr", "infiniband-hdr", "infiniband-ndr", "ethernet-25", "roce-100", "roce-200", "roce-400"}
    assert nvlinks | wide | {"pcie-3", "pcie-4", "pcie-5", "efa-1", "efa-2", "efa-3", "efa-4"} <= set(fabric_names())


@pytest.mark.parametrize("name", PINNED)
def test_profiles_keep_what_was_fitted(name: str) -> None:
    cluster = load_cluster(name)
    intra, inter = PINNED[name]
    assert cluster.intra_node == intra
    assert cluster.inter_node == inter
    pinned = replace(cluster, intra_node=intra, inter_node=inter)
    for gpus in (cluster.gpus_per_node, 4 * cluster.gpus_per_node):
        for nbytes in (1 << 20, 1 << 30):
            given_s = seconds("all_reduce", "ring", nbytes, gpus, cluster.tiers(gpus))
            assert given_s == seconds("all_reduce", "ring", nbytes, gpus, pinned.tiers(gpus))


@pytest.mark.parametrize("name", cluster_names())
def test_a_cluster_says_which_profile_a_figure_is_from(name: str) -> None:
    sources = load_cluster(name).sources
    for level in ("intra_node", "inter_node"):
        # A source tells of the count and of one link: "12 per GPU (data sheet), each: 25 GB/s (data sheet)".
        assert ", each: " in sources[f"{level}.bytes_per_s"]
        assert any(f"(fabric {fabric})" in sources[f"{level}.latency_s"] for fabric in fabric_names())


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_user_names_a_fabric_of_the_catalogue(tmp_path: Path) -> None:
    text = 'base = "dgx-a100"\n[intra_node]\nfabric = "pcie-4"\nlinks = 1\n[inter_node]\nfabric = "roce-100"\nnics = 2'
    cluster = load_cluster(write(tmp_path, text))
    pcie, roce = load_fabric("pcie-4"), load_fabric("roce-100")
    assert cluster.intra_node == Fabric(bytes_per_s=32e9, latency_s=pcie.latency_s, efficiency=pcie.efficiency)
    assert cluster.inter_node == Fabric(bytes_per_s=25e9, latency_s=roce.latency_s, efficiency=roce.efficiency, nics=2)
    assert "intra_node.start_s" not in cluster.sources  # that was NVLink's
    assert "intra_node.links" not in cluster.sources
    assert "(fabric roce-100)" in cluster.sources["inter_node.efficiency"]


def test_a_user_overrides_a_figure_of_a_fabric_and_keeps_the_nics_of_the_base(tmp_path: Path) -> None:
    text = 'base = "dgx-a100"\n[inter_node]\nfabric = "infiniband-ndr"\nefficiency = 0.5'
    cluster = load_cluster(write(tmp_path, text))
    assert cluster.inter_node == Fabric(bytes_per_s=400e9, latency_s=9.6e-6, efficiency=0.5, nics=8)
    assert cluster.sources["inter_node.efficiency"] == "given in mine.toml"
    assert cluster.sources["inter_node.nics"] == load_cluster("dgx-a100").sources["inter_node.nics"]


def test_a_user_s_fabric_lies_beside_the_cluster(tmp_path: Path) -> None:
    write(tmp_path, PROFILE, "wire.toml")
    text = 'base = "dgx-2"\n[intra_node]\nfabric = "./wire.toml"\nlinks = 3'
    assert load_cluster(write(tmp_path, text)).intra_node == Fabric(bytes_per_s=3e10, latency_s=1e-6, efficiency=0.5)


BAD = {
    '[inter_node]\nfabric = "infiniband-hrd"': r"inter_node\.fabric = 'infiniband-hrd'.*did you mean 'infiniband-hdr'",
    '[intra_node]\nfabric = "nvlink2"': r"'intra_node\.links' is missing: fabric 'nvlink2' is the profile of one",
    '[intra_node]\nfabric = "nvlink2"\nlinks = 0': r"intra_node: links must be > 0 and finite, got 0",
    '[intra_node]\nfabric = "nvlink2"\nlinks = 1\nbytes_per_s = 1e9': r"'fabric' and 'bytes_per_s' both say",
    "[intra_node]\nlinks = 6": r"'links' counts the links of a 'fabric'",
    '[inter_node]\nfabric = "efa-1"\nlinks = 4': r"inter_node has no 'links': give 'nics'",
    '[inter_node]\nfabric = "./none.toml"': r"inter_node\.fabric.*cannot read .*none\.toml",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_fabric_gives_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=BAD[text]) as error:
        load_cluster(write(tmp_path, f'base = "dgx-a100"\n{text}'))
    assert "\n" not in str(error.value)
    assert "mine.toml" in str(error.value)


def test_a_profile_without_a_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wire\.toml: 'latency_s' has no source"):
        load_fabric(write(tmp_path, PROFILE.replace('latency_s = "measured"\n', ""), "wire.toml"))


@given(links=st.integers(1, 64), rate=st.floats(1e8, 1e12), share=st.floats(0.01, 1))
def test_bandwidth_is_links_times_a_link(links: int, rate: float, share: float) -> None:
    sources = dict.fromkeys(("bytes_per_s", "latency_s", "efficiency"), "made")
    profile = FabricProfile(name="made", bytes_per_s=rate, latency_s=0.0, efficiency=share, sources=sources)
    intra = build_fabric("intra_node", FabricTable(fabric="made", links=links), None, profile)
    inter = build_fabric("inter_node", FabricTable(fabric="made", nics=links), None, profile)
    assert intra.achieved_bytes_per_s == inter.achieved_bytes_per_s == pytest.approx(links * rate * share)
    assert (intra.nics, inter.nics) == (None, links)
