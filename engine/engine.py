"""`initialize` and the engine: forward, backward, step, on any device."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .assembly import full_parameters, full_state_dict
from .communicator import Communicator
from .config import Config
from .context import ContextParallel
from .device import DTYPES, communicator_for, model_device, transfers_for
from .evaluation import Evaluation, Weight, evaluate
from .experts import spread_experts
from .flat import flat_units, narrow_buffers
from .gathered import remember
from .groups import Groups, groups_for
from .host_step import HostSteps
from .loader import ResumableLoader, evaluation_loader
from .local_updates import LocalTraining
from .loss import loss_of
from .loss_scale import LossScaler
from .monitor import Monitor, monitor_for
from .optim import unsharded
from .optimizer import ShardedOptimizer
from .queries import Queries, of_module
from .randomness import Randomness
from .recompute import recompute_blocks
from .sampling import Share
from .saves import Saves
from .scheduler import scheduler_for
from .sections import OptimizerSection
from .stages import LayerList, layers_of
from .tensor_models import share_layers
from .tier import Tiers
from .transfer import Moved, Transfers
from .zero import ZeroRuntime, reduce_order

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SchedulerFactory = Callable[[torch.optim.Optimizer], Any]
Keys = Mapping[str, Any] | str | Path
Criterion = Callable[..., Tensor]


def initialize(
    model: nn.Module | Sequence[Callable[..., Any]],
    criterion: Criterion | Keys | None = None,
    config: Keys | None = None,
    *,
    optimizer: torch.optim.Optimizer | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    args: Any = None,
    dist_init_required: bool | None = None,
    lr_scheduler: SchedulerFactory | torch.optim.lr_scheduler.LRScheduler | None = None,
    units: Iterable[nn.Module] | None = None,
    timeout_s: float = 600.0,
) -> "tuple[Engine, ShardedOptimizer, ResumableLoader | None, Any]":
    """Make a model trainable in parallel; the call that a DeepSpeed script makes.

    Args:
        model: any module; its parameters stay the same objects, their memory moves into flat units. For pipeline stages
            one that can say its layers (engine/stages.py), or a list of them.
        criterion: kept as `engine.criterion`, for `engine.criterion(engine(inputs), targets)`; a config may stand in
            its place: `initialize(model, {...})`.
        config: DeepSpeed's JSON as a dict or a path (the keys of docs/config.md).
        optimizer: made on the model's parameters, or a function of them; else the config's `optimizer` section; else
            AdamW as torch sets it up.
        model_parameters: parameters or parameter groups for the configured optimizer; else all trainable ones.
        training_data: a dataset for a loader of this rank's micro-batches, joined by `collate_fn`.
        args: parsed command-line arguments, whose `deepspeed_config` is the config's path if no other is given, and
            whose attributes values of "auto" stand for (engine/dialect.py).
        dist_init_required: accepted; the process group is joined if it is not yet.
        lr_scheduler: a function of the sharded optimizer that returns a torch scheduler, or a scheduler on the
            optimizer that is passed; else the config's `scheduler` section. `engine.step` steps it.
        units: modules whose parameters travel together; else the repeated blocks of the model.
        timeout_s: how long a rank waits for the others in one collective.

    Returns:
        (engine, optimizer, dataloader, lr_scheduler); the last two are None where nothing was given.

    Raises:
        ValueError: the config or the optimizer does not fit; the message names the key.
    """
    criterion, config = _told_apart(criterion, config)
    model = model if isinstance(model, nn.Module) else LayerList(model)
    communicator = communicator_for(model_device(model), timeout_s)
    source = getattr(args, "deepspeed_config", None) if config is None else config
    settings = Config.read(source, communicator.world, args)
    if settings.parallelism.pipeline > 1:
        layers_of(model)  # refused here, before ranks are joined and layers cut
    groups = groups_for(communicator, settings)
    randomness = share_layers(
        model,
        settings.parallelism,
        groups,
        settings.seed,
        optimizer=optimizer,
        keeps_products=settings.activations.policy in ("selective", "budget"),
    )
    if settings.kernels.names:
        from .fused_modules import fuse

        fuse(model, settings.kernels)
    pattern = _pattern(model, settings, optimizer, model_parameters)
    transfers = transfers_for(model_device(model), communicator, timeout_s, pin=settings.placement.pin_memory)
    kind = _kind_of_engine(model, settings)
    engine = kind(model, settings, groups, pattern, units, timeout_s, transfers)
    engine.criterion = criterion
    engine.lr_scheduler = scheduler_for(lr_scheduler, settings.scheduler, pattern, engine.optimizer)
    engine.collate = collate_fn
    engine.randomness = randomness
    if randomness.drawn:
        engine.stateful["randomness"] = randomness
    loader = _loader(training_data, collate_fn, settings, groups.axis("data"))
    if loader is not None:
        engine.stateful["data_loader"] = loader
    return engine, engine.optimizer, loader, engine.lr_scheduler


def _kind_of_engine(model: nn.Module, settings: Config) -> "type[Engine]":
    """What performs the model: stages, or all of it at once."""
    staged = settings.parallelism.pipeline > 1 or isinstance(model, LayerList)
    if not staged:
        return Engine
    from .pipeline import PipelineEngine, performer

    return performer.get(PipelineEngine)


def _told_apart(criterion: Any, config: Keys | None) -> tuple[Criterion | None, Keys | None]:
    """(criterion, config), of which the second may have been given in the place of the first.

    Raises:
        ValueError: two configs, or a criterion that is none or would have to be trained.
    """
    if isinstance(criterion, Mapping | str | Path):
        if config is not None:
            raise ValueError("initialize got two configs; allowed: initialize(model, criterion, config)")
        return None, criterion
    if criterion is not None and not callable(criterion):
        raise ValueError(f"criterion is a {type(criterion).__name__}; allowed: a function of outputs and targets")
    if isinstance(criterion, nn.Module) and any(p.requires_grad for p in criterion.parameters()):
        raise ValueError(f"criterion {type(criterion).__name__} has trainable parameters; make it part of the model")
    return criterion, config


def _pattern(
    model: nn.Module, settings: Config, optimizer: Any, parameters: Iterable[Any] | None
) -> torch.optim.Optimizer:
    """An optimizer on the whole parameters, whose class, groups and values the sharded one takes over."""
    trainable = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if optimizer is not None:
        return optimizer(trainable)
    return unsharded(trainable, settings.optimizer or OptimizerSection(type="AdamW"))


def _loader(
    data: Dataset | None, collate: Callable[[list[Any]], Any] | None, settings: Config, samples: Communicator
) -> ResumableLoader | None:
    if data is None:
        return None
    share = Share(
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        rank=samples.rank,
        world=samples.world,
    )
    return ResumableLoader(data, share, seed=settings.seed, options=settings.data_loading, collate=collate)


class Engine(Queries, Saves, nn.Module):
    """A model in training: `loss = engine(batch)`, `engine.backward(loss)`, `engine.step()`.

    `step` ends a micro-step: it steps the optimizer at the last of `gradient_accumulation_steps` and does nothing
    before. A micro-step has one `backward` as a rule; the gradients of several add up, as in torch.

    Attributes:
        module: the user's model; what the engine itself does not have is looked up there.
        optimizer: its ShardedOptimizer.
        criterion: what `initialize` was given, or None.
        loss_scaler: the scale of the loss, 1 unless something is in fp16; its state belongs to a checkpoint.
        global_steps: optimizer steps since the beginning, those that were skipped included.
        micro_steps: micro-steps that `step` has ended since the beginning.
        stateful: objects with `state_dict` and `load_state_dict` that checkpoints save and restore, by name; the same
            on every rank, except that rank 0's state is saved.
        monitor: what the config's metrics are written by; None where none are asked for.
        groups: what its collectives span.
        local_updates: lets ranks step by themselves; None where they step together.
        communicator: all ranks.
        recompute: what its blocks compute again in backward; None for nothing.
        context: what the ranks do that share each sequence; None where each has its own.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Config,
        groups: Groups,
        pattern: torch.optim.Optimizer,
        units: Iterable[nn.Module] | None = None,
        timeout_s: float = 600.0,
        transfers: Transfers | None = None,
    ) -> None:
        super().__init__()
        self.module, self.settings, self.groups = model, settings, groups
        self.communicator = communicator = groups.run
        self.global_steps = self.micro_steps = 0
        self.lr_scheduler: Any = None
        self.criterion: Criterion | None = None
        self.timeout_s = timeout_s
        self.collate: Callable[[list[Any]], Any] | None = None
        self.randomness: Randomness | None = None
        self.monitor: Monitor | None = monitor_for(
            settings.monitoring, communicator, model_device(model), groups.same_samples
        )
        if settings.redundancy.expert_ranks > 1:
            with communicator.observer.category("parameters"):
                spread_experts(model, groups.axis("expert"))
        shape = settings.parallelism
        self.context: ContextParallel | None = None
        if groups.axis("context").world > 1:
            self.context = ContextParallel(groups.axis("context"), shape.context_attention, shape.context_placement)
        self.tiers: Tiers | None = None
        self._device_mesh: DeviceMesh | None = None
        if settings.placement.moves:
            transfers = transfers or Transfers(timeout_s, communicator.observer)
            self.tiers = Tiers(settings.placement, transfers, communicator.rank)
        self.runtime = self._make_runtime(pattern, units)
        if self.tiers is not None:
            self.tiers.make_buffers(adds=settings.zero.gradients and settings.accumulation > 1)
            trainable = sorted((u for u in self.runtime.units if u.trainable), key=lambda unit: reduce_order(unit.part))
            self.runtime.host_steps = HostSteps(self.tiers, trainable)
        self.loss_scaler = LossScaler(settings.formats.scaling)
        self.optimizer = ShardedOptimizer(
            pattern,
            self.runtime,
            clip=settings.clip,
            scaler=self.loss_scaler,
            one_pass="optimizer" in settings.kernels.names,
        )
        self._loss_is_scaled = False
        self.stateful: dict[str, Any] = {"loss_scaler": self.loss_scaler}
        local = settings.redundancy.local
        self.local_updates = LocalTraining(local, self.runtime) if local is not None else None
        if self.local_updates is not None:
            self.stateful["local_updates"] = self.local_updates
        remember(self.runtime)

    def _make_runtime(self, pattern: torch.optim.Optimizer, units: Iterable[nn.Module] | None) -> Any:
        """The model in flat units, and what moves them; its blocks learn to compute again."""
        model, settings, communicator = self.module, self.settings, self.communicator
        blocks, flat = flat_units(model, settings, self.groups, pattern, pattern.param_groups, units, self.tiers)
        communicator.observer.enter("initialize.end", -1)
        narrow_buffers(model, settings, self.groups)
        runtime = ZeroRuntime(model, blocks, flat, settings.zero, self.groups, settings.accumulation, settings.buffers)
        runtime.before_backward = self._check_loss
        if self.context is not None:
            self.context.check_positions([model.forward], f"{type(model).__name__}.forward has no argument")
            self.context.install(model, blocks)
        self.recompute = recompute_blocks(
            model,
            blocks,
            settings.activations,
            model_device(model),
            visit=runtime.visiting,
            group=None if settings.parallelism.sequence_parallel else self.groups.axis("tensor"),
            observer=communicator.observer,
        )
        return runtime

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "module" not in self.__dict__.get("_modules", {}):
                raise
            return of_module(self, self.module, name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if self.monitor is not None:
            self.monitor.saw((arguments, keywords))
        if self.context is not None:
            arguments, keywords = self.context.cut(arguments, keywords)
        randomness = self.randomness if self.module.training else None
        drawing = nullcontext() if randomness is None else randomness.forward()
        with self._timed("forward"), self._autocast(), drawing:
            return self.module(*arguments, **keywords)

    def _timed(self, phase: str) -> AbstractContextManager[None]:
        return nullcontext() if self.monitor is None else self.monitor.timed(phase)

    def _autocast(self) -> AbstractContextManager[Any]:
        """What forward runs under: the config's torch.autocast, else whatever the caller has set up."""
        cast = self.settings.formats.autocast
        return nullcontext() if cast == "off" else torch.autocast(self.device.type, DTYPES[cast])

    def backward(self, loss: Any, *, more: bool = False, retain_graph: bool = False) -> None:
        """Backward of a loss. The mean over ranks and micro-steps is taken as gradients arrive, not here.

        Args:
            loss: a scalar tensor, or what a model returned with one in it (engine/loss.py).
            more: another backward follows in this micro-step, whose gradients add to these. Needed with accumulation,
                where that would pass for the next micro-step; else optional, and a reduction less at ZeRO 0 and 1.
            retain_graph: keep the graph for that other backward.

        Raises:
            RuntimeError: a backward follows another one without `step` between, with accumulation and without `more`.
        """
        loss = loss_of(loss)
        if self.monitor is not None:
            self.monitor.took(loss)
        self.runtime.announced = more
        with self._timed("backward"):
            self.scale_loss(loss).backward(retain_graph=retain_graph)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """What `backward` may be called on: `loss` times the loss scale, which is `loss` itself where that is 1."""
        if self.loss_scaler.scale == 1.0:
            return loss
        scaled = loss * self.loss_scaler.scale
        scaled.register_hook(self._see_scaled_loss)
        return scaled

    def _see_scaled_loss(self, gradient: Tensor) -> None:
        self._loss_is_scaled = True

    def _check_loss(self) -> None:
        """Backward has reached the model: it must have come from a scaled loss, because the step will unscale."""
        scaled, self._loss_is_scaled = self._loss_is_scaled, False
        if not scaled and self.loss_scaler.scale != 1.0:
            raise RuntimeError(
                f"loss.backward() without the loss scale, which is {self.loss_scaler.scale:g}: call"
                " engine.backward(loss), or engine.scale_loss(loss).backward()"
            )

    def step(self) -> None:
        """Step the optimizer and the schedule if this was the last micro-step; neither, if a gradient is inf or nan.

        That is for fp16, compressed communication and bf16 (`check_grad_overflow`); elsewhere such a step is taken.
        New parameters travel between ranks until the next forward, or `state_dict`, or `settle` waits for them.
        """
        last = self.runtime.end_micro_step()
        self.micro_steps += 1
        if not last:
            return
        self._take_step()

    def _take_step(self) -> None:
        """The gradients of all micro-steps are here."""
        rate = self.optimizer.param_groups[0]["lr"]
        with self._timed("step"):
            self.optimizer.step()
            if self.local_updates is not None:
                self.local_updates.after_step()
        if self.lr_scheduler is not None and not self.optimizer.overflow:
            self.lr_scheduler.step()
        self.global_steps += 1
        if self.monitor is not None:
            self._report(self.monitor, rate)

    def _report(self, monitor: Monitor, rate: Any) -> None:
        """Tell the monitor of a step that was taken at a learning rate."""
        known: dict[str, float | None] = {"lr": float(rate)}
        if monitor.wishes.due(self.global_steps):  # else nothing is read from the device
            scaling = self.loss_scaler.policy
            known["gradient_norm"] = self.get_global_grad_norm()
            known["loss_scale"] = self.loss_scaler.scale if scaling.dynamic or scaling.initial != 1.0 else None
            known["skipped_steps"] = self.skipped_steps if scaling.skip else None
        monitor.stepped(self.global_steps, known)

    def log(self, values: Mapping[str, float]) -> None:
        """Write values of your own, by name, beside those of the last step; nothing if no metrics are written."""
        if self.monitor is not None:
            self.monitor.log(self.global_steps, values)

    def evaluate(
        self, data: Iterable[Any] | Dataset, *, name: str = "evaluation", weight: Weight | None = None
    ) -> Evaluation:
        """Mean loss and perplexity over a whole set, without gradients or dropout. All ranks must call it.

        Args:
            data: a torch Dataset, which the ranks share, or this rank's batches (of any number).
            name: what metrics call it.
            weight: (batch, output) -> what a batch counts; see engine/evaluation.py.
        """
        if isinstance(data, Dataset):
            samples = self.groups.axis("data")
            data = evaluation_loader(data, self.settings.micro_batch, samples.rank, samples.world, self.collate)
        found = evaluate(self, data, weight=weight)
        self.log({f"{name}/loss": found.loss, f"{name}/perplexity": found.perplexity})
        return found

    def settle(self) -> None:
        """Wait until the parameters of the last step are here, before reading them directly."""
        self.runtime.settle()

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter of the whole model, by name, on the host. All ranks must call it."""
        return {each.names[0]: value for each, value in full_parameters(self).items()}

    def full_state_dict(self) -> dict[str, Tensor]:
        """The model's parameters and persistent buffers, whole, by the model's own names. All ranks must call it.

        (`state_dict` of a model whose parameters are sharded shows NaN where values are not here.)
        """
        return full_state_dict(self)

    def own_state(self) -> dict[str, Any]:
        """What of the model's `state_dict` this rank keeps up to date: all, except where stages share the model."""
        state: dict[str, Any] = self.module.state_dict()
        return state

    def device_mesh(self) -> "DeviceMesh":
        """The run's ranks by axis as torch's DeviceMesh; all ranks must call it first. See engine/device_mesh.py."""
        if self._device_mesh is None:
            from .device_mesh import device_mesh

            self._device_mesh = device_mesh(self.settings.parallelism, self.device, self.timeout_s)
        return self._device_mesh

    # Offload #

    def offload_report(self) -> dict[str, Moved]:
        """What has been copied, read and written so far by direction, and what the host has done: bytes and seconds."""
        return {} if self.tiers is None else self.tiers.transfers.report()

    def apply_delayed_update(self) -> None:
        """Let the parameters show the last update, where `delayed_update` holds it back. All ranks must call it."""
        if self.runtime.host_steps is not None:
            self.runtime.host_steps.bring_late()

    def close(self) -> None:
        """Wait for a checkpoint under way, end threads and writers, remove offload files; the parameters stay.

        Those that rest off the device can no longer be gathered then.
        """
        self.settle()
        if self.monitor is not None:
            self.monitor.close()
        try:
            if "checkpoints" in vars(self):
                self.checkpoints.close()
        finally:
            if self.tiers is not None:
                self.tiers.close()
            self.groups.close()
