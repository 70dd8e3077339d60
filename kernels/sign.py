"""One bit per value: its sign, eight to a byte, and for each block the mean magnitude.

The compression of 1-bit Adam (Tang et al. 2021, section 4) with a scale per block. Of a block x of d values the error
is exactly

    || x - C(x) ||^2 = || x ||^2 - || x ||_1^2 / d    <= (1 - 1/d) || x ||^2

(Karimireddy et al. 2019, Error Feedback Fixes SignSGD, section 4): values of one magnitude, and zeros, are exact.
A block with inf or nan, or whose magnitudes sum to more than fp32 holds, comes back without a finite value.

Shapes: any leading dimensions, blocks along the last one; the last block may be short. Bytes: n / 8 rounded up, and 4
for each started block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .quantize import as_blocks


class Signs(NamedTuple):
    """Bits [..., ceil(n / 8)] uint8, set for x >= 0, the first value lowest; scales [..., blocks] fp32."""

    bits: Tensor
    scales: Tensor


def pack_signs(values: Tensor, block: int) -> Signs:
    """The signs and mean magnitudes of `values` [..., n], of any floating dtype."""
    elements = values.shape[-1]
    sums = as_blocks(values.float().abs(), block).sum(-1)
    starts = torch.arange(0, elements, block, device=values.device)
    sizes = (elements - starts).clamp(max=block)
    bits = as_blocks((values >= 0).to(torch.uint8), 8)
    packed = (bits << _places(values)).sum(-1, dtype=torch.uint8)
    return Signs(packed, sums / sizes)


def unpack_signs(signs: Signs, elements: int, block: int) -> Tensor:
    """fp32 values [..., elements]: plus or minus the mean magnitude of their block."""
    bits = ((signs.bits[..., None] >> _places(signs.bits)) & 1).flatten(-2)[..., :elements]
    values = as_blocks(bits.float() * 2 - 1, block) * signs.scales[..., None]
    return values.flatten(-2)[..., :elements]


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, device=like.device, dtype=torch.uint8)
