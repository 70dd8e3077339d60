"""Learning-rate schedules: the formulas, the objects that follow them, and a run that is interrupted."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import Run, start_engine, train_step
from torch import nn
from torch.optim import lr_scheduler
from windtunnel.engine.config import Config
from windtunnel.engine.engine import initialize
from windtunnel.engine.schedule import (
    OF_TORCH,
    LRRangeTest,
    OneCycle,
    SchedulerSection,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
)
from windtunnel.engine.scheduler import FormulaLR, make_scheduler, take_over
from windtunnel.engine.world import World

# Formulas #


@pytest.mark.parametrize(
    ("kind", "step", "share"),
    [
        ("log", 0, 0.0),
        ("log", 1, 0.0),  # one step late
        ("log", 5, math.log(5) / math.log(10)),
        ("log", 10, 1.0),
        ("log", 11, 1.0),
        ("linear", 1, 0.0),
        ("linear", 2, 0.1),
        ("linear", 10, 0.9),
        ("linear", 11, 1.0),
        ("linear", 5000, 1.0),
    ],
)
def test_warm_up(kind: Any, step: int, share: float) -> None:
    schedule = WarmupLR(warmup_min_lr=0.2, warmup_max_lr=1.2, warmup_num_steps=10, warmup_type=kind)
    assert schedule.lr(step, 0, 99.0) == pytest.approx(0.2 + share)


def test_warm_up_ends_at_the_optimizers_own_rate_unless_told() -> None:
    assert WarmupLR(warmup_num_steps=4).lr(100, 0, 0.3) == 0.3


@pytest.mark.parametrize(("step", "share"), [(1, 0.0), (6, 0.5), (11, 1.0), (21, 0.75), (51, 0.0), (10**6, 0.0)])
def test_warm_up_and_decay(step: int, share: float) -> None:
    schedule = WarmupDecayLR(total_num_steps=50, warmup_max_lr=0.4, warmup_num_steps=10, warmup_type="linear")
    assert schedule.lr(step, 0, 1.0) == pytest.approx(0.4 * share, abs=1e-15)


@pytest.mark.parametrize(("step", "ratio"), [(0, 0.1), (1, 0.1), (6, 0.55), (10, 0.91), (30, 0.55), (50, 0.1)])
def test_warm_up_and_cosine(step: int, ratio: float) -> None:
    schedule = WarmupCosineLR(
        total_num_steps=50, warmup_min_ratio=0.1, warmup_num_steps=10, cos_min_ratio=0.1, warmup_type="linear"
    )
    assert schedule.lr(step, 0, 3.0) == pytest.approx(3.0 * ratio)
    assert schedule.lr(step + 1000, 0, 3.0) == pytest.approx(0.3)


CYCLE = OneCycle(
    cycle_min_lr=0.1,
    cycle_max_lr=0.9,
    cycle_first_step_size=10,
    cycle_second_step_size=20,
    decay_step_size=5,
    decay_lr_rate=0.5,
    decay_mom_rate=-0.1,
)


@pytest.mark.parametrize(
    ("step", "lr", "momentum"),
    [
        (0, 0.1, 0.9),
        (5, 0.5, 0.85),
        (10, 0.9, 0.8),
        (20, 0.5, 0.85),
        (30, 0.1, 0.9),
        (35, 0.1 / 1.5, 0.81),
        (40, 0.05, 0.72),
    ],
)
def test_one_cycle(step: int, lr: float, momentum: float) -> None:
    assert CYCLE.lr(step, 0, 1.0) == pytest.approx(lr)
    assert CYCLE.momentum(step, 0) == pytest.approx(momentum)


def test_one_cycle_in_stairs() -> None:
    cycle = OneCycle(
        cycle_min_lr=0.0, cycle_max_lr=1.0, cycle_first_step_size=6, cycle_first_stair_count=3, cycle_momentum=False
    )
    assert [cycle.lr(step, 0, 1.0) for step in range(13)] == pytest.approx(
        [0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0, 0]
    )
    assert cycle.lr(1000, 0, 1.0) == 0.0
    assert cycle.momentum(3, 0) is None


@pytest.mark.parametrize(("stairs", "multiple"), [(False, 1 + 2 * 1.75), (True, 1 + 2 * 1)])
def test_range_test(stairs: bool, multiple: float) -> None:
    schedule = LRRangeTest(
        lr_range_test_min_lr=0.01,
        lr_range_test_step_size=4,
        lr_range_test_step_rate=2.0,
        lr_range_test_staircase=stairs,
    )
    assert schedule.lr(0, 0, 1.0) == 0.01
    assert schedule.lr(7, 0, 1.0) == pytest.approx(0.01 * multiple)


steps = st.integers(1, 60)


@given(warm=steps, rest=st.integers(0, 100), kind=st.sampled_from(["log", "linear"]), low=st.floats(0, 1))
def test_warm_ups_rise_and_then_fall(warm: int, rest: int, kind: Any, low: float) -> None:
    warm = max(2, warm)
    sizes: dict[str, Any] = {"warmup_num_steps": warm, "warmup_type": kind}
    ends = {
        WarmupLR(warmup_min_lr=low, warmup_max_lr=low + 1, **sizes): (low, low + 1),
        WarmupDecayLR(total_num_steps=warm + rest, warmup_min_lr=low, warmup_max_lr=low + 1, **sizes): (low, low + 1),
        WarmupCosineLR(total_num_steps=warm + rest, warmup_min_ratio=low, cos_min_ratio=low, **sizes): (low, 1.0),
    }
    for schedule, (least, most) in ends.items():
        rates = [schedule.lr(step, 0, 1.0) for step in range(warm + rest + 5)]
        # Sums of a few roundings of numbers up to 2.
        assert all(least - 1e-12 <= rate <= most + 1e-12 for rate in rates)
        rising, falling = rates[: warm + 1], rates[warm + 1 :]
        assert all(a <= b + 1e-12 for a, b in pairwise(rising))
        if not isinstance(schedule, WarmupLR):
            assert all(a >= b - 1e-12 for a, b in pairwise(falling))


@given(first=steps, second=steps, stairs=st.integers(0, 7))
def test_a_cycle_has_its_peak_and_its_ends(first: int, second: int, stairs: int) -> None:
    cycle = OneCycle(
        cycle_min_lr=1.0,
        cycle_max_lr=2.0,
        cycle_first_step_size=first,
        cycle_second_step_size=second,
        cycle_first_stair_count=stairs,
    )
    rates = [cycle.lr(step, 0, 0.0) for step in range(first + second + 3)]
    assert rates[0] == rates[first + second] == rates[-1] == 1.0
    assert rates[first] == max(rates) == 2.0
    for step, rate in enumerate(rates):  # learning rate and momentum mirror each other
        momentum = cycle.momentum(step, 0)
        assert momentum is not None
        assert (momentum - 0.8) / 0.1 == pytest.approx(2.0 - rate)


# Objects #


def sgd(groups: int = 1, **arguments: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=0.1, **arguments)


def rates_of(scheduler: Any, count: int) -> list[list[float]]:
    """The learning rates before each of `count` steps, of every parameter group."""
    rates = []
    for _ in range(count):
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
        assert scheduler.get_last_lr() == rates[-1]
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def test_the_object_follows_the_formula_for_each_group() -> None:
    optimizer = sgd(2)
    optimizer.param_groups[1]["lr"] = 0.7
    section = SchedulerSection(type="WarmupLR", params={"warmup_min_lr": [0.0, 0.1], "warmup_num_steps": 5})
    scheduler = make_scheduler(section, optimizer)
    formula = WarmupLR(warmup_min_lr=(0.0, 0.1), warmup_num_steps=5)
    assert isinstance(scheduler, lr_scheduler.LRScheduler)
    wanted = [[formula.lr(step, 0, 0.1), formula.lr(step, 1, 0.7)] for step in range(9)]
    assert rates_of(scheduler, 9) == [pytest.approx(rates) for rates in wanted]


@pytest.mark.parametrize(
    ("optimizer", "found"),
    [
        (lambda: torch.optim.Adam([nn.Parameter(torch.zeros(1))], betas=(0.5, 0.7)), lambda g: g["betas"]),
        (lambda: sgd(momentum=0.5), lambda g: (g["momentum"], 0.7)),
    ],
)
def test_a_cycle_moves_the_first_beta_or_the_momentum(optimizer: Callable, found: Callable) -> None:
    scheduler = FormulaLR(optimizer(), CYCLE)
    group = scheduler.optimizer.param_groups[0]
    assert found(group) == (0.9, 0.7)
    scheduler.load_state_dict({"steps": 10})
    assert found(group) == (pytest.approx(0.8), 0.7)
    assert scheduler.get_last_lr() == [group["lr"]] == [pytest.approx(0.9)]


def test_a_cycle_of_no_momentum_is_refused() -> None:
    optimizer = torch.optim.Adagrad([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="cycle_momentum = True, but the optimizer has neither betas nor momentum"):
        FormulaLR(optimizer, CYCLE)


def test_a_value_for_each_group_or_one() -> None:
    with pytest.raises(ValueError, match=r"scheduler.params.warmup_min_lr has 3 values; .* each of the 2 parameter"):
        FormulaLR(sgd(2), WarmupLR(warmup_min_lr=(0.0, 0.0, 0.0)))


OF_TORCH_PARAMS: dict[str, dict[str, Any]] = {
    "ConstantLR": {"factor": 0.5, "total_iters": 3},
    "CosineAnnealingLR": {"T_max": 10, "eta_min": 0.01},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 4},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"total_iters": 5},
    "MultiStepLR": {"milestones": [3, 7]},
    "OneCycleLR": {"max_lr": 0.5, "total_steps": 20},
    "PolynomialLR": {"total_iters": 6, "power": 2.0},
    "StepLR": {"step_size": 3, "gamma": 0.5},
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_those_of_torch_by_name(name: str) -> None:
    params = OF_TORCH_PARAMS[name]
    ours = make_scheduler(SchedulerSection(type=name, params=params), sgd(momentum=0.9))
    assert rates_of(ours, 12) == rates_of(getattr(lr_scheduler, name)(sgd(momentum=0.9), **params), 12)


def test_closed_forms_of_step_and_cosine() -> None:
    stairs = make_scheduler(SchedulerSection(type="StepLR", params=OF_TORCH_PARAMS["StepLR"]), sgd())
    cosine = make_scheduler(SchedulerSection(type="CosineAnnealingLR", params={"T_max": 10}), sgd())
    assert rates_of(stairs, 10) == [[pytest.approx(0.1 * 0.5 ** (step // 3))] for step in range(10)]
    assert rates_of(cosine, 10) == [[pytest.approx(0.05 * (1 + math.cos(math.pi * s / 10)))] for s in range(10)]


# What is refused #


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "WarmupLr"}, "type = 'WarmupLr'; allowed: WarmupLR, .*StepLR.*did you mean 'WarmupLR'"),
        ({"type": "ReduceLROnPlateau"}, "type = 'ReduceLROnPlateau'; .* a metric is passed to initialize"),
        ({"type": "WarmupLR", "params": {"warmup_max": 1}}, "unknown key 'warmup_max'.*did you mean 'warmup_max_lr'"),
        ({"type": "WarmupLR", "params": {"warmup_type": "cubic"}}, "warmup_type = 'cubic'"),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 0}}, "warmup_num_steps = 0; allowed: at least 1"),
        ({"type": "WarmupDecayLR"}, "'total_num_steps' is missing"),
        (
            {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_num_steps": 10}},
            "total_num_steps = 9; allowed: at least 10",
        ),
        ({"type": "OneCycle", "params": {"cycle_min_lr": 0.1}}, "'cycle_max_lr' is missing"),
        ({"type": "LRRangeTest", "params": {"lr_range_test_step_size": 0}}, "lr_range_test_step_size = 0"),
        ({"params": {}}, "'scheduler.type' is missing"),
    ],
)
def test_a_section_that_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"config: .*{message}") as refused:
        Config.read({"scheduler": section}, 1)
    assert "\n" not in str(refused.value)


def test_an_argument_that_torch_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"scheduler.params.step_sise is not known to StepLR; .*'step_size'"):
        make_scheduler(SchedulerSection(type="StepLR", params={"step_sise": 3}), sgd())
    with pytest.raises(ValueError, match=r"scheduler.params for StepLR: .*step_size"):
        make_scheduler(SchedulerSection(type="StepLR"), sgd())


# With the engine #


def test_a_schedule_on_the_users_optimizer_is_taken_over() -> None:
    """Composed ones too; the shards see the rates that the user's own loop would."""

    def chained(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        warm, rest = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(optimizer, 0.5)
        return lr_scheduler.SequentialLR(optimizer, [warm, rest], milestones=[3])

    alone = rates_of(chained(sgd()), 8)
    model = nn.Linear(2, 1)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, optimizer, _, scheduler = initialize(model, optimizer=own, lr_scheduler=chained(own))
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        engine.backward(engine(torch.ones(1, 2)).sum())
        engine.step()
    assert rates == [pytest.approx(wanted) for wanted in alone]
    assert engine.lr_scheduler is scheduler


def test_a_schedule_on_another_optimizer_is_refused() -> None:
    model = nn.Linear(2, 1)
    own, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(ValueError, match="StepLR was not built on the optimizer that initialize was given"):
        initialize(model, optimizer=own, lr_scheduler=lr_scheduler.StepLR(other, 3))
    with pytest.raises(ValueError, match="object was not built on the optimizer"):
        take_over(object(), own, other)


def test_a_schedule_that_needs_a_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs metrics at each step"):
        initialize(nn.Linear(2, 1), optimizer=torch.optim.SGD, lr_scheduler=lr_scheduler.ReduceLROnPlateau)


SECTIONS: list[dict[str, Any]] = [
    {"type": "WarmupDecayLR", "params": {"total_num_steps": 8, "warmup_num_steps": 3}},
    {
        "type": "OneCycle",
        "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 0.01, "cycle_first_step_size": 3, "decay_step_size": 1},
    },
    {"type": "CosineAnnealingLR", "params": {"T_max": 6}},
]


def interrupted(rank: int, world: int, section: dict[str, Any], stop: int | None) -> list[tuple[float, Any]]:
    """(loss, learning rate and betas after the step) of 8 steps; after `stop` of them a new scheduler takes over."""
    run = Run("mlp", stage=1)
    engine = start_engine(run, run.build(), scheduler=section)
    seen = []
    for step in range(8):
        if step == stop:
            state = engine.lr_scheduler.state_dict()
            engine.lr_scheduler = make_scheduler(SchedulerSection(**section), engine.optimizer)
            engine.lr_scheduler.load_state_dict(state)
        loss = train_step(engine, run, step, rank, world)
        group = engine.optimizer.param_groups[0]
        seen.append((loss, (group["lr"], group["betas"])))
    engine.close()
    return seen


@pytest.mark.parametrize("section", SECTIONS[:2], ids=lambda section: section["type"])
def test_a_run_that_is_resumed_midway(two_ranks: World, section: dict[str, Any]) -> None:
    whole = two_ranks.run(interrupted, section, None)
    assert len({rate for _, (rate, _) in whole[0]}) > 3
    assert two_ranks.run(interrupted, section, 5) == whole


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section["type"])
@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_a_state_means_the_same_to_a_new_object(section: dict[str, Any], stop: int) -> None:
    def fresh() -> Any:
        return make_scheduler(SchedulerSection(**section), torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.3))

    whole, first, second = fresh(), fresh(), fresh()
    wanted = rates_of(whole, 8)
    assert rates_of(first, stop) == wanted[:stop]
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert rates_of(second, 8 - stop) == wanted[stop:]
