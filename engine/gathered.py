"""`zero.Init` and `zero.GatheredParameters`: sharded parameters whole for a while, for a script to read or set."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .unit import FlatUnit
from .zero import ZeroRuntime


@contextmanager
def Init(  # noqa: N802  (scripts call it as the class that it is there)
    module: nn.Module | None = None,
    *,
    config_dict_or_path: Any = None,
    dtype: torch.dtype | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """Build a model inside.

    A model is built whole, in host memory, on every rank; `initialize` cuts it and frees what is not this rank's, unit
    by unit. So this saves no memory while a model is built, and it need not be used.

    Args:
        module: accepted and left as it is.
        config_dict_or_path: accepted; `initialize` reads its own.
        dtype: of floating-point tensors that are made inside without a dtype of their own.
        enabled: False makes the context do nothing.
    """
    before = torch.get_default_dtype()
    if enabled and dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_runtimes: "weakref.WeakSet[ZeroRuntime]" = weakref.WeakSet()


def remember(runtime: ZeroRuntime) -> None:
    """From now on `GatheredParameters` knows the runtime's parameters."""
    _runtimes.add(runtime)


@contextmanager
def GatheredParameters(  # noqa: N802  (as above)
    params: Iterable[nn.Parameter] | nn.Parameter,
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """Inside, these parameters are whole on every rank; all ranks must enter, between steps.

    A unit is gathered as a whole, so up to the units of these parameters are in memory at once. Parameters that no
    engine trains are whole anyway, and are left alone.

    Args:
        modifier_rank: the rank whose values all ranks train on with afterwards; None if none changes them (changes to
            sharded parameters are then lost).
        fwd_module: accepted; the parameters are freed at the end whatever module used them.
        enabled: False makes the context do nothing.

    Raises:
        ValueError: a modifier_rank that there is not.
    """
    wanted = {params} if isinstance(params, nn.Parameter) else set(params)
    units = [unit for runtime in _runtimes for unit in runtime.units if not wanted.isdisjoint(unit.parameters)]
    if not enabled or not units:
        yield
        return
    _check_rank(modifier_rank, units[0].groups.everyone.world)
    for unit in units:
        with unit.groups.uncompressed():
            unit.gather()
            unit.arrive()
    try:
        yield
        if modifier_rank is not None:
            for unit in units:
                _spread(unit, modifier_rank)
    finally:
        for unit in units:
            unit.free()


def _check_rank(rank: int | None, world: int) -> None:
    if rank is not None and not 0 <= rank < world:
        raise ValueError(f"modifier_rank = {rank}; allowed: 0 to {world - 1}, or None")


def _spread(unit: FlatUnit, root: int) -> None:
    """One rank's values of a unit to all ranks, to train on."""
    with unit.groups.uncompressed(), torch.no_grad():
        unit.groups.everyone.broadcast(unit.full, f"parameters set in {unit.label}", root).wait()
    unit.adopt()
