"""A model's parameters in flat units, with the same values on all ranks that are to have them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .config import Config
from .device import DTYPES
from .groups import Groups
from .optimizer import layouts
from .partition import partition
from .tier import Tiers
from .unit import FlatUnit


def flat_units(
    model: nn.Module,
    settings: Config,
    groups: Groups,
    pattern: torch.optim.Optimizer,
    parameter_groups: Sequence[dict[str, Any]],
    units: Iterable[nn.Module] | None = None,
    tiers: Tiers | None = None,
) -> tuple[list[nn.Module], list[FlatUnit]]:
    """The unit modules of a model, and its units with this rank's shards. All ranks that share the model call it.

    Args:
        parameter_groups: the pattern's, with no parameters but the model's.
        units: modules whose parameters travel together; else the repeated blocks of the model.
        tiers: where what need not be on the device rests.

    Raises:
        ValueError: units, parameters and groups that do not fit each other.
    """
    blocks, parts = partition(
        model,
        parameter_groups,
        units,
        bucket_elements=settings.buffers.bucket_elements,
        persistent_below=settings.buffers.persistent_below if settings.zero.parameters else 0,
    )
    layout_of = layouts(pattern, parts, settings.placement)
    observer = groups.run.observer
    flat = []
    for part in parts:
        observer.enter("initialize", part.block)
        dtype = DTYPES.get(settings.precision, part.dtype)
        gradients = DTYPES.get(settings.formats.gradients, dtype)
        unit = FlatUnit(part, settings.zero, groups.of(part.role), dtype, observer, gradients)
        groups.replicate([unit.full], part.role)
        # The gradients of what stages share are summed on the device, after those of all micro-batches.
        unit.take_shard(tiers, None if unit.groups.sums_beside else layout_of.get(part))
        flat.append(unit)
    return blocks, flat


def narrow_buffers(model: nn.Module, settings: Config, groups: Groups) -> None:
    """Floating-point buffers follow the parameters' precision, else they would widen what they meet; all have equal
    values on data-parallel ranks.
    """
    with groups.run.observer.category("buffers"):
        if settings.precision in DTYPES:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.data = buffer.to(DTYPES[settings.precision])
    groups.everyone.replicate(model.buffers())
