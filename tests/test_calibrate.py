"""Fits recover what they are given, profiles survive the file, and no kernel of a flight is without a primitive."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.tiers import RING_STEPS, Tier, ring_seconds
from windtunnel.collectives.trace import Kernel
from windtunnel.engine.pilot import Plan, fly
from windtunnel.engine.world import World
from windtunnel.experiments import calibrate as calibration
from windtunnel.experiments import primitives, timing
from windtunnel.experiments.calibrate import (
    as_cluster,
    calibrate,
    fit_ring,
    kernel_curves,
    launch_seconds,
    matmul_points,
    merge_points,
    overlap_rates,
    profile,
    profile_path,
    to_toml,
    write,
)
from windtunnel.experiments.models import load_model
from windtunnel.experiments.timing import RING_BYTES, KernelTime, ModuleTime, Overlap, RingTime, Timings
from windtunnel.sim.hardware import Cluster, load_cluster
from windtunnel.sim.kernel import kernel_seconds

ADD = Kernel("add", "memory", 0.0, 8000, 4000, "fp32", (1000,))
COPY = Kernel("copy_", "memory", 0.0, 4000, 4000, "fp32", (1000,))
PRODUCT = Kernel("mm", "matmul", 2.0 * 64**3, 1, 1, "fp32", (1, 64, 64, 64))
ATTENTION = Kernel("attention", "attention", 4e6, 1000, 1000, "fp32", (1, 8, 128, 128, 32))

RING = Tier(name="sockets", ranks=4, latency_s=2e-4, bytes_per_s=1.5e9)

TIMINGS = Timings(
    products=[KernelTime(PRODUCT, 2e-5), KernelTime(replace(PRODUCT, name="addmm"), 4e-5)],
    operators=[KernelTime(ADD, 3e-6), KernelTime(COPY, 1e-6), KernelTime(ATTENTION, 1e-3)],
    module=ModuleTime((PRODUCT, ADD), 5e-5),
    rings=[RingTime(kind, n, ring_seconds(kind, n, 4, [RING])) for kind in RING_STEPS for n in RING_BYTES],
    overlap=Overlap(1.0, 1.0, 1.5, 2.0),
    framework_bytes=170_000_000,
)


# Fits #


@given(
    latency_s=st.floats(1e-6, 1e-2),
    bytes_per_s=st.floats(1e7, 1e11),
    ranks=st.integers(2, 16),
)
def test_ring_fit_recovers_latency_and_bandwidth(latency_s: float, bytes_per_s: float, ranks: int) -> None:
    tier = Tier(name="sockets", ranks=ranks, latency_s=latency_s, bytes_per_s=bytes_per_s)
    timed = [RingTime(kind, n, ring_seconds(kind, n, ranks, [tier])) for kind in RING_STEPS for n in RING_BYTES]
    fitted_s, fitted_rate = fit_ring(timed, ranks)
    fitted = Tier(name="fitted", ranks=ranks, latency_s=fitted_s, bytes_per_s=fitted_rate)
    for ring in timed:
        assert ring_seconds(ring.kind, ring.nbytes, ranks, [fitted]) == pytest.approx(ring.seconds, rel=1e-6)


def test_ring_fit_never_gives_a_negative_latency() -> None:
    timed = [RingTime("all_gather", n, 1e-9 * n**1.1) for n in RING_BYTES]
    latency_s, bytes_per_s = fit_ring(timed, 2)
    assert latency_s == 0.0
    assert bytes_per_s > 0


def test_ring_fit_gives_a_bandwidth_even_in_noise() -> None:
    timed = [RingTime("all_gather", n, 1e-3 * (1 + 1 / n)) for n in RING_BYTES]  # no slower with more bytes
    latency_s, bytes_per_s = fit_ring(timed, 2)
    assert latency_s == 0.0
    assert 0 < bytes_per_s < 1e12


RATES = st.floats(0.05, 1.0)
WORK = st.floats(0.01, 10.0)


@given(compute_rate=RATES, communication_rate=RATES, compute_s=WORK, communication_s=WORK)
def test_overlap_rates_are_recovered(
    compute_rate: float, communication_rate: float, compute_s: float, communication_s: float
) -> None:
    both_s = min(compute_s / compute_rate, communication_s / communication_rate)
    overlap = Overlap(
        compute_s,
        communication_s,
        both_s + max(0.0, compute_s - both_s * compute_rate),
        both_s + max(0.0, communication_s - both_s * communication_rate),
    )
    assert overlap_rates(overlap) == pytest.approx((compute_rate, communication_rate), rel=1e-6)


def test_overlap_rates_stay_within_bounds() -> None:
    compute_rate, communication_rate = overlap_rates(Overlap(1.0, 1.0, 0.9, 5.0))  # faster together: noise
    assert compute_rate == 1.0
    assert 0 < communication_rate < 0.05


def test_layouts_of_a_product_are_averaged() -> None:
    (point,) = matmul_points(TIMINGS.products)
    assert (point.m, point.n, point.k, point.flops_per_s) == (64, 64, 64, pytest.approx(2 * 64**3 / 3e-5))


def test_points_of_about_one_size_become_one() -> None:
    assert merge_points([(100.0, 4e-6), (110.0, 1e-6), (200.0, 1e-5)]) == (
        pytest.approx((104.88, 2e-6), rel=1e-3),
        pytest.approx((200.0, 1e-5)),
    )


def test_add_stands_for_operators_without_a_curve() -> None:
    curves = {curve.name: curve.points for curve in kernel_curves(TIMINGS.operators)}
    assert curves["default"] == curves["add"] == (pytest.approx((12000.0, 3e-6)),)


def test_launch_is_what_the_kernels_do_not_explain() -> None:
    processor = as_cluster(TIMINGS, 4).processor
    explained_s = kernel_seconds(PRODUCT, processor) + kernel_seconds(ADD, processor)
    assert launch_seconds(TIMINGS.module, processor) == pytest.approx((5e-5 - explained_s) / 2)
    assert launch_seconds(ModuleTime((PRODUCT,), 0.0), processor) == 0.0


# Files #


def test_profile_survives_the_file(tmp_path: Path) -> None:
    cluster = as_cluster(TIMINGS, 4)
    write(cluster, tmp_path / "here.toml")
    loaded = load_cluster(tmp_path / "here.toml")
    assert loaded == replace(cluster, name="here")
    assert loaded.tiers(4)[0].latency_s == pytest.approx(RING.latency_s)
    assert profile(loaded)["processor"]["sources"]["launch_s"].startswith("measured by windtunnel calibrate on ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.processor.toml", "here.toml"]


def test_toml_quotes_what_needs_it() -> None:
    assert to_toml({"a": 1e-05, "t": {"x.y": 'say "hi"'}}) == 'a = 1e-05\n\n[t]\n"x.y" = "say \\"hi\\""\n'


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Calibration without measuring; lists the ranks of each measurement asked for."""
    asked: list[int] = []

    def measure(ranks: int, _: object) -> Cluster:
        asked.append(ranks)
        return as_cluster(TIMINGS, ranks)

    monkeypatch.setattr(calibration, "measure", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return asked


def test_profile_is_measured_once_and_again_on_request(measured: list[int]) -> None:
    assert calibrate(2) == calibrate(2)
    assert measured == [2]
    assert calibrate(3).gpus_per_node == 3
    calibrate(2, redo=True)
    assert measured == [2, 3, 2]


def test_broken_profile_is_measured_anew(measured: list[int]) -> None:
    known = calibrate(2)
    profile_path(2).write_text("gpus_per_node = ")
    assert calibrate(2) == known
    assert measured == [2, 2]


def test_profile_for_other_ranks_is_not_taken(measured: list[int], tmp_path: Path) -> None:
    assert calibrate(2, path=tmp_path / "a.toml").gpus == 2
    assert calibrate(4, path=tmp_path / "a.toml").gpus == 4


def test_one_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="ranks = 1; allowed: at least 2"):
        calibrate(1)


