"""Block quantisation: error bounds, exact values, packing, and what is not finite."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from windtunnel.engine.compression import BlockQuantized
from windtunnel.kernels.quantize import LARGEST_CODE, as_blocks, dequantize, pack_nibbles, quantize, unpack_nibbles

BITS = st.sampled_from([4, 8])
BLOCKS = st.integers(1, 9)
VALUES = st.lists(st.floats(-(2.0**126), 2.0**126, width=32), max_size=40)


def round_trip(x: Tensor, bits: int, block: int, noise: Tensor | None = None) -> Tensor:
    return dequantize(quantize(x, bits, block, noise), x.shape[-1], bits, block)


def bound(x: Tensor, bits: int, block: int, steps: float) -> Tensor:
    """`steps` quantisation steps of each value's block, and fp32's rounding."""
    largest = as_blocks(x.double().abs(), block).amax(-1, keepdim=True)
    off = largest / LARGEST_CODE[bits] * steps * (1 + 2.0**-20) + 2.0**-126
    return off.expand(*off.shape[:-1], block).flatten(-2)[..., : x.shape[-1]]


@given(values=VALUES, bits=BITS, block=BLOCKS)
def test_to_nearest_is_within_half_a_step(values: list[float], bits: int, block: int) -> None:
    x = torch.tensor(values)
    off = (round_trip(x, bits, block).double() - x.double()).abs()
    assert (off <= bound(x, bits, block, 0.5)).all()


@given(values=VALUES, bits=BITS, block=BLOCKS, seed=st.integers(0, 2**20))
def test_at_random_is_within_a_step(values: list[float], bits: int, block: int, seed: int) -> None:
    x = torch.tensor(values)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    off = (round_trip(x, bits, block, noise).double() - x.double()).abs()
    assert (off <= bound(x, bits, block, 1.0)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_at_random_is_right_on_average(bits: int) -> None:
    x = torch.linspace(-1, 1, 64).expand(20_000, 64)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    mean = round_trip(x, bits, 64, noise).double().mean(0)
    step = 1 / LARGEST_CODE[bits]
    # The mean of 20,000 draws has a deviation of at most step / 2 / sqrt(20,000): five of them.
    assert (mean - x[0].double()).abs().max() <= 5 * step / 2 / 20_000**0.5


@given(
    bits=BITS,
    block=BLOCKS,
    power=st.integers(-100, 100),
    codes=st.lists(st.integers(-7, 7), max_size=30),
)
def test_multiples_of_the_scale_are_exact(bits: int, block: int, power: int, codes: list[int]) -> None:
    # Each block reaches its largest code, so that its scale is the power of two itself.
    whole = [LARGEST_CODE[bits] if place % block == 0 else code for place, code in enumerate(codes)]
    x = torch.tensor([code * 2.0**power for code in whole])
    assert torch.equal(round_trip(x, bits, block), x)
    assert torch.equal(round_trip(x, bits, block, torch.full_like(x, 0.5)), x)


@given(bits=BITS, block=BLOCKS, elements=st.integers(0, 30), rows=st.integers(1, 3))
def test_shapes_and_bytes(bits: int, block: int, elements: int, rows: int) -> None:
    made = quantize(torch.ones(rows, elements), bits, block)
    assert made.scales.shape == (rows, -(-elements // block))
    assert made.codes.shape == (rows, elements if bits == 8 else -(-elements // 2))
    nbytes = sum(part.numel() * part.element_size() for part in made)
    assert nbytes == rows * BlockQuantized(bits=bits, block=block).payload_bytes(elements)  # type: ignore[arg-type]
    assert torch.equal(dequantize(made, elements, bits, block), torch.ones(rows, elements))


@given(codes=st.lists(st.integers(-8, 7), max_size=30))
def test_nibbles(codes: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.int8))
    assert unpack_nibbles(packed, len(codes)).tolist() == codes
    if len(codes) >= 2:
        assert packed[0].item() == (codes[0] & 15) + 16 * (codes[1] & 15)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_block_that_is_not_finite_is_nan_and_no_other(bits: int, bad: float) -> None:
    x = torch.tensor([1.0, 2.0, bad, 3.0, 4.0, 5.0])
    for noise in (None, torch.full_like(x, 0.5)):
        assert round_trip(x, bits, 2, noise).isnan().tolist() == [False, False, True, True, False, False]


@given(values=st.lists(st.floats(0, 2.0**-126, width=32, allow_subnormal=True), max_size=20), bits=BITS)
def test_denormals_and_zeros(values: list[float], bits: int) -> None:
    x = torch.tensor(values)
    back = round_trip(x, bits, 4)
    assert torch.isfinite(back).all()
    assert (back.abs() <= 2.0**-125).all()
    assert (back == 0)[as_blocks(x, 4).eq(0).all(-1, keepdim=True).expand(-1, 4).flatten()[: len(values)]].all()
