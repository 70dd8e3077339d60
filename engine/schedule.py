"""Learning-rate schedules as formulas: what the learning rate is before a given optimizer step.

The names, parameters and formulas are those of DeepSpeed's JSON (`scheduler`), so that a run keeps its curve when it
changes engines. engine/scheduler.py makes objects of them that an optimizer follows. Steps count from 0.

[Note: warm-up begins one step late]
DeepSpeed counts the warm-up schedules from -1: the first two steps both have the learning rate that warm-up begins
with, and the last one of the warm-up is reached before step `warmup_num_steps + 1`. So it is here. Its range test and
its cycle count from 0.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..reading import STRICT, nearest, read_into

PerGroup = float | tuple[float, ...]
"""One value for all parameter groups, or one for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSection:
    """`scheduler`: a type by name and its keyword arguments.

    Attributes:
        type: a schedule of DeepSpeed's (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest) or of torch's
            that numbers alone describe (StepLR, CosineAnnealingLR, ...).
        params: its arguments by name.
    """

    __pydantic_config__ = STRICT
    type: str
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        schedule_named(self.type, self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupLR:
    """From the minimum to the maximum in `warmup_num_steps`, then constant.

    At warm-up step i of W: minimum + (maximum - minimum) * log(i + 1) / log(W) ("log"), or * i / W ("linear").

    Attributes:
        warmup_max_lr: None for the optimizer's own learning rate.
    """

    __pydantic_config__ = STRICT
    warmup_min_lr: PerGroup = 0.0
    warmup_max_lr: PerGroup | None = None
    warmup_num_steps: int = 1000
    warmup_type: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        _at_least("warmup_num_steps", self.warmup_num_steps, 1)

    def lr(self, step: int, group: int, base: float) -> float:
        low = per_group(self.warmup_min_lr, group)
        high = base if self.warmup_max_lr is None else per_group(self.warmup_max_lr, group)
        return low + (high - low) * self.share(max(0, step - 1))  # see [Note: warm-up begins one step late]

    def share(self, step: int) -> float:
        """How far from minimum to maximum."""
        return min(1.0, warm_up(step, self.warmup_num_steps, self.warmup_type))


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupDecayLR:
    """Warm-up as in WarmupLR, then in a straight line to the minimum at `total_num_steps`."""

    __pydantic_config__ = STRICT
    total_num_steps: int
    warmup_min_lr: PerGroup = 0.0
    warmup_max_lr: PerGroup = 0.001
    warmup_num_steps: int = 1000
    warmup_type: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        _at_least("warmup_num_steps", self.warmup_num_steps, 1)
        _at_least("total_num_steps", self.total_num_steps, self.warmup_num_steps)

    def lr(self, step: int, group: int, base: float) -> float:
        low, high = per_group(self.warmup_min_lr, group), per_group(self.warmup_max_lr, group)
        return low + (high - low) * self.share(max(0, step - 1))  # see [Note: warm-up begins one step late]

    def share(self, step: int) -> float:
        """How far from minimum to maximum."""
        warm = max(2, self.warmup_num_steps)
        if step < warm:
            return warm_up(step, self.warmup_num_steps, self.warmup_type)
        return max(0.0, (self.total_num_steps - step) / max(1, self.total_num_steps - warm))


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupCosineLR:
    """Multiples of the optimizer's learning rate: warm-up from `warmup_min_ratio` to 1, then half a cosine.

    At p = (i - W + 1) / (total - W) of the way after the warm-up: c + (1 - c) * (1 + cos(pi p)) / 2 with
    c = `cos_min_ratio`, where it stays from the end on (Loshchilov and Hutter 2017, equation 5, without restarts).
    """

    __pydantic_config__ = STRICT
    total_num_steps: int
    warmup_min_ratio: float = 0.0
    warmup_num_steps: int = 1000
    cos_min_ratio: float = 0.0001
    warmup_type: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        _at_least("warmup_num_steps", self.warmup_num_steps, 1)
        _at_least("total_num_steps", self.total_num_steps, self.warmup_num_steps)

    def lr(self, step: int, group: int, base: float) -> float:
        return base * self.share(max(0, step - 1))  # see [Note: warm-up begins one step late]

    def share(self, step: int) -> float:
        """Multiple of the optimizer's learning rate."""
        warm = max(2, self.warmup_num_steps)
        if step < warm:
            done = warm_up(step, self.warmup_num_steps, self.warmup_type)
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * done
        done = min(1.0, (step - warm + 1) / max(1, self.total_num_steps - warm))
        return self.cos_min_ratio + (1 - self.cos_min_ratio) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class OneCycle:
    """Up in a first part and down in a second one, then decay (Smith 2018, section 4); momentum moves the other way.

    After the cycle the learning rate is minimum / (1 + rate * t / `decay_step_size`) at step t after it, and momentum
    maximum * (1 + rate * t / `decay_step_size`), as in DeepSpeed: a rate above 0 makes momentum grow.

    Attributes:
        cycle_second_step_size: None for as many steps as the first part has.
        cycle_first_stair_count: steps of a staircase in the first part; 0 for a slope. The second part's is the same
            if left out.
        decay_step_size: 0 for no decay.
        cycle_momentum: of the optimizer's first beta, or its `momentum`. (DeepSpeed also sets the second beta to
            0.99; here it stays.)
    """

    __pydantic_config__ = STRICT
    cycle_min_lr: PerGroup
    cycle_max_lr: PerGroup
    decay_lr_rate: float = 0.0
    cycle_first_step_size: int = 2000
    cycle_second_step_size: int | None = None
    cycle_first_stair_count: int = 0
    cycle_second_stair_count: int | None = None
    decay_step_size: int = 0
    cycle_momentum: bool = True
    cycle_min_mom: PerGroup = 0.8
    cycle_max_mom: PerGroup = 0.9
    decay_mom_rate: float = 0.0

    def __post_init__(self) -> None:
        _at_least("cycle_first_step_size", self.cycle_first_step_size, 1)
        for name in ("cycle_second_step_size", "cycle_first_stair_count", "cycle_second_stair_count"):
            _at_least(name, getattr(self, name) or 0, 0)
        for name in ("decay_step_size", "decay_lr_rate"):
            _at_least(name, getattr(self, name), 0)

    @property
    def total(self) -> int:
        second = self.cycle_second_step_size
        return self.cycle_first_step_size + (self.cycle_first_step_size if second is None else second)

    def lr(self, step: int, group: int, base: float) -> float:
        low, high = per_group(self.cycle_min_lr, group), per_group(self.cycle_max_lr, group)
        if step <= self.total:
            return low + (high - low) * self.height(step)
        return low / (1 + self.decay_lr_rate * self._intervals(step))

    def momentum(self, step: int, group: int) -> float | None:
        """Momentum before a step; None where it is left alone."""
        if not self.cycle_momentum:
            return None
        low, high = per_group(self.cycle_min_mom, group), per_group(self.cycle_max_mom, group)
        if step <= self.total:
            return high - (high - low) * self.height(step)
        return high * (1 + self.decay_mom_rate * self._intervals(step))

    def height(self, step: int) -> float:
        """How far from minimum to maximum the cycle is."""
        if step <= self.cycle_first_step_size:
            part, of, stairs = step, self.cycle_first_step_size, self.cycle_first_stair_count
        else:
            second = self.cycle_second_stair_count
            stairs = self.cycle_first_stair_count if second is None else second
            part, of = self.total - step, self.total - self.cycle_first_step_size
        return part * stairs // of / stairs if stairs else part / of

    def _intervals(self, step: int) -> float:
        return (step - self.total) / self.decay_step_size if self.decay_step_size else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LRRangeTest:
    """Upwards from the minimum, in a straight line or in stairs, to see where training diverges (Smith 2018, sect. 2).

    Before step t: minimum * (1 + rate * t / `lr_range_test_step_size`), the quotient rounded down for stairs.
    """

    __pydantic_config__ = STRICT
    lr_range_test_min_lr: PerGroup = 1e-3
    lr_range_test_step_size: int = 2000
    lr_range_test_step_rate: float = 1.0
    lr_range_test_staircase: bool = False

    def __post_init__(self) -> None:
        _at_least("lr_range_test_step_size", self.lr_range_test_step_size, 1)

    def lr(self, step: int, group: int, base: float) -> float:
        size = self.lr_range_test_step_size
        intervals = step // size if self.lr_range_test_staircase else step / size
        return per_group(self.lr_range_test_min_lr, group) * (1 + self.lr_range_test_step_rate * intervals)


Schedule = WarmupLR | WarmupDecayLR | WarmupCosineLR | OneCycle | LRRangeTest

SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
}

