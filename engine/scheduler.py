"""Objects that set an optimizer's learning rate before each step, in the manner of torch.optim.lr_scheduler."""

import inspect
from dataclasses import fields
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from ..reading import nearest
from .schedule import OneCycle, Schedule, SchedulerSection, schedule_named


class FormulaLR(lr_scheduler.LRScheduler):
    """Follows a formula of engine/schedule.py; its state is the number of steps taken, so it resumes anywhere."""

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self.schedule = schedule
        for part in fields(schedule):
            value = getattr(schedule, part.name)
            if isinstance(value, tuple) and len(value) != len(optimizer.param_groups):
                raise ValueError(
                    f"scheduler.params.{part.name} has {len(value)} values; allowed: one, or one for each of the"
                    f" {len(optimizer.param_groups)} parameter groups"
                )
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The learning rate of each parameter group before step number `last_epoch`."""
        return [self.schedule.lr(self.last_epoch, group, float(base)) for group, base in enumerate(self.base_lrs)]

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self._set_momenta()

    def _set_momenta(self) -> None:
        if isinstance(self.schedule, OneCycle):
            for number, group in enumerate(self.optimizer.param_groups):
                _set_momentum(group, self.schedule.momentum(self.last_epoch, number))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a number of steps taken, and set the optimizer accordingly."""
        self.last_epoch = state_dict["steps"]
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = torch.full_like(group["lr"], float(lr)) if isinstance(group["lr"], torch.Tensor) else lr
        self._set_momenta()


def _set_momentum(group: dict[str, Any], momentum: float | None) -> None:
    if momentum is None:
        return
    if "betas" in group:
        group["betas"] = (momentum, *group["betas"][1:])
    elif "momentum" in group:
        group["momentum"] = momentum
    else:
        raise ValueError(
            "scheduler.params.cycle_momentum = True, but the optimizer has neither betas nor momentum; allowed: False"
        )


def scheduler_for(given: Any, section: SchedulerSection | None, pattern: Optimizer, optimizer: Optimizer) -> Any:
    """The scheduler of a run, or None: the one that `initialize` was given, else the configured one.

    Args:
        given: a function of the optimizer, or a scheduler that was built on `pattern`.
        pattern: the user's optimizer on whole parameters.
        optimizer: the one on shards, which the scheduler shall set.

    Raises:
        ValueError: it does not fit the optimizer, or cannot be stepped by `engine.step`.
    """
    if given is None:
        return None if section is None else make_scheduler(section, optimizer)
    return checked(given(optimizer) if callable(given) else take_over(given, pattern, optimizer))


def make_scheduler(section: SchedulerSection, optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    """The configured scheduler on an optimizer.

    Raises:
        ValueError: a parameter that a scheduler of torch does not have, or a value that does not fit the optimizer.
    """
    schedule = schedule_named(section.type, section.params)
    if schedule is not None:
        return FormulaLR(optimizer, schedule)
    kind: type[lr_scheduler.LRScheduler] = getattr(lr_scheduler, section.type)
    known = [name for name in inspect.signature(kind).parameters if name not in ("optimizer", "last_epoch")]
    for name in section.params:
        if name not in known:
            raise ValueError(
                f"scheduler.params.{name} is not known to {section.type}; allowed: {', '.join(known)}"
                f"{nearest(name, known)}"
            )
    try:
        return kind(optimizer, **section.params)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scheduler.params for {section.type}: {error}") from None


def checked(scheduler: Any) -> Any:
    """The scheduler, if `engine.step` can step it.

    Raises:
        ValueError: it wants to be told something at each step, as ReduceLROnPlateau does.
    """
    needed = [
        name
        for name, parameter in inspect.signature(scheduler.step).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if needed:
        raise ValueError(
            f"lr_scheduler: {type(scheduler).__name__} needs {', '.join(needed)} at each step, which engine.step() does"
            " not know; make it on the optimizer that initialize returns, and step it yourself"
        )
    return scheduler


def take_over(scheduler: Any, pattern: Optimizer, optimizer: Optimizer) -> Any:
    """Let a scheduler that was built on the user's optimizer set the one on shards, which has the same groups.

    Returns:
        The scheduler, changed in place, and so are those that it is composed of.

    Raises:
        ValueError: it was built on another optimizer than the one given to `initialize`, or has none.
    """
    for part in _composed_of(scheduler):
        if getattr(part, "optimizer", None) is not pattern:
            raise ValueError(
                f"lr_scheduler: {type(part).__name__} was not built on the optimizer that initialize was given; pass"
                " both (optimizer=..., lr_scheduler=...), or a function of the optimizer that returns the scheduler"
            )
    for part in _composed_of(scheduler):
        part.optimizer = optimizer
    # torch lets the first scheduler mark the optimizer, and warns about an optimizer that is not marked. This one gets
    # its mark from a scheduler that changes nothing and is forgotten.
    lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for mine, theirs in zip(optimizer.param_groups, pattern.param_groups, strict=True):
        mine.update({name: value for name, value in theirs.items() if name != "params"})
    return scheduler


def _composed_of(scheduler: Any) -> list[Any]:
    inner = getattr(scheduler, "_schedulers", [])
    return [scheduler, *(part for one in inner for part in _composed_of(one))]
