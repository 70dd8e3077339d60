"""Low-rank factors: exact where the rank suffices, a projection everywhere, nan where anything is not finite."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from windtunnel.engine.compression import LowRank
from windtunnel.kernels.low_rank import as_matrix, orthonormal, start_factor

SIDES = st.integers(1, 24)
CPU = torch.device("cpu")


def project(matrix: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    left = orthonormal(matrix @ factor)
    return left, matrix.T @ left


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(rows=SIDES, columns=SIDES, rank=st.integers(1, 4), seed=st.integers(0, 999))
def test_a_matrix_of_that_rank_is_exact(rows: int, columns: int, rank: int, seed: int) -> None:
    rank = min(rank, rows, columns)
    matrix = orthonormal(random(seed, rows, rank)) @ orthonormal(random(seed + 1, columns, rank)).T
    left, right = project(matrix, start_factor(columns, rank, CPU))
    # fp32 rounding, enlarged by how nearly the first factor misses a direction: 2e-7 is usual, and the largest of
    # 10,000 random matrices was 1.2e-3.
    assert float((left @ right.T - matrix).norm()) <= 2e-2 * float(matrix.norm())


@given(rows=SIDES, columns=SIDES, rank=st.integers(1, 4), seed=st.integers(0, 999), lacking=st.booleans())
def test_it_is_a_projection(rows: int, columns: int, rank: int, seed: int, lacking: bool) -> None:
    rank = min(rank, rows, columns)
    matrix = random(seed, rows, 1) @ random(seed + 1, 1, columns) if lacking else random(seed, rows, columns)
    left, right = project(matrix, start_factor(columns, rank, CPU))
    assert torch.allclose(left.T @ left, torch.eye(rank), atol=1e-5)  # also where the rank lacks
    lost = float((matrix - left @ right.T).norm())
    assert lost <= float(matrix.norm()) * (1 + 1e-5)
    best = float(torch.linalg.svdvals(matrix)[rank:].norm())
    assert lost >= best - 1e-4 * float(matrix.norm())


def test_iterating_comes_near_the_best() -> None:
    matrix = orthonormal(random(1, 40, 20)) @ torch.diag(0.5 ** torch.arange(20.0)) @ orthonormal(random(2, 20, 20)).T
    factor = start_factor(20, 3, CPU)
    for _ in range(10):
        left, factor = project(matrix, factor)
    # Singular values halve, so each iteration shrinks what is amiss by 4; 1 % is far above what ten leave.
    assert float((matrix - left @ factor.T).norm()) <= 1.01 * float(torch.linalg.svdvals(matrix)[3:].norm())


def test_zeros_give_zeros() -> None:
    left, right = project(torch.zeros(5, 4), start_factor(4, 2, CPU))
    assert torch.equal(left @ right.T, torch.zeros(5, 4))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_reaches_everything(bad: float) -> None:
    matrix = random(3, 6, 5)
    matrix[2, 3] = bad
    left, right = project(matrix, start_factor(5, 2, CPU))
    assert not torch.isfinite(left @ right.T).any()


@given(elements=st.integers(0, 300), columns=st.none() | st.integers(1, 40), rank=st.integers(1, 9))
def test_the_matrix_holds_the_buffer(elements: int, columns: int | None, rank: int) -> None:
    rows, width, used = LowRank(rank=rank, columns=columns).shape(elements)
    matrix = as_matrix(torch.arange(float(elements)), width)
    assert matrix.shape == (rows, width)
    assert matrix.flatten()[:elements].tolist() == list(range(elements))
    assert used == min(rank, rows, width)
    if columns is None and elements:
        assert width - 1 <= rows <= width  # as good as square
