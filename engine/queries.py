"""What a training script asks its engine, by the names that DeepSpeed gave the questions."""

import os
from typing import TYPE_CHECKING, Any

import torch

from ..reading import nearest

if TYPE_CHECKING:
    from .communicator import Communicator
    from .config import Config
    from .loss_scale import LossScaler
    from .optimizer import ShardedOptimizer
    from .zero import ZeroRuntime

UNSUPPORTED: dict[str, str] = {
    "no_sync": "set gradient_accumulation_steps: micro-steps before the last communicate only what the stage must",
    "set_gradient_accumulation_boundary": "set gradient_accumulation_steps, which decides where a step ends",
    "set_train_batch_size": "batch sizes are fixed when the engine is made",
    "set_train_micro_batch_size": "batch sizes are fixed when the engine is made",
    "save_pretrained": "call engine.module.save_pretrained(folder, state_dict=engine.full_state_dict())",
    "train_batch": "the model is not cut into stages (pipeline_size); call engine(batch), engine.backward, engine.step",
    "eval_batch": "the model is not cut into stages (pipeline_size); call engine.evaluate(batches)",
}
"""Methods of DeepSpeed's engine, or of a model, that an engine does not have, and what to do instead."""


class Queries:
    """The questions; `Engine` answers them from what it holds."""

    if TYPE_CHECKING:
        settings: Config
        communicator: Communicator
        optimizer: ShardedOptimizer
        loss_scaler: LossScaler
        runtime: ZeroRuntime
        global_steps: int
        micro_steps: int

    # Ranks #

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.runtime.units[0].full.device

    @property
    def global_rank(self) -> int:
        return self.communicator.rank

    @property
    def local_rank(self) -> int:
        """This rank's number on its host."""
        return int(os.environ.get("LOCAL_RANK", self.communicator.rank))

    @property
    def world_size(self) -> int:
        return self.communicator.world

    @property
    def dp_world_size(self) -> int:
        """Ranks, or groups of them, that train on samples of their own."""
        return self.settings.sample_ranks

    # Batches and steps #

    @property
    def global_samples(self) -> int:
        """Samples that all ranks have trained on."""
        return self.global_steps * self.train_batch_size()

    def train_batch_size(self) -> int:
        """Samples per optimizer step, of all ranks."""
        return self.settings.micro_batch * self.settings.accumulation * self.settings.sample_ranks

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.settings.micro_batch

    def gradient_accumulation_steps(self) -> int:
        return self.settings.accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-step under way, which ends with `step`, is the last one before the optimizer steps."""
        return (self.micro_steps + 1) % self.settings.accumulation == 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `optimizer.zero_grad`: nothing to do, and an error where gradients would be lost."""
        self.optimizer.zero_grad(set_to_none)

    # Settings #

    def zero_optimization(self) -> bool:
        return self.settings.zero.stage > 0

    def zero_optimization_stage(self) -> int:
        return self.settings.zero.stage

    def gradient_clipping(self) -> float:
        """Largest global gradient norm, 0 where nothing is clipped."""
        return self.settings.clip

    def fp16_enabled(self) -> bool:
        return self.settings.precision == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self.settings.precision == "bf16"

    # Optimizer #

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """The momentum of each parameter group: `momentum`, or Adam's `betas`; 0.0 where there is none."""
        return [group.get("momentum", group.get("betas", 0.0)) for group in self.optimizer.param_groups]

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were not taken because a gradient was inf or nan."""
        return self.loss_scaler.state.skipped

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients, without loss scale and before clipping.

        inf or nan if the step was skipped; None where nothing needs it: gradients are neither clipped nor checked.
        """
        return self.optimizer.gradient_norm


def of_module(engine: Any, module: Any, name: str) -> Any:
    """What the user's model has by a name that the engine lacks.

    Raises:
        AttributeError: neither has it, or the engine must not pass it on; with what to do, or the nearest name.
    """
    kind = type(engine).__name__
    if name in UNSUPPORTED:
        raise AttributeError(f"{kind} does not support {name!r}: {UNSUPPORTED[name]}")
    try:
        return getattr(module, name)
    except AttributeError:
        known = [
            known for known in (*dir(type(engine)), *vars(module), *dir(type(module))) if not known.startswith("_")
        ]
        found = f"neither {kind} nor its module {type(module).__name__} has an attribute {name!r}"
        raise AttributeError(found + nearest(name, known)) from None
