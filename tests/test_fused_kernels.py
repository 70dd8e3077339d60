"""Norms, activations, rotary positions, dropout: against references, finite differences and published words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from windtunnel.engine.fused_modules import fuse
from windtunnel.engine.kernel_section import KernelSection
from windtunnel.kernels import activations, dropout, norms, philox

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.lists(st.integers(0, 4), max_size=2).map(tuple)
WIDTHS = st.integers(1, 9)
SEED = torch.tensor(1234)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Some roundings of each dtype: 2^-53, 2^-24, 2^-9, 2^-12; a few of fp32 cancel in sums of nine."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rope(length: int, width: int) -> Tensor:
    angles = drawn(length, width // 2, seed=9)
    return torch.stack((angles.cos(), angles.sin())).repeat(1, 1, 2)


Pair = tuple[Callable[..., Any], Callable[..., Any], Callable[[tuple[int, ...], int], list[Tensor]]]

PAIRS: dict[str, Pair] = {
    "rms_norm": (
        lambda x, w: norms.rms_norm(x, w, 1e-5)[0],
        lambda x, w: norms.plain_rms_norm(x, w, 1e-5)[0],
        lambda shape, d: [drawn(*shape, d), drawn(d, seed=1)],
    ),
    "add_rms_norm": (
        lambda x, r, w: norms.rms_norm(x, w, 1e-5, r),
        lambda x, r, w: norms.plain_rms_norm(x, w, 1e-5, r),
        lambda shape, d: [drawn(*shape, d), drawn(*shape, d, seed=2), drawn(d, seed=1)],
    ),
    "layer_norm": (
        lambda x, w, b: norms.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: norms.plain_layer_norm(x, w, b, 1e-5),
        lambda shape, d: [drawn(*shape, d), drawn(d, seed=1), drawn(d, seed=2)],
    ),
    "swiglu": (
        activations.swiglu,
        activations.plain_swiglu,
        lambda shape, d: [drawn(*shape, d), drawn(*shape, d, seed=1)],
    ),
    "bias_gelu": (
        activations.bias_gelu,
        activations.plain_bias_gelu,
        lambda shape, d: [drawn(*shape, d), drawn(d, seed=1)],
    ),
    "rotary": (
        lambda x: activations.rotary(x, rope(x.shape[-2], x.shape[-1]).to(x.dtype)),
        lambda x: activations.plain_rotary(x, rope(x.shape[-2], x.shape[-1]).to(x.dtype)),
        lambda shape, d: [drawn(*shape, 3, 2 * d)],
    ),
    "dropout": (
        lambda x: dropout.dropout(x, 0.3, SEED),
        lambda x: dropout.plain_dropout(x, 0.3, int(SEED)),
        lambda shape, d: [drawn(*shape, d)],
    ),
    "dropout_residual": (
        lambda x, r: dropout.dropout(x, 0.3, SEED, r),
        lambda x, r: dropout.plain_dropout(x, 0.3, int(SEED), r),
        lambda shape, d: [drawn(*shape, d), drawn(*shape, d, seed=1)],
    ),
}


def results(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", PAIRS)
@given(shape=SHAPES, width=WIDTHS, dtype=DTYPES, strided=st.booleans())
def test_values_and_gradients_are_the_references(
    name: str, shape: tuple[int, ...], width: int, dtype: torch.dtype, strided: bool
) -> None:
    """The reference gets the same rounded inputs in float64."""
    fast, plain, make = PAIRS[name]
    rounded = [tensor.to(dtype) for tensor in make(shape, width)]
    if strided:
        rounded = [torch.stack((t, t), dim=-1)[..., 0] for t in rounded]
    narrow = [t.detach().requires_grad_() for t in rounded]
    wide = [t.detach().double().requires_grad_() for t in rounded]
    found, wanted = results(fast(*narrow)), results(plain(*wide))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    weights = [drawn(*one.shape, seed=5) for one in found]
    gradients = [
        torch.autograd.grad([(o.double() * w).sum() for o, w in zip(outputs, weights, strict=True)], given)
        for outputs, given in ((found, narrow), (wanted, wide))
    ]
    for one, other in zip(*gradients, strict=True):
        # sums over up to 16 rows; dx of norms divides by small rows
        scale = 30 * TOLERANCE[dtype] * (1 + float(other.abs().max()) if other.numel() else 1)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=scale)


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    fast, _, make = PAIRS[name]
    assert torch.autograd.gradcheck(fast, [tensor.requires_grad_() for tensor in make((2, 3), 4)])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e15, 0.0])
def test_special_values_are_the_references(name: str, value: float) -> None:
    fast, plain, make = PAIRS[name]
    given = [tensor.float() for tensor in make((2, 3), 4)]
    given[0].view(-1)[5] = value
    for one, other in zip(results(fast(*given)), results(plain(*given)), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("name", PAIRS)
def test_large_tensors_are_worked_on_in_pieces(name: str) -> None:
    fast, plain, make = PAIRS[name]
    given = [tensor.float() for tensor in make((3, 70), 401)]
    for one, other in zip(results(fast(*given)), results(plain(*given)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: norms.rms_norm(torch.ones(2, 3, dtype=torch.int64), torch.ones(3), 1e-5), "x is torch.int64; allowed"),
    (lambda: norms.rms_norm(torch.ones(2, 3), torch.ones(3).half(), 1e-5), "weight is torch.float16 on cpu; allowed"),
    (lambda: norms.rms_norm(torch.ones(2, 3), torch.ones(4), 1e-5), r"weight is \(4,\); allowed: \(3,\)"),
    (lambda: norms.rms_norm(torch.ones(2, 3), torch.ones(3), 1e-5, torch.ones(3)), r"residual is \(3,\); allowed"),
    (lambda: activations.swiglu(torch.ones(2, 3), torch.ones(3)), r"up is \(3,\); allowed: \(2, 3\), as gate"),
    (lambda: activations.bias_gelu(torch.ones(2, 3), torch.ones(2)), r"bias is \(2,\); allowed: \(3,\)"),
    (lambda: activations.rotary(torch.ones(2, 3), torch.ones(2, 2, 3)), r"table is \(2, 2, 3\) for heads \(2, 3\)"),
    (lambda: dropout.dropout(torch.ones(2), 1.0, SEED), "p = 1.0; allowed: from 0 to below 1"),
    (lambda: dropout.dropout(torch.ones(2), 0.5, SEED, torch.ones(3)), r"residual is \(3,\); allowed: \(2,\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_is_not_allowed(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Random words #


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_are_the_published_ones(counter: tuple[int, ...], key: tuple[int, int], wanted: tuple[int, ...]) -> None:
    """Known answers for philox4x32-10 in the Random123 distribution, examples/kat_vectors."""
    found = philox.philox(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(map(int, found)) == wanted


@given(seed=st.integers(0, 2**62), start=st.integers(0, 9), count=st.integers(0, 30))
def test_a_stream_may_be_entered_anywhere(seed: int, start: int, count: int) -> None:
    whole = philox.words(seed, 0, 4 * start + count, torch.device("cpu"))
    assert torch.equal(philox.words(seed, 4 * start, count, torch.device("cpu")), whole[4 * start :])


def test_the_share_of_what_is_kept() -> None:
    mask = dropout.kept(7, torch.Size([400, 500]), 0.2, torch.device("cpu"))
    # 200,000 draws deviate by 0.0009; five of those.
    assert float(mask.double().mean()) == pytest.approx(0.8, abs=0.0045)
    assert not torch.equal(mask, dropout.kept(8, mask.shape, 0.2, mask.device))


# Modules #


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.drop = nn.RMSNorm(6), nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(functional.relu(self.first(self.norm(x))))


def test_fused_modules_keep_their_class_names_and_parameters() -> None:
    model = Small()
    parameters = dict(model.named_parameters())
    x = drawn(5, 6, dtype=torch.float32)
    plain = model.eval()(x)
    assert fuse(model, KernelSection(fused=["norm", "dropout"])) == {"dropout": 1, "norm": 1}
    assert isinstance(model.norm, nn.RMSNorm)
    assert isinstance(model.drop, nn.Dropout)
    assert dict(model.named_parameters()) == parameters
    torch.testing.assert_close(model(x), plain)


def test_fused_dropout_is_the_same_in_a_recomputation() -> None:
    model = Small().train()
    fuse(model, KernelSection(fused=["dropout"]))
    x = drawn(50, 6, dtype=torch.float32).requires_grad_()
    torch.manual_seed(3)
    output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.manual_seed(3)
    again = model(x)
    assert torch.equal(output, again)
    torch.testing.assert_close(gradient, torch.autograd.grad(again.sum(), x)[0])
