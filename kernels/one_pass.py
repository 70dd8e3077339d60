"""An optimizer's step in one pass over memory: gradients of any dtype in, new masters and their low-precision copy out.

A step of AdamW reads master, gradient and two moments and writes three of them: 28 bytes per parameter in fp32. What
usually surrounds it moves the same values again: gradients are widened, unscaled and clipped, their norm is taken, the
master is copied to 16 bits (Ren et al. 2021, ZeRO-Offload, section 5.1, fuse the last with the step for CPUs). What an
element becomes needs that element alone, so that tensors may be cut anywhere.

A `Rule` is an optimizer with its values for one step; kernels/adamw.py, sgd.py and lion.py have one each.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Elements per chunk: few enough that widened gradients take little memory, enough that calls cost nothing."""

COPY_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Floating dtypes that gradients come and copies go in."""


class Shards(NamedTuple):
    """What a pass goes over: lists of tensors, alike in order, in numbers of elements and in device; all contiguous.

    Attributes:
        masters: fp32 or float64; stepped in place.
        gradients: of any floating dtype; read.
        moments: for each of the rule's moments a list, in the dtype of the masters; updated in place.
        steps: for each tensor a scalar, how many steps it has taken with this one; none for rules that do not count.
        copies: of any floating dtype, take the new masters; none if empty. May share memory with gradients that have
            the same dtype: a chunk's gradient is read before its copy is written.
    """

    masters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    moments: tuple[Sequence[Tensor], ...]
    steps: Sequence[Tensor]
    copies: Sequence[Tensor] = ()


class HasMoments(Protocol):
    """One step of an optimizer.

    Attributes:
        moments: how an optimizer's state names them, in order.
    """

    @property
    def moments(self) -> tuple[str, ...]: ...


class Rule(HasMoments, Protocol):
    """One step of an element-wise optimizer."""

    def plain_(self, master: Tensor, gradient: Tensor, moments: Sequence[Tensor], step: float) -> None:
        """The formula, in place on `master` and `moments` [n]."""

    def fused_(self, shards: Shards) -> None:
        """The same in as few operators as torch has for it; gradients are in the dtype of the masters."""


def plain_step_(rule: Rule, shards: Shards, *, multiplier: float = 1.0) -> Tensor:
    """The reference: one operator after another over whole tensors.

    Args:
        multiplier: of the gradients: 1 / loss scale, and the coefficient of clipping.

    Returns:
        The sum of squares of the multiplied gradients, a scalar in float64. It is not finite if one of them is not;
        what was stepped by that one is spoiled, as it would be in torch.

    Raises:
        ValueError: a dtype or a layout that is not allowed.
    """
    check(rule, shards)
    squares = torch.zeros((), dtype=torch.float64, device=shards.masters[0].device if shards.masters else "cpu")
    for number, (master, gradient) in enumerate(zip(shards.masters, shards.gradients, strict=True)):
        multiplied = gradient.to(master.dtype) * multiplier
        squares += multiplied.double().square().sum()
        step = float(shards.steps[number]) if shards.steps else 0.0
        rule.plain_(master, multiplied, [moment[number] for moment in shards.moments], step)
        if shards.copies:
            shards.copies[number].copy_(master)
    return squares


def chunked_step_(rule: Rule, shards: Shards, *, multiplier: float = 1.0, chunk: int = CHUNK) -> Tensor:
    """As `plain_step_`, a chunk at a time, by torch's fused operators where it has them.

    Sums of squares are of fp32 within a chunk, of float64 over chunks.

    Args:
        chunk: elements that are worked on together, of one tensor or of several small ones.
    """
    check(rule, shards)
    squares: list[Tensor] = []
    for part in chunks(shards, chunk):
        gradients = [multiplied(g, m.dtype, multiplier) for g, m in zip(part.gradients, part.masters, strict=True)]
        squares += [torch.dot(gradient, gradient) for gradient in gradients]
        rule.fused_(part._replace(gradients=gradients))
        if part.copies:
            torch._foreach_copy_(list(part.copies), list(part.masters))
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(squares).double().sum()


def multiplied(gradient: Tensor, dtype: torch.dtype, multiplier: float) -> Tensor:
    """`gradient` widened and multiplied; itself if there is nothing to do."""
    if multiplier == 1.0:
        return gradient.to(dtype)
    # widened first: the product would be rounded in the narrow format
    return gradient * multiplier if gradient.dtype == dtype else gradient.to(dtype).mul_(multiplier)


def chunks(shards: Shards, elements: int) -> Iterator[Shards]:
    """The shards in parts of about `elements` each: small tensors together, large ones cut; empty ones left out."""
    taken: list[tuple[int, slice]] = []
    room = elements
    for number, master in enumerate(shards.masters):
        for start in range(0, master.numel(), elements):
            stop = min(start + elements, master.numel())
            if taken and stop - start > room:
                yield _part(shards, taken)
                taken, room = [], elements
            taken.append((number, slice(start, stop)))
            room -= stop - start
    if taken:
        yield _part(shards, taken)


def _part(shards: Shards, taken: list[tuple[int, slice]]) -> Shards:
    def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[number].view(-1)[where] for number, where in taken] if tensors else []

    return Shards(
        cut(shards.masters),
        cut(shards.gradients),
        tuple(cut(moment) for moment in shards.moments),
        [shards.steps[number] for number, _ in taken] if shards.steps else [],
        cut(shards.copies),
    )


def check(rule: HasMoments, shards: Shards) -> None:
    """Raise a ValueError that names what does not fit of the shards."""
    if len(shards.moments) != len(rule.moments):
        raise ValueError(
            f"{type(rule).__name__} got {len(shards.moments)} lists of moments; allowed: {len(rule.moments)},"
            f" {', '.join(rule.moments)}"
        )
    lists = {"gradients": shards.gradients, **dict(zip(rule.moments, shards.moments, strict=True))}
    if shards.copies:
        lists["copies"] = shards.copies
    for name, tensors in lists.items():
        if len(tensors) != len(shards.masters):
            raise ValueError(f"{len(tensors)} {name} for {len(shards.masters)} masters; allowed: as many")
    for number, master in enumerate(shards.masters):
        if master.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"masters[{number}] is {master.dtype}; allowed: torch.float32, torch.float64")
        _check_tensor(f"masters[{number}]", master, master, COPY_DTYPES)
        for name, tensors in lists.items():
            dtypes = COPY_DTYPES if name in ("gradients", "copies") else (master.dtype,)
            _check_tensor(f"{name}[{number}]", tensors[number], master, dtypes)


def _check_tensor(name: str, tensor: Tensor, master: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass a contiguous tensor, or step a copy of it")
    if tensor.numel() != master.numel():
        raise ValueError(f"{name} has {tensor.numel()} elements; allowed: {master.numel()}, those of its master")
    if tensor.device != master.device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {master.device}, where its master is")
