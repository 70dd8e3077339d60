"""Symmetric block quantisation to int8 or int4: each `block` values share the scale max |x| / L, L = 127 or 7.

The blocks of ZeRO++ (Wang et al. 2023, section 3.1) and of Dettmers et al. 2022 (8-bit Optimizers, section 2.1).
A value comes back with an error of at most

    nearest      max |x| / (2 L)    over its block, up to a relative 2^-20 and an absolute 2^-126 of fp32 rounding
    at random    max |x| / L        likewise; the expected value is x itself

Zeros and multiples of the scale are exact. A block that holds inf or nan comes back as nan throughout, never as finite
numbers; a block whose largest value is fp32's own may come back as inf.

Shapes: any number of leading dimensions, blocks along the last one, [..., n]; the last block may be short, n may be 0.
Bytes: n (int8) or n / 2 rounded up (int4), and 4 for each started block.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_CODE = {8: 127, 4: 7}


class Quantized(NamedTuple):
    """Codes [..., n] int8, or two to a byte [..., ceil(n / 2)] uint8, the first in the low bits; scales [..., blocks].

    The scales are fp32.
    """

    codes: Tensor
    scales: Tensor


def quantize(values: Tensor, bits: int, block: int, noise: Tensor | None = None) -> Quantized:
    """Quantise `values` [..., n] of any floating dtype.

    Args:
        bits: 8 or 4.
        block: values that share a scale.
        noise: [..., n] uniform on [0, 1): a value is rounded up with the probability of its distance from below
            (Gupta et al. 2015, section 3). None rounds to nearest.
    """
    largest = LARGEST_CODE[bits]
    cut = as_blocks(values.float(), block)
    scales = cut.abs().amax(-1) / largest
    # 0 / 0 in a block of zeros, x / 0 where the scale is too small for fp32, inf / inf: the scale says it all.
    steps = (cut / scales[..., None]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    steps = steps.round() if noise is None else (steps + as_blocks(noise, block)).floor()
    codes = steps.clamp(-largest, largest).to(torch.int8).flatten(-2)[..., : values.shape[-1]]
    return Quantized(codes if bits == 8 else pack_nibbles(codes), scales)


def dequantize(quantized: Quantized, elements: int, bits: int, block: int) -> Tensor:
    """fp32 values [..., elements] of what `quantize` made of as many with the same `bits` and `block`."""
    codes = quantized.codes if bits == 8 else unpack_nibbles(quantized.codes, elements)
    values = as_blocks(codes.float(), block) * quantized.scales[..., None]
    return values.flatten(-2)[..., :elements]


def as_blocks(values: Tensor, block: int) -> Tensor:
    """[..., n] as [..., blocks, block], zeros at the end of the last one."""
    blocks = -(-values.shape[-1] // block)
    return functional.pad(values, (0, blocks * block - values.shape[-1])).unflatten(-1, (blocks, block))


def pack_nibbles(codes: Tensor) -> Tensor:
    """[..., n] int8 from -8 to 7 as [..., ceil(n / 2)] uint8 of two's complement nibbles, the first one low."""
    nibbles = functional.pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8) & 15
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, elements: int) -> Tensor:
    """The [..., elements] int8 that `pack_nibbles` was given."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :elements]
    return (nibbles ^ 8).to(torch.int8) - 8
