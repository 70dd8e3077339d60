"""Context parallelism: the ranks along the axis "context" hold S / c tokens of each sequence of S.

Everything but attention works on tokens by themselves, so a model is unchanged: inside its forward,
`scaled_dot_product_attention` is done with the other ranks of the axis (`parallel.context_attention`):

    ulysses      all-to-all from S / c tokens of all heads to all tokens of H / c heads, attention, and back
                 (Jacobs et al. 2023, DeepSpeed Ulysses, section 3)
    ring         keys and values travel round the ring, each rank attends to what is there (engine/blockwise.py)
    all_gather   keys and values of all ranks at once

`Engine.forward` cuts integer tensors [batch, S, ...] along dimension 1 and passes the positions of this rank's tokens
as `position_ids` [1, S / c]. With equal numbers of tokens the mean over ranks of their mean losses is that of all.

[Note: where attention is replaced]
A mode of the forward is not active when a block is computed again in backward, which on CUDA even happens in another
thread. So the mode goes around each block's own forward, which recomputation calls as well.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .blockwise import AllGather, Blockwise, Passage, Ring
from .communicator import Communicator

POSITIONS = "position_ids"
"""The argument of a model's forward that takes the positions of its tokens; Hugging Face's name."""


class ContextParallel:
    """What the ranks of a context axis do with one model.

    Args:
        group: the ranks that share each sequence.
        method: "ulysses", "ring" or "all_gather".
        placement: "zigzag" or "contiguous"; always the latter for "ulysses", whose attention sees all tokens in order.
    """

    def __init__(self, group: Communicator, method: str, placement: str = "zigzag") -> None:
        self.group, self.method = group, method
        self.zigzag = method != "ulysses" and placement == "zigzag"
        passages: dict[str, Callable[[Communicator], Passage]] = {"ring": Ring, "all_gather": AllGather}
        self.passage = passages[method](group) if method in passages else None

    # Tokens #

    def positions(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Positions [S / c] int64, ascending, of this rank's tokens in sequences of S = `tokens`.

        Zigzag: of 2 c chunks rank r has chunks r and 2 c - 1 - r, so that causal attention is as much work for every
        rank.

        Raises:
            ValueError: `tokens` cannot be cut in as many equal chunks.
        """
        c, r = self.group.world, self.group.rank
        chunks = 2 * c if self.zigzag else c
        if tokens % chunks:
            raise ValueError(
                f"sequences of {tokens} tokens cannot be cut for parallel.context = {c} ranks with context_attention ="
                f" {self.method!r}; allowed: a multiple of {chunks}"
            )
        size = tokens // chunks
        mine = (r, chunks - 1 - r) if self.zigzag else (r,)
        return torch.cat([torch.arange(chunk * size, (chunk + 1) * size, device=device) for chunk in mine])

    def cut(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with: this rank's tokens of what the engine was called with, and their positions.

        Raises:
            ValueError: no integer tensor [batch, tokens, ...], or several with different numbers of tokens.
        """
        sizes: dict[int, Tensor] = {}

        def visit(value: Any) -> Any:
            if not _is_tokens(value):
                return value
            tokens = value.shape[1]
            if tokens not in sizes:
                sizes[tokens] = self.positions(tokens, value.device)
            return value.index_select(1, sizes[tokens])

        here: tuple[Any, ...] = tree_map(visit, arguments)
        named: dict[str, Any] = tree_map(visit, dict(keywords))
        self._check_tokens(sizes)
        if POSITIONS not in named:
            named[POSITIONS] = next(iter(sizes.values()))[None]
        return here, named

    def tokens(self, batch: Any) -> int:
        """How many each sequence of a batch has.

        Raises:
            ValueError: as `cut`.
        """
        sizes = {value.shape[1] for value in tree_leaves(batch) if _is_tokens(value)}
        self._check_tokens(sizes)
        return int(sizes.pop())

    def _check_tokens(self, sizes: Collection[int]) -> None:
        if len(sizes) != 1:
            raise ValueError(
                f"parallel.context = {self.group.world}: a batch has integer tensors of {sorted(sizes) or 'no'} tokens;"
                " allowed: one or more [batch, tokens, ...] with the same number of tokens"
            )

    # Attention #

    def check_positions(self, forwards: Iterable[Callable[..., Any]], lacks: str) -> None:
        """That one of the forwards of a model can be told the positions of its tokens.

        Raises:
            ValueError: none of them, as `lacks` says.
        """
        if not any(map(takes_positions, forwards)):
            raise ValueError(
                f"parallel.context = {self.group.world}: {lacks} {POSITIONS!r}, so each rank's first token would pass"
                " for the first of its sequence; add the argument, an int64 tensor [1, tokens], or train with"
                " parallel.context = 1"
            )

    def install(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Have the attention of a model done across ranks: see [Note: where attention is replaced]."""
        for module in (model, *blocks):
            module.forward = self._around(module.forward)

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def with_attention(*arguments: Any, **keywords: Any) -> Any:
            with _AttentionMode(self):
                return forward(*arguments, **keywords)

        return with_attention

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`functional.scaled_dot_product_attention` over the tokens of all ranks of the axis.

        Args:
            query: [B, H, S / c, E]; key, value: [B, K, S / c, E], each of this rank's tokens.

        Returns:
            [B, H, S / c, E] for this rank's tokens.

        Raises:
            ValueError: a mask, other shapes, heads that do not divide, or dropout inside blocks.
        """
        if attn_mask is not None:
            raise ValueError(
                f"parallel.context = {self.group.world}: attention with a mask or a bias (ALiBi's too), which would"
                " have to be cut along tokens; allowed: none, or is_causal"
            )
        if query.dim() != 4 or key.shape != value.shape or query.shape[2:] != key.shape[2:]:
            raise ValueError(
                f"parallel.context = {self.group.world}: attention of {list(query.shape)}, {list(key.shape)},"
                f" {list(value.shape)}; allowed: [batch, heads, tokens, size], with as many keys as queries"
            )
        heads, shared = query.shape[1], key.shape[1]
        if heads % shared or (heads != shared and not enable_gqa):
            raise ValueError(f"attention of {heads} query heads and {shared} key heads; allowed: a multiple of those")
        query, key, value = _as_autocast(query, key, value)
        if self.passage is None:
            return self._ulysses(query, key, value, dropout_p, is_causal, scale)
        if dropout_p:
            raise ValueError(
                f"parallel.context_attention = {self.method!r} and dropout {dropout_p:g} inside attention; allowed:"
                " 'ulysses', or no dropout there"
            )
        scale = 1 / sqrt(query.shape[-1]) if scale is None else scale
        out: Tensor = Blockwise.apply(query, key, value, self.passage, self.zigzag, is_causal, scale)
        return out

    def _ulysses(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, causal: bool, scale: float | None
    ) -> Tensor:
        times = repeats(query.shape[1], key.shape[1], self.group.world)
        if times > 1:  # neighbours: each copy still serves neighbouring query heads
            key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        query, key, value = ToHeads.apply(self.group, query, key, value)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=dropout_p,
            is_causal=causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        out: Tensor = ToTokens.apply(self.group, mixed)
        return out


def takes_positions(forward: Callable[..., Any]) -> bool:
    """Whether a forward may be called with the positions of its tokens."""
    called = forward.forward if isinstance(forward, nn.Module) else forward
    accepted = inspect.signature(called).parameters.values()
    return any(p.name == POSITIONS or p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted)


def repeats(heads: int, shared: int, ranks: int) -> int:
    """How often each of `shared` key heads is repeated so that they divide among the ranks as query heads do.

    Raises:
        ValueError: `heads` is no multiple of the ranks.
    """
    if heads % ranks:
        raise ValueError(
            f"attention of {heads} heads cannot be cut among parallel.context = {ranks} ranks; allowed: a divisor of"
            " heads, or parallel.context_attention = 'ring' or 'all_gather', which keep heads whole"
        )
    group = heads // shared
    return next(times for times in range(1, group + 1) if group % times == 0 and shared * times % ranks == 0)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2 and value.dtype in (torch.int32, torch.int64)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch.autocast would give attention: its dtype, where it is on. Here it must be before they travel."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


class _AttentionMode(TorchFunctionMode):
    """Inside, attention is done by a ContextParallel. It may be entered again inside: the inner one does the work."""

    def __init__(self, context: ContextParallel) -> None:
        super().__init__()
        self.context = context

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is not functional.scaled_dot_product_attention:
            return function(*arguments, **(keywords or {}))
        with torch._C.DisableTorchFunction():  # the mode of the model's own forward is still around that of the block
            return self.context.attention(*arguments, **(keywords or {}))


# Between tokens and heads #


class ToHeads(torch.autograd.Function):
    """Tensors [B, H, S / c, E] of this rank's tokens become [B, H / c, S, E] of its heads; the collectives overlap."""

    @staticmethod
    def forward(ctx: Any, group: Communicator, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return _to_heads(group, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_to_tokens(ctx.group, gradients)


class ToTokens(torch.autograd.Function):
    """The other way, for one tensor."""

    @staticmethod
    def forward(ctx: Any, group: Communicator, tensor: Tensor) -> Tensor:
        ctx.group = group
        return _to_tokens(group, (tensor,))[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, _to_heads(ctx.group, (gradient,))[0]


def _to_heads(group: Communicator, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """[B, (c H'), S', E] -> c parts [B, H', S', E], exchanged -> [B, H', (c S'), E]."""
    parts = [tensor.unflatten(1, (group.world, -1)).movedim(1, 0) for tensor in tensors]
    return tuple(part.movedim(0, 2).flatten(2, 3) for part in _exchanged(group, parts))


def _to_tokens(group: Communicator, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """[B, H', (c S'), E] -> c parts [B, H', S', E], exchanged -> [B, (c H'), S', E]."""
    parts = [tensor.unflatten(2, (group.world, -1)).movedim(2, 0) for tensor in tensors]
    return tuple(part.movedim(0, 1).flatten(1, 2) for part in _exchanged(group, parts))


def _exchanged(group: Communicator, parts: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor's part r goes to rank r; all of them are under way at once."""
    buffers = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    handles = [group.all_to_all(buffer.view(-1), "heads and tokens") for buffer in buffers]
    for handle in handles:
        handle.wait()
    return buffers
