"""RMSNorm with a residual, forward and backward, in Triton: a row is read once and normalised in registers.

Backward: each program walks over some of the rows and keeps its part of the weight's gradient, so that no two of them
add to the same memory and sums come in the same order every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .in_cache import rows_of, wide

PROGRAMS = 512
"""That walk over the rows in backward: some for each of a GPU's 100 to 150 multiprocessors."""

WIDEST = 1 << 16
"""Elements of a row that registers hold."""


@triton.jit
def _forward(
    x, residual, weight, y, total, scales, width, eps,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < width
    values = tl.load(x + row * width + places, mask=inside, other=0.0)
    if ADDS:
        values = values + tl.load(residual + row * width + places, mask=inside, other=0.0)
        values = values.to(total.dtype.element_ty)  # statistics are of the sum as it is stored
        tl.store(total + row * width + places, values, mask=inside)
    values = values.to(scales.dtype.element_ty)
    scale = 1.0 / tl.sqrt(tl.sum(values * values) / width + eps)
    factor = tl.load(weight + places, mask=inside, other=0.0).to(values.dtype)
    tl.store(y + row * width + places, (values * scale * factor).to(y.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _backward(
    gradient, x, weight, scales, of_x, of_weight, rows, width,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    inside = places < width
    factor = tl.load(weight + places, mask=inside, other=0.0).to(scales.dtype.element_ty)
    sums = tl.zeros((BLOCK,), dtype=scales.dtype.element_ty)
    for row in range(program, rows, PROGRAMS):
        start = tl.to_tensor(row).to(tl.int64) * width
        scale = tl.load(scales + row)
        normed = tl.load(x + start + places, mask=inside, other=0.0).to(scale.dtype) * scale
        given = tl.load(gradient + start + places, mask=inside, other=0.0).to(scale.dtype)
        sums += given * normed
        given = given * factor
        result = (given - normed * (tl.sum(given * normed) / width)) * scale
        tl.store(of_x + start + places, result.to(of_x.dtype.element_ty), mask=inside)
    tl.store(of_weight + program * width + places, sums, mask=inside)


def rms_norm_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., D], the scale of each row, and x + residual (x itself without one)."""
    rows = rows_of(x.contiguous())
    added = rows if residual is None else rows_of(residual.contiguous())
    y, scales = torch.empty_like(rows), torch.empty(rows.shape[0], dtype=wide(x.dtype), device=x.device)
    total = rows if residual is None else torch.empty_like(rows)
    if rows.numel():
        _forward[(rows.shape[0],)](
            rows, added, weight.contiguous(), y, total, scales, rows.shape[1], eps,
            ADDS=residual is not None, BLOCK=_block(rows.shape[1]),
        )  # fmt: skip
    return y.view(x.shape), scales, total.view(x.shape)


def rms_norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """dx [..., D] and dw [D]."""
    rows, given = rows_of(x.contiguous()), rows_of(gradient.contiguous())
    of_x, programs = torch.empty_like(rows), min(PROGRAMS, max(1, rows.shape[0]))
    parts = torch.zeros(programs, rows.shape[1], dtype=scales.dtype, device=x.device)
    if rows.numel():
        _backward[(programs,)](
            given, rows, weight.contiguous(), scales, of_x, parts, rows.shape[0], rows.shape[1],
            PROGRAMS=programs, BLOCK=_block(rows.shape[1]),
        )  # fmt: skip
    return of_x.view(x.shape), parts.sum(0).to(weight.dtype)


def _block(width: int) -> int:
    block = triton.next_power_of_2(width)
    if block > WIDEST:
        raise ValueError(f"a row of {width} elements; allowed: up to {WIDEST}, what registers hold")
    return int(block)