def test_place_that_cannot_be_written_is_named_before_measuring(measured: list[int], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write a profile in"):
        calibrate(2, path=tmp_path / "file" / "a.toml")
    assert measured == []


# Primitives #


@pytest.fixture(scope="module")
def timed() -> list[primitives.Primitive]:
    """All primitives, the operators at their smallest size only."""
    with pytest.MonkeyPatch.context() as patch, primitives.torch.no_grad():
        patch.setattr(primitives, "ELEMENTS", primitives.ELEMENTS[:1])
        patch.setattr(primitives, "LARGE", primitives.WIDTH**2)
        patch.setattr(primitives, "FEATURES", primitives.FEATURES[:2])
        return [*primitives.operators(), *primitives.products()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 3])
def test_every_kernel_of_a_flight_has_a_primitive(
    timed: list[primitives.Primitive], precision: str, stage: int
) -> None:
    spec = replace(load_model("gpt-demo"), layers=2)
    plan = Plan(
        factory="windtunnel.experiments.transformer:for_flight",
        arguments={"spec": spec, "batch": 2, "seq": spec.seq},
        config={
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "gradient_clipping": 1.0,
            "bf16": {"enabled": precision == "bf16"},
        },
        world=2,
        micro_steps=2,
    )
    flown = {op.name for segment in fly(plan).segments for op in segment if isinstance(op, Kernel)}
    assert flown - {primitive.kernel.name for primitive in timed} == set()


def test_primitives_are_what_a_recorder_would_write_down(timed: list[primitives.Primitive]) -> None:
    attention = [p.kernel for p in timed if p.kernel.name == "attention"]
    batch, tensor_bytes = 8, 8 * 128 * 8 * 32 * 4
    eight = next(kernel for kernel in attention if kernel.shape[0] == batch)
    assert (eight.read_bytes, eight.write_bytes) == (3 * tensor_bytes, tensor_bytes + batch * 8 * 128 * 4)
    assert eight.flops == 4.0 * batch * 8 * 128 * 128 * 32


def test_a_primitive_starts_one_kernel() -> None:
    x = primitives.torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"one kernel, not \['mul', 'add'\]"):
        primitives.primitive(lambda: x * 2 + x)


def test_ranks_time_primitives_together(two_ranks: World) -> None:
    """The bodies themselves, on little work: rings, the module, and the memory of a rank."""
    first, second = two_ranks.run(timing.time_module)
    assert first.kernels == second.kernels
    assert 0 < first.seconds < 1.0
    assert min(two_ranks.run(timing.resident_bytes)) > 10_000_000
    sizes = RING_BYTES[:3]
    by_rank = two_ranks.run(timing.time_rings, sizes)
    assert [ring[:2] for ring in by_rank[0]] == [(kind, n) for kind in RING_STEPS for n in sizes]
    assert all(0 < ring.seconds < 1.0 for ring in by_rank[0])
