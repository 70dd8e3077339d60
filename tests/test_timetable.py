"""A plan in one pass and the same plan played by events; many pipelines at once and each alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline_schedules import BLOCKING
from test_pipeline_step import posted, priced_plans
from windtunnel.collectives.pipeline import Plan
from windtunnel.collectives.pipeline_messages import fuse, with_communication
from windtunnel.collectives.pipeline_schedules import schedule
from windtunnel.sim.pipeline import StagePrice, compose, compose_by_events, order_of
from windtunnel.sim.timetable import END, MEET, POST, order

ROUNDING = 1e-9
"""Of sums of a few thousand floats: the clock adds the time until an arrival to now, the pass takes the arrival."""

Priced = tuple[Plan, list[StagePrice]]


def forms(plan: Plan) -> list[Plan]:
    """All ways to pass its messages that can be performed."""
    blocking = [fuse(with_communication(plan))] if plan.schedule in BLOCKING else []
    return [posted(plan), fuse(posted(plan)), *blocking]


def link(activation_s: float, gradient_s: float) -> Callable[[str, int, int], float]:
    """Messages whose times differ by direction and by place."""
    return lambda what, sender, receiver: (activation_s if what == "activation" else gradient_s) * (1 + sender % 3)


@settings(max_examples=60)
@given(priced_plans(), st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_one_pass_finds_what_the_clock_plays(priced: Priced, activation_s: float, gradient_s: float) -> None:
    plan, stages = priced
    for form in forms(plan):
        found = compose(form, stages, link(activation_s, gradient_s))
        played = compose_by_events(form, stages, link(activation_s, gradient_s))
        assert found.step_s == pytest.approx(played.step_s, rel=ROUNDING)
        for one, other in zip(found.ranks, played.ranks, strict=True):
            assert one.actions == other.actions
            assert one.starts_s == pytest.approx(other.starts_s, rel=ROUNDING, abs=ROUNDING)
            assert one.ends_s == pytest.approx(other.ends_s, rel=ROUNDING)
            assert one.breakdown_s == pytest.approx(other.breakdown_s, rel=ROUNDING, abs=ROUNDING * found.step_s)
            assert [count for _, count in one.in_flight] == [count for _, count in other.in_flight]


@settings(max_examples=30)
@given(priced_plans())
def test_the_order_posts_each_message_once_from_each_side(priced: Priced) -> None:
    plan = posted(priced[0])
    found = order(plan)
    for kind in (POST, MEET):
        assert sorted(doing.subject for doing in found.doings if doing.kind == kind) == list(range(len(found.ways)))
    assert sum(doing.kind == END for doing in found.doings) == plan.ranks * (
        plan.micro_batches // plan.micro_batches_per_step
    )


def test_the_order_of_a_plan_is_found_once() -> None:
    plan = posted(schedule("1f1b").plan(3, 4))
    assert order_of(plan) is order_of(plan)
    assert order_of(replace(plan)) is not order_of(plan)


def test_sides_that_disagree_on_the_order_are_refused() -> None:
    plan = posted(schedule("gpipe").plan(2, 2))
    receiving = plan.programs[1]
    first, second = (item for item in receiving if str(item).startswith("post (receive activation"))
    swapped = {first: second, second: first}
    crossed = replace(plan, programs=(plan.programs[0], tuple(swapped.get(item, item) for item in receiving)))
    with pytest.raises(ValueError, match="rank 1 does not receive what rank 0 sends"):
        order(crossed)


@settings(max_examples=30)
@given(priced_plans(), st.lists(st.floats(0.5, 3.0), min_size=2, max_size=4))
def test_many_pipelines_at_once_are_each_alone(priced: Priced, paces: list[float]) -> None:
    from windtunnel.sim.timetable import evaluate

    plan, stages = posted(priced[0]), priced[1]
    found = order_of(plan)
    per_step = plan.micro_batches_per_step
    prices = [stages[rank].seconds(action, per_step) for rank, action in found.prices]
    after = [stage.after_s for stage in stages]
    factors = np.array(paces)
    together = evaluate(found, [price * factors for price in prices], lambda *_: 0.5 * factors, after)
    for number, factor in enumerate(paces):
        alone = evaluate(found, [price * factor for price in prices], lambda *_, f=factor: 0.5 * f, after)
        for one, other in zip(together.ranks, alone.ranks, strict=True):
            assert [float(now[number]) for now, *_ in one.marks[1:]] == [now for now, *_ in other.marks[1:]]
            assert [float(end[number]) for end in one.ends_s] == other.ends_s
