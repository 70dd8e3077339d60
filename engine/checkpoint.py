"""Checkpoints of an engine: saved at any layout, loaded at any other; whole or absent; in the background if asked.

[Note: who talks when]
A save begins with one collective of training's communicator, on the main thread: a rank that does not save is seen
there, and named. All further agreement goes over a communicator of its own on the host, made at the first save, which
one thread of each rank uses at a time: the main thread to plan, then, if the save is asynchronous, the writing thread.
A next save, a load and `close` wait for that thread first. So nothing of it can come between collectives of training.
"""

import os
import secrets
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from . import checkpoint_files as files
from . import run_state
from .agreement import Disagreement, all_or_none, everyones
from .checkpoint_files import CheckpointError, DigestingFiles, Manifest, Stored
from .checkpoint_plan import Region, RegionSavePlanner, Source, Stock
from .communicator import Communicator
from .device import end_host_communicator, host_communicator
from .optimizer import Held

if TYPE_CHECKING:
    from .engine import Engine

PARAMETERS, OPTIMIZER, BUFFERS, RANKS, RUN = "parameters/", "optimizer/", "buffers/", "ranks/", "run"
"""Keys in a checkpoint: parameters/NAME, optimizer/STATE/NAME, buffers/NAME, ranks/NUMBER, run."""


class Checkpoints:
    """What one engine has saved and is saving."""

    def __init__(self, engine: "Engine", timeout_s: float) -> None:
        self.engine, self.timeout_s = engine, timeout_s
        self._host: Communicator | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="windtunnel checkpoint")  # ended before Python is
        self._pending: Future[None] | None = None

    def save(
        self,
        save_dir: Path,
        tag: str,
        client_state: Mapping[str, Any],
        *,
        save_latest: bool,
        asynchronous: bool,
        keep_last: int | None,
    ) -> Path:
        """See Engine.save_checkpoint."""
        self.wait()
        engine = self.engine
        files.check_tag(tag)
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last = {keep_last}; allowed: at least 1, or None to keep all")
        if engine.device.type == "sim":
            raise ValueError("save_checkpoint: a model on the sim device has shapes and no values; use cpu or cuda")
        if engine.runtime.micro_step:
            raise ValueError(
                f"save_checkpoint after micro-step {engine.runtime.micro_step} of {engine.settings.accumulation}: the"
                " gradients accumulated so far would be lost; save after the engine.step() that ends the batch"
            )
        host = self._meet("save_checkpoint")
        saving = _Saving(engine, host, save_dir, tag, save_latest=save_latest, keep_last=keep_last)
        saving.prepare(client_state)
        if asynchronous:
            saving.planner.stage()
            self._pending = self._writer.submit(saving.perform)
        else:
            saving.perform()
        return saving.folder

    def wait(self) -> None:
        """Wait for an asynchronous save.

        Raises:
            CheckpointError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for what is being saved, and give back the thread and the communicator.

        Raises:
            CheckpointError: an asynchronous save failed.
        """
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            if self._host is not None:
                end_host_communicator(self._host)
                self._host = None

    def _meet(self, call: str) -> Communicator:
        """All ranks make this call: see [Note: who talks when]."""
        self.engine.settle()
        here = torch.ones(1, dtype=torch.int32, device=self.engine.device)
        self.engine.communicator.all_reduce(here, call, largest=True, scalar=True).wait()
        if self._host is None:
            self._host = host_communicator(self.engine.communicator, self.timeout_s)
        return self._host

    def load(
        self,
        load_dir: Path,
        tag: str | None,
        *,
        strict: bool,
        optimizer: bool,
        lr_scheduler: bool,
        module_only: bool,
        fall_back: bool,
    ) -> tuple[str | None, dict[str, Any]]:
        """See Engine.load_checkpoint."""
        self.wait()
        host = self._meet("load_checkpoint")
        folder = _chosen(host, load_dir, tag, fall_back)
        if folder is None:
            return None, {}
        try:
            (state, *_) = all_or_none(
                host,
                partial(
                    _restore,
                    self.engine,
                    folder,
                    strict=strict,
                    optimizer=optimizer and not module_only,
                    lr_scheduler=lr_scheduler and not module_only,
                    module_only=module_only,
                ),
                f"load {folder.name}",
            )
        except Disagreement as error:
            raise CheckpointError(f"checkpoint {folder.name!r} in {load_dir} does not fit this run: {error}") from error
        self.engine.optimizer.publish()
        self.engine.settle()
        return str(folder), state


