"""Targets for `verify` that seed a bug into the engine on the ranks, and models that engines get wrong.

A seed replaces methods of the engine when a target is made on a rank; `restore` puts them back.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from small_models import SAMPLES, VOCAB, Residual, Run, token_batch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from windtunnel.engine.communicator import DONE, Handle
from windtunnel.engine.optimizer import ShardedOptimizer
from windtunnel.engine.unit import FlatUnit
from windtunnel.engine.zero import ZeroRuntime
from windtunnel.experiments import ranks

STEPS = 3

Sample = tuple[nn.Module, list[Any]]

_before: list[tuple[Any, str, Any]] = []


def seed(owner: Any, name: str, replacement: Any) -> None:
    if dist.is_initialized():  # on a rank, not where the target is looked at
        _before.append((owner, name, vars(owner)[name]))
        setattr(owner, name, replacement)


def restore(rank: int, world: int) -> None:
    while _before:
        setattr(*_before.pop())


def zoo(name: str) -> Sample:
    run = Run(name, steps=STEPS, dtype=torch.float32)
    return run.build(), [run.batch(step) for step in range(STEPS)]


# The engine, broken #

REDUCE, GATHER, STEP, KEEP, ACCEPT = (
    FlatUnit.reduce, FlatUnit.gather, ShardedOptimizer.step, FlatUnit.keep_reduced, FlatUnit.accept
)  # fmt: skip


def a_reduction_is_missing() -> Sample:
    """Of the middle block."""

    def reduce(unit: FlatUnit) -> Handle:
        if unit.block != 1:
            return REDUCE(unit)
        unit.fill_unseen()
        return DONE

    seed(FlatUnit, "reduce", reduce)
    return zoo("gpt")


def accumulation_is_not_divided_by() -> Sample:
    seed(ZeroRuntime, "gradient_scale", property(lambda runtime: 1.0 / runtime.communicator.world))
    return zoo("gpt")


def gathers_are_stale() -> Sample:
    """What is gathered is what was there before the last step."""
    before: dict[FlatUnit, Tensor] = {}

    def step(optimizer: ShardedOptimizer, *arguments: Any) -> Any:
        before.update({unit: unit.shard.clone() for unit in optimizer.units})
        return STEP(optimizer, *arguments)

    def gather(unit: FlatUnit, *, again: bool = False) -> None:
        now = unit.shard
        unit.shard = before.get(unit, now)
        GATHER(unit, again=again)
        unit.shard = now

    seed(ShardedOptimizer, "step", step)
    seed(FlatUnit, "gather", gather)
    return zoo("gpt")


class Tied(Residual):
    """The embedding is the head, too; `dropped` keeps the head's gradient from it."""

    dropped = False

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            h = h + block(h)
        weight = self.embedding.weight.detach() if self.dropped else self.embedding.weight
        return functional.cross_entropy((h @ weight.T).flatten(0, 1), y.flatten())


def a_tied_gradient_is_dropped() -> Sample:
    """Under the engine, one of the two users of a weight has no say."""
    initialize = ranks.initialize

    def dropping(model: Any, *arguments: Any, **keywords: Any) -> Any:
        model.dropped = True
        return initialize(model, *arguments, **keywords)

    seed(ranks, "initialize", dropping)
    return tied()


def tied() -> Sample:
    return _tokens(Tied)


# Models that engines get wrong #


class Shared(Residual):
    """One block under two checkpointed calls."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embedding(x)
        for number in (0, 1, 0, 2):
            h = h + checkpoint(self.blocks[number], h, use_reentrant=self.use_reentrant)
        return functional.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


def _tokens(make: Callable[[], nn.Module]) -> Sample:
    torch.manual_seed(0)
    return make(), [token_batch(step) for step in range(STEPS)]


def shared() -> Sample:
    return _tokens(lambda: Shared(use_reentrant=False))


def shared_reentrant() -> Sample:
    return _tokens(lambda: Shared(use_reentrant=True))


def shared_gradients_overwrite() -> Sample:
    """A gradient that comes again in a backward takes the place of the one before."""

    def accept(unit: FlatUnit, parameter: nn.Parameter, scale: float) -> None:
        unit.seen.discard(parameter)
        ACCEPT(unit, parameter, scale)

    seed(FlatUnit, "accept", accept)
    return shared_reentrant()


def two_backwards(model: Callable[..., Tensor], backward: Callable[..., None], batch: Any) -> Tensor:
    """Two losses, each of its own forward: of the tokens, and of the tokens shifted."""
    x, y = batch
    first = model(x, y)
    backward(first, more=True)
    second = model((x + 1) % VOCAB, y) * 2
    backward(second)
    return first.detach() + second.detach()


def one_graph(model: Callable[..., Tensor], backward: Callable[..., None], batch: Any) -> Tensor:
    """Two losses of one forward."""
    loss = model(*batch)
    backward(loss * 2, more=True, retain_graph=True)
    backward(loss)
    return loss.detach()


def undeclared(model: Callable[..., Tensor], backward: Callable[..., None], batch: Any) -> Tensor:
    return two_backwards(model, lambda loss, **options: backward(loss), batch)


def with_two_backwards() -> Any:
    return *zoo("tied"), two_backwards


def with_one_graph() -> Any:
    return *zoo("tied"), one_graph


def with_undeclared_backwards() -> Any:
    return *zoo("tied"), undeclared


def what_is_reduced_is_reduced_again() -> Any:
    """A second backward adds to what the first one's reduction left, and all of it is reduced."""
    seed(FlatUnit, "keep_reduced", lambda unit: None)
    return with_undeclared_backwards()


assert SAMPLES % 6 == 0, "two ranks and three micro-steps"
