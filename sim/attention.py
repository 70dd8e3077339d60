"""Seconds of fused attention: what the mask leaves of the scores, how long sequences are, how many blocks there are.

Flash attention gives each multiprocessor a block of queries and goes through the keys (Dao 2023, FlashAttention-2,
section 3.2). Blocks that a causal mask hides whole are skipped; those on its edge cost as much as any. Few keys leave
little to go through between a block's beginning and its end, and few blocks leave multiprocessors idle.
"""

import math
from dataclasses import dataclass, replace

from ..collectives.trace import Kernel
from .processor import Processor

BLOCK = 128
"""Queries of a block, and keys that are skipped or computed at a time."""

SIZE_STEP = 32
"""Head sizes are computed in steps of so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashCurve:
    """What the algorithm has in common on all GPUs.

    Attributes:
        forward_half_tokens, backward_half_tokens: keys per query at which the kernel runs at half of the rate that it
            has on long sequences.
        backward_share: rate of the backward over that of the forward on long sequences, where a GPU has no figure of
            its own.
    """

    forward_half_tokens: float
    backward_half_tokens: float
    backward_share: float


FLASH = FlashCurve(forward_half_tokens=64.0, backward_half_tokens=192.0, backward_share=0.98)
"""Fitted to the measurements of all GPUs (experiments/fit_kernels.py)."""

BACKWARD = "attention_backward"


def attention_seconds(kernel: Kernel, peak_flops: float, processor: Processor, curve: FlashCurve = FLASH) -> float:
    """Seconds of the arithmetic, without the time of a kernel that does nothing.

    Args:
        kernel: of family "attention"; its shape is (batch, heads, queries, keys, head size), and its FLOPs are those
            without a mask.
        peak_flops: FLOP/s in its data type.
    """
    batch, heads, queries, keys, size = kernel.shape
    visible = visible_share(queries, keys) if kernel.causal else 1.0
    padded = SIZE_STEP * math.ceil(size / SIZE_STEP) / size
    rate = peak_flops * _share(kernel.name, keys * visible, processor, curve)
    blocks = batch * heads * math.ceil(queries / BLOCK)
    idle = max(1.0, processor.multiprocessors / blocks)
    return kernel.flops * visible * padded * idle / rate


FIRST_SHARE = 0.5
"""Rate of FlashAttention over that of FlashAttention-2 (Dao 2023, abstract: around twice as fast), since July 2023."""


def with_first_flash_attention(processor: Processor) -> Processor:
    """The processor with FlashAttention as it was before FlashAttention-2, for what ran then."""
    backward = processor.attention_backward_efficiency
    return replace(
        processor,
        attention_efficiency=processor.attention_efficiency * FIRST_SHARE,
        attention_backward_efficiency=None if backward is None else backward * FIRST_SHARE,
    )


def visible_share(queries: int, keys: int) -> float:
    """Share of the blocks of scores that a causal mask leaves, the last query seeing all keys."""
    rows, columns = math.ceil(queries / BLOCK), math.ceil(keys / BLOCK)
    hidden = sum(max(0, min(columns, later)) for later in range(rows))
    return 1.0 - hidden / (rows * columns)


def _share(name: str, tokens: float, processor: Processor, curve: FlashCurve) -> float:
    """Of the peak, at so many keys per query."""
    if name == BACKWARD:
        share = processor.attention_backward_efficiency or processor.attention_efficiency * curve.backward_share
        return share * tokens / (tokens + curve.backward_half_tokens)
    return processor.attention_efficiency * tokens / (tokens + curve.forward_half_tokens)
