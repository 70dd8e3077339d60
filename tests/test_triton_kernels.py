"""The Triton kernels in Triton's interpreter, on the CPU, against the references."""

import os

import pytest
import torch

# Read where triton and its kernels are imported, here while tests are collected. Where there is a GPU, other tests of
# this process may want compiled kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the extra 'triton' is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a machine with a GPU: set TRITON_INTERPRET=1", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st
from test_one_pass import DTYPES, RULES, clone, same, shards
from torch import Tensor
from windtunnel.kernels import activations, dropout, norms
from windtunnel.kernels.one_pass import Rule, plain_step_
from windtunnel.kernels.triton_activations import (
    bias_gelu_backward,
    bias_gelu_forward,
    dropout_forward,
    swiglu_backward,
    swiglu_forward,
)
from windtunnel.kernels.triton_norms import rms_norm_backward, rms_norm_forward
from windtunnel.kernels.triton_optimizers import BLOCK, triton_step_

FEW = settings(max_examples=15)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@FEW
@given(
    rule=st.sampled_from(RULES), sizes=st.lists(st.sampled_from([0, 1, 33, BLOCK + 1]), max_size=3),
    gradient=st.sampled_from(DTYPES[1:]), copy=st.sampled_from([None, *DTYPES[1:]]),
    multiplier=st.sampled_from([1.0, 0.3]),
)  # fmt: skip
def test_optimizers(
    rule: Rule, sizes: list[int], gradient: torch.dtype, copy: torch.dtype | None, multiplier: float
) -> None:
    given = shards(rule, sizes, wide=torch.float32, gradient=gradient, copy=copy)
    plain, fast = clone(given), clone(given)
    wanted = plain_step_(rule, plain, multiplier=multiplier)
    found = triton_step_(rule, fast, multiplier=multiplier)
    same(fast, plain, rtol=1e-5, atol=1e-6)  # some roundings of fp32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)
    for copied, other in zip(fast.copies, plain.copies, strict=True):
        torch.testing.assert_close(copied.float(), other.float(), rtol=1e-2, atol=1e-6)  # one rounding of 16 bits


@FEW
@given(rows=st.integers(0, 5), width=st.sampled_from([1, 7, 64, 65]), adds=st.booleans())
def test_rms_norm(rows: int, width: int, adds: bool) -> None:
    x, weight, residual = drawn(rows, width), drawn(width, seed=1), drawn(rows, width, seed=2) if adds else None
    y, scales, total = rms_norm_forward(x, residual, weight, 1e-5)
    wanted, summed = norms.plain_rms_norm(x, weight, 1e-5, residual)
    torch.testing.assert_close((y, total), (wanted, summed))
    leaf, factor = summed.clone().requires_grad_(), weight.clone().requires_grad_()
    given = drawn(rows, width, seed=3)
    expected = torch.autograd.grad(norms.plain_rms_norm(leaf, factor, 1e-5)[0], (leaf, factor), given)
    found = rms_norm_backward(given, summed, weight, scales)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@FEW
@given(rows=st.integers(0, 5), width=st.sampled_from([1, 7, 300]))
def test_activations(rows: int, width: int) -> None:
    gate, up, given = (drawn(rows, width, seed=seed) for seed in range(3))
    made = torch.empty_like(gate), torch.empty_like(gate)
    torch.testing.assert_close(swiglu_forward(gate, up, made[0]), activations.plain_swiglu(gate, up))
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    wanted = torch.autograd.grad(activations.plain_swiglu(*leaves), leaves, given)
    torch.testing.assert_close(swiglu_backward(given, gate, up, *made), wanted)
    bias = drawn(width, seed=4)
    torch.testing.assert_close(bias_gelu_forward(gate, bias, made[0]), activations.plain_bias_gelu(gate, bias))
    (slope,) = torch.autograd.grad(activations.plain_bias_gelu(leaves[0], bias), leaves[:1], given)
    torch.testing.assert_close(bias_gelu_backward(given, gate, bias, made[0]), slope, rtol=1e-5, atol=1e-5)


@FEW
@given(elements=st.sampled_from([0, 1, 5, BLOCK + 3]), seed=st.integers(0, 2**62), adds=st.booleans())
def test_dropout_has_the_references_mask(elements: int, seed: int, adds: bool) -> None:
    x, residual = drawn(elements), drawn(elements, seed=1) if adds else None
    torch.testing.assert_close(dropout_forward(x, residual, 0.3, seed), dropout.plain_dropout(x, 0.3, seed, residual))