class _Saving:
    """One save: planned and, if it is asynchronous, staged on the main thread; then performed on any."""

    def __init__(
        self,
        engine: "Engine",
        host: Communicator,
        save_dir: Path,
        tag: str,
        *,
        save_latest: bool,
        keep_last: int | None,
    ) -> None:
        self.engine, self.host, self.save_dir, self.tag = engine, host, save_dir, tag
        self.save_latest, self.keep_last = save_latest, keep_last
        self.folder = save_dir / tag

    def prepare(self, client_state: Mapping[str, Any]) -> None:
        """Agree on what each rank writes, and take what must be of this moment."""
        token = secrets.token_hex(4)
        asked = (str(self.save_dir.absolute()), self.tag, self.engine.global_steps)
        try:
            begun = all_or_none(self.host, partial(self._begin, token, asked), f"begin {self.tag}")
            self.partial: Path = begun[0][0]
            for rank, (_, theirs) in enumerate(begun):
                if theirs != begun[0][1]:
                    raise ValueError(f"save_checkpoint (folder, tag, steps): rank 0 has {begun[0][1]}, rank {rank} {theirs}")
            planned = all_or_none(self.host, partial(self._plan, client_state), f"plan {self.tag}")
        except Disagreement as error:
            raise self._failed(error) from error
        plans, self.metadata = self.planner.create_global_plan([plan for plan, _ in planned])
        mine: SavePlan = self.writer.prepare_global_plan(plans)[self.host.rank]
        self.plan = self.planner.finish_plan(mine)
        self.manifest: Manifest = planned[0][1]

    def _begin(self, token: str, asked: tuple[str, str, int]) -> tuple[Path, tuple[str, str, int]]:
        folder = files.begin(self.save_dir, self.tag, token) if self.host.rank == 0 else self.save_dir
        return folder, asked

    def _plan(self, client_state: Mapping[str, Any]) -> tuple[SavePlan, Manifest]:
        if not self.partial.is_dir():
            raise FileNotFoundError(f"{self.partial}, which rank 0 made, is not seen here: save_dir must be shared")
        tensors, objects = _contents(self.engine, self.host, client_state)
        self.planner = RegionSavePlanner(tensors, objects)
        self.files = DigestingFiles()
        self.writer = FileSystemWriter(self.partial)
        self.writer.fs = self.files
        rank = self.host.rank
        self.planner.set_up_planner({}, is_coordinator=rank == 0)
        self.writer.set_up_storage_writer(is_coordinator=rank == 0, rank=rank, use_collectives=True)
        return self.writer.prepare_local_plan(self.planner.create_local_plan()), _manifest(self.engine, self.tag)

    def perform(self) -> None:
        """Write this rank's files, and let rank 0 make the checkpoint the one of its tag when all have.

        Raises:
            CheckpointError: any rank could not; what was there before is untouched.
        """
        try:
            written = all_or_none(self.host, self._write, f"write {self.tag}")
            all_or_none(self.host, partial(self._finish, written), f"finish {self.tag}")
        except Disagreement as error:
            raise self._failed(error) from error

    def _write(self) -> tuple[list[WriteResult], dict[str, Stored]]:
        try:
            return self.writer.write_data(self.plan, self.planner).value(), dict(self.files.stored)
        except Exception as error:
            raise OSError(f"cannot write into {self.partial}: {self.files.failure or error}") from error

    def _finish(self, written: list[tuple[list[WriteResult], dict[str, Stored]]]) -> None:
        if self.host.rank != 0:
            return
        metadata: Metadata = self.metadata
        self.writer.finish(metadata, [results for results, _ in written])
        for _, stored in written:
            self.manifest.files.update(stored)
        self.manifest.files.update(self.files.stored)
        files.commit(self.partial, self.folder, self.manifest)
        if self.save_latest:
            files.point_latest(self.save_dir, self.tag)
        files.forget_replaced(self.folder)
        if self.keep_last is not None:
            files.prune(self.save_dir, self.keep_last, self.tag)

    def _failed(self, error: Disagreement) -> CheckpointError:
        partial_folder = getattr(self, "partial", None)
        if self.host.rank == 0 and partial_folder is not None:
            shutil.rmtree(partial_folder, ignore_errors=True)
        kept = files.latest_tag(self.save_dir)
        return CheckpointError(
            f"checkpoint {self.tag!r} was not saved in {self.save_dir}: {error};"
            f" {'latest is still ' + repr(kept) if kept else 'there is no earlier one'}"
        )


# What is saved #


def _contents(
    engine: "Engine", host: Communicator, client_state: Mapping[str, Any]
) -> tuple[dict[Region, Source], dict[str, bytes]]:
    """This rank's regions of tensors, and the objects that it writes."""
    tensors: dict[Region, Source] = {}
    objects: dict[str, bytes] = {}
    for held in engine.optimizer.held():
        for state, value in engine.optimizer.values(held).items():
            key = PARAMETERS + held.name if state == "parameter" else f"{OPTIMIZER}{state}/{held.name}"
            if isinstance(value, Tensor) and value.shape == (held.elements,):
                region = Region.range(key, held.first, held.elements, held.whole)
                tensors[region] = Source(value.dtype, partial(_fetch, engine, held, state))
            elif isinstance(value, Tensor) and value.dim():
                raise ValueError(
                    f"optimizer state {state!r} of {held.name} has shape {tuple(value.shape)} for {held.elements}"
                    " elements; allowed: a value per element, or a scalar"
                )
            elif held.first == 0:
                # A scalar goes with the parameter: who has its first element writes it.
                objects[key] = run_state.to_bytes(value)
    module_tensors, extra_state = run_state.split(run_state.buffers(engine))
    marks = everyones(host, run_state.fingerprints(module_tensors), "buffers")
    if host.rank == 0:
        tensors |= {
            Region.all_of(BUFFERS + name, tensor.shape): Source(tensor.dtype, tensor.clone)
            for name, tensor in module_tensors.items()
        }
        objects[RUN] = run_state.to_bytes(run_state.run_record(engine, extra_state, client_state))
    own = {name: module_tensors[name] for name, mark in marks[host.rank].items() if mark != marks[0].get(name)}
    objects[f"{RANKS}{host.rank}"] = run_state.to_bytes(run_state.rank_record(engine, own))
    return tensors, objects


