"""Random words from counters: Philox-4x32-10 (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3).

Words are a function of a key and a counter, so that whoever knows both has the same words again, in any order and on
any device: a dropout mask need not be kept for backward, nor a generator's state for a recomputation.

Ten rounds of (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)), after each of which
k0 and k1 grow by the golden ratio and sqrt(3) - 1 (section 5.3 there). All numbers are 32 bits wide.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for each counter.

    Args:
        counter: four int64 tensors alike in shape, with values of 32 bits.

    Returns:
        int64 tensors of the same shape, from 0 to 2^32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The products wrap at 64 bits; masks make their halves what an unsigned product would have.
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            _high(second) ^ c1 ^ k0,
            second & MASK,
            _high(first) ^ c3 ^ k1,
            first & MASK,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & MASK


def words(seed: int, first: int, elements: int, device: torch.device) -> Tensor:
    """[elements] words of a stream of them, from number `first` on, a multiple of 4; int64 from 0 to 2^32 - 1.

    Args:
        seed: 64 bits: the key. Word i is word i % 4 of the counter i / 4.
    """
    assert first % 4 == 0
    low = torch.arange(first // 4, first // 4 + -(-elements // 4), device=device)
    nothing = torch.zeros_like(low)
    found = philox((low & MASK, low >> 32, nothing, nothing), (seed & MASK, (seed >> 32) & MASK))
    return torch.stack(found, dim=-1).view(-1)[:elements]
