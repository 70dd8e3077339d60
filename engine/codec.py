"""Rows of numbers as rows of bytes and back, as a scheme of engine/compression.py says."""

import torch
from torch import Tensor

from ..kernels.quantize import Quantized, dequantize, quantize
from ..kernels.sign import Signs, pack_signs, unpack_signs
from ..kernels.top_k import Sparse, largest_k, scatter_k
from .compression import BlockQuantized, Coded, OneBit, TopK


def encode(scheme: Coded, rows: Tensor, noise: Tensor | None = None) -> Tensor:
    """Code `rows` [r, n] fp32, each for itself.

    Args:
        noise: [r, n] uniform on [0, 1) for stochastic rounding.

    Returns:
        [r, scheme.payload_bytes(n)] uint8, contiguous: codes first, then scales (or values).
    """
    codes, numbers = _parts(scheme, rows, noise)
    return torch.cat((codes.contiguous().view(torch.uint8), numbers.contiguous().view(torch.uint8)), dim=-1)


def decode(scheme: Coded, payload: Tensor, elements: int) -> Tensor:
    """The fp32 rows [r, elements] that `payload` [r, bytes] stands for."""
    codes, numbers = payload.split(_split(scheme, elements), dim=-1)
    numbers = _aligned(numbers).view(torch.float32)
    if isinstance(scheme, BlockQuantized):
        codes = codes.view(torch.int8) if scheme.bits == 8 else codes
        return dequantize(Quantized(codes, numbers), elements, scheme.bits, scheme.block)
    if isinstance(scheme, OneBit):
        return unpack_signs(Signs(codes, numbers), elements, scheme.block)
    return scatter_k(Sparse(_aligned(codes).view(torch.int32), numbers), elements)


def _parts(scheme: Coded, rows: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    if isinstance(scheme, BlockQuantized):
        return quantize(rows, scheme.bits, scheme.block, noise)
    if isinstance(scheme, OneBit):
        return pack_signs(rows, scheme.block)
    return largest_k(rows, scheme.kept(rows.shape[-1]))


def _split(scheme: Coded, elements: int) -> tuple[int, int]:
    """Bytes of the codes and of the numbers after them."""
    nbytes = scheme.payload_bytes(elements)
    numbers = nbytes // 2 if isinstance(scheme, TopK) else 4 * -(-elements // scheme.block)
    return nbytes - numbers, numbers


def _aligned(part: Tensor) -> Tensor:
    """A copy of some columns of a payload: its numbers may begin at any byte, a view of them must not."""
    return part.clone(memory_format=torch.contiguous_format)
