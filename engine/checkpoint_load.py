"""A checkpoint into an engine: which one, is it whole, does it fit, and this rank's part of it."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checkpoint_files as files
from . import run_state
from .agreement import DisagreementError, all_or_none, everyones
from .checkpoint_files import CheckpointError, Manifest
from .checkpoint_plan import BUFFERS, OPTIMIZER, PARAMETERS, RANKS, RUN, Region, Stock
from .communicator import Communicator
from .optimizer import Held

if TYPE_CHECKING:
    from .engine import Engine


def chosen(host: Communicator, load_dir: Path, tag: str | None, fall_back: bool) -> Path | None:
    """The folder to load, its files checked; None where nothing was ever saved and no tag is asked for.

    Raises:
        CheckpointError: a tag that is not there, or is damaged.
    """
    (found, *_) = everyones(host, (tag or files.latest_tag(load_dir)), "tag")
    if found is None:
        return None
    others = files.others_than(load_dir, found) if fall_back else []
    (candidates, *_) = everyones(host, [found, *others], "tags")
    for candidate in candidates:
        try:
            folders = all_or_none(host, partial(_checked, host, load_dir, candidate), f"check {candidate}")
            return Path(folders[0])
        except DisagreementError as error:
            if candidate == candidates[-1]:
                raise files.with_advice(CheckpointError(str(error)), load_dir, found) from error
    raise AssertionError("the last candidate returns or raises")


def _checked(host: Communicator, load_dir: Path, tag: str) -> str:
    """The ranks share the work of reading every file."""
    folder = files.folder_of(load_dir, tag)
    manifest = Manifest.read(folder)
    files.check_files(folder, manifest, sorted(manifest.files)[host.rank :: host.world])
    return os.fspath(folder)


def restore(
    engine: "Engine",
    folder: Path,
    everywhere: set[str],
    *,
    strict: bool,
    optimizer: bool,
    lr_scheduler: bool,
    module_only: bool,
) -> dict[str, Any]:
    """This rank's part of a checkpoint into the engine; the client's state.

    Args:
        everywhere: names of parameters and buffers that any rank of this run has.
    """
    manifest, stock = Manifest.read(folder), Stock(folder)
    module_tensors, _ = run_state.split(run_state.buffers(engine))
    _compare(engine, manifest, everywhere, optimizer=optimizer, strict=strict)
    rank = f"{RANKS}{engine.communicator.rank}"
    same_rank = manifest.world == engine.communicator.world and rank in stock.objects
    records = stock.read({}, [RUN, rank] if same_rank else [RUN])
    run = run_state.from_bytes(records[RUN])
    own = run_state.from_bytes(records[rank]) if same_rank else None
    if own is not None and own["mesh"] != run_state.mesh(engine):
        own = None

    # What can still be refused comes first, so that a refusal leaves the engine as it was.
    if not module_only:
        run_state.check_stateful(engine, run["stateful"])
    if optimizer:
        run_state.restore_groups(engine, run["groups"])

    states = _states_by_parameter(stock) if optimizer else {}
    for held in engine.optimizer.held():
        if held.name in manifest.parameters:
            engine.optimizer.put(held, _read_values(stock, held, states.get(held.name, [])))
    values = {name: stock.whole(BUFFERS + name) for name in module_tensors if name in manifest.buffers}
    values |= own["buffers"] if own is not None else {}
    engine.module.load_state_dict(values | run["extra_state"], strict=False)

    if lr_scheduler and engine.lr_scheduler is not None and run["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(run["lr_scheduler"])
    if not module_only:
        engine.global_steps = run["global_steps"]
        engine.micro_steps = engine.global_steps * engine.settings.accumulation
        for name, thing in engine.stateful.items():
            thing.load_state_dict(run["stateful"][name])
        if own is not None:
            run_state.restore_rank(engine, own)
    client_state: dict[str, Any] = run["client_state"]
    return client_state


def names(engine: "Engine") -> set[str]:
    """Of this rank's parameters and buffers."""
    module_tensors, _ = run_state.split(run_state.buffers(engine))
    return {slot.name for slot in run_state.slots(engine)} | set(module_tensors)


def _compare(engine: "Engine", manifest: Manifest, mine: set[str], *, optimizer: bool, strict: bool) -> None:
    """Whether a checkpoint is of this model and optimizer.

    Raises:
        ValueError: naming what differs.
    """
    here = {slot.name: run_state.whole_shape(slot) for slot in run_state.slots(engine)}
    there = manifest.parameters
    for name, shape in here.items():
        if shape != there.get(name, shape):
            raise ValueError(f"parameter {name} has shape {shape}, in the checkpoint {there[name]}")
    saved = there.keys() | set(manifest.buffers)
    if strict and mine != saved:
        raise ValueError(
            f"the checkpoint lacks {_some(mine - saved)} and has {_some(saved - mine)} that the model lacks; allowed:"
            " the same names, or load_module_strict=False"
        )
    if optimizer and manifest.optimizer != engine.optimizer.kind.__name__:
        raise ValueError(
            f"the optimizer is {engine.optimizer.kind.__name__}, in the checkpoint {manifest.optimizer}; allowed: the"
            " same, or load_optimizer_states=False"
        )


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return (", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")) or "nothing"


def _states_by_parameter(stock: Stock) -> dict[str, list[str]]:
    """Names of the optimizer's state of each parameter."""
    states: dict[str, list[str]] = {}
    for key in [*stock.sizes, *stock.objects]:
        if key.startswith(OPTIMIZER):
            _, state, name = key.split("/", 2)
            states.setdefault(name, []).append(state)
    return states


def _read_values(stock: Stock, held: Held, states: list[str]) -> dict[str, Any]:
    """What `ShardedOptimizer.put` takes: on the host, in the dtypes that this run steps in.

    State in the dtype of the saved parameter follows the parameter's dtype here; state in any other (8 or 16 bits, by
    choice of the optimizer) stays as it is.
    """
    saved = stock.dtypes[PARAMETERS + held.name]
    values: dict[str, Any] = {}
    regions: dict[Region, Tensor] = {}
    scalars: dict[str, str] = {}
    for name, key in [("parameter", PARAMETERS + held.name), *((s, f"{OPTIMIZER}{s}/{held.name}") for s in states)]:
        if key in stock.objects:
            scalars[key] = name
            continue
        dtype = held.unit.wide if stock.dtypes[key] == saved else stock.dtypes[key]
        values[name] = torch.zeros(held.elements, dtype=dtype)  # which padding keeps
        for chunk in held.chunks:
            regions[Region(key, chunk.offset, chunk.shape, held.shape)] = chunk.of(values[name])
    for key, data in stock.read(regions, scalars).items():
        values[scalars[key]] = run_state.from_bytes(data)
    return values
