"""Which parameters travel together: the repeated blocks of a model, else its root.

A parameter belongs to the deepest unit module that contains *all* its users, so a tied embedding belongs to the root
even when one of its users sits in a block.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .roles import WHOLE, Role, role_of


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter by its first name, and where the optimizer puts it."""

    name: str
    parameter: nn.Parameter
    group: int


@dataclass(frozen=True, slots=True)
class Part:
    """What becomes one flat unit: parameters of one unit module that share dtype, trainability, group and role.

    Attributes:
        owner: the unit module, whose forward needs them.
        block: its number among the repeated blocks, -1 for the root.
        number: its number among the parts of its owner.
        persistent: its parameters stay whole on every rank, even where parameters are sharded.
        role: what its parameters are to the ranks that share the model.
    """

    owner: nn.Module
    block: int
    slots: tuple[Slot, ...]
    number: int = 0
    persistent: bool = False
    role: Role = WHOLE

    @property
    def trainable(self) -> bool:
        return self.slots[0].parameter.requires_grad

    @property
    def dtype(self) -> torch.dtype:
        return self.slots[0].parameter.dtype

    @property
    def label(self) -> str:
        name = "root" if self.block < 0 else f"block {self.block}"
        name += f" part {self.number}" if self.number else ""
        return name if self.trainable else f"{name} (frozen)"


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The children of every ModuleList or Sequential of two or more modules of one class with parameters.

    Outermost lists win: blocks inside a block are part of it.
    """
    children = list(model.children())
    if isinstance(model, nn.ModuleList | nn.Sequential) and len(children) > 1:
        same = len({type(child) for child in children}) == 1
        if same and all(next(child.parameters(), None) is not None for child in children):
            return list(dict.fromkeys(children))
    found = (block for child in children for block in repeated_blocks(child))
    return list(dict.fromkeys(found))


def partition(
    model: nn.Module,
    groups: Sequence[dict],
    units: Iterable[nn.Module] | None = None,
    *,
    bucket_elements: float = math.inf,
    persistent_below: int = 0,
) -> tuple[list[nn.Module], list[Part]]:
    """Cut a model into parts.

    Args:
        groups: the optimizer's parameter groups, each with a list of parameters under "params".
        units: unit modules that override the repeated blocks.
        bucket_elements: a part with more elements than this is cut between its parameters into several; a parameter
            that is larger by itself is a part by itself.
        persistent_below: parameters with fewer elements than this are put into persistent parts.

    Returns:
        The unit modules in order of registration (not the root), and the parts, those of the root first.

    Raises:
        ValueError: a unit or an optimized parameter that is not in the model, or a trainable one in no group.
    """
    blocks = repeated_blocks(model) if units is None else list(dict.fromkeys(units))
    blocks = [block for block in blocks if block is not model]
    known = set(model.modules())
    for block in blocks:
        if block not in known:
            raise ValueError(f"units: {type(block).__name__} is not a module of the model")
    number = {block: index for index, block in enumerate(blocks)}
    homes = _homes(model, number)
    group_of = _groups_by_parameter(model, groups)
    parts: dict[tuple, list[Slot]] = {}
    for name, parameter in model.named_parameters():
        group = group_of.get(parameter, -1)
        if parameter.requires_grad and group < 0:
            raise ValueError(f"parameter {name!r} requires a gradient but is in no parameter group of the optimizer")
        owner = homes[parameter]
        persistent = parameter.numel() < persistent_below
        role = role_of(parameter)
        key = (number.get(owner, -1), owner, persistent, role, parameter.dtype, parameter.requires_grad, group)
        parts.setdefault(key, []).append(Slot(name, parameter, group))
    cut: list[Part] = []
    count: Counter[nn.Module] = Counter()
    for (block, owner, persistent, role, *_), slots in parts.items():
        for bucket in _buckets(slots, bucket_elements):
            cut.append(Part(owner, block, bucket, count[owner], persistent, role))
            count[owner] += 1
    return blocks, sorted(cut, key=lambda part: part.block)


def _buckets(slots: list[Slot], limit: float) -> Iterator[tuple[Slot, ...]]:
    """Neighbours whose elements together stay within the limit, at least one each."""
    bucket: list[Slot] = []
    elements = 0
    for slot in slots:
        if bucket and elements + slot.parameter.numel() > limit:
            yield tuple(bucket)
            bucket, elements = [], 0
        bucket.append(slot)
        elements += slot.parameter.numel()
    yield tuple(bucket)


def _homes(model: nn.Module, number: dict[nn.Module, int]) -> dict[nn.Parameter, nn.Module]:
    """The deepest unit (or the root) that contains all users of each parameter.

    Paths are followed with duplicates: a module registered in two places makes its parameters users of both.
    """
    chains: dict[nn.Parameter, list[nn.Module]] = {}

    def visit(module: nn.Module, chain: list[nn.Module]) -> None:
        if module in number:
            chain = [*chain, module]
        for parameter in module._parameters.values():
            if parameter is not None:
                before = chains.get(parameter, chain)
                common = [a for a, b in zip(before, chain, strict=False) if a is b]
                chains[parameter] = common
        for child in module._modules.values():
            if child is not None:
                visit(child, chain)

    visit(model, [model])
    return {parameter: chain[-1] for parameter, chain in chains.items()}


def _groups_by_parameter(model: nn.Module, groups: Sequence[dict]) -> dict[nn.Parameter, int]:
    known = set(model.parameters())
    numbered = {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
    foreign = [parameter for parameter in numbered if parameter not in known]
    if foreign:
        raise ValueError(f"the optimizer has a parameter of shape {tuple(foreign[0].shape)} that is not in the model")
    return numbered
