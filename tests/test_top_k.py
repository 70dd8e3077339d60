"""The largest values: what is kept, what is lost, and what is not finite."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.engine.compression import TopK
from windtunnel.kernels.top_k import largest_k, scatter_k

FRACTIONS = st.floats(0.001, 1.0)


@given(values=st.lists(st.floats(-1e9, 1e9, width=32, allow_subnormal=True), max_size=50), fraction=FRACTIONS)
def test_the_error_is_the_smallest_values(values: list[float], fraction: float) -> None:
    x = torch.tensor(values)
    k = TopK(fraction=fraction).kept(len(values))
    back = scatter_k(largest_k(x, k), len(values))
    lost = (x - back).double().square().sum().item()
    smallest = sorted(value * value for value in x.double().tolist())[: len(values) - k]
    assert lost == pytest.approx(sum(smallest), rel=1e-12)
    if values:
        assert lost <= (1 - k / len(values)) * float(x.double().square().sum()) * (1 + 1e-12)
    assert ((back == x) | (back == 0)).all()


@given(elements=st.integers(1, 60), nonzero=st.integers(0, 60), seed=st.integers(0, 999))
def test_sparse_values_are_exact(elements: int, nonzero: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(elements, generator=generator)
    x[torch.randperm(elements, generator=generator)[nonzero:]] = 0
    assert torch.equal(scatter_k(largest_k(x, min(nonzero, elements)), elements), x)


@given(elements=st.integers(0, 200), fraction=FRACTIONS, rows=st.integers(1, 3))
def test_shapes_and_bytes(elements: int, fraction: float, rows: int) -> None:
    scheme = TopK(fraction=fraction)
    made = largest_k(torch.zeros(rows, elements), scheme.kept(elements))
    assert sum(part.numel() * part.element_size() for part in made) == rows * scheme.payload_bytes(elements)
    assert scheme.kept(elements) >= min(elements, 1)
    assert torch.equal(scatter_k(made, elements), torch.zeros(rows, elements))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_kept_before_any_number(bad: float) -> None:
    x = torch.tensor([3e38, 1.0, bad, -3e38])
    back = scatter_k(largest_k(x, 1), 4)
    assert torch.isfinite(back).tolist() == [True, True, False, True]
