"""FLOPs and bytes of an operator, from the shapes of its operands."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_backward_flop, conv_flop

from ..collectives.trace import Kernel
from .communicator import DTYPE_NAMES

aten = torch.ops.aten

# Operators that start no kernel although they make tensors: the memory is left as it is.
NO_KERNEL = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense"})

ATTENTION = frozenset(
    {
        "attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    }
)
"""Forward of fused attention: ours on `sim`, torch's elsewhere. Query and key come first."""

OURS = {"attention": 4, "attention_backward": 6}
"""Attention on `sim`, and which of its arguments says whether it is causal."""

# Operators that read of their first operand only as much as they write.
GATHERS = frozenset({"embedding", "index_select", "gather", "index", "nll_loss_forward", "nll_loss_backward"})


OVERWRITES = frozenset({"copy_", "zero_", "fill_", "recurrent_cell", "recurrent_cell_backward"})
"""Operators that write to operands without reading them."""


def describe(
    function: Any, operands: Sequence[Tensor], arguments: Sequence[Any], results: Sequence[Tensor]
) -> Kernel | None:
    """The kernel that an operator starts, or None if it starts none (views, allocations).

    Args:
        function: the OpOverload.
        operands: all tensors among its arguments, those in lists included.
        arguments: its positional arguments.
        results: all tensors that it returned.
    """
    name = function.overloadpacket.__name__
    if name in NO_KERNEL or function.namespace in ("prim", "profiler"):
        return None
    mutated = mutated_operands(function, operands, arguments)
    sources = {id(tensor.untyped_storage()) for tensor in operands}
    fresh = [tensor for tensor in results if id(tensor.untyped_storage()) not in sources]
    if not fresh and not mutated:
        return None  # a view
    written = sum(map(_bytes, fresh)) + sum(map(_bytes, mutated))
    copies = _argument(function, arguments, "copies") or ()
    sources_read = [
        tensor
        for tensor in operands
        if not _only_written(function, tensor, mutated) and not any(tensor is copy for copy in copies)
    ]
    first_read = written if name in GATHERS else sum(map(_bytes, sources_read[:1]))
    read = first_read + sum(map(_bytes, sources_read[1:]))
    if name == "linear_cross_entropy":
        more_read, more_written = _logit_traffic(*arguments[:2], *arguments[3:5])
        read, written = read + more_read, written + more_written
    family, flops, shape = _arithmetic(name, arguments, results)
    first = next((t for t in operands if t.is_floating_point()), (list(operands) + list(results))[0])
    dtype = DTYPE_NAMES.get(first.dtype, str(first.dtype))
    return Kernel(name, family, flops, read, written, dtype, shape, name in OURS and bool(arguments[OURS[name]]))


def flops_of(function: Any, arguments: Sequence[Any], results: Sequence[Tensor]) -> float:
    """FLOPs of an operator, as `describe` has them; 0 for what only moves or adds values."""
    return _arithmetic(function.overloadpacket.__name__, arguments, results)[1]


def _bytes(tensor: Tensor) -> int:
    """What a kernel touches of a tensor: an expanded one is smaller in memory than its shape says."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def mutated_operands(function: Any, operands: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    """The operands that the operator writes to, as its schema says; `out=` comes last among the operands."""
    targets: list[Tensor] = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        if argument.kwarg_only:
            targets.append(operands[-1])
        elif position < len(arguments):
            given = arguments[position]
            targets += given if isinstance(given, list | tuple) else [given]
    return [target for target in targets if isinstance(target, Tensor)]


def _logit_traffic(hidden: Tensor, weight: Tensor, of_hidden: bool, of_weight: bool) -> tuple[int, int]:
    """(read, written) bytes of the chunks of logits in kernels/linear_cross_entropy.py, which no operand shows.

    They are made by the product; their maximum is taken and subtracted, the exponentials are taken and summed; for
    gradients they are scaled, and read by each product.
    """
    products = int(of_hidden) + int(of_weight)
    logits = hidden.shape[0] * weight.shape[0] * max(4, hidden.element_size())
    return logits * (4 + bool(products) + products), logits * (3 + bool(products))


def _argument(function: Any, arguments: Sequence[Any], name: str) -> Any:
    """The positional argument that the schema calls so; None if there is none."""
    named = (given for known, given in zip(function._schema.arguments, arguments, strict=False) if known.name == name)
    return next(named, None)


def _only_written(function: Any, tensor: Tensor, mutated: Sequence[Tensor]) -> bool:
    """Whether an operand is where the result goes: `out=`, or the target of a copy or a fill."""
    overwrites = function._overloadname == "out" or function.overloadpacket.__name__ in OVERWRITES
    return overwrites and any(tensor is target for target in mutated)


def _arithmetic(name: str, arguments: Sequence[Any], results: Sequence[Tensor]) -> tuple[str, float, tuple[int, ...]]:
    """(family, FLOPs, shape as collectives.trace.Kernel wants it). A multiply-add counts two."""
    match name:
        case "mm" | "addmm":
            left, right = arguments[-2:]
            shape = (1, left.shape[0], right.shape[1], left.shape[1])
        case "bmm" | "baddbmm":
            left, right = arguments[-2:]
            shape = (left.shape[0], left.shape[1], right.shape[2], left.shape[2])
        case "head_products":
            left, right = arguments
            shape = (left.shape[0] * left.shape[1], left.shape[2], right.shape[3], left.shape[3])
        case _ if name in ATTENTION:
            return (
                "attention",
                _attention_flops(arguments[0], arguments[1], matmuls=2),
                _attention_shape(*arguments[:2]),
            )
        case "attention_backward":
            # scores again, then the gradients of value, probabilities, query and key (Dao et al. 2022, algorithm 4)
            return (
                "attention",
                _attention_flops(arguments[1], arguments[2], matmuls=5),
                _attention_shape(*arguments[1:3]),
            )
        case "linear_cross_entropy":
            # the logits and the gradients of both factors: as many products, each as large
            hidden, weight = arguments[:2]
            shape = (1 + sum(map(bool, arguments[3:5])), hidden.shape[0], weight.shape[0], hidden.shape[1])
        case "convolution":
            flops = conv_flop(*arguments, out_val=results[0])
            return "convolution", float(flops), tuple(results[0].shape)
        case "convolution_backward":
            made = iter(results)  # without the gradients that nobody wanted
            gradients = [next(made) if wanted else None for wanted in arguments[-1]]
            flops = conv_backward_flop(*arguments, out_val=gradients)
            return "convolution", float(flops), tuple(arguments[0].shape)
        case _:
            return "memory", 0.0, tuple(results[0].shape) if results else ()
    batch, m, n, k = shape
    return "matmul", 2.0 * batch * m * n * k, shape


def _attention_shape(query: Tensor, key: Tensor) -> tuple[int, ...]:
    *batch, heads, queries, size = query.shape
    return (batch[0] if batch else 1, heads, queries, key.shape[-2], size)


def _attention_flops(query: Tensor, key: Tensor, matmuls: int) -> float:
    """Causal attention is counted in full, as is customary for model FLOPs."""
    batch, heads, queries, keys, size = _attention_shape(query, key)
    return 2.0 * matmuls * batch * heads * queries * keys * size
