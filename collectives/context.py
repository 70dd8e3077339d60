"""Context parallelism in numbers: what one attention layer sends over the axis that shares sequences.

Each of c ranks has S / c tokens of B sequences, H query heads and K key heads of E elements. Per layer and micro-step,
in bytes that one rank sends (and receives), for elements of b bytes and sums of gradients in w bytes (at least 4):

    ulysses       forward and backward each exchange q, o of H heads and k, v of K heads:
                  2 (2 H + 2 K) E B S/c (c-1)/c b            (Jacobs et al. 2023, section 3.2)
    ring,         forward k, v; backward k, v again, and the sums of their gradients:
    all_gather    (c-1) 2 K E B S/c (2 b + w)                (Liu et al. 2023, section 3)

Formulas are *expectations*: they know shapes and nothing of any collective's algorithm.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSize:
    """One attention layer, as the formulas see it.

    Attributes:
        batch: sequences of a micro-batch.
        tokens: of a whole sequence, S.
        heads, kv_heads: query heads, and heads of keys and values as they are exchanged (repeated ones counted).
        head_size: elements of a head.
        element_bytes: of queries, keys and values.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    element_bytes: int


def attention_elements(size: AttentionSize, ranks: int, method: str) -> dict[str, int]:
    """Elements of the buffers of each kind of collective, forward and backward of a layer, as a ledger counts them.

    Raises:
        ValueError: an unknown method.
    """
    head = size.batch * size.tokens // ranks * size.head_size
    pair = 2 * size.kv_heads * head
    match method:
        case "ulysses":
            return {"all_to_all": 2 * (2 * size.heads * head + pair)}
        case "all_gather":
            return {"all_gather": 2 * ranks * pair, "reduce_scatter": ranks * pair}
        case "ring":
            return {"send": 3 * (ranks - 1) * pair}
    raise ValueError(f"context_attention = {method!r}; allowed: 'ulysses', 'ring', 'all_gather'")


def attention_bytes(size: AttentionSize, ranks: int, method: str) -> int:
    """Bytes that one rank sends for a layer, forward and backward; the formulas above.

    Raises:
        ValueError: an unknown method.
    """
    elements = attention_elements(size, ranks, method)
    if method == "ulysses":
        return elements["all_to_all"] * size.element_bytes * (ranks - 1) // ranks
    pair = 2 * size.kv_heads * size.batch * size.tokens // ranks * size.head_size
    return (ranks - 1) * pair * (2 * size.element_bytes + max(4, size.element_bytes))
