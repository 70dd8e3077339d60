"""Chains of element-wise kernels as the one kernel that a fusing compiler, or hand-written fused code, makes of them.

A chain is a run of element-wise kernels on as many elements each, with nothing that computes, communicates or waits in
between. Fused, a value that one kernel hands to the next stays in registers.

A trace does not say which tensors a kernel reads, so this is an approximation. A kernel is taken to read what its
neighbour before it wrote, if it reads as many bytes; that much reading is saved. The writing is saved only of storages
that are freed before the chain ends: what lives on, such as an activation that backward needs, is written as before.
"""

from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from math import prod

from ..collectives.trace import Alloc, Free, Kernel, Op, Segment

FUSIONS = ("none", "elementwise")
"""How the element-wise kernels of a trace are priced: each by itself, or in chains."""

FUSED = "fused"

ELEMENTWISE = frozenset({
    "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "pow",
    "reciprocal", "clamp", "where", "masked_fill", "tanh", "tanh_backward", "sigmoid", "sigmoid_backward", "relu",
    "threshold_backward", "gelu", "gelu_backward", "silu", "silu_backward", "mish", "mish_backward", "addcmul",
    "addcdiv", "lerp", "native_dropout", "native_dropout_backward", "bernoulli_", "_to_copy", "copy_", "clone",
    "zeros_like", "ones_like", "fill_", "zero_", FUSED,
})  # fmt: skip
"""Operators that compute each element of their result from the same elements of their operands."""

MOVES = (Kernel, Alloc, Free)
"""Ops that a chain reaches across: its own kernels, and the bookkeeping of memory."""


def fuse(segment: Segment, keys: Collection[str]) -> list[tuple[int, Op]]:
    """(position, op) of a segment, its chains each as one kernel at the position of their last.

    Positions are those of the segment as it is, because waits elsewhere point to them.

    Args:
        keys: as which the segment is run; a Free that points to one of them points into this segment.
    """
    fused: list[tuple[int, Op]] = []
    chain: list[int] = []
    for position, op in enumerate(segment):
        if isinstance(op, Kernel) and chain and _continues(op, segment[chain[-1]]):
            chain.append(position)
            continue
        if isinstance(op, Kernel) or not isinstance(op, MOVES):
            fused += _joined(segment, chain, keys)
            chain = []
        if isinstance(op, Kernel) and op.name in ELEMENTWISE:
            chain = [position]
        else:
            fused.append((position, op))
    fused += _joined(segment, chain, keys)
    return sorted(fused, key=lambda pair: pair[0])


def _continues(kernel: Kernel, before: Op) -> bool:
    assert isinstance(before, Kernel)
    return kernel.name in ELEMENTWISE and prod(kernel.shape) == prod(before.shape)


def _joined(segment: Segment, chain: list[int], keys: Collection[str]) -> list[tuple[int, Op]]:
    """The kernel that stands for a chain of positions."""
    kernels = [op for op in (segment[position] for position in chain) if isinstance(op, Kernel)]
    if len(kernels) < 2:
        return [(position, segment[position]) for position in chain]
    read, write = kernels[0].read_bytes, kernels[-1].write_bytes
    for number, (kernel, following) in enumerate(pairwise(kernels)):
        handed = kernel.write_bytes if following.read_bytes >= kernel.write_bytes else 0
        read += following.read_bytes - handed
        dead = _dead_bytes(segment, chain[number - 1] if number else None, chain[number], chain[-1], keys)
        write += kernel.write_bytes - min(dead, kernel.write_bytes)
    last = kernels[-1]
    return [(chain[-1], replace(last, name=FUSED, read_bytes=read, write_bytes=write))]


def _dead_bytes(segment: Segment, before: int | None, position: int, end: int, keys: Collection[str]) -> int:
    """Bytes that the kernel at `position` allocates and that are free again when the next thing after `end` begins.

    A kernel's results are allocated just before it.
    """
    made = _allocated(segment, before, position)
    after = next((n for n in range(end + 1, len(segment)) if not isinstance(segment[n], Free)), len(segment))
    freed = {
        op.ref.op
        for op in segment[position + 1 : after]
        if isinstance(op, Free) and op.ref.key in keys and (op.ref.relative, op.ref.block, op.ref.age) == (True, 0, 0)
    }
    return sum(nbytes for place, nbytes in made.items() if place in freed)


def _allocated(segment: Segment, before: int | None, position: int) -> dict[int, int]:
    """Bytes by position of the allocations between the kernel before and the one at `position`."""
    first = 0
    for place in range(position - 1, -1 if before is None else before, -1):
        if not isinstance(segment[place], Alloc | Free):
            first = place + 1
            break
    else:
        first = 0 if before is None else before + 1
    between = ((place, segment[place]) for place in range(first, position))
    return {place: op.nbytes for place, op in between if isinstance(op, Alloc)}
