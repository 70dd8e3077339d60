"""One bit per value: the error's closed form, packing, and what is not finite."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from windtunnel.engine.compression import OneBit
from windtunnel.kernels.sign import pack_signs, unpack_signs

BLOCKS = st.integers(1, 20)


def round_trip(x: Tensor, block: int) -> Tensor:
    return unpack_signs(pack_signs(x, block), x.shape[-1], block)


@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), block=BLOCKS)
def test_the_error_is_what_the_norms_say(values: list[float], block: int) -> None:
    x = torch.tensor(values)
    back = round_trip(x, block)
    for start in range(0, len(values), block):
        part, got = x[start : start + block].double(), back[start : start + block].double()
        square = float(part.square().sum())
        expected = square - float(part.abs().sum()) ** 2 / len(part)
        # fp32 rounds the mean: 2^-24 of it per addition, squared with the signs' own magnitude.
        assert float((got - part).square().sum()) == pytest.approx(expected, abs=1e-5 * square + 1e-30)
        assert expected <= (1 - 1 / len(part)) * square * (1 + 1e-12)


@given(signs=st.lists(st.booleans(), max_size=60), block=BLOCKS, power=st.integers(-120, 100))
def test_one_magnitude_is_exact(signs: list[bool], block: int, power: int) -> None:
    x = torch.tensor([math.ldexp(1.0 if sign else -1.0, power) for sign in signs])
    assert torch.equal(round_trip(x, block), x)


@given(elements=st.integers(0, 60), block=BLOCKS, rows=st.integers(1, 3))
def test_zeros_shapes_and_bytes(elements: int, block: int, rows: int) -> None:
    made = pack_signs(torch.zeros(rows, elements), block)
    assert made.bits.shape == (rows, -(-elements // 8))
    assert made.scales.shape == (rows, -(-elements // block))
    nbytes = sum(part.numel() * part.element_size() for part in made)
    assert nbytes == rows * OneBit(block=block).payload_bytes(elements)
    assert torch.equal(unpack_signs(made, elements, block), torch.zeros(rows, elements))


def test_the_first_value_is_the_lowest_bit() -> None:
    made = pack_signs(torch.tensor([1.0, -1, -1, -1, -1, -1, -1, 1, 1]), 16)
    assert made.bits.tolist() == [0b10000001, 0b1]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_block_that_is_not_finite_has_no_finite_value(bad: float) -> None:
    back = round_trip(torch.tensor([1.0, 2.0, bad, 3.0, 4.0]), 2)
    assert torch.isfinite(back).tolist() == [True, True, False, False, True]


def test_denormals() -> None:
    x = torch.tensor([2.0**-149, -(2.0**-149), 2.0**-140, -(2.0**-127)])
    assert torch.equal(round_trip(x, 1), x)
    assert (round_trip(x, 4).abs() <= 2.0**-127).all()
