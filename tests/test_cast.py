"""Half-precision casts: error bounds, the scale for a sum, and what overflows."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from windtunnel.kernels.cast import LARGEST_FP16, largest_magnitude, scale_for_sum, scaled_cast, unscaled

NORMAL_FP32 = 2.0**-126
MAGNITUDES = st.floats(2.0**-149, 2.0**127, width=32)
VALUES = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@given(values=VALUES)
def test_bf16_is_within_its_bound(values: list[float]) -> None:
    x = tensor(values)
    off = (unscaled(scaled_cast(x, torch.bfloat16)).double() - x.double()).abs()
    fits = x.abs() < 2.0**127
    assert (off <= torch.clamp(x.double().abs() * 2.0**-8, min=2.0**-134))[fits].all()


@given(values=VALUES, power=st.sampled_from([0, 16, 24]))
def test_fp16_is_within_its_bound_or_inf(values: list[float], power: int) -> None:
    x, scale = tensor(values), 2.0**power
    back = unscaled(scaled_cast(x, torch.float16, scale), scale)
    fits = x.double().abs() * scale < 65520  # halfway between 65504 and what 2^16 would be
    off = (back.double() - x.double()).abs()
    assert (off <= torch.clamp(x.double().abs() * 2.0**-11, min=2.0**-25 / scale))[fits].all()
    assert torch.isinf(back[~fits]).all()
    assert (back.sign() == x.sign())[~fits].all()


def test_what_is_not_finite_stays_so() -> None:
    x = tensor([torch.inf, -torch.inf, torch.nan, 1.0])
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(unscaled(scaled_cast(x, dtype, 4.0), 4.0).nan_to_num(nan=7.0, posinf=8.0, neginf=9.0),
                           tensor([8.0, 9.0, 7.0, 1.0]))  # fmt: skip


def test_the_largest_magnitude() -> None:
    assert largest_magnitude(tensor([])).tolist() == [0.0]
    assert largest_magnitude(tensor([1.0, -3.0])).tolist() == [3.0]
    assert largest_magnitude(tensor([1.0, torch.nan])).tolist() == [torch.inf]
    assert largest_magnitude(tensor([-torch.inf, 1.0])).tolist() == [torch.inf]
    assert largest_magnitude(torch.tensor([1e300], dtype=torch.float64)).tolist() == [torch.inf]


@given(largest=MAGNITUDES, terms=st.integers(1, 2048))
def test_the_scale_is_the_largest_power_of_two_with_headroom(largest: float, terms: int) -> None:
    scale = scale_for_sum(tensor([largest]), terms).item()
    assert 2.0**-126 <= scale <= 2.0**126
    bound = 2.0 ** max(power for power in range(-20, 16) if terms * 2.0**power <= LARGEST_FP16)
    exact = max(2.0**power for power in range(-149, 400) if 2.0**power * largest <= bound)
    assert scale == min(max(exact, 2.0**-126), 2.0**126)


@given(largest=MAGNITUDES, terms=st.integers(1, 2048), share=st.floats(0.5, 1.0))
def test_no_sum_of_scaled_terms_overflows(largest: float, terms: int, share: float) -> None:
    x = tensor([largest, largest * share])
    half = scaled_cast(x, torch.float16, scale_for_sum(x[:1], terms))
    total = half.clone()
    for _ in range(terms - 1):
        total += half
    assert torch.isfinite(total).all()


def test_the_largest_fp16_itself_would_not_do() -> None:
    share = tensor([LARGEST_FP16 / 3]).half()
    assert torch.isinf(share + share + share).all()
    assert scale_for_sum(tensor([LARGEST_FP16 / 3]), 3).item() == 0.5


def test_the_scale_of_nothing_and_of_overflow() -> None:
    assert scale_for_sum(tensor([0.0]), 4).tolist() == [1.0]
    assert scale_for_sum(tensor([torch.inf]), 4).isnan().all()
    assert scaled_cast(tensor([0.0, 1.0]), torch.float16, scale_for_sum(tensor([torch.inf]), 4)).isnan().all()


@given(values=st.lists(st.integers(-1024, 1024), min_size=1, max_size=30), power=st.integers(-60, 60))
def test_a_power_of_two_changes_no_bit(values: list[int], power: int) -> None:
    x = tensor([value * 2.0**power for value in values])
    scale = scale_for_sum(largest_magnitude(x), 1)
    assert torch.equal(unscaled(scaled_cast(x, torch.float16, scale), scale), x)  # 11 bits: fp16 holds them all
