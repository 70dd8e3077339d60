"""Attention over keys and values that lie on other ranks, a rank's block after another: forward and backward.

A rank's block of keys is merged into the softmax of those that came before (kernels/attention.py). How the blocks get
here is a `Passage`: `Ring` (Liu et al. 2023, Ring Attention with Blockwise Transformers) hands them on to the next rank
while it computes, `AllGather` (Llama Team 2024, section 3.3.2) has them all at once, at c times the memory.

What causal attention hides between the tokens of this rank r and those of rank s is not computed. Where tokens lie in
zigzag, chunks r and 2 c - 1 - r (engine/context.py), that is half of each block:

             zigzag                                                           contiguous
    s = r    all queries, all keys, causal                                    the same
    s < r    all queries see the first half of the keys, none the second      all see all
    s > r    the second half of the queries sees all keys, the first none     none sees any
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.attention import Block, Gradients, merge, wide
from .communicator import Communicator, Handle
from .device import attention_kernels

Contribute = Callable[[int, Tensor], Tensor]
"""(source, its keys and values [2, B, K, S', E]) -> this rank's part of their gradients, in the wide dtype."""


class Passage(Protocol):
    """How the keys and values of all ranks come to this one, and gradients go back. `pair` is [2, B, K, S', E]."""

    group: Communicator

    def blocks(self, pair: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(source, its pair) for every rank, this one first."""

    def gradients(self, pair: Tensor, contribute: Contribute) -> Tensor:
        """The sum of what all ranks contribute to the gradients of this rank's pair."""


class AllGather:
    """Everything at once."""

    def __init__(self, group: Communicator) -> None:
        self.group = group

    def blocks(self, pair: Tensor) -> Iterator[tuple[int, Tensor]]:
        everything = pair.new_empty((self.group.world, *pair.shape))
        everything[self.group.rank].copy_(pair)
        self.group.all_gather(everything.view(-1), "keys and values").wait()
        for step in range(self.group.world):
            source = (self.group.rank - step) % self.group.world
            yield source, everything[source]

    def gradients(self, pair: Tensor, contribute: Contribute) -> Tensor:
        sums = pair.new_empty((self.group.world, *pair.shape), dtype=wide(pair.dtype))
        for source, values in self.blocks(pair):
            sums[source].copy_(contribute(source, values))
        self.group.reduce_scatter(sums.view(-1), "gradients of keys and values").wait()
        return sums[self.group.rank]


class Ring:
    """Each block goes to the next rank while this one computes with it.

    Gradients set out from the rank after their block's own, with the first part that is computed elsewhere, and come
    home after c - 1 hops, where the own part is added.
    """

    def __init__(self, group: Communicator) -> None:
        self.group = group

    def _hand_on(self, tensor: Tensor, label: str) -> "Travel":
        """`tensor` to the next rank, and what the one before hands on here."""
        came = torch.empty_like(tensor)
        return Travel(tensor, came, self.group.shift(tensor.view(-1), came.view(-1), label))

    def blocks(self, pair: Tensor) -> Iterator[tuple[int, Tensor]]:
        rank, world = self.group.rank, self.group.world
        for step in range(world):
            travel = self._hand_on(pair, "keys and values") if step < world - 1 else None
            yield (rank - step) % world, pair
            if travel is not None:
                pair = travel.arrive()

    def gradients(self, pair: Tensor, contribute: Contribute) -> Tensor:
        travel: Travel | None = None
        own: Tensor | None = None
        for source, values in self.blocks(pair):
            part = contribute(source, values)
            if source == self.group.rank:
                own = part
                continue
            if travel is not None:
                part += travel.arrive()
            travel = self._hand_on(part, "gradients of keys and values")
        assert own is not None
        assert travel is not None
        return own + travel.arrive()


class Travel(NamedTuple):
    """A tensor on its way to the next rank, which is kept until it is there, and one that comes from the one before."""

    gone: Tensor
    came: Tensor
    handles: list[Handle]

    def arrive(self) -> Tensor:
        for handle in self.handles:
            handle.wait()
        return self.came


class Seen(NamedTuple):
    """What of a rank's queries sees what of another's keys, and whether under a causal mask."""

    queries: slice
    keys: slice
    causal: bool


def seen(rank: int, source: int, tokens: int, *, zigzag: bool, causal: bool) -> Seen | None:
    """The part of a block that is computed, in tokens of the ranks, if any; see the top of this file."""
    everything, half = slice(0, tokens), tokens // 2
    if not causal or source == rank:
        return Seen(everything, everything, causal)
    if not zigzag:
        return Seen(everything, everything, False) if source < rank else None
    if source < rank:
        return Seen(everything, slice(0, half), False)
    return Seen(slice(half, tokens), everything, False)


class Blockwise(torch.autograd.Function):
    """Attention of this rank's queries [B, H, S', E] over the keys and values [B, K, S', E] of all ranks.

    Outputs and gradients are summed over blocks in fp32 at least. Backward keeps the output and its log-sum-exp
    instead of scores, and lets keys and values come once more.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, passage: Passage, zigzag: bool, causal: bool, scale: float
    ) -> Tensor:
        kernels, tokens = attention_kernels(query.device), query.shape[2]
        found: Block | None = None
        for source, (keys, values) in passage.blocks(torch.stack((key, value))):
            part = seen(passage.group.rank, source, tokens, zigzag=zigzag, causal=causal)
            if part is None:
                continue
            here = kernels.block(
                query[:, :, part.queries],
                keys[:, :, part.keys],
                values[:, :, part.keys],
                causal=part.causal,
                scale=scale,
            )
            found = here if found is None else _merge_into(found, part.queries, here)
        assert found is not None
        output = found.output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, found.logsumexp)
        ctx.passage, ctx.zigzag, ctx.causal, ctx.scale = passage, zigzag, causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        kernels, rank, tokens = attention_kernels(query.device), ctx.passage.group.rank, query.shape[2]
        gradient = gradient.contiguous()
        of_query = torch.zeros_like(query, dtype=wide(query.dtype))

        def contribute(source: int, pair: Tensor) -> Tensor:
            of_pair = torch.zeros_like(pair, dtype=wide(pair.dtype))
            part = seen(rank, source, tokens, zigzag=ctx.zigzag, causal=ctx.causal)
            if part is None:
                return of_pair
            found: Gradients = kernels.block_backward(
                gradient[:, :, part.queries],
                query[:, :, part.queries],
                pair[0][:, :, part.keys],
                pair[1][:, :, part.keys],
                Block(output[:, :, part.queries], logsumexp[:, :, part.queries]),
                causal=part.causal,
                scale=ctx.scale,
            )
            of_query[:, :, part.queries].add_(found.query)
            of_pair[0, :, :, part.keys].copy_(found.key)
            of_pair[1, :, :, part.keys].copy_(found.value)
            return of_pair

        of_key, of_value = ctx.passage.gradients(torch.stack((key, value)), contribute)
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), None, None, None, None


def _merge_into(found: Block, queries: slice, here: Block) -> Block:
    """`found` with another block of keys for some of its queries, the last ones."""
    merged = merge(Block(found.output[:, :, queries], found.logsumexp[:, :, queries]), here)
    if queries.start == 0:
        return merged
    rest = slice(0, queries.start)
    return Block(
        torch.cat((found.output[:, :, rest].to(merged.output.dtype), merged.output), dim=2),
        torch.cat((found.logsumexp[:, :, rest], merged.logsumexp), dim=2),
    )