OF_TORCH = (
    "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR", "LinearLR",
    "MultiStepLR", "OneCycleLR", "PolynomialLR", "StepLR",
)  # fmt: skip
"""torch's schedulers that numbers alone describe and that step without being told a metric."""


def schedule_named(name: str, params: dict[str, Any]) -> Schedule | None:
    """The formula called `name`; None for one of torch's, whose arguments torch checks.

    Raises:
        ValueError: an unknown type, or a parameter that it does not have or allow.
    """
    if name in SCHEDULES:
        schedule: Schedule = read_into(SCHEDULES[name], params, f"params of {name}")
        return schedule
    if name not in OF_TORCH:
        known = (*SCHEDULES, *OF_TORCH)
        raise ValueError(
            f"type = {name!r}; allowed: {', '.join(known)}{nearest(name, known)}"
            " (one that needs a function or a metric is passed to initialize as lr_scheduler=...)"
        )
    return None


def per_group(value: PerGroup, group: int) -> float:
    """A parameter group's own value."""
    return value[group] if isinstance(value, tuple) else value


def warm_up(step: int, steps: int, kind: str) -> float:
    """How much of a warm-up of `steps` is done at `step`: log(step + 1) / log(steps), or step / steps."""
    steps = max(2, steps)
    return math.log(step + 1) / math.log(steps) if kind == "log" else step / steps


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} = {value}; allowed: at least {least}")
