"""What tensor ranks send each other for a transformer: its collectives, and their bytes, in closed form.

Shoeybi et al. 2019 (Megatron-LM), section 3: a layer has two regions, attention and feed-forward, and each ends with an
all-reduce in forward and begins with one in backward. Korthikanti et al. 2022, section 4.2.2: with activations cut
along the sequence each of these is a reduce-scatter and an all-gather, which send the same.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Sent(NamedTuple):
    """A collective: its kind, the elements of the whole buffer, and the bytes of one."""

    kind: str
    elements: int
    element_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedLayers:
    """A transformer whose layers tensor ranks share, with the loss, on one micro-batch.

    Attributes:
        batch, seq, hidden: of the activations; `seq` a multiple of the ranks with `sequence_parallel`.
        recomputed: each layer is computed again in backward, up to its last matrix product, whose sum nobody needs.
        element_bytes: of one activation.
        loss_bytes: of one number of the cross-entropy.
    """

    layers: int
    batch: int
    seq: int
    hidden: int
    ranks: int
    sequence_parallel: bool = False
    recomputed: bool = False
    element_bytes: int = 2
    loss_bytes: int = 4

    def micro_step(self) -> Counter[Sent]:
        """The collectives of one forward and backward.

        The embedding sums its ranks' rows. With sequence parallelism its whole output is then cut, so its gradient is
        gathered. The head is one more region, which begins only. The loss reduces the largest logit of each token, then
        the sum of exponentials and the target's logit.
        """
        tokens = self.batch * self.seq
        activations = tokens * self.hidden
        found: Counter[Sent] = Counter()

        def add(kind: str, times: int, elements: int = activations, element_bytes: int = self.element_bytes) -> None:
            found[Sent(kind, elements, element_bytes)] += times

        begun, ended = (2 * self.layers, self.layers) if self.recomputed else (0, 0)  # once more
        regions = 2 * self.layers
        if self.sequence_parallel:
            add("all_gather", 2 * regions + begun + 1)  # begin in forward, end in backward; the head
            add("reduce_scatter", 2 * regions + ended + 1)
            add("all_gather", 1)
        else:
            add("all_reduce", 2 * regions + ended + 1)
        add("all_reduce", 1)
        add("all_reduce", 1, tokens, self.loss_bytes)
        add("all_reduce", 1, 2 * tokens, self.loss_bytes)
        return found

    def step(self, micro_steps: int, partial: Iterable[int] = (), gradient_bytes: int = 4) -> Counter[Sent]:
        """The collectives of an optimizer step.

        Args:
            partial: elements of each flat buffer of gradients that are terms of a sum over the ranks (of norms and
                biases with sequence parallelism), which the step takes once.
        """
        found = Counter({sent: times * micro_steps for sent, times in self.micro_step().items()})
        found.update(Sent("all_reduce", elements, gradient_bytes) for elements in partial)
        return found


def sent_bytes(collectives: Counter[Sent], ranks: int) -> int:
    """Bytes that each rank sends, by algorithms that send the least; buffers are multiples of the ranks."""
    total = 0
    for sent, times in collectives.items():
        rounds = 2 if sent.kind == "all_reduce" else 1
        total += times * rounds * (sent.elements // ranks) * (ranks - 1) * sent.element_bytes
    return total
