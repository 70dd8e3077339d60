"""One process, plain torch, whole batches: what `verify` holds the ranks against."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.config import Config
from ..engine.loss import loss_of
from ..engine.loss_scale import LossScaler
from ..engine.optim import unsharded
from ..engine.scheduler import make_scheduler
from .comparison import GRADIENT, PARAMETER, STATE, Key, Size, sizes
from .ranks import DTYPES, Task


@dataclass(frozen=True, slots=True)
class Known:
    """What one process found.

    Attributes:
        sizes: by step that is watched; the tensors are in the task's folder.
        moments: values that the optimizer keeps for each element of a parameter.
    """

    losses: tuple[float, ...]
    sizes: dict[int, dict[Key, Size]]
    moments: int


def reference(rank: int, world: int, task: Task, watch: Collection[int] = ()) -> Known | None:
    """Train on rank 0, and keep gradients, optimizer state and parameters of the steps to `watch`."""
    if rank != 0:
        return None
    model, batches, micro_step = task.training()
    settings = Config.read(task.config(0), 1)
    narrow = task.precision in ("bf16", "fp16")
    if narrow:
        model = model.to(DTYPES[task.precision])
    names = {parameter: name for name, parameter in model.named_parameters()}
    masters = {p: p.detach().float() if narrow else p for p in names if p.requires_grad}
    optimizer = unsharded(list(masters.values()), settings.optimizer)
    scheduler = None if settings.scheduler is None else make_scheduler(settings.scheduler, optimizer)
    scaler = LossScaler(settings.formats.scaling)
    cast = settings.formats.autocast

    def forward(*arguments: Any, **keywords: Any) -> Any:
        with nullcontext() if cast == "off" else torch.autocast("cpu", DTYPES[cast]):
            return model(*arguments, **keywords)

    def backward(loss: Any, more: bool = False, retain_graph: bool = False) -> None:
        (loss_of(loss) * scaler.scale).backward(retain_graph=retain_graph)

    losses, known = [], {}
    for number, batch in enumerate(batches):
        losses.append(micro_step(forward, backward, batch).item())
        _hand_over(masters, scaler.scale)
        overflow = scaler.policy.skip and not _finite(masters.values())
        snapshot = {
            (GRADIENT, names[p]): m.grad.clone()
            for p, m in masters.items()
            if m.grad is not None and number in watch and not overflow
        }
        if settings.clip:
            nn.utils.clip_grad_norm_(masters.values(), settings.clip)
        _step(masters, optimizer, skip=overflow)
        scaler.update(overflow)
        if scheduler is not None and not overflow:
            scheduler.step()
        if number in watch:
            snapshot |= _state(masters, names, optimizer)
            snapshot |= {(PARAMETER, name): p.detach().clone() for p, name in names.items()}
            torch.save(snapshot, task.snapshot_path(number))
            known[number] = sizes(snapshot)
    return Known(tuple(losses), known, _moments(optimizer))


def _hand_over(masters: Mapping[nn.Parameter, Tensor], loss_scale: float) -> None:
    """Gradients to the masters, in their precision and without the loss scale."""
    for parameter, master in masters.items():
        if master is not parameter:
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None
        if master.grad is not None and loss_scale != 1.0:
            master.grad /= loss_scale


def _finite(masters: Iterable[Tensor]) -> bool:
    return all(bool(master.grad.isfinite().all()) for master in masters if master.grad is not None)


def _step(masters: Mapping[nn.Parameter, Tensor], optimizer: torch.optim.Optimizer, skip: bool) -> None:
    if not skip:
        optimizer.step()
    optimizer.zero_grad()
    for parameter, master in masters.items():
        if master is not parameter:
            parameter.data.copy_(master)


def _state(
    masters: Mapping[nn.Parameter, Tensor], names: Mapping[nn.Parameter, str], optimizer: torch.optim.Optimizer
) -> dict[Key, Tensor]:
    found: dict[Key, Tensor] = {}
    for parameter, master in masters.items():
        if master is not parameter:
            found[STATE + "master", names[parameter]] = master.clone()
        kept: Mapping[str, Any] = optimizer.state.get(master, {})
        for what, value in kept.items():
            if isinstance(value, Tensor) and value.numel() in (1, master.numel()):
                found[STATE + what, names[parameter]] = value.clone()
    return found


def _moments(optimizer: torch.optim.Optimizer) -> int:
    """From torch's own state of a parameter, tensors of its shape; 0 where nothing was stepped."""
    counts = (
        sum(isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape for value in kept.values())
        for parameter, kept in optimizer.state.items()
    )
    return max(counts, default=0)
