"""Checkpoints of an engine: saved at any layout, loaded at any other; whole or absent; in the background if asked.

[Note: who talks when]
A save begins with one collective of training's communicator, on the main thread: a rank that does not save is seen
there, and named. All further agreement goes over a communicator of its own on the host, made at the first save, which
one thread of each rank uses at a time: the main thread to plan, then, if the save is asynchronous, the writing thread.
A next save, a load and `close` wait for that thread first. So nothing of it can come between collectives of training.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint_files as files
from .agreement import DisagreementError, all_or_none, everyones
from .checkpoint_files import CheckpointError
from .checkpoint_load import chosen, names, restore
from .checkpoint_save import Saving
from .communicator import Communicator
from .device import end_host_communicator, host_communicator

if TYPE_CHECKING:
    from .engine import Engine


LOG = logging.getLogger(__name__)


def _perform_aloud(saving: Saving) -> None:
    """A failure is raised where the save is waited for; whoever reads the log should not wait for that."""
    try:
        saving.perform()
    except Exception as error:
        LOG.error("%s", error)
        raise


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
        engine = self.engine
        files.check_tag(tag)
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last = {keep_last}; allowed: at least 1, or None to keep all")
        host = self.meet("save_checkpoint")
        saving = Saving(engine, host, save_dir, tag, save_latest=save_latest, keep_last=keep_last)
        saving.prepare(client_state)
        if asynchronous:
            saving.stage()
            self._pending = self._writer.submit(_perform_aloud, saving)
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

    def meet(self, call: str) -> Communicator:
        """All ranks make this call and get the communicator for it: see [Note: who talks when].

        Raises:
            CheckpointError: an asynchronous save, which is waited for, failed.
            CommunicationError: a rank makes another call.
            ValueError: this is no moment for it, or no device.
        """
        self.wait()
        engine = self.engine
        if engine.device.type == "sim":
            raise ValueError(f"{call}: a model on the sim device has shapes and no values; use cpu or cuda")
        if begun := engine.runtime.micro_step + bool(engine.runtime.backwards):
            raise ValueError(
                f"{call} after micro-step {begun} of {engine.settings.accumulation}: the gradients"
                " accumulated so far would be lost; do it after the engine.step() that ends the batch"
            )
        if engine.local_updates is not None and not engine.local_updates.agreed:
            every = engine.local_updates.settings.every
            raise ValueError(
                f"{call} after step {engine.global_steps}: the ranks' parameters differ between agreements; do it after"
                f" one, every {every} steps from local_updates.warmup_steps on"
            )
        engine.settle()
        here = torch.ones(1, dtype=torch.int32, device=engine.device)
        engine.communicator.all_reduce(here, call, largest=True, scalar=True).wait()
        if self._host is None:
            self._host = host_communicator(engine.communicator, self.timeout_s)
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
        host = self.meet("load_checkpoint")
        folder = chosen(host, load_dir, tag, fall_back)
        if folder is None:
            return None, {}
        everywhere = set().union(*everyones(host, names(self.engine), "names"))
        try:
            (state, *_) = all_or_none(
                host,
                partial(
                    restore,
                    self.engine,
                    folder,
                    everywhere,
                    strict=strict,
                    optimizer=optimizer and not module_only,
                    lr_scheduler=lr_scheduler and not module_only,
                    module_only=module_only,
                ),
                f"load {folder.name}",
            )
        except DisagreementError as error:
            raise CheckpointError(f"checkpoint {folder.name!r} in {load_dir} does not fit this run: {error}") from error
        self.engine.optimizer.publish()
        self.engine.settle()
        return str(folder), state
