"""Half-precision casts with a power-of-two scale that leaves headroom for a sum over ranks.

fp16 has 11 significant bits and reaches from 2^-24 to 65504 = 2^16 - 32; bf16 has 8 bits and fp32's range (IEEE
754-2019, table 3.5). Rounded to nearest, a value x that does not overflow is off by at most

    fp16   max(2^-11 |x|, 2^-25)         bf16   max(2^-8 |x|, 2^-134)

and, multiplied by a scale s = 2^e before the cast and divided by it after it, by max(2^-11 |x|, 2^-25 / s) in fp16: a
power of two changes no significant bit. What overflows becomes inf, and inf and nan stay what they are: a result that
is not finite is how an overflow is reported, as dynamic loss scaling needs it (Micikevicius et al. 2018, section 3.2).
"""

import math

import torch
from torch import Tensor

LARGEST_FP16 = 65504.0


def largest_magnitude(values: Tensor) -> Tensor:
    """max |x| of `values` [n], as fp32 [1]; 0 if empty, inf if any is inf, nan or beyond fp32.

    inf stands for nan because the maximum over ranks of a nan is not the same in every library.
    """
    if values.numel() == 0:
        return values.new_zeros(1, dtype=torch.float32)
    return values.abs().amax().float().nan_to_num(nan=torch.inf, posinf=torch.inf).view(1)


def scale_for_sum(largest: Tensor, terms: int) -> Tensor:
    """The power of two s by which values of magnitude at most `largest` (fp32 [1]) are multiplied to be summed in fp16.

    With B the largest power of two such that `terms` * B <= 65504, s is the largest for which s * largest <= B. B is
    an fp16 number, so no product is rounded past it, nor (up to 2048 terms, whose multiples of B fp16 holds) a partial
    sum past as many B: no order of summation overflows. (65504 / terms itself would not do: 3 * fp16(65504 / 3) is
    inf.)

    Returns:
        fp32 [1]: 1 if `largest` is 0, nan if it is inf; between 2^-126 and 2^126, so that 1 / s is exact too.
    """
    # frexp: x = m * 2^e with 1/2 <= m < 1. So B = 2^(e-1), and 2^-e x <= 1, or 2^(1-e) x = 1 for a power of two.
    _, bound = math.frexp(LARGEST_FP16 / terms)
    mantissa, exponent = torch.frexp(largest)
    power = (bound - 1 - exponent + (mantissa == 0.5)).clamp(-126, 126)
    scale = ((power + 127) << 23).view(torch.float32)  # its bits: exact, as no library's 2^x need be
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    return torch.where(torch.isinf(largest), torch.full_like(scale, torch.nan), scale)


def scaled_cast(values: Tensor, dtype: torch.dtype, scale: Tensor | float = 1.0) -> Tensor:
    """`scale` * `values` [n] in `dtype`, rounded once: 2 bytes per element; inf where that is too large."""
    if isinstance(scale, float) and scale == 1.0:
        return values.to(dtype)
    return (values.float() * scale).to(dtype)


def unscaled(values: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """`values` [n] / `scale`, in fp32."""
    return values.float() / scale
