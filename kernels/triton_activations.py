"""SwiGLU, bias + GELU and dropout with a residual in Triton; formulas as in kernels/activations.py and dropout.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .in_cache import wide

BLOCK = 1024

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _swiglu(gate, up, made, elements, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < elements
    g = tl.load(gate + places, mask=inside, other=0.0).to(WIDE)
    u = tl.load(up + places, mask=inside, other=0.0).to(WIDE)
    tl.store(made + places, (g / (1.0 + tl.exp(-g)) * u).to(made.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(gradient, gate, up, of_gate, of_up, elements, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < elements
    d = tl.load(gradient + places, mask=inside, other=0.0).to(WIDE)
    g = tl.load(gate + places, mask=inside, other=0.0).to(WIDE)
    u = tl.load(up + places, mask=inside, other=0.0).to(WIDE)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(of_gate + places, (d * u * s * (1.0 + g * (1.0 - s))).to(of_gate.dtype.element_ty), mask=inside)
    tl.store(of_up + places, (d * g * s).to(of_up.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu(
    x, bias, gradient, made, elements, width, ROOT: tl.constexpr, CUBIC: tl.constexpr,
    BACKWARD: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < elements
    z = tl.load(x + places, mask=inside, other=0.0).to(WIDE)
    z += tl.load(bias + places % width, mask=inside, other=0.0).to(WIDE)
    # (1 + tanh k) / 2 = 1 / (1 + exp(-2 k))
    share = 1.0 / (1.0 + tl.exp(-2.0 * ROOT * (z + CUBIC * z * z * z)))
    result = z * share
    if BACKWARD:
        slope = share + 2.0 * z * share * (1.0 - share) * ROOT * (1.0 + 3.0 * CUBIC * z * z)
        result = tl.load(gradient + places, mask=inside, other=0.0).to(WIDE) * slope
    tl.store(made + places, result.to(made.dtype.element_ty), mask=inside)


@triton.jit
def _dropout(
    x, residual, made, elements, seed, threshold, factor, ADDS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < elements
    w0, w1, w2, w3 = tl.randint4x(seed, (places // 4).to(tl.int32))
    which = places % 4
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    kept = (word.to(tl.int64) & 0xFFFFFFFF) < threshold
    result = tl.where(kept, tl.load(x + places, mask=inside, other=0.0).to(WIDE) * factor, 0.0)
    if ADDS:
        result += tl.load(residual + places, mask=inside, other=0.0).to(WIDE)
    tl.store(made + places, result.to(made.dtype.element_ty), mask=inside)


def swiglu_forward(gate: Tensor, up: Tensor, made: Tensor) -> Tensor:
    """Into `made`, which is contiguous."""
    _swiglu[_grid(made)](gate.contiguous(), up.contiguous(), made, made.numel(), WIDE=_wide(gate), BLOCK=BLOCK)
    return made


def swiglu_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, of_gate: Tensor, of_up: Tensor
) -> tuple[Tensor, Tensor]:
    """Into `of_gate` and `of_up`, which are contiguous."""
    _swiglu_backward[_grid(of_gate)](
        gradient.contiguous(), gate.contiguous(), up.contiguous(), of_gate, of_up, of_gate.numel(),
        WIDE=_wide(gate), BLOCK=BLOCK,
    )  # fmt: skip
    return of_gate, of_up


def bias_gelu_forward(x: Tensor, bias: Tensor, made: Tensor) -> Tensor:
    """Into `made`, which is contiguous."""
    return _gelu(x, bias, x, made, backward=False)


def bias_gelu_backward(gradient: Tensor, x: Tensor, bias: Tensor, made: Tensor) -> Tensor:
    """The gradient of x, into `made`, which is contiguous."""
    return _gelu(x, bias, gradient, made, backward=True)


def _gelu(x: Tensor, bias: Tensor, gradient: Tensor, made: Tensor, *, backward: bool) -> Tensor:
    from .activations import CUBIC, ROOT

    _bias_gelu[_grid(made)](
        x.contiguous(), bias.contiguous(), gradient.contiguous(), made, made.numel(), x.shape[-1],
        ROOT=ROOT, CUBIC=CUBIC, BACKWARD=backward, WIDE=_wide(x), BLOCK=BLOCK,
    )  # fmt: skip
    return made


def dropout_forward(x: Tensor, residual: Tensor | None, p: float, seed: int) -> Tensor:
    """As `dropout` of kernels/dropout.py, up to 2^34 elements."""
    from .dropout import threshold

    made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values = x.contiguous()
    _dropout[_grid(made)](
        values, values if residual is None else residual.contiguous(), made, made.numel(), seed, threshold(p),
        1 / (1 - p), ADDS=residual is not None, WIDE=_wide(x), BLOCK=BLOCK,
    )  # fmt: skip
    return made


def _grid(made: Tensor) -> tuple[int]:
    return (max(1, triton.cdiv(made.numel(), BLOCK)),)


def _wide(tensor: Tensor) -> tl.dtype:
    return TYPES[wide(tensor.dtype)]
