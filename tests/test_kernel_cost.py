"""Kernel costs against hand counts, physical bounds and measurements."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.trace import Kernel
from windtunnel.sim.attention import FLASH, visible_share, with_first_flash_attention
from windtunnel.sim.gemm import SHORTEST_PART, SMALL_TILE_COST, partial_bytes, tiled_flops
from windtunnel.sim.hardware import KernelCurve, MatmulPoint, Processor, load_processor, processor_names
from windtunnel.sim.kernel import KernelCost, kernel_seconds

A100 = load_processor("a100-80gb")
GPUS = [load_processor(name) for name in processor_names()]
CURVE = KernelCurve(name="add", dtype="fp32", points=((1e3, 2e-6), (1e5, 1e-5), (1e7, 1e-3)))
DEFAULT = KernelCurve(name="default", dtype="fp32", points=((1e6, 1e-3),))
POINTS = tuple(
    MatmulPoint(dtype="fp32", batch=1, m=size, n=size, k=size, flops_per_s=rate)
    for size, rate in ((64, 1e10), (256, 4e10), (1024, 8e10), (2048, 9e10), (4096, 7e10))
)
MEASURED = replace(
    A100,
    matmul_points=POINTS,
    kernel_curves=(CURVE, DEFAULT),
    sources={**A100.sources, "matmul_points": "a test", "kernel_curves": "a test"},
)


def matmul(m: int, n: int, k: int, batch: int = 1, dtype: str = "fp16", itemsize: int = 2) -> Kernel:
    read, write = batch * (m * k + k * n) * itemsize, batch * m * n * itemsize
    return Kernel("mm", "matmul", 2.0 * batch * m * n * k, read, write, dtype, (batch, m, n, k))


def memory(nbytes: int, name: str = "add", dtype: str = "fp32") -> Kernel:
    return Kernel(name, "memory", 0.0, nbytes - nbytes // 3, nbytes // 3, dtype, (nbytes,))


def whole(batch: int, m: int, n: int, k: int, tile: tuple[int, int], cost: float = 100.0) -> float:
    """FLOPs at full rate on 108 multiprocessors, the inner dimension not split; by default small tiles do not pay."""
    return dict(tiled_flops(batch, m, n, k, 108, tile, cost))[1]


def test_a_tile_more_costs_a_wave() -> None:
    # One size of tile, 64 x 64: 12 x 9 tiles fill a wave, a row more starts a second.
    k = 65536
    wave = 2 * 64 * 64 * k * 108
    assert whole(1, 12 * 64, 9 * 64, k, (64, 64)) == wave
    assert whole(1, 12 * 64 + 1, 9 * 64, k, (64, 64)) == 2 * wave


def test_smaller_tiles_fill_a_wave_that_would_be_idle() -> None:
    # 12 x 9 tiles of 128 x 256 fill a wave. With a row more, 25 x 18 = 450 tiles of 64 x 128 take 5 waves of 108, each
    # a quarter as long but for a tile that loads twice the bytes per FLOP. Other tiles are slower.
    k = 65536
    wave = 2 * 128 * 256 * k * 108
    assert whole(1, 12 * 128, 9 * 256, k, (128, 256), cost=0.25) == wave
    assert whole(1, 12 * 128 + 1, 9 * 256, k, (128, 256), cost=0.25) == pytest.approx(wave * 5 / 4 * (1 + 0.25))


def test_the_products_of_a_batch_share_waves() -> None:
    assert whole(3, 6 * 128, 6 * 256, 8192, (128, 256)) == 2 * 128 * 256 * 8192 * 108


def test_a_long_inner_dimension_is_split_among_idle_multiprocessors() -> None:
    # Four tiles leave 104 of 108 idle. In 16 parts each the work is 1/16, and the parts are written and read in fp32.
    flops = dict(tiled_flops(1, 256, 512, 16384, 108, (128, 256), 100.0))
    assert flops[16] == pytest.approx(flops[1] / 16)
    assert partial_bytes(256 * 512, 16) == 2 * 16 * 256 * 512 * 4
    assert partial_bytes(256 * 512, 1) == 0
    assert set(dict(tiled_flops(1, 256, 512, 2 * SHORTEST_PART - 1, 108, (128, 256)))) == {1}
    assert kernel_seconds(matmul(256, 512, 16384), A100) < flops[1] / (312e12 * A100.matmul_efficiency) / 4


@given(
    sizes=st.tuples(*[st.integers(1, 5_000)] * 3), batch=st.integers(1, 8), tile=st.sampled_from([(128, 256), (64, 64)])
)
def test_no_split_and_no_tile_saves_work(sizes: tuple[int, int, int], batch: int, tile: tuple[int, int]) -> None:
    for split, flops in tiled_flops(batch, *sizes, 108, tile):
        assert flops >= 2 * batch * math.prod(sizes)
        assert split == 1 or sizes[2] >= split * SHORTEST_PART


def test_arithmetic_and_traffic_overlap_in_part() -> None:
    kernel = matmul(12 * 128, 9 * 256, 96)  # too short to be split
    arithmetic_s = whole(1, 12 * 128, 9 * 256, 96, (128, 256), SMALL_TILE_COST) / (312e12 * A100.matmul_share("fp16"))
    traffic_s = (kernel.read_bytes + kernel.write_bytes) / (2.039e12 * A100.memory_efficiency)
    started_s = A100.kernel_floor_s + A100.matmul_start_s
    assert kernel_seconds(kernel, A100) == pytest.approx(started_s + math.hypot(arithmetic_s, traffic_s))


def test_a_skinny_product_waits_for_memory() -> None:
    kernel = matmul(1, 16384, 16384)
    traffic_s = (kernel.read_bytes + kernel.write_bytes) / (2.039e12 * A100.memory_efficiency)
    assert traffic_s < kernel_seconds(kernel, A100) < 1.1 * traffic_s


def test_types_may_reach_shares_of_their_own() -> None:
    sources = {**A100.sources, "matmul_efficiencies": "a test"}
    slow = replace(A100, matmul_efficiencies={"tf32": 0.41}, sources=sources)
    assert (slow.matmul_share("tf32"), slow.matmul_share("bf16")) == (0.41, A100.matmul_efficiency)
    kernel = matmul(8192, 8192, 8192, dtype="tf32")
    at_full = replace(slow, matmul_efficiencies={"tf32": 0.82})
    assert kernel_seconds(kernel, slow) == pytest.approx(2 * kernel_seconds(kernel, at_full), rel=0.01)


@pytest.mark.parametrize(
    ("gpu", "dtype", "sizes", "tflops"),
    [
        # hw_microbench hw-0002 to hw-0007 (the large square ones set matmul_efficiency) and hw-0082.
        ("a100-80gb", "fp16", (2048, 2048, 2048), 221.8),
        ("a100-80gb", "fp16", (4096, 4096, 4096), 228.0),
        ("a100-80gb", "fp16", (1024, 2145, 1024), 132.8),
        ("a100-80gb", "fp16", (6144, 12288, 12288), 250.8),
        ("a100-80gb", "bf16", (1024, 10240, 5120), 271.2),
        # hw-0085.
        ("h100-sxm", "bf16", (2048, 2048, 13312), 794.5),
    ],
)
def test_measured_products_are_met(gpu: str, dtype: str, sizes: tuple[int, int, int], tflops: float) -> None:
    seconds = kernel_seconds(matmul(*sizes, dtype=dtype), load_processor(gpu))
    assert 2 * math.prod(sizes) / seconds / 1e12 == pytest.approx(tflops, rel=0.2)


@given(
    gpu=st.sampled_from(GPUS),
    sizes=st.tuples(*[st.integers(1, 20_000)] * 3),
    batch=st.integers(1, 64),
    dtype=st.sampled_from(["fp32", "fp16"]),
)
def test_no_product_beats_the_hardware(gpu: Processor, sizes: tuple[int, int, int], batch: int, dtype: str) -> None:
    kernel = matmul(*sizes, batch=batch, dtype=dtype)
    seconds = kernel_seconds(kernel, gpu)
    assert seconds >= kernel.flops / gpu.peak_flops[dtype]
    assert seconds >= (kernel.read_bytes + kernel.write_bytes) / gpu.memory_bytes_per_s
    assert seconds >= gpu.kernel_floor_s


@given(
    sizes=st.tuples(st.integers(1, 5_000), st.integers(1, 5_000), st.integers(1, 100) | st.integers(2_048, 5_000)),
    axis=st.integers(0, 2),
    more=st.integers(0, 5_000),
)
def test_a_larger_product_never_takes_less(sizes: tuple[int, int, int], axis: int, more: int) -> None:
    """Where the inner dimension may be cut in as many parts: in more parts a longer one may take less."""
    more = min(more, 100) if sizes[2] <= 100 else more
    larger = [size + more * (i == axis) for i, size in enumerate(sizes)]
    assert kernel_seconds(matmul(*larger), A100) >= kernel_seconds(matmul(*sizes), A100)


def attention(heads: int, queries: int, keys: int, causal: bool, name: str = "attention") -> Kernel:
    flops = (2.0 if name == "attention" else 5.0) * 2 * heads * queries * keys * 128
    return Kernel(name, "attention", flops, 1 << 10, 1 << 10, "fp16", (1, heads, queries, keys, 128), causal)


def test_long_attention_runs_at_its_share_of_the_peak() -> None:
    kernel = attention(32, 1 << 17, 1 << 17, causal=False)
    rate = 312e12 * A100.attention_efficiency * (1 << 17) / ((1 << 17) + FLASH.forward_half_tokens)
    assert kernel_seconds(kernel, A100) == pytest.approx(A100.kernel_floor_s + kernel.flops / rate)


def test_a_causal_mask_hides_the_blocks_above_the_diagonal() -> None:
    assert visible_share(128, 128) == 1.0
    assert visible_share(1024, 1024) == pytest.approx((8 + 1) / (2 * 8))
    assert visible_share(128, 1024) == 1.0  # the last queries see all keys
    assert visible_share(256, 1024) == pytest.approx(15 / 16)
    full, causal = (kernel_seconds(attention(32, 8192, 8192, mask), A100) for mask in (False, True))
    assert 0.5 < causal / full < 0.53


def test_attention_of_few_blocks_leaves_multiprocessors_idle() -> None:
    few, many = (kernel_seconds(attention(heads, 1024, 1024, False), A100) for heads in (1, 13))
    assert few == pytest.approx(many, rel=0.05)  # 8 and 104 blocks on 108 multiprocessors


def test_attention_backward_has_a_share_of_its_own_or_that_of_the_algorithm() -> None:
    kernel = attention(32, 1 << 17, 1 << 17, False, "attention_backward")
    sources = {**A100.sources, "attention_backward_efficiency": "a test"}
    measured = replace(A100, attention_backward_efficiency=0.3, sources=sources)
    untold = replace(measured, attention_backward_efficiency=None)
    assert kernel.flops / kernel_seconds(kernel, measured) / 312e12 == pytest.approx(0.3, rel=0.01)
    share = A100.attention_efficiency * FLASH.backward_share
    assert kernel.flops / kernel_seconds(kernel, untold) / 312e12 == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("gpu", ["a100-80gb", "h100-sxm"])
@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_the_first_flash_attention_takes_twice_as_long(gpu: str, name: str) -> None:
    processor, kernel = load_processor(gpu), attention(32, 8192, 8192, True, name)
    now, then = (
        kernel_seconds(kernel, one) - processor.kernel_floor_s
        for one in (processor, with_first_flash_attention(processor))
    )
    assert then == pytest.approx(2 * now)


@given(
    gpu=st.sampled_from(GPUS),
    heads=st.integers(1, 64),
    tokens=st.integers(1, 20_000),
    more=st.integers(0, 20_000),
    causal=st.booleans(),
    name=st.sampled_from(["attention", "attention_backward"]),
)
def test_attention_grows_with_its_sequence_and_beats_no_peak(
    gpu: Processor, heads: int, tokens: int, more: int, causal: bool, name: str
) -> None:
    kernel = attention(heads, tokens, tokens, causal, name)
    seconds = kernel_seconds(kernel, gpu)
    assert seconds >= gpu.kernel_floor_s + 0.5 * kernel.flops / gpu.peak_flops["fp16"]
    # A block more on as many idle multiprocessors costs only its keys.
    longer = attention(heads, tokens, tokens + more, causal, name)
    assert kernel_seconds(longer, gpu) >= seconds * (1 - 1e-12)


@given(gpu=st.sampled_from(GPUS), flops=st.floats(0, 1e15))
def test_convolutions_keep_within_the_hardware(gpu: Processor, flops: float) -> None:
    kernel = Kernel("op", "convolution", flops, 1 << 20, 1 << 20, "fp16", (1, 8, 128, 128, 64))
    traffic_s = (2 << 20) / (gpu.memory_bytes_per_s * gpu.memory_efficiency)
    expected_s = gpu.kernel_floor_s + max(flops / (gpu.peak_flops["fp16"] * gpu.matmul_share("fp16")), traffic_s)
    assert kernel_seconds(kernel, gpu) == pytest.approx(expected_s)


@given(gpu=st.sampled_from(GPUS), nbytes=st.integers(0, 1 << 34), more=st.integers(0, 1 << 34))
def test_memory_kernels_move_bytes_at_the_achieved_bandwidth(gpu: Processor, nbytes: int, more: int) -> None:
    seconds = kernel_seconds(memory(nbytes, dtype="int64"), gpu)
    cached = gpu.cache_bytes_per_s is not None and nbytes <= gpu.cache_bytes
    rate = gpu.cache_bytes_per_s if cached else gpu.memory_bytes_per_s * gpu.memory_efficiency
    assert rate is not None
    assert seconds == pytest.approx(gpu.kernel_floor_s + nbytes / rate)
    assert kernel_seconds(memory(nbytes + more), gpu) >= seconds


def test_a_small_kernel_is_slower_than_memory_and_one_in_the_cache_is_faster() -> None:
    def bandwidth(nbytes: int) -> float:
        return nbytes / kernel_seconds(memory(nbytes), A100)

    assert bandwidth(1 << 20) < 0.5 * 2.039e12 < 2.039e12 < bandwidth(24 << 20)
    assert bandwidth(1 << 30) == pytest.approx(2.039e12 * A100.memory_efficiency, rel=0.01)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: str(point.m))
def test_interpolation_goes_through_the_measured_products(point: MatmulPoint) -> None:
    kernel = matmul(point.m, point.n, point.k, dtype="fp32", itemsize=4)
    assert kernel_seconds(kernel, MEASURED) == pytest.approx(max(kernel.flops / point.flops_per_s, A100.kernel_floor_s))


@given(sizes=st.tuples(*[st.integers(1, 10_000)] * 3), batch=st.integers(1, 16))
def test_an_interpolated_rate_lies_between_the_measured(sizes: tuple[int, int, int], batch: int) -> None:
    kernel = matmul(*sizes, batch=batch, dtype="fp32", itemsize=4)
    seconds = kernel_seconds(kernel, MEASURED)
    assert seconds == A100.kernel_floor_s or 1e10 * 0.999 <= kernel.flops / seconds <= 9e10 * 1.001
    assert seconds >= A100.kernel_floor_s


def test_a_type_without_measured_products_takes_the_roofline() -> None:
    assert kernel_seconds(matmul(512, 512, 512), MEASURED) == kernel_seconds(matmul(512, 512, 512), A100)


@pytest.mark.parametrize(("nbytes", "seconds"), CURVE.points)
def test_a_curve_goes_through_its_points(nbytes: float, seconds: float) -> None:
    assert kernel_seconds(memory(int(nbytes)), MEASURED) == pytest.approx(seconds)


def test_a_curve_between_and_beyond_its_points() -> None:
    between = kernel_seconds(memory(10**6), MEASURED)
    assert between == pytest.approx(math.sqrt(1e-5 * 1e-3))  # 1e6 is half-way from 1e5 to 1e7 in log space
    assert kernel_seconds(memory(10**9), MEASURED) == pytest.approx(1e-1)  # at the bandwidth of the last point
    assert kernel_seconds(memory(10), MEASURED) == A100.kernel_floor_s


def test_curves_are_found_by_name_then_type_then_default() -> None:
    assert kernel_seconds(memory(1000, dtype="int64"), MEASURED) == pytest.approx(2e-6)
    assert kernel_seconds(memory(10**6, name="cat"), MEASURED) == pytest.approx(1e-3)
    attention = Kernel("add", "attention", 1e15, 10**5, 0, "fp16", (1, 1, 1, 1, 1))
    assert kernel_seconds(attention, MEASURED) == pytest.approx(1e-5)
    other = replace(attention, name="attend")  # "default" stands for ops of family "memory" only
    assert kernel_seconds(other, MEASURED) == kernel_seconds(other, A100)


@pytest.mark.parametrize("family", ["matmul", "attention", "convolution"])
def test_an_unsupported_type_is_named(family: str) -> None:
    kernel = replace(matmul(64, 64, 64, dtype="bf16"), family=family)
    with pytest.raises(ValueError, match=r"'bf16'.*'v100-16gb' does not have; it has fp64, fp32, fp16") as error:
        kernel_seconds(kernel, load_processor("v100-16gb"))
    assert "\n" not in str(error.value)


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown family 'sparse'; known: matmul, attention, convolution, memory"):
        kernel_seconds(replace(memory(1), family="sparse"), A100)


def test_the_cache_answers_as_the_function() -> None:
    cost = KernelCost(A100)
    for kernel in (matmul(256, 256, 256), memory(1 << 20), matmul(256, 256, 256)):
        assert cost(kernel) == kernel_seconds(kernel, A100)
