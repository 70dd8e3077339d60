"""One process that does in plain torch, number by number, what ranks do in a precision: gradients in their own dtype,
fp32 masters, a loss scale, clipping. It shares nothing with the engine but the models.

The ranks import this module, so it imports nothing that only tests need.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from small_models import Run, micro_batches
from torch import Tensor, nn

SGD = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1}
"""It shows a gradient of the wrong size, which Adam divides away."""

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A precision, as the loop below and a config say it. `scale` 0 is dynamic, None is no scale at all."""

    parameters: str = "fp32"
    gradients: str | None = None
    autocast: str | None = None
    scale: float | None = None
    window: int = 1000
    hysteresis: int = 2
    power: int = 16

    @property
    def config(self) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        if self.parameters != "fp32":
            keys[self.parameters] = {"enabled": True}
        if self.gradients is not None:
            keys["data_types"] = {"grad_accum_dtype": self.gradients}
        if self.autocast is not None:
            keys["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[self.autocast]}
        if self.scale is not None:
            keys["fp16"] = {
                **keys.get("fp16", {}),
                "loss_scale": self.scale,
                "initial_scale_power": self.power,
                "loss_scale_window": self.window,
                "hysteresis": self.hysteresis,
            }
        return keys

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", FORMATS[self.autocast]) if self.autocast else nullcontext()

    def cast(self, run: Run, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Floating inputs in the parameters' dtype."""
        x, y = (t.to(FORMATS[self.parameters]) if t.is_floating_point() else t for t in batch)
        return x, y


@dataclass
class Scale:
    """Dynamic loss scaling by the book of GradScaler, with a count of overflows that are forgiven."""

    numbers: Numbers
    value: float = 1.0
    forgiven: int = 0
    clean: int = 0
    skipped: int = 0
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.numbers.scale is not None:
            self.value = self.numbers.scale or 2.0**self.numbers.power

    def update(self, overflow: bool) -> None:
        self.skipped += overflow
        dynamic = self.numbers.scale == 0
        if overflow:
            self.clean = 0
            self.forgiven += 1
            if dynamic and self.forgiven >= self.numbers.hysteresis:
                self.value /= 2
        else:
            self.clean += 1
            if dynamic and self.clean % self.numbers.window == 0:
                self.value *= 2
                self.forgiven = 0
        self.history.append(self.value)


@dataclass(frozen=True)
class Result:
    """After every step the losses (of all micro-steps and ranks) and the scale; at the end parameters, norm, skips."""

    losses: list[float]
    scales: list[float]
    parameters: dict[str, Tensor]
    norm: float | None
    skipped: int


Prepare = Callable[[int, int, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
"""What is done to the micro-batch of a rank in a step: (step, rank, batch) -> batch."""


def untouched(step: int, rank: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def train_plainly(
    run: Run,
    numbers: Numbers,
    world: int,
    prepare: Prepare = untouched,
    make: Callable[..., torch.optim.Optimizer] | None = None,
) -> Result:
    """The run as `world` ranks would do it, one after another in this process.

    From ZeRO 2 on each micro-step's gradients are summed over the ranks before they are added up, below it after.
    """
    model = run.build().to(FORMATS[numbers.parameters])
    masters = {p: p.detach().float() if p.dtype.itemsize == 2 else p for p in model.parameters()}
    optimizer = (make or (lambda parameters: torch.optim.SGD(parameters, **SGD)))(list(masters.values()))
    scale, losses, norm = Scale(numbers), [], None
    for step in range(run.steps):
        gradients, step_losses = _gradients(model, run, numbers, world, step, scale.value, prepare)
        losses += step_losses
        norm = float(sum(g.double().square().sum() for g in gradients.values()) ** 0.5) / scale.value
        overflow = not all(torch.isfinite(g).all() for g in gradients.values())
        if not (overflow and (numbers.scale is not None or numbers.parameters == "bf16")):
            factor = min(1.0, run.clip / (norm + 1e-6)) if run.clip else 1.0
            _step(masters, optimizer, gradients, factor / scale.value)
        scale.update(overflow)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Result(losses, scale.history, parameters, norm, scale.skipped)


def _gradients(
    model: nn.Module, run: Run, numbers: Numbers, world: int, step: int, scale: float, prepare: Prepare
) -> tuple[dict[nn.Parameter, Tensor], list[float]]:
    """The mean over ranks and micro-steps, in the gradients' dtype, and the losses by micro-step and rank."""
    share = 1.0 / (world * run.accumulation)
    kind = FORMATS[numbers.gradients or numbers.parameters]
    first, micro_sums = [{} for _ in range(world)], []
    losses = []
    for micro_step in range(run.accumulation):
        of_ranks: list[dict[nn.Parameter, Tensor]] = []
        for rank in range(world):
            batch = numbers.cast(run, prepare(step, rank, micro_batches(run, step, rank, world)[micro_step]))
            with numbers.context():
                loss = model(*batch)
            (loss * scale).backward()
            losses.append(loss.item())
            of_ranks.append({p: p.grad for p in model.parameters() if p.grad is not None})
            for p in model.parameters():
                p.grad = None
        if run.stage >= 2:
            micro_sums.append({p: sum(_share(of[p], share, kind) for of in of_ranks) for p in of_ranks[0]})
        else:
            for total, of in zip(first, of_ranks, strict=True):
                for p, gradient in of.items():
                    if p in total:
                        total[p].add_(gradient, alpha=share)
                    else:
                        total[p] = _share(gradient, share, kind)
    parts = micro_sums if run.stage >= 2 else first
    return {p: sum(part[p] for part in parts) for p in parts[0]}, losses


def _share(gradient: Tensor, share: float, kind: torch.dtype) -> Tensor:
    """share * gradient, computed in the wider dtype and rounded to `kind`."""
    wide = torch.promote_types(gradient.dtype, kind)
    return (gradient.to(wide) * share).to(kind)


def _step(masters: dict, optimizer: torch.optim.Optimizer, gradients: dict, factor: float) -> None:
    for parameter, master in masters.items():
        gradient = gradients.get(parameter)
        master.grad = None if gradient is None else gradient.to(master.dtype) * factor
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, master in masters.items():
            if master is not parameter:
                parameter.copy_(master)
