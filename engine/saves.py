"""What an engine saves and loads, by the names that DeepSpeed gave the calls."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from .checkpoint import Checkpoints
    from .engine import Engine


class Saves:
    """The calls; `Engine` says what there is to save."""

    if TYPE_CHECKING:
        timeout_s: float
        global_steps: int

    @cached_property
    def checkpoints(self) -> "Checkpoints":
        """What this engine saves; made at first use, because torch.distributed.checkpoint is slow to import."""
        from .checkpoint import Checkpoints

        return Checkpoints(cast("Engine", self), self.timeout_s)

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        *,
        asynchronous: bool = False,
        keep_last: int | None = None,
    ) -> Path:
        """Save everything that training needs to go on, whole or not at all. All ranks must call it, after a `step`.

        Parameters and optimizer state are saved by whole parameter, so that any number of ranks along any axis and any
        ZeRO stage can load them; see also `stateful`.

        Args:
            save_dir: a folder that all ranks see.
            tag: name of this checkpoint, "global_stepN" if left out; one of that name is replaced.
            client_state: anything of the caller's that can be pickled; rank 0's is saved.
            save_latest: let the file `latest` name it once it is complete.
            asynchronous: copy to host memory now, write while training goes on. The next save, a load, `close` and the
                end of Python wait for it; if it failed, the first three raise what this call would have.
            keep_last: afterwards, delete all complete checkpoints in `save_dir` but so many.

        Raises:
            CheckpointError: it could not be written; what was saved before is untouched.
            ValueError: in the middle of an accumulated batch, or ranks that ask for different things.
            CommunicationError: a rank does not save; the message names it.
        """
        tag = f"global_step{self.global_steps}" if tag is None else tag
        return self.checkpoints.save(
            Path(save_dir),
            tag,
            client_state or {},
            save_latest=save_latest,
            asynchronous=asynchronous,
            keep_last=keep_last,
        )

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        *,
        fall_back: bool = False,
    ) -> tuple[str | None, dict[str, Any]]:
        """Go on from a checkpoint; at the layout that saved it, with the same bits. All ranks must call it.

        Random states are restored where the ranks along each axis are as many as they were.

        Args:
            tag: the one that `latest` names if left out.
            load_module_strict: the model's names must be those of the checkpoint.
            load_module_only: parameters and buffers alone; a fine-tuning run begins so.
            fall_back: if it is damaged, take the newest complete one before it.

        Returns:
            (its folder, the client state); (None, {}) where nothing was saved and no tag is asked for.

        Raises:
            CheckpointError: it is not there, is damaged, or does not fit the model; the message names tag, file and
                the complete ones.
        """
        return self.checkpoints.load(
            Path(load_dir),
            tag,
            strict=load_module_strict,
            optimizer=load_optimizer_states,
            lr_scheduler=load_lr_scheduler_states,
            module_only=load_module_only,
            fall_back=fall_back,
        )

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "pytorch_model.bin") -> Path:
        """The whole model in one file, fp16 if the run is in fp16, else bf16. All ranks must call it; rank 0 writes.

        A name that ends with .safetensors gives such a file, any other a state dict as torch.save writes it. For
        several files, other dtypes, or Hugging Face use `windtunnel.engine.export.export`, which holds less in memory.
        """
        from .export import save_16bit_model

        return save_16bit_model(cast("Engine", self), Path(save_dir), save_filename)
