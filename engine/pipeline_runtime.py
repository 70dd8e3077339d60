"""ZeRO under a pipeline: a runtime per chunk, with several micro-batches under way, and all of a rank's as one."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .communicator import Communicator
from .deferred import DeferredWeights, products
from .groups import Groups
from .host_step import HostSteps
from .observer import Observer
from .unit import FlatUnit
from .zero import ZeroRuntime

# [Note: gradients of a chunk]
# Any number of forwards lie between a forward of a chunk and its backward, so calls whose backward is still to come are
# no sign of a lost one. Until the last micro-batch (or, where gradients are sharded, the end of each) nothing is
# reduced; a backward that leaves weight gradients for later reduces nothing either. A parameter that a later chunk of
# this rank shares gets gradients while backward is in that chunk: they wait in its own unit for its own backward.
# Nobody waits for a reduction inside a backward unless memory asks for it: the stage before this one waits for the
# gradient of the input, and its own reduction would only begin after ours, and so on down the pipeline.


class ChunkRuntime(ZeroRuntime):
    """Moves the units of one chunk through a step: see [Note: gradients of a chunk].

    Attributes:
        deferred: what its linear layers owe, once `defer_weights` was called.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.deferred: DeferredWeights | None = None
        self._reduces = False
        self._summed_later: list[FlatUnit] = []

    def defer_weights(self) -> None:
        """From now on its linear layers can be asked for their weight gradients later."""
        self.deferred = DeferredWeights(products(self.model, self._owned_together))

    def _owned_together(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether parameters are trained by units of one module of this chunk, which are reduced one after another."""
        owners = [self._unit_of[p].owner if p in self._unit_of else None for p in parameters]
        return None not in owners and len(set(owners)) == 1

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """The whole backward of a micro-batch."""
        self._reduces = True
        self._run(outputs, gradients)
        self._reduces = False
        self._count_micro_batch()

    def backward_of_input(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], micro_batch: int
    ) -> None:
        """Backward without the weight gradients of linear layers, which `backward_of_weights` brings."""
        assert self.deferred is not None
        self.deferred.micro_batch = micro_batch
        self._run(outputs, gradients)
        self.deferred.micro_batch = None

    def _begin_backward(self) -> None:
        if not self._backward_running:  # its gradients go where the last one's are still on their way
            self._absorb_pending()
        super()._begin_backward()

    def _run(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        self.backwards = 0
        torch.autograd.backward(list(outputs), list(gradients))

    def backward_of_weights(self, micro_batch: int) -> None:
        """What `backward_of_input` left; each unit is reduced while those after it are computed."""
        assert self.deferred is not None
        self._absorb_pending()
        self._reduces = True
        for _, together in groupby(self._reduce_order, key=lambda unit: unit.owner):
            units = list(together)
            weights = {parameter for unit in units for parameter in unit.parameters}
            for parameter, gradient in self.deferred.pay(micro_batch, weights):
                parameter.grad = gradient
                self._unit_of[parameter].accept(parameter, self.gradient_scale)
                self.used.add(parameter)
            for unit in units:
                self._reduce(unit)
        self._reduces = False
        self._count_micro_batch()

    def _count_micro_batch(self) -> None:
        self.backwards = 0
        self.micro_step += 1

    def _reduce(self, unit: FlatUnit) -> None:
        if self._reduces:
            super()._reduce(unit)
            return
        self._next_to_reduce += 1
        self._reduced.add(unit)

    @property
    def _most_behind(self) -> int:
        return super()._most_behind if self.zero.gradients else len(self._reduce_order)

    def _absorb_all(self) -> None:
        """Later: see [Note: gradients of a chunk]."""

    def _absorb_pending(self) -> list[FlatUnit]:
        """Wait for the reductions that the last backward left under way; their units."""
        pending = []
        while self._behind:
            unit, handle = self._behind.popleft()
            handle.wait()
            unit.absorb()
            pending.append(unit)
        return pending

    def _reduce_between_replicas(self, unit: FlatUnit) -> None:
        """Not inside backward: the rank that this one would wait for may wait for what this one is about to send."""
        self._summed_later.append(unit)

    def _gradient_ready(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None:  # else it is owed
            super()._gradient_ready(parameter)

    def _end_backward(self) -> None:
        super()._end_backward()
        self.backwards = 0  # each is counted with its micro-batch

    def end_pipeline(self) -> None:
        """All micro-batches are through: wait for what is reduced, and sum over the ranks that share parameters."""
        for unit in (*self._summed_later, *self._absorb_pending()):
            unit.reduce_between_replicas().wait()
        self._summed_later.clear()


class PipelineRuntime:
    """The chunks of one rank as a single runtime: what the optimizer, checkpoints and queries ask of one.

    Attributes:
        chunks: in the order of the model.
        units: of all chunks.
        host_steps: steps the units whose state rests off the device, once all micro-batches are through.
    """

    host_steps: HostSteps | None = None

    def __init__(self, chunks: Sequence[ChunkRuntime], groups: Groups) -> None:
        self.chunks, self.groups = list(chunks), groups
        first = self.chunks[0]
        self.zero, self.accumulation, self.deciding = first.zero, first.accumulation, first.deciding
        self.communicator: Communicator = first.communicator
        self.observer: Observer = first.observer
        self.units = [unit for chunk in self.chunks for unit in chunk.units]

    @property
    def micro_step(self) -> int:
        """How many micro-batches have passed all chunks since the last optimizer step."""
        return min(chunk.micro_step for chunk in self.chunks)

    @property
    def backwards(self) -> int:
        return 0

    @property
    def missing(self) -> bool:
        return any(chunk.missing for chunk in self.chunks)

    def used_anywhere(self, missed: bool) -> set[nn.Parameter]:
        """As ZeroRuntime's; what several stages hold counts as used if one of them used it."""
        training = [chunk for chunk in self.chunks if any(unit.trainable for unit in chunk.units)]
        used: set[nn.Parameter] = set().union(*(chunk.used_anywhere(missed) for chunk in training))
        shared = [unit for unit in self.units if unit.trainable and unit.groups.sums_beside] if missed else []
        for unit in shared:
            flags = torch.tensor([p in used for p in unit.parameters], dtype=torch.int32).to(unit.full.device)
            unit.groups.replica.all_reduce(flags, "used parameters", largest=True, scalar=True).wait()
            used.update(p for p, flag in zip(unit.parameters, flags.tolist(), strict=True) if flag)
        return used

    def end_pipeline(self) -> None:
        for chunk in self.chunks:
            chunk.end_pipeline()

    def end_step(self) -> None:
        for chunk in self.chunks:
            chunk.end_step()

    def drop_step(self) -> None:
        for chunk in self.chunks:
            chunk.drop_step()

    def settle(self) -> None:
        for chunk in self.chunks:
            chunk.settle()

    def gathered_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for chunk in self.chunks:
            yield from chunk.gathered_parameters()