def _fetch(engine: "Engine", held: Held, state: str) -> Tensor:
    value: Tensor = engine.optimizer.values(held)[state]
    return value


def _manifest(engine: "Engine", tag: str) -> Manifest:
    parameters = dict(engine.module.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    everywhere = engine.module.named_parameters(remove_duplicate=False)
    return Manifest(
        tag=tag,
        world=engine.communicator.world,
        stage=engine.settings.zero.stage,
        global_steps=engine.global_steps,
        optimizer=engine.optimizer.kind.__name__,
        parameters={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        dtypes={name: str(parameter.dtype).removeprefix("torch.") for name, parameter in parameters.items()},
        aliases={name: names[parameter] for name, parameter in everywhere if name not in parameters},
        buffers=tuple(run_state.split(run_state.buffers(engine))[0]),
        files={},
    )


# Loading #


def _chosen(host: Communicator, load_dir: Path, tag: str | None, fall_back: bool) -> Path | None:
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
        except Disagreement as error:
            if candidate == candidates[-1]:
                raise files.with_advice(CheckpointError(str(error)), load_dir, found) from error
    raise AssertionError("the last candidate returns or raises")


def _checked(host: Communicator, load_dir: Path, tag: str) -> str:
    """The ranks share the work of reading every file."""
    folder = files.folder_of(load_dir, tag)
    manifest = Manifest.read(folder)
    files.check_files(folder, manifest, sorted(manifest.files)[host.rank :: host.world])
    return os.fspath(folder)


def _restore(
    engine: "Engine",
    folder: Path,
    *,
    strict: bool,
    optimizer: bool,
    lr_scheduler: bool,
    module_only: bool,
) -> dict[str, Any]:
    """This rank's part of a checkpoint into the engine; the client's state."""
    manifest, stock = Manifest.read(folder), Stock(folder)
    module_tensors, _ = run_state.split(run_state.buffers(engine))
    _compare(engine, manifest, set(module_tensors), optimizer=optimizer, strict=strict)
    rank = f"{RANKS}{engine.communicator.rank}"
    same_rank = manifest.world == engine.communicator.world and rank in stock.objects
    records = stock.read({}, [RUN, rank] if same_rank else [RUN])
    run = run_state.from_bytes(records[RUN])
    own = run_state.from_bytes(records[rank]) if same_rank else None

    states = _states_by_parameter(stock) if optimizer else {}
    for held in engine.optimizer.held():
        if held.name in manifest.parameters:
            engine.optimizer.put(held, _read_values(engine, stock, held, states.get(held.name, [])))
    values = {name: stock.whole(BUFFERS + name) for name in module_tensors if name in manifest.buffers}
    values |= own["buffers"] if own is not None else {}
    engine.module.load_state_dict(values | run["extra_state"], strict=False)

    if optimizer:
        run_state.restore_groups(engine, run["groups"])
    if lr_scheduler and engine.lr_scheduler is not None and run["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(run["lr_scheduler"])
    if not module_only:
        engine.global_steps = run["global_steps"]
        run_state.restore_stateful(engine, run["stateful"])
        if own is not None:
            run_state.restore_rank(engine, own)
    client_state: dict[str, Any] = run["client_state"]
    return client_state


def _compare(engine: "Engine", manifest: Manifest, buffers: set[str], *, optimizer: bool, strict: bool) -> None:
    """Whether a checkpoint is of this model and optimizer.

    Raises:
        ValueError: naming what differs.
    """
    here = {name: tuple(parameter.shape) for name, parameter in engine.module.named_parameters()}
    there = manifest.parameters
    for name in here.keys() & there.keys():
        if here[name] != there[name]:
            raise ValueError(f"parameter {name} has shape {here[name]}, in the checkpoint {there[name]}")
    mine, saved = here.keys() | buffers, there.keys() | set(manifest.buffers)
    if strict and mine != saved:
        raise ValueError(
            f"the checkpoint lacks {_some(mine - saved)} and has {_some(saved - mine)} that the model lacks; allowed: the"
            " same names, or load_module_strict=False"
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


def _read_values(engine: "Engine", stock: Stock, held: Held, states: list[str]) -> dict[str, Any]:
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
        dtype = held.tensor.dtype if stock.dtypes[key] == saved else stock.dtypes[key]
        values[name] = torch.empty(held.elements, dtype=dtype)
        regions[Region.range(key, held.first, held.elements, held.whole)] = values[name]
    for key, data in stock.read(regions, scalars).items():
        values[scalars[key]] = run_state.from_bytes(data)
    return values
