"""Evaluation: the mean loss over a whole set that the ranks share, as one process would find it.

[Note: ranks that run out]
Where parameters are sharded or experts spread, a forward is also a row of collectives of all ranks. So before each
batch the ranks tell each other who has one; a rank without one runs its last batch again and counts nothing. A rank
that never had one gets the first batch of another rank to do so with. Elsewhere ranks run alone.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batch import call, count_of, map_tensors, samples_in
from .communicator import Communicator
from .loss import loss_of

if TYPE_CHECKING:
    from .engine import Engine

Weight = Callable[[Any, Any], Tensor | float]
"""(batch, output of the model) -> how many things the batch's loss is a mean of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found, the same on every rank.

    Attributes:
        loss: mean over all samples (or tokens: whatever the weights count) of all ranks.
        weight: how many those are.
        batches: of all ranks.
    """

    loss: float
    weight: float
    batches: int

    @property
    def perplexity(self) -> float:
        """exp(loss), inf where that is no float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def evaluate(engine: "Engine", batches: Iterable[Any], *, weight: Weight | None = None) -> Evaluation:
    """Mean loss of a model in evaluation mode without gradients. All ranks must call it.

    Modules are put back into the modes that they were in, and training goes on as if nothing had been.

    Args:
        batches: this rank's; ranks may have unequal numbers of them. Tensors are moved to the model's device.
        weight: (batch, output) -> what the batch counts. By default the count that the model returns beside its loss
            (an integer, or `num_tokens`), else the samples of the batch.

    Raises:
        ValueError: the model returns no loss, or no rank has a batch.
    """
    device = engine.runtime.units[0].full.device
    weigh = weight or _default_weight
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss * weight, weight, batches
    with torch.no_grad(), evaluating(engine):
        for batch, counts in _in_step(engine, iter(batches), device):
            placed = map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
            output = call(engine, placed)
            if counts:
                much = torch.as_tensor(weigh(placed, output), dtype=torch.float64, device=device)
                totals += _counted(loss_of(output), much)
    engine.communicator.all_reduce(totals, "evaluation", scalar=True).wait()
    loss, weighed, count = (totals / engine.groups.same_samples).tolist()
    if not count:
        raise ValueError("evaluate: no rank has a batch; allowed: at least one batch on one rank")
    return Evaluation(loss=loss / weighed if weighed else math.nan, weight=weighed, batches=int(count))


def _counted(loss: Tensor, weight: Tensor) -> Tensor:
    """[loss * weight, weight, 1]; a mean of nothing, which is nan, counts nothing."""
    if loss.numel() != 1:
        raise ValueError(f"evaluate: the model's loss has shape {tuple(loss.shape)}; allowed: a scalar")
    return torch.stack(
        (torch.where(weight > 0, loss.double().reshape(()) * weight, 0.0), weight, torch.ones_like(weight))
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module, and afterwards the mode that each was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _default_weight(batch: Any, output: Any) -> Tensor | float:
    count = count_of(output)
    return samples_in(batch) if count is None else count


def _in_step(engine: "Engine", batches: Iterator[Any], device: torch.device) -> Iterator[tuple[Any, bool]]:
    """(batch, whether it counts), as often on every rank where forward needs all: [Note: ranks that run out]."""
    communicator = engine.communicator
    together = engine.runtime.zero.parameters or engine.groups.axis("expert").world > 1
    if communicator.world == 1 or not together:
        yield from ((batch, True) for batch in batches)
        return
    nothing = object()
    spare: Any = nothing
    while True:
        batch = next(batches, nothing)
        have = torch.zeros(communicator.world, dtype=torch.int32, device=device)
        have[communicator.rank] = batch is not nothing
        communicator.all_reduce(have, "who has a batch", scalar=True).wait()
        here = have.tolist()
        if not any(here):
            return
        if spare is nothing and not all(here):  # the first round: later every rank has a spare one
            spare = _shared(communicator, batch, here.index(1), device)
        if batch is not nothing:
            spare = batch
        yield spare, batch is not nothing


def _shared(communicator: Communicator, batch: Any, root: int, device: torch.device) -> Any:
    """The root's batch, on every rank."""
    packed = io.BytesIO()
    if communicator.rank == root:
        torch.save(map_tensors(batch, Tensor.cpu), packed)
    size = torch.tensor([packed.tell()], dtype=torch.int64, device=device)
    communicator.broadcast(size, "size of a batch", root).wait()
    content = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if communicator.rank == root:
        content.copy_(torch.frombuffer(packed.getbuffer(), dtype=torch.uint8))
    communicator.broadcast(content, "a batch", root).wait()
    return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), weights_only=False)
