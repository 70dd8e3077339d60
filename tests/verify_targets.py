"""Targets for `verify` and factories for flights: models of the zoo, broken ones, and ranks that break.

The ranks and the pilot import this module.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from small_models import SAMPLES, SEQ, VOCAB, Mlp, Run, regression_batch
from torch import Tensor, nn
from torch.nn import functional
from windtunnel.engine.unit import FlatUnit

STEPS = 4

Sample = tuple[nn.Module, list[Any]]


def on_rank(rank: int) -> bool:
    return dist.is_initialized() and dist.get_rank() == rank


def zoo(name: str) -> Sample:
    run = Run(name, steps=STEPS, dtype=torch.float32)
    return run.build(), [run.batch(step) for step in range(STEPS)]


def mlp() -> Sample:
    return zoo("mlp")


def cnn() -> Sample:
    return zoo("cnn")


def lstm() -> Sample:
    return zoo("lstm")


def tied() -> Sample:
    return zoo("tied")


def never_used() -> Sample:
    return zoo("never used")


def used_twice() -> Sample:
    return zoo("used twice")


def frozen() -> Sample:
    return zoo("frozen")


class Answer:
    """What some model libraries return."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class TakesKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, 6), nn.Linear(6, VOCAB)

    def forward(self, tokens: Tensor, labels: Tensor) -> Answer:
        return Answer(functional.cross_entropy(self.head(self.embedding(tokens)).flatten(0, 1), labels.flatten()))


def with_keywords() -> Sample:
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (STEPS, SAMPLES, SEQ))
    return TakesKeywords(), [{"tokens": batch, "labels": batch.roll(1, 1)} for batch in tokens]


class HasTables(Mlp):
    """Buffers, of which one is no part of the state and one is whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(1, 2, 7), persistent=False)
        self.register_buffer("order", torch.arange(7).flip(0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x[:, self.order] * self.scale, y)


def with_buffers() -> Sample:
    torch.manual_seed(0)
    return _regression(HasTables())


# Ranks that break #


def no_gradients_are_reduced() -> Sample:
    """On the ranks (not where flights and checks are made) a gradient stays what this rank computed."""

    class Done:
        def wait(self) -> None:
            pass

    def reduce(unit: FlatUnit) -> Done:
        unit.fill_unseen()
        return Done()

    if dist.is_initialized():
        FlatUnit.reduce = reduce  # type: ignore[assignment, method-assign]
    return mlp()


def no_parameters_are_published() -> Sample:
    """On the ranks, what another rank stepped never arrives."""
    if dist.is_initialized():
        FlatUnit.publish = lambda unit: None  # type: ignore[method-assign]
    return mlp()


PUBLISH = FlatUnit.publish


def parameters_are_published_twice() -> Sample:
    """On the ranks, a collective that changes nothing and that nobody expects."""

    def publish(unit: FlatUnit) -> None:
        PUBLISH(unit)
        unit.arrive()
        PUBLISH(unit)

    if dist.is_initialized():
        FlatUnit.publish = publish  # type: ignore[method-assign]
    return mlp()


class Breaks(Mlp):
    """Runs `accident` on rank 1 in its third forward under ZeRO."""

    def __init__(self, accident: Callable[[], Any]) -> None:
        super().__init__()
        self.accident, self.forwards = accident, 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.forwards += 1
        if on_rank(1) and self.forwards == 3:
            self.accident()
        return super().forward(x, y)


def _regression(model: nn.Module) -> Sample:
    batches = [tuple(tensor.float() for tensor in regression_batch(step)) for step in range(STEPS)]
    return model, batches


def killed() -> Sample:
    return _regression(Breaks(lambda: os.kill(os.getpid(), signal.SIGKILL)))


def stalled() -> Sample:
    return _regression(Breaks(threading.Event().wait))


def failing() -> Sample:
    def fail() -> None:
        raise RuntimeError("the third forward is too much")

    return _regression(Breaks(fail))


# Targets that are none #

A_NUMBER = 3


def raises() -> Sample:
    raise KeyError("no data here")


def only_a_model() -> Any:
    return Mlp()


def no_batches() -> Any:
    return Mlp(), []


def uneven() -> Sample:
    return Mlp(), [(torch.randn(5, 7), torch.randn(5, 3))]


def a_scalar_batch() -> Any:
    return Mlp(), [(torch.tensor(1.0), torch.tensor(2.0))]


# Factories for flights #


def dies() -> None:
    os._exit(7)


def never_returns() -> None:
    threading.Event().wait()


def raises_in_the_air() -> Any:
    raise RuntimeError("the engine is on fire")


def linear(width: int) -> tuple[nn.Module, Callable[[], tuple]]:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(width, width))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).sum()

    return Loss(), lambda: (torch.empty(2, width),)
