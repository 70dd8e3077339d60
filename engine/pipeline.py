"""Pipeline parallelism performed: an engine whose ranks hold neighbouring layers and pass micro-batches along."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives.groups import TIED
from ..collectives.pipeline import Action, Plan
from .batch import map_tensors
from .communicator import Communicator
from .config import Config
from .engine import Engine
from .evaluation import evaluating
from .flat import flat_units, narrow_buffers
from .groups import tying
from .loss import loss_of
from .partition import repeated_blocks
from .pipeline_format import Format, format_of, learn_formats
from .pipeline_play import Duties, Held, Player
from .pipeline_runtime import ChunkRuntime, PipelineRuntime
from .pipeline_section import forwards_of, in_flight_by_stage
from .recompute import recompute_blocks
from .roles import give_role, role_of
from .stages import Chunk, bounds_as_given, bounds_of, chunks_of, drop_others, layers_of, tied_ranks

performer: ContextVar[type["PipelineEngine"]] = ContextVar("performer")
"""What `initialize` makes of a model with stages, if not a PipelineEngine."""


class PipelineEngine(Engine):
    """Trains a model whose layers are on several ranks: `loss = engine.train_batch(batches)` is a whole step.

    A batch is (inputs, targets): the first stage gives the inputs to the first layer, the last stage has the criterion
    make the loss of what the last layer returns and the targets, or, without one, gives the targets to the last layer.
    Either may be a tuple of several. Ranks of stages between read none.

    Attributes:
        plan: who computes what in a step.
        bounds: where each chunk begins in the row of layers, and where the last one ends.
        actions: what this rank has computed in its last pass, in order.
    """

    def _make_runtime(self, pattern: torch.optim.Optimizer, units: Iterable[nn.Module] | None) -> PipelineRuntime:
        model, settings = self.module, self.settings
        _check(settings)
        self.pipeline: Communicator = self.groups.axis("pipeline")
        self.plan = self._make_plan()
        self._training = settings.pipeline.posted(self.plan)
        self._evaluation = settings.pipeline.posted(forwards_of(self.plan))
        self.actions: list[Action] = []
        self._spare: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._held: Held | None = None
        self._batches: Iterator[Any] | None = None
        everything = self._cut(model)
        self._chunks = [chunk for chunk in everything if self.plan.place(chunk.number).rank == self.pipeline.rank]
        self._everything = everything
        blocks = repeated_blocks(model) if units is None else list(units)
        drop_others(model, self._chunks)
        if settings.parallelism.sequence_parallel:
            for chunk in self._chunks:
                if not chunk.first:
                    chunk.register_forward_pre_hook(self._draw_apart)
        taken: set[nn.Parameter] = set()
        runtimes = []
        for chunk in self._chunks:
            chunk.borrowed = frozenset(taken)
            taken.update(chunk.parameters())
            runtimes.append(self._chunk_runtime(chunk, blocks, pattern))
        narrow_buffers(model, settings, self.groups)
        self._stages = PipelineRuntime(runtimes, self.groups)
        return self._stages

    def _draw_apart(self, chunk: nn.Module, arguments: Any) -> None:
        """What a chunk takes is cut along the sequence, unless it is the first one: each tensor rank draws its own."""
        if self.randomness is not None and chunk.training:
            self.randomness.separate()

    def _make_plan(self) -> Plan:
        return self.settings.pipeline.plan(self.pipeline.world, self.settings.accumulation)

    def _cut(self, model: nn.Module) -> list[Chunk]:
        """All chunks of the model; what several ranks share is marked, and these ranks are joined."""
        layers, plan, section = layers_of(model), self.plan, self.settings.pipeline
        if self.context is not None:
            self.context.check_positions([each.forward for each in layers], f"no layer of {type(model).__name__} takes")
        in_flight = in_flight_by_stage(plan)
        if section.partition == "layers":
            self.bounds = bounds_as_given(section.layers, plan.stages, len(layers))
        else:
            self.bounds = bounds_of(model, layers, plan.stages, section.partition, section.costs, in_flight)
        chunks = chunks_of(model, layers, self.bounds)
        used = {parameter for chunk in chunks for parameter in chunk.parameters()}
        for name, parameter in model.named_parameters():
            if parameter not in used:
                raise ValueError(f"parameter {name!r} is in no layer of the pipeline; allowed: each in one or more")
        rank_of = [plan.place(chunk.number).rank for chunk in chunks]
        training = {
            rank for chunk, rank in zip(chunks, rank_of, strict=True) for p in chunk.parameters() if p.requires_grad
        }
        if idle := sorted(set(rank_of) - training):
            raise ValueError(
                f"pipeline.partition = {section.partition!r}: stages {idle} have no parameters to train; allowed: some"
                " on each (another partition, or fewer stages)"
            )
        tied = tied_ranks(chunks, rank_of)
        if len(set(tied.values())) > 1:
            raise ValueError(
                f"parameters are tied between the stages {sorted(set(tied.values()))}; allowed: one set of stages"
            )
        for parameter, ranks in tied.items():
            role = role_of(parameter)
            give_role(parameter, replace(role, partial=(*role.partial, TIED)))
            if TIED not in self.groups.beside:
                self.groups = tying(self.groups, self.settings, ranks)
        return chunks

    def _chunk_runtime(self, chunk: Chunk, blocks: list[nn.Module], pattern: torch.optim.Optimizer) -> ChunkRuntime:
        settings, mine = self.settings, set(chunk.parameters())
        inside = set(chunk.modules())
        groups = [{**g, "params": [p for p in g["params"] if p in mine]} for g in pattern.param_groups]
        own = [block for block in blocks if block in inside]
        owners, flat = flat_units(chunk, settings, self.groups, pattern, groups, own, self.tiers)
        runtime = ChunkRuntime(chunk, owners, flat, settings.zero, self.groups, settings.accumulation, settings.buffers)
        if any(action.kind == "W" for action in self.plan.actions(self.pipeline.rank)):
            runtime.defer_weights()
        if self.context is not None:
            self.context.install(chunk, own)
        if owners:
            self.recompute = recompute_blocks(
                chunk,
                owners,
                settings.activations,
                runtime.units[0].full.device,
                visit=runtime.visiting,
                group=self.groups.axis("tensor"),
                observer=self.communicator.observer,
            )
        return runtime

    # A step #

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """One step: `gradient_accumulation_steps` micro-batches forward and backward, and the optimizer's.

        Args:
            data_iter: gives a batch (inputs, targets) per micro-batch, to ranks of the first and the last stage; if
                left out, the loader of `initialize`'s training_data, over and over.

        Returns:
            The loss, mean over micro-batches and all ranks, the same on every rank; a scalar in fp64.

        Raises:
            ValueError: a micro-batch of another shape than the first one.
        """
        self.module.train()
        for chunk in self._chunks:
            chunk.train()
        losses = self._pass(self._training, data_iter)
        self._announce(None)
        self._stages.end_pipeline()
        self.micro_steps += self.settings.accumulation
        mean = self._mean(losses)
        self._take_step()
        return mean

    def eval_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """The mean loss of as many micro-batches as a step has, in evaluation mode without gradients.

        All ranks must call it, as train_batch.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for module in (self, *self._chunks):
                stack.enter_context(evaluating(module))
            return self._mean(self._pass(self._evaluation, data_iter))

    def _pass(self, plan: Plan, data_iter: Iterator[Any] | None) -> list[Tensor]:
        """All micro-batches through this rank's chunks; the losses that came out here.

        An error on one rank is told to all that may wait for it: what it owes them will not come.
        """
        try:
            return self._play(plan, data_iter)
        except Exception as error:
            for group in self.groups.each():
                group.give_up(f"{type(error).__name__}: {error}")
            raise

    def _play(self, plan: Plan, data_iter: Iterator[Any] | None) -> list[Tensor]:
        inputs, targets = self._read(data_iter)
        if self._held is None:
            self._place_tokens()
            self._held = Held(self._chunks, self._stages.chunks, *self._learn_formats(inputs.get(0, ())))
        duties = Duties(self._loss, self.scale_loss, self._around, self._announce)
        player = Player(plan, self._held, self.pipeline, duties, inputs, targets, self._spare)
        player.play()
        self.actions = player.actions
        return player.losses

    def _learn_formats(self, inputs: tuple[Any, ...]) -> tuple[list[Format], list[Format]]:
        """What each chunk of this rank takes and gives, from the inputs of the first one."""
        with torch.no_grad(), self._autocast():
            return learn_formats(self._chunks, self.plan, self.pipeline, inputs, self.device)

    def _place_tokens(self) -> None:
        """Tell each chunk where this rank's tokens stand in their sequences, if ranks share these."""
        if self.context is not None:
            positions = self.context.positions(self._sequence_tokens(), self.device)[None]
            for chunk in self._chunks:
                chunk.place_tokens(positions)

    def _sequence_tokens(self) -> int:
        """Of a whole sequence: only the ends of the model have seen one."""
        tokens = torch.tensor([self._tokens], device=self.device)
        self.pipeline.all_reduce(tokens, "tokens of a sequence", largest=True, scalar=True).wait()
        return int(tokens)

    def _announce(self, action: Action | None) -> None:
        """An action of this rank comes now; None: all are done. Flights listen."""

    def _read(self, data_iter: Iterator[Any] | None) -> tuple[dict[int, Any], dict[int, Any]]:
        """Inputs and targets by micro-batch, where this rank has the first or the last chunk."""
        first, last = (any(getattr(chunk, end) for chunk in self._chunks) for end in ("first", "last"))
        if not (first or last):
            return {}, {}
        source = self._loader_batches() if data_iter is None else data_iter
        inputs, targets = {}, {}
        for number in range(self.settings.accumulation):
            batch = next(source, None)
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                what = "ended" if batch is None else f"gave a {type(batch).__name__}"
                raise ValueError(
                    f"train_batch: data_iter {what} at micro-batch {number} of {self.settings.accumulation}; allowed:"
                    " so many pairs (inputs, targets)"
                )
            if self.monitor is not None and last:
                self.monitor.saw(batch[0])
            placed = map_tensors(batch, lambda tensor: tensor.to(self.device, non_blocking=True))
            if self.context is not None:
                self._tokens = self.context.tokens(placed)
                placed, _ = self.context.cut(tuple(placed), {})
            inputs[number], targets[number] = map(_several, placed)
        if first:
            self._check_shapes(inputs)
        return inputs, targets

    def _check_shapes(self, inputs: dict[int, tuple[Any, ...]]) -> None:
        """Inputs of other shapes than the first ever would not fit the messages; said before any is sent."""
        for number, each in inputs.items():
            found = format_of([value for value in each if isinstance(value, Tensor)])
            self._taken = found if self._taken is None else self._taken
            if found != self._taken:
                now, before = ([tuple(shape) for shape, _ in form] for form in (found, self._taken))
                raise ValueError(
                    f"micro-batch {number} has inputs of shapes {now}, but the first one of the run {before}: stages"
                    " exchange buffers of one size; pad the micro-batches or drop those that differ"
                )

    _taken: Format | None = None
    _tokens = 0

    def _loader_batches(self) -> Iterator[Any]:
        loader = self.stateful.get("data_loader")
        if loader is None:
            raise ValueError("train_batch without data_iter, and initialize got no training_data; give one of them")
        if self._batches is None:
            self._batches = _over_and_over(loader)
        return self._batches

    def _loss(self, chunk: Chunk, inputs: tuple[Any, ...], targets: tuple[Any, ...]) -> Tensor:
        criterion = self.criterion
        loss = loss_of(chunk(inputs, targets)) if criterion is None else criterion(chunk(inputs), *targets)
        if self.monitor is not None and torch.is_grad_enabled():
            self.monitor.took(loss)
        return loss

    @contextmanager
    def _around(self, phase: str) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._timed(phase))
            if phase == "forward":
                stack.enter_context(self._autocast())
                if self.randomness is not None and self.module.training:
                    stack.enter_context(self.randomness.forward())
            yield

    def _mean(self, losses: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss in losses:
            total += loss.to(torch.float64)
        self.communicator.all_reduce(total, "loss", scalar=True).wait()
        return total * (self.pipeline.world / (self.communicator.world * self.settings.accumulation))

    # The whole model #

    def own_state(self) -> dict[str, Any]:
        here = {name for chunk in self._chunks for name in chunk.state_dict()}
        elsewhere = {name for chunk in self._everything for name in chunk.state_dict()} - here
        return {name: value for name, value in super().own_state().items() if name not in elsewhere}

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError(
            "a model cut into pipeline stages has no forward of its own: call engine.train_batch or eval_batch"
        )

    def backward(self, loss: Any, *, more: bool = False, retain_graph: bool = False) -> None:
        raise RuntimeError("a pipeline does backward inside its schedule: call engine.train_batch(batches)")

    def step(self) -> None:
        raise RuntimeError("a pipeline's step is part of engine.train_batch(batches)")


def _check(settings: Config) -> None:
    """Raise a ValueError where the config asks for what a pipeline does not do."""
    if settings.zero.parameters:
        raise ValueError(
            "zero_optimization.stage = 3 with a pipeline: every micro-batch would gather all parameters again; allowed:"
            " 0, 1, 2"
        )
    if settings.redundancy.local is not None:
        raise ValueError("local_updates with a pipeline; allowed: stages that step together")


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _over_and_over(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader
