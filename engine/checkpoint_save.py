"""One save of a checkpoint: planned by all ranks, staged, written by all, made the one of its tag by rank 0."""

import secrets
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from . import checkpoint_files as files
from . import run_state
from .agreement import DisagreementError, all_or_none
from .checkpoint_files import FORMAT, CheckpointError, DigestingFiles, Manifest, Stored
from .checkpoint_plan import BUFFERS, OPTIMIZER, PARAMETERS, RANKS, RUN, Region, RegionSavePlanner, Source
from .checkpoint_share import Assets, Task, assets, share
from .chunks import Chunk
from .communicator import Communicator
from .optimizer import Held

if TYPE_CHECKING:
    from .engine import Engine


class _Start(NamedTuple):
    """What a rank tells the others first: the folder to write into (rank 0's counts), what it saves, what it has."""

    partial: Path
    asked: tuple[str, str, int]
    assets: Assets


class Saving:
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
        self.partial: Path  # what it is called until it is whole; known once rank 0 has made it

    def prepare(self, client_state: Mapping[str, Any]) -> None:
        """Agree on what each rank writes, and take what must be of this moment."""
        try:
            begun = all_or_none(self.host, self._begin, f"begin {self.tag}")
            for rank, start in enumerate(begun):
                if start.asked != begun[0].asked:
                    raise ValueError(
                        f"save_checkpoint: rank 0 saves (folder, tag, steps) {begun[0].asked}, rank {rank}"
                        f" {start.asked}; allowed: the same on all ranks"
                    )
            self.partial = begun[0].partial
            everyones = [start.assets for start in begun]
            planned = all_or_none(self.host, partial(self._plan, everyones, client_state), f"plan {self.tag}")
        except DisagreementError as error:
            raise self._failed(error) from error
        plans, self.metadata = self.planner.create_global_plan([plan for plan, _ in planned])
        mine: SavePlan = self.writer.prepare_global_plan(plans)[self.host.rank]
        self.plan = self.planner.finish_plan(mine)
        self.manifest = Manifest.joined([manifest for _, manifest in planned])

    def _begin(self) -> "_Start":
        folder = self.save_dir
        if self.host.rank == 0:
            self.partial = folder = files.begin(self.save_dir, self.tag, secrets.token_hex(4))
        asked = (str(self.save_dir.absolute()), self.tag, self.engine.global_steps)
        return _Start(folder, asked, assets(self.engine))

    def _plan(self, everyones: list[Assets], client_state: Mapping[str, Any]) -> tuple[SavePlan, Manifest]:
        if not self.partial.is_dir():
            raise FileNotFoundError(f"{self.partial}, which rank 0 made, is not seen here: save_dir must be shared")
        task = share(everyones, self.host.rank)
        tensors, objects = _contents(self.engine, self.host.rank, task, client_state)
        self.planner = RegionSavePlanner(tensors, objects)
        self.files = DigestingFiles()
        self.writer = FileSystemWriter(self.partial)
        self.writer.fs = self.files
        rank = self.host.rank
        self.planner.set_up_planner({}, is_coordinator=rank == 0)
        self.writer.set_up_storage_writer(is_coordinator=rank == 0, rank=rank, use_collectives=True)
        return self.writer.prepare_local_plan(self.planner.create_local_plan()), _manifest(self.engine, self.tag)

    def stage(self) -> None:
        """Copy what this rank writes to host memory: from here on, training may change it.

        Raises:
            CheckpointError: on all ranks, if one has no memory for it.
        """
        try:
            all_or_none(self.host, self.planner.stage, f"stage {self.tag}")
        except DisagreementError as error:
            raise self._failed(error) from error

    def perform(self) -> None:
        """Write this rank's files, and let rank 0 make the checkpoint the one of its tag when all have.

        Raises:
            CheckpointError: any rank could not; what was there before is untouched.
        """
        try:
            written = all_or_none(self.host, self._write, f"write {self.tag}")
            all_or_none(self.host, partial(self._finish, written), f"finish {self.tag}")
        except DisagreementError as error:
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

    def _failed(self, error: DisagreementError) -> CheckpointError:
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
    engine: "Engine", rank: int, task: Task, client_state: Mapping[str, Any]
) -> tuple[dict[Region, Source], dict[str, bytes]]:
    """This rank's regions of tensors, and the objects that it writes."""
    tensors: dict[Region, Source] = {}
    objects: dict[str, bytes] = {}
    for held in engine.optimizer.held():
        if held.name in task.elsewhere:
            continue
        chunks, shape = held.chunks, held.shape
        for state, value in engine.optimizer.values(held).items():
            key = PARAMETERS + held.name if state == "parameter" else f"{OPTIMIZER}{state}/{held.name}"
            if isinstance(value, Tensor) and value.shape == (held.elements,):
                for chunk in chunks:
                    region = Region(key, chunk.offset, chunk.shape, shape)
                    tensors[region] = Source(value.dtype, partial(_fetch, engine, held, state, chunk))
            elif isinstance(value, Tensor) and value.dim():
                raise ValueError(
                    f"optimizer state {state!r} of {held.name} has shape {tuple(value.shape)} for {held.elements}"
                    " elements; allowed: a value per element, or a scalar"
                )
            elif any(not any(chunk.offset) for chunk in chunks):
                # A scalar goes with the parameter: who has its first element writes it.
                objects[key] = run_state.to_bytes(value)
    module_tensors, _ = run_state.split(run_state.buffers(engine))
    tensors |= {
        Region.all_of(BUFFERS + name, module_tensors[name].shape): Source(
            module_tensors[name].dtype, module_tensors[name].clone
        )
        for name in task.buffers
    }
    if rank == 0:
        record = run_state.run_record(engine, task.groups, task.extra_state, client_state)
        objects[RUN] = run_state.to_bytes(record)
    own = {name: module_tensors[name] for name in task.own_buffers}
    objects[f"{RANKS}{rank}"] = run_state.to_bytes(run_state.rank_record(engine, own))
    return tensors, objects


def _fetch(engine: "Engine", held: Held, state: str, chunk: Chunk) -> Tensor:
    return chunk.of(engine.optimizer.values(held)[state])


def _manifest(engine: "Engine", tag: str) -> Manifest:
    slots = run_state.slots(engine)
    names = run_state.every_name(engine)
    return Manifest(
        format=FORMAT,
        tag=tag,
        world=engine.communicator.world,
        stage=engine.settings.zero.stage,
        global_steps=engine.global_steps,
        optimizer=engine.optimizer.kind.__name__,
        parameters={slot.name: run_state.whole_shape(slot) for slot in slots},
        dtypes={slot.name: str(slot.parameter.dtype).removeprefix("torch.") for slot in slots},
        aliases={alias: slot.name for slot in slots for alias in names[slot.parameter][1:]},
        buffers=tuple(run_state.split(run_state.buffers(engine))[0]),
        files={},
    )
