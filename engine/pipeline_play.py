"""Plays one rank's program of a pipeline plan: forwards, backwards and the messages between the stages."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..collectives.pipeline import (
    ACTIVATION,
    BACKWARD,
    FORWARD,
    GRADIENT,
    INPUT,
    WEIGHT,
    Action,
    Message,
    Plan,
    Post,
    Recv,
    Send,
    Wait,
    makes,
)
from ..collectives.pipeline_acknowledge import acknowledgements
from .communicator import Communicator, Handle, Letter
from .pipeline_format import Format, in_format
from .pipeline_runtime import ChunkRuntime
from .stages import Chunk

Key = tuple[str, int, int]
"""("activation" or "gradient", chunk of this rank, micro-batch)."""


@dataclass(frozen=True, slots=True)
class Held:
    """One rank's part of the model: its chunks with their runtimes, and between which formats they lie.

    Attributes:
        enters, leaves: by chunk, what it takes and what it gives; empty at the ends of the model.
    """

    chunks: Sequence[Chunk]
    runtimes: Sequence[ChunkRuntime]
    enters: Sequence[Format]
    leaves: Sequence[Format]


@dataclass(frozen=True, slots=True)
class Duties:
    """What the engine wants of a pass through the pipeline.

    Attributes:
        loss: (last chunk, its inputs, targets) -> the loss of a micro-batch.
        scaled: the loss as backward begins with it.
        around: context of a phase, "forward" or "backward".
        announce: told of each action before it is done.
    """

    loss: Callable[[Chunk, tuple[Any, ...], tuple[Any, ...]], Tensor]
    scaled: Callable[[Tensor], Tensor]
    around: Callable[[str], AbstractContextManager[Any]]
    announce: Callable[[Action], None]


@dataclass(slots=True)
class _Kept:
    """Of a chunk's forward, until its backward: leaves that it took, and what it gave."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Player:
    """One pass of a plan's micro-batches through this rank's chunks.

    Attributes:
        actions: what it has computed, in order.
        losses: of the micro-batches that came to the end of the model here, detached.
    """

    def __init__(
        self,
        plan: Plan,
        held: Held,
        pipeline: Communicator,
        duties: Duties,
        inputs: Mapping[int, tuple[Any, ...]],
        targets: Mapping[int, tuple[Any, ...]],
        spare: dict[tuple[int, torch.dtype], list[Tensor]],
    ) -> None:
        self.plan, self.held, self.pipeline, self.duties = plan, held, pipeline, duties
        self.inputs, self.targets, self.spare = inputs, targets, spare
        self.actions: list[Action] = []
        self.losses: list[Tensor] = []
        self._splits = {(a.chunk, a.micro_batch) for a in plan.actions(pipeline.rank) if a.kind == WEIGHT}
        self._acknowledged = acknowledgements(plan, pipeline.rank)
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._here: dict[Key, tuple[Tensor, ...]] = {}  # received, or made by a neighbour on this rank
        self._made: dict[Key, tuple[Tensor, ...]] = {}  # to be sent
        self._coming: dict[Key, list[Handle]] = {}
        self._leaving: dict[Send, list[tuple[Handle, Tensor]]] = {}
        self._lent: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)

    def play(self) -> None:
        """Do all of it, and wait for what was sent."""
        for item in self.plan.programs[self.pipeline.rank]:
            match item:
                case Action():
                    self.perform(item)
                case Post():
                    self._post(item.messages)
                case Wait():
                    self._wait(item.message)
                case _:
                    raise AssertionError(f"a plan whose messages are posted has no {item}")
        for sent in list(self._leaving):
            self._sent(sent)

    # Computation #

    def perform(self, action: Action) -> None:
        """Compute."""
        self.duties.announce(action)
        kinds = {FORWARD: self._forward, BACKWARD: self._backward, INPUT: self._backward, WEIGHT: self._weights}
        kinds[action.kind](action)
        self.actions.append(action)

    def _forward(self, action: Action) -> None:
        number, micro_batch = action.chunk, action.micro_batch
        chunk = self.held.chunks[number]
        if chunk.first:
            inputs = self.inputs[micro_batch]
        else:
            inputs = tuple(map(_leaf, self._here.pop((ACTIVATION, number, micro_batch))))
        with self.duties.around("forward"):
            if chunk.last:
                loss = self.duties.loss(chunk, inputs, self.targets[micro_batch])
                self.losses.append(loss.detach())
                outputs: tuple[Tensor, ...] = (loss,)
            else:
                outputs = in_format(chunk(inputs), self.held.leaves[number], chunk.number)
                self._hand_on(action, tuple(output.detach() for output in outputs))
        if torch.is_grad_enabled():
            self._kept[number, micro_batch] = _Kept(() if chunk.first else inputs, outputs)
        else:
            self._give_back(number, micro_batch)

    def _backward(self, action: Action) -> None:
        number, micro_batch = action.chunk, action.micro_batch
        chunk, runtime = self.held.chunks[number], self.held.runtimes[number]
        kept = self._kept.pop((number, micro_batch))
        outputs: tuple[Tensor, ...] = kept.outputs
        gradients: tuple[Tensor | None, ...] = (None,)
        if chunk.last:
            outputs = (self.duties.scaled(outputs[0]),)
        else:
            outputs = tuple(output for output in outputs if output.is_floating_point())
            gradients = self._here.pop((GRADIENT, number, micro_batch))
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        if not pairs and any(unit.trainable for unit in runtime.units):
            raise RuntimeError(f"what chunk {chunk.number} returned needs no gradient, but the chunk has parameters")
        with self.duties.around("backward"):
            roots, seeds = [root for root, _ in pairs], [seed for _, seed in pairs]
            if action.kind == INPUT:
                runtime.backward_of_input(roots, seeds, micro_batch)
            else:
                runtime.backward(roots, seeds)
        if not chunk.first:
            self._hand_on(action, tuple(map(_gradient, filter(Tensor.is_floating_point, kept.inputs))))
        if action.kind == BACKWARD:
            self._give_back(number, micro_batch)

    def _weights(self, action: Action) -> None:
        with self.duties.around("backward"):
            self.held.runtimes[action.chunk].backward_of_weights(action.micro_batch)
        self._give_back(action.chunk, action.micro_batch)

    def _hand_on(self, action: Action, tensors: tuple[Tensor, ...]) -> None:
        """What an action made is for another rank, or for a neighbour on this one."""
        rank = self.pipeline.rank
        send = makes(self.plan, rank, action)
        assert send is not None
        if send.peer != rank:
            lent = {each.untyped_storage()._cdata for each in self._lent[action.chunk, action.micro_batch]}
            own = (each.clone() if each.untyped_storage()._cdata in lent else each for each in tensors)
            self._made[send.what, send.chunk, send.micro_batch] = tuple(own)
            return
        chunk = self.plan.place(self.plan.tag(rank, send).stage).chunk
        self._here[send.what, chunk, send.micro_batch] = tensors

    # Messages #

    def _post(self, messages: Sequence[Message]) -> None:
        letters: list[Letter] = []
        owners: list[Message] = []
        for message in messages:
            key = (message.what, message.chunk, message.micro_batch)
            name = (
                f"{message.what} of chunk {self.held.chunks[message.chunk].number}, micro-batch {message.micro_batch}"
            )
            if isinstance(message, Send):
                kind, tensors = "send", self._made.pop(key)
            else:
                kind, tensors = "recv", self._landing(message)
                self._here[key] = tensors
            letters += [Letter(kind, tensor.contiguous().view(-1), message.peer, name) for tensor in tensors]
            owners += [message] * len(tensors)
        for message, letter, handle in zip(owners, letters, self.pipeline.exchange(letters), strict=True):
            if isinstance(message, Send):
                self._leaving.setdefault(message, []).append((handle, letter.buffer))
            else:
                self._coming.setdefault((message.what, message.chunk, message.micro_batch), []).append(handle)

    def _landing(self, message: Recv) -> tuple[Tensor, ...]:
        """Buffers for what is received; they are given back when the micro-batch has left the chunk."""
        if message.what == ACTIVATION:
            wanted = self.held.enters[message.chunk]
        else:
            wanted = tuple(each for each in self.held.leaves[message.chunk] if each[1].is_floating_point)
        tensors = []
        for shape, dtype in wanted:
            spare = self.spare.setdefault((shape.numel(), dtype), [])
            buffer = spare.pop() if spare else torch.empty(shape.numel(), dtype=dtype, device=self._device)
            self._lent[message.chunk, message.micro_batch].append(buffer)
            tensors.append(buffer.view(shape))
        return tuple(tensors)

    @property
    def _device(self) -> torch.device:
        return next(unit.full.device for runtime in self.held.runtimes for unit in runtime.units)

    def _wait(self, message: Recv) -> None:
        for handle in self._coming.pop((message.what, message.chunk, message.micro_batch), ()):
            handle.wait()
        for sent in self._acknowledged.get(message, ()):
            self._sent(sent)

    def _sent(self, message: Send) -> None:
        for handle, _ in self._leaving.pop(message, ()):
            handle.wait()

    def _give_back(self, chunk: int, micro_batch: int) -> None:
        for buffer in self._lent.pop((chunk, micro_batch), ()):
            self.spare[buffer.numel(), buffer.dtype].append(buffer)


def _leaf(tensor: Tensor) -> Tensor:
    """The start of a graph."""
    start = tensor.detach()
    return start.requires_grad_() if start.is_floating_point() and torch.is_grad_enabled() else start


def _gradient(leaf: Tensor) -> Tensor:
    """Zeros where the chunk did not use what it was given."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
