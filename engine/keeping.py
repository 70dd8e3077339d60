"""Which results of a block's operations are kept from forward, so that its recomputation need not make them again."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..collectives.recompute import BlockActivations, Choice, Key, Operation
from .operators import describe, mutated_operands

COSTLY = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution", "_scaled_mm", "_grouped_mm", "head_products"}
)
"""Operators whose results "selective" keeps, besides fused attention, which has a name of its own on each backend."""


class Keeping(NamedTuple):
    """What surrounds a block.

    Attributes:
        first: around its forward.
        again: around its recomputation.
        saved: told each tensor that autograd saves in forward.
    """

    first: AbstractContextManager[Any]
    again: AbstractContextManager[Any]
    saved: Callable[[Tensor], None]


def _ignore(tensor: Tensor) -> None:
    pass


def keep_nothing() -> Keeping:
    return Keeping(nullcontext(), nullcontext(), _ignore)


def keep_costly() -> Keeping:
    """Matrix products, convolutions and attention."""

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        name = operator.overloadpacket.__name__
        costly = name in COSTLY or "attention" in name
        return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE

    first, again = create_selective_checkpoint_contexts(policy)
    return Keeping(first, again, _ignore)


def keep_chosen(chosen: Choice) -> Keeping:
    """The operations that were chosen, counted by name."""
    seen: Counter[str] = Counter()

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        key = _next_key(seen, operator)
        keep = chosen.kept is not None and key in chosen.kept
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    first, again = create_selective_checkpoint_contexts(policy)
    return Keeping(first, again, _ignore)


def _next_key(seen: Counter[str], operator: Any) -> Key:
    name = str(operator)
    seen[name] += 1
    return name, seen[name] - 1


class Capture(TorchDispatchMode):
    """Describes a block while its forward runs. It holds every result until then, so that memory is not used twice.

    Args:
        block: whose parameters and buffers autograd's saved tensors are told apart from.
        inputs: tensors that come from outside of the block and are not activations of it (masks, tables).
    """

    def __init__(self, block: nn.Module, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._seen: Counter[str] = Counter()
        self._operations: list[Operation] = []
        self._maker: dict[int, int] = {}  # number of the operation that made a storage
        self._alive: list[Tensor] = []
        self._lasting = {_storage(tensor) for tensor in (*block.parameters(), *block.buffers(), *inputs)}
        self._saved: dict[int, int] = {}
        self._reached = 0  # operations before the last tensor that autograd saved
        self._overwritten: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        operands = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._overwritten |= {
            self._maker[_storage(tensor)]
            for tensor in mutated_operands(function, operands, args)
            if _storage(tensor) in self._maker
        }
        self._add(function, operands, args, results)
        return result

    def _add(self, function: Any, operands: list[Tensor], arguments: tuple, results: list[Tensor]) -> None:
        known = {_storage(tensor) for tensor in operands}
        fresh = {_storage(tensor): tensor for tensor in results if _storage(tensor) not in known}
        self._maker.update(dict.fromkeys(fresh, len(self._operations)))
        self._alive += fresh.values()
        kernel = describe(function, operands, arguments, results)
        self._operations.append(
            Operation(
                key=_next_key(self._seen, function),
                nbytes=sum(tensor.untyped_storage().nbytes() for tensor in fresh.values()),
                flops=0.0 if kernel is None else kernel.flops,
                moved_bytes=0 if kernel is None else kernel.read_bytes + kernel.write_bytes,
                keepable=bool(fresh) and len(fresh) == len({_storage(tensor) for tensor in results}),
            )
        )

    def saved(self, tensor: Tensor) -> None:
        """Autograd saves this tensor."""
        self._reached = len(self._operations)
        self._alive.append(tensor)
        if _storage(tensor) not in self._lasting:
            self._saved[_storage(tensor)] = tensor.untyped_storage().nbytes()

    def description(self, input_bytes: int) -> BlockActivations:
        """What was seen; nothing is held any more.

        Args:
            input_bytes: what the block's inputs take while they rest.
        """
        operations = tuple(
            Operation(
                key=operation.key,
                nbytes=operation.nbytes,
                flops=operation.flops,
                moved_bytes=operation.moved_bytes,
                again=number < self._reached,
                keepable=operation.keepable and number not in self._overwritten,
            )
            for number, operation in enumerate(self._operations)
        )
        self._alive.clear()
        return BlockActivations(operations, input_bytes, sum(self._saved.values()))


def capturing(capture: Capture) -> Keeping:
    """Around a block that is being described; meanwhile it keeps nothing."""
    return Keeping(capture, nullcontext(), capture.saved)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def bytes_of(tensors: Iterable[Tensor], resting: Callable[[Tensor], int]) -> int:
    """What tensors take while they rest, shared memory counted once."""
    return sum({_storage(tensor): resting(tensor) for tensor in tensors}.values())


def is_input(leaf: Any) -> bool:
    """Whether an argument of a block is an activation. Masks and tables are not: blocks share them."""
    return isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_floating_point(leaf)
