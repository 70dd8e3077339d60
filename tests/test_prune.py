"""Magnitude pruning: how many go, that none of them is larger than one that stays, and the schedule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from windtunnel.kernels.prune import CubicSchedule, kept_heads, kept_rows, kept_weights

SPARSITIES = st.floats(0, 1)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def weights(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(kept: Tensor, magnitudes: Tensor, sparsity: float) -> None:
    assert int((~kept).sum()) == round(sparsity * magnitudes.numel())
    if kept.any() and not kept.all():
        assert magnitudes[kept].min() >= magnitudes[~kept].max()


@given(rows=st.integers(0, 9), columns=st.integers(0, 9), sparsity=SPARSITIES, dtype=DTYPES, seed=st.integers(0, 99))
def test_the_smallest_weights_go(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int) -> None:
    weight = weights((columns, rows), seed, dtype).t()  # strided
    kept = kept_weights(weight, sparsity)
    assert kept.shape == weight.shape
    check(kept, weight.abs(), sparsity)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), sparsity=SPARSITIES, seed=st.integers(0, 99))
def test_the_smallest_rows_go(rows: int, columns: int, sparsity: float, seed: int) -> None:
    weight = weights((rows, columns), seed)
    check(kept_rows(weight, sparsity), weight.norm(dim=1), sparsity)


@given(heads=st.integers(1, 6), size=st.integers(1, 5), sparsity=SPARSITIES, dim=st.sampled_from([0, 1]))
def test_the_smallest_heads_go(heads: int, size: int, sparsity: float, dim: int) -> None:
    weight = weights((heads * size, 3), heads + size)
    norms = weight.view(heads, size * 3).norm(dim=1)
    kept = kept_heads(weight if dim == 0 else weight.t().contiguous(), sparsity, size, dim)
    assert int((~kept).sum()) == round(sparsity * heads)
    if kept.any() and not kept.all():  # summed in another order: 1e-6
        assert norms[kept].min() >= norms[~kept].max() * (1 - 1e-6)


def test_of_equal_weights_the_later_go_and_nan_stays() -> None:
    assert kept_weights(torch.tensor([1.0, 1.0, -1.0, 1.0]), 0.5).tolist() == [True, True, False, False]
    assert kept_weights(torch.tensor([9.0, float("nan"), 1.0]), 0.67).tolist() == [False, True, False]


def test_the_schedule_is_cubic() -> None:
    schedule = CubicSchedule(final=0.8, first_step=10, last_step=30)
    found = [schedule.sparsity(step) for step in (0, 10, 20, 30, 99)]
    assert found == pytest.approx([0, 0, 0.8 - 0.8 / 8, 0.8, 0.8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kept_weights(torch.ones(3, dtype=torch.int64), 0.5), "weight is torch.int64; allowed: torch.float64"),
        (lambda: kept_rows(torch.ones(3, 3), 1.5), "sparsity = 1.5; allowed: from 0"),
        (lambda: kept_heads(torch.ones(9, 3), 0.5, 4), "head_size = 4; allowed: a divisor of 9"),
        (lambda: CubicSchedule(final=0.5, first_step=3, last_step=3), "last_step = 3; allowed: above first_step = 3"),
    ],
)
def test_what_is_not_allowed(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
