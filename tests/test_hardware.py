"""The hardware catalogue, and what users write instead of it."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from windtunnel.collectives.costs import seconds
from windtunnel.sim.hardware import (
    CATALOGUE,
    FIGURES,
    Cluster,
    Fabric,
    Wiring,
    cluster_names,
    load_cluster,
    load_processor,
    processor_names,
)
from windtunnel.sim.host import Host
from windtunnel.sim.processor import MEASURED

CPU = """
kind = "cpu"
memory_bytes = 8_000_000_000
memory_bytes_per_s = 2e10
memory_efficiency = 1.0
matmul_efficiency = 1.0
attention_efficiency = 1.0
multiprocessors = 1
tile = [1, 1]
launch_s = 0
kernel_floor_s = 1e-6
framework_bytes = 0
allocation_bytes = 64
asynchronous = false
compute_rate_under_communication = 0.5
communication_rate_under_compute = 0.5
peak_flops = { fp32 = 1e11 }
matmul_efficiencies = { fp32 = 0.9 }
matmul_start_s = 1e-6
attention_backward_efficiency = 0.5
cache_bytes = 1_000_000
cache_bytes_per_s = 1e11
matmul_points = [{ dtype = "fp32", batch = 1, m = 64, n = 64, k = 64, flops_per_s = 5e10 }]
kernel_curves = [{ name = "default", dtype = "fp32", points = [[1000, 1e-6], [1e6, 1e-4]] }]
"""
SOURCES = "[sources]\n" + "\n".join(f'{name} = "measured"' for name in FIGURES)
FULL = """
gpu = "h100-pcie"
gpus_per_node = 4
intra_node = { bytes_per_s = 2.4e10, latency_s = 5e-6 }
inter_node = { bytes_per_s = 5e10, latency_s = 1e-5, nics = 1 }
"""


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", processor_names())
def test_every_processor_loads_with_a_source_for_each_figure(name: str) -> None:
    processor = load_processor(name)
    assert processor.name == name
    assert processor.asynchronous == (processor.kind == "gpu")
    unmeasured = {name for name, nothing in MEASURED.items() if getattr(processor, name) == nothing}
    assert set(processor.sources) == set(FIGURES) - unmeasured
    assert all(len(source) >= 20 for source in processor.sources.values())
    hash(processor)


@pytest.mark.parametrize("name", cluster_names())
def test_every_cluster_loads_with_a_source_for_each_figure(name: str) -> None:
    cluster = load_cluster(name)
    tables = {f"{table}.{key}" for table in ("intra_node", "inter_node") for key in vars_of(Fabric)}
    optional = {f"{table}.{key}" for table in ("intra_node", "inter_node") for key in ("start_s", "local_bytes_per_s")}
    required = tables - optional - {"intra_node.nics"} | {"gpus_per_node"} | {f"host.{key}" for key in vars_of(Host)}
    assert required <= set(cluster.sources) <= required | optional | {"price"}
    assert (cluster.price is not None) == ("price" in cluster.sources)
    assert all(len(source) >= 15 for source in cluster.sources.values()), cluster.sources
    assert cluster.nodes is None
    cluster.check_gpus(10**6)


def vars_of(kind: type) -> tuple[str, ...]:
    return tuple(kind.__dataclass_fields__)


def test_the_catalogue_has_what_the_contract_names() -> None:
    gpus = "v100-16gb v100-32gb a100-40gb a100-80gb a100-pcie-40gb a100-pcie-80gb h100-sxm h100-pcie h200 b200"
    gpus += " mi250x mi300x"
    assert set(gpus.split()) <= set(processor_names())
    dgx = "dgx-1 dgx-2 dgx-a100 dgx-a100-40gb dgx-h100 dgx-h200 dgx-b200"
    aws = "aws-p3 aws-p3dn aws-p4d aws-p4de aws-p5 aws-p5e aws-p5en aws-p6-b200"
    assert set(f"{dgx} {aws}".split()) <= set(cluster_names())
    assert sum(name.startswith("azure-nd") for name in cluster_names()) == 6
    assert sum(name.startswith("gcp-a") for name in cluster_names()) == 6
    assert load_cluster("dgx-a100").processor == load_processor("a100-80gb")
    assert load_cluster("dgx-a100-40gb").processor == load_processor("a100-40gb")
    assert load_cluster("dgx-1").processor == load_processor("v100-16gb")


@pytest.mark.parametrize(
    ("name", "dtype", "tflops", "gigabytes", "terabytes_per_s"),
    [
        ("v100-16gb", "fp16", 125, 16, 0.9),
        ("v100-32gb", "fp16", 125, 32, 0.9),
        ("a100-40gb", "bf16", 312, 40, 1.555),
        ("a100-80gb", "fp16", 312, 80, 2.039),
        ("h100-sxm", "bf16", 989, 80, 3.35),
        ("h100-pcie", "bf16", 756, 80, 2.0),
        ("h200", "fp8", 1979, 141, 4.8),
        ("b200", "bf16", 2250, 180, 7.7),
        ("a100-pcie-40gb", "bf16", 312, 40, 1.555),
        ("a100-pcie-80gb", "bf16", 312, 80, 1.935),
        ("mi250x", "bf16", 191.5, 64, 1.638),
        ("mi300x", "bf16", 1307.4, 192, 5.3),
    ],
)
def test_known_numbers(name: str, dtype: str, tflops: float, gigabytes: float, terabytes_per_s: float) -> None:
    gpu = load_processor(name)
    assert gpu.peak_flops[dtype] == pytest.approx(tflops * 1e12, rel=0.001)
    assert gpu.memory_bytes == pytest.approx(gigabytes * 1e9, rel=0.08)  # printed in GB or in GiB, by generation
    assert gpu.memory_bytes_per_s == pytest.approx(terabytes_per_s * 1e12, rel=0.005)
    assert ("bf16" in gpu.peak_flops) == (not name.startswith("v100"))


def test_tiers_of_whole_nodes() -> None:
    intra, inter = load_cluster("dgx-a100").tiers(20)
    assert (intra.name, intra.ranks, inter.name, inter.ranks) == ("intra_node", 8, "inter_node", 24)
    assert intra.bytes_per_s == pytest.approx(300e9 * 0.941)
    assert inter.bytes_per_s == pytest.approx(200e9 * 0.96)
    assert intra.latency_s < inter.latency_s


def test_tiers_know_what_a_whole_collective_costs(tmp_path: Path) -> None:
    intra, inter = load_cluster(write(tmp_path, FULL)).tiers(8)
    assert (intra.start_s, intra.local_bytes_per_s) == (0.0, math.inf)
    text = FULL.replace("latency_s = 5e-6", "latency_s = 5e-6, start_s = 2e-5, local_bytes_per_s = 1e12")
    cluster = load_cluster(write(tmp_path, text))
    assert cluster.tiers(8)[0] == replace(intra, start_s=2e-5, local_bytes_per_s=1e12)
    assert cluster.tiers(8)[1] == inter
    assert cluster.sources["intra_node.start_s"] == "given in mine.toml"


def test_a_user_says_how_nodes_are_wired(tmp_path: Path) -> None:
    assert load_cluster("dgx-a100").fabric is None
    text = 'base = "dgx-a100"\n[fabric]\nkind = "rail"\nnodes_per_leaf = 32\noversubscription = 2.0'
    cluster = load_cluster(write(tmp_path, text))
    assert cluster.fabric == Wiring(kind="rail", nodes_per_leaf=32, oversubscription=2.0)
    assert cluster.sources["fabric"] == "given in mine.toml"
    assert cluster.tiers(64) == load_cluster("dgx-a100").tiers(64)
    assert load_cluster(write(tmp_path, FULL + 'fabric = { kind = "flat" }')).fabric == Wiring(kind="flat")
    with pytest.raises(ValueError, match=r"'fabric' wires nodes, but 'inter_node' is missing"):
        replace(cluster, inter_node=None, nodes=1)


def test_a_large_ring_runs_at_the_measured_bus_bandwidth() -> None:
    # nccl_curves nccl-0016: 1 GiB over the 8 GPUs of a node in 8,203.9 us.
    priced = seconds("all_reduce", "ring", 2**30, 8, load_cluster("dgx-a100").tiers(8))
    assert priced == pytest.approx(8203.9e-6, rel=0.05)


def test_a_user_overrides_a_base(tmp_path: Path) -> None:
    text = 'base = "dgx-a100"\ngpu = "a100-40gb"\nnodes = 4\n[inter_node]\nbytes_per_s = 50e9\nnics = 4'
    cluster = load_cluster(write(tmp_path, text))
    base = load_cluster("dgx-a100")
    assert (cluster.name, cluster.gpus, cluster.processor.name) == ("mine", 32, "a100-40gb")
    assert cluster.intra_node == base.intra_node
    assert cluster.inter_node is not None
    assert cluster.inter_node.achieved_bytes_per_s == 50e9  # a user's bandwidth is an achieved one
    assert cluster.inter_node.latency_s == base.inter_node.latency_s if base.inter_node else None
    assert cluster.sources["inter_node.bytes_per_s"] == "given in mine.toml"
    assert cluster.sources["intra_node.latency_s"] == base.sources["intra_node.latency_s"]


def test_a_user_keeps_an_efficiency_that_is_given(tmp_path: Path) -> None:
    both = write(tmp_path, 'base = "dgx-h100"\n[inter_node]\nbytes_per_s = 50e9\nefficiency = 0.5')
    fabric = load_cluster(both).inter_node
    assert fabric is not None
    assert fabric.achieved_bytes_per_s == 25e9
    alone = write(tmp_path, 'base = "dgx-h100"\n[intra_node]\nefficiency = 0.5')
    assert load_cluster(alone).intra_node.achieved_bytes_per_s == 225e9


def test_a_cluster_from_scratch_and_a_processor_file_beside_it(tmp_path: Path) -> None:
    assert load_cluster(write(tmp_path, FULL)).tiers(6)[1].ranks == 8
    write(tmp_path, CPU + SOURCES, "laptop.toml")
    text = 'gpu = "laptop.toml"\ngpus_per_node = 2\nnodes = 1\nintra_node = { bytes_per_s = 1e9, latency_s = 2e-5 }'
    cluster = load_cluster(write(tmp_path, text))
    assert cluster.processor.name == "laptop"
    assert not cluster.processor.asynchronous
    assert cluster.processor.matmul_points[0].m == 64
    assert cluster.processor.kernel_curves[0].points == ((1000, 1e-6), (1e6, 1e-4))
    assert [tier.name for tier in cluster.tiers(2)] == ["intra_node"]


def test_a_job_larger_than_the_cluster_is_refused() -> None:
    cluster = replace(load_cluster("dgx-a100"), nodes=2)
    cluster.check_gpus(16)
    with pytest.raises(ValueError, match=r"gpus = 17, but cluster 'dgx-a100' has 16 \(2 nodes of 8\)"):
        cluster.tiers(17)
    with pytest.raises(ValueError, match="gpus must be >= 1, got 0"):
        cluster.check_gpus(0)


def test_several_nodes_need_a_network(tmp_path: Path) -> None:
    base = load_cluster("dgx-a100")
    with pytest.raises(ValueError, match="'inter_node' is missing"):
        replace(base, inter_node=None)
    assert isinstance(replace(base, inter_node=None, nodes=1), Cluster)


BAD_CLUSTERS = {
    'base = "dgx-a10"': r"base = 'dgx-a10': unknown cluster 'dgx-a10'.*dgx-2.*did you mean 'dgx-a100'",
    'base = "dgx-a100"\ngpu = "a100-80g"': r"unknown processor 'a100-80g'.*did you mean 'a100-80gb'",
    'base = "dgx-a100"\ngpus_pernode = 4': r"unknown key 'gpus_pernode'.*did you mean 'gpus_per_node'",
    'base = "dgx-a100"\n[inter_node]\nlatency = 1e-6': r"unknown key 'inter_node.latency'.*did you mean 'latency_s'",
    'base = "dgx-a100"\n[intra_node]\nnics = 4': r"intra_node has no 'nics'",
    'base = "dgx-a100"\nnodes = "4"': r"nodes = '4'.*integer",
    'base = "dgx-a100"\nnodes = true': r"nodes = True.*integer",
    'base = "dgx-a100"\nnodes = 2.5': r"nodes = 2\.5.*integer",
    'base = "dgx-a100"\nnodes = 0': r"nodes must be > 0 and finite, got 0",
    'base = "dgx-a100"\ngpus_per_node = -8': r"gpus_per_node must be > 0 and finite, got -8",
    'base = "dgx-a100"\nintra_node = 3e11': r"intra_node = 3.*",
    'base = "dgx-a100"\n[inter_node]\nbytes_per_s = "fast"': r"inter_node\.bytes_per_s = 'fast'.*number",
    'base = "dgx-a100"\n[inter_node]\nbytes_per_s = -1.0': r"inter_node: bytes_per_s must be > 0 and finite, got -1",
    'base = "dgx-a100"\n[inter_node]\nbytes_per_s = nan': r"bytes_per_s.*nan",
    'base = "dgx-a100"\n[inter_node]\nbytes_per_s = inf': r"bytes_per_s.*inf",
    'base = "dgx-a100"\n[inter_node]\nlatency_s = -1e-6': r"inter_node: latency_s must be >= 0",
    'base = "dgx-a100"\n[intra_node]\nefficiency = 1.5': r"efficiency must be > 0 and <= 1, got 1\.5",
    'base = "dgx-a100"\n[inter_node]\nstart_s = -1e-6': r"inter_node: start_s must be >= 0 and finite",
    'base = "dgx-a100"\n[intra_node]\nlocal_bytes_per_s = 0.0': r"local_bytes_per_s must be > 0 and finite, got 0",
    'base = "dgx-a100"\n[fabric]\nkind = "rails"': r"fabric: kind = 'rails'; allowed: flat, .*did you mean 'rail'",
    'base = "dgx-a100"\n[fabric]\nnodes_per_leaf = 4': r"'fabric.kind' is missing",
    'base = "dgx-a100"\n[fabric]\nkind = "rail"': r"fabric: 'nodes_per_leaf' is missing: kind = 'rail' needs it",
    'base = "dgx-a100"\n[fabric]\nkind = "flat"\nnodes_per_leaf = 4': r"fabric: kind = 'flat' has no leaves",
    'base = "dgx-a100"\n[fabric]\nkind = "flat"\nnode_per_leaf = 4': r"'fabric.node_per_leaf'.*did you mean 'nodes_per",
    'base = "dgx-a100"\n[fabric]\nkind = "rail"\nnodes_per_leaf = 0': r"fabric: nodes_per_leaf must be > 0 and finite",
    'base = "dgx-a100"\n[fabric]\nkind = "rail"\nnodes_per_leaf = 4\noversubscription = 0.5': (
        r"fabric: oversubscription must be >= 1 and finite, got 0\.5"
    ),
    'base = "dgx-a100': r"not TOML",
    "gpus_per_node = 4": r"'gpu' is missing",
    'gpu = "h200"': r"'gpus_per_node' is missing",
    'gpu = "h200"\ngpus_per_node = 8': r"'intra_node' is missing",
    'gpu = "h200"\ngpus_per_node = 8\nintra_node = { bytes_per_s = 1e9 }': r"'intra_node\.latency_s' is missing",
    FULL.replace("inter_node =", "# "): r"'inter_node' is missing: give it, or nodes = 1",
    'gpu = "none.toml"\ngpus_per_node = 1': r"cannot read .*none\.toml",
}


@pytest.mark.parametrize("text", BAD_CLUSTERS)
def test_a_bad_cluster_file_gives_one_line(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=BAD_CLUSTERS[text]) as error:
        load_cluster(path)
    assert "\n" not in str(error.value)
    assert "mine.toml" in str(error.value)


BAD_PROCESSORS = {
    "kernel_floor_s": ("kernel_floor_s = 1e-6", "", r"'kernel_floor_s' is missing"),
    "unknown": ("tile = [1, 1]", "tile = [1, 1]\ntyle = 1", r"unknown key 'tyle'.*did you mean 'tile'"),
    "tile": ("tile = [1, 1]", "tile = [1, 0]", r"tile must be two numbers > 0"),
    "kind": ('"cpu"', '"tpu"', r"kind = 'tpu'"),
    "share": (
        "matmul_efficiency = 1.0",
        "matmul_efficiency = 1.1",
        r"matmul_efficiency must be > 0 and <= 1, got 1\.1",
    ),
    "text": ("launch_s = 0", 'launch_s = "0"', r"launch_s = '0'.*number"),
    "dtype": ("fp32 = 1e11", "bf61 = 1e11", r"peak_flops has unknown 'bf61'.*did you mean 'bf16'"),
    "peak": ("fp32 = 1e11", "fp32 = 0.0", r"peak_flops\.fp32 must be > 0"),
    "point": ("m = 64", "m = 0", r"matmul_points\.0: m must be > 0"),
    "curve": (
        "[[1000, 1e-6], [1e6, 1e-4]]",
        "[[1e6, 1e-4], [1e3, 1e-6]]",
        r"kernel_curves\.0: points must be.*ascending",
    ),
    "empty": ("[[1000, 1e-6], [1e6, 1e-4]]", "[]", r"kernel_curves\.0: points must be at least one pair"),
}


@pytest.mark.parametrize("case", BAD_PROCESSORS)
def test_a_bad_processor_file_gives_one_line(tmp_path: Path, case: str) -> None:
    old, new, message = BAD_PROCESSORS[case]
    text = CPU + SOURCES
    assert old in text
    with pytest.raises(ValueError, match=message) as error:
        load_processor(write(tmp_path, text.replace(old, new, 1)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_without_a_source_is_refused(tmp_path: Path, figure: str) -> None:
    for source in ("", f'{figure} = " "\n'):
        text = (CPU + SOURCES + "\n").replace(f'\n{figure} = "measured"\n', f"\n{source}")
        with pytest.raises(ValueError, match=f"{figure!r} has no source"):
            load_processor(write(tmp_path, text))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("matmul_efficiencies = { bf16 = 0.9 }", r"matmul_efficiencies has 'bf16'; allowed: what peak_flops has, fp32"),
        ("matmul_efficiencies = { fp32 = 1.1 }", r"matmul_efficiencies\.fp32 must be > 0 and <= 1, got 1\.1"),
        ("attention_backward_efficiency = 0", r"attention_backward_efficiency must be > 0 and <= 1, got 0"),
        ("matmul_start_s = -1", r"matmul_start_s must be >= 0 and finite, got -1"),
        ("cache_bytes_per_s = 0", r"cache_bytes_per_s must be > 0 and finite, got 0"),
    ],
)
def test_measured_figures_are_checked(tmp_path: Path, line: str, message: str) -> None:
    name = line.partition(" ")[0]
    text = "\n".join(line if each.startswith(f"{name} =") else each for each in CPU.splitlines())
    with pytest.raises(ValueError, match=message) as error:
        load_processor(write(tmp_path, text + "\n" + SOURCES))
    assert "\n" not in str(error.value)


def test_a_processor_may_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    given_ = [line for line in CPU.splitlines() if line.partition(" ")[0] not in MEASURED]
    sources = "[sources]\n" + "\n".join(f'{name} = "measured"' for name in FIGURES if name not in MEASURED)
    processor = load_processor(write(tmp_path, "\n".join(given_) + "\n" + sources))
    assert {name: getattr(processor, name) for name in MEASURED} == MEASURED


def test_a_source_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sources has unknown 'memory_byte'.*did you mean 'memory_bytes'"):
        load_processor(write(tmp_path, CPU + SOURCES + '\nmemory_byte = "x"'))


def test_a_catalogue_cluster_without_a_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clusters").mkdir()
    text = (CATALOGUE / "clusters" / "dgx-2.toml").read_text()
    path = tmp_path / "clusters" / "dgx-2.toml"
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith('"inter_node.nics"')))
    monkeypatch.setattr("windtunnel.sim.entries.CATALOGUE", tmp_path)
    with pytest.raises(ValueError, match=r"dgx-2\.toml: 'inter_node\.nics' has no source"):
        load_cluster(path)


@pytest.mark.parametrize("load", [load_cluster, load_processor])
def test_an_unknown_name_or_file_gives_one_line(load: object, tmp_path: Path) -> None:
    assert callable(load)
    with pytest.raises(ValueError, match=r"unknown (cluster|processor) 'dgx-a1000'; the catalogue has .*path") as error:
        load("dgx-a1000")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"cannot read .*missing\.toml"):
        load(str(tmp_path / "missing.toml"))
    with pytest.raises(ValueError, match="cannot read"):
        load(tmp_path)


def test_importing_hardware_is_cheap() -> None:
    code = "import sys, windtunnel.sim.hardware; print({'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
