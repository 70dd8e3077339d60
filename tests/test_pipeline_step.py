"""A composed pipeline step: idle time as the schedule's, messages where arithmetic says, sums that close."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline_schedules import BLOCKING, plans
from windtunnel.collectives.pipeline import Action, Plan, peak_in_flight
from windtunnel.collectives.pipeline_clock import bubble_fraction, play, step_window
from windtunnel.collectives.pipeline_messages import fuse, prefetch, with_communication
from windtunnel.collectives.pipeline_schedules import schedule
from windtunnel.sim.pipeline import ActionPrice, Link, LinkPrice, PipelineStep, StagePrice, compose, free

RELATIVE = 1e-9
"""Sums of a few thousand floats."""


def equal_stages(plan: Plan, forward_s: float = 1.0, after_s: float = 0.0) -> list[StagePrice]:
    """A backward takes twice as long as a forward, each of its parts as long."""
    actions = {
        (kind, chunk): ActionPrice(seconds=2 * forward_s if kind == "B" else forward_s)
        for kind in "FBIW"
        for chunk in range(plan.chunks)
    }
    return [StagePrice(actions=actions, after_s=after_s)] * plan.ranks


def posted(plan: Plan) -> Plan:
    return prefetch(with_communication(plan))


seconds = st.floats(0.01, 10.0)
prices = st.builds(ActionPrice, seconds=seconds, first_s=st.none() | seconds, last_s=st.none() | seconds)


@st.composite
def priced_plans(draw: st.DrawFn) -> tuple[Plan, list[StagePrice]]:
    """A plan with messages, and a price of its own for each rank, chunk and kind."""
    plan = draw(plans(most_ranks=6, most=12))
    stages = [
        StagePrice(
            actions={(kind, chunk): draw(prices) for kind in "FBIW" for chunk in range(plan.chunks)},
            after_s=draw(st.floats(0.0, 5.0)),
        )
        for _ in range(plan.ranks)
    ]
    return plan, stages


def check_sums(step: PipelineStep, stages: list[StagePrice]) -> None:
    for rank, price in zip(step.ranks, stages, strict=True):
        assert sum(rank.breakdown_s.values()) == pytest.approx(step.step_s, rel=RELATIVE)
        assert rank.after_s == price.after_s
        assert min(rank.breakdown_s.values()) >= -RELATIVE * step.step_s
        assert all(one.end_s <= other.start_s for one, other in pairwise(rank.spans))


# Free messages #


@settings(max_examples=40)
@given(plans())
def test_with_free_messages_the_bubble_is_the_schedules(plan: Plan) -> None:
    step = compose(posted(plan), equal_stages(plan))
    idle_s = sum(rank.bubble_s for rank in step.ranks)
    assert idle_s / (plan.ranks * step.step_s) == pytest.approx(float(bubble_fraction(plan)), abs=RELATIVE)
    assert all(rank.exposed_p2p_s == 0 for rank in step.ranks)


@settings(max_examples=40)
@given(priced_plans())
def test_with_free_messages_every_action_runs_when_the_longest_path_says(priced: tuple[Plan, list[StagePrice]]) -> None:
    """Two clocks, one of them without events and without messages."""
    plan, stages = priced
    if not plan.flushes:
        return  # what follows a step delays the next one there, and the longest path knows nothing of it
    step = compose(posted(plan), stages)
    table = play(plan, lambda rank, action: stages[rank].seconds(action, plan.micro_batches_per_step))
    for rank, slots in zip(step.ranks, table, strict=True):
        assert [span.action for span in rank.spans] == [slot.action for slot in slots]
        assert [span.end_s for span in rank.spans] == pytest.approx([slot.end for slot in slots], rel=RELATIVE)
    ends = [slots[-1].end + price.after_s for slots, price in zip(table, stages, strict=True)]
    assert step.step_s == pytest.approx(max(ends), rel=RELATIVE)
    check_sums(step, stages)


@pytest.mark.parametrize(("name", "ranks", "number", "chunks"), [("1f1b", 64, 128, 1), ("interleaved", 35, 70, 3)])
def test_a_large_step(name: str, ranks: int, number: int, chunks: int) -> None:
    plan = schedule(name).plan(ranks, number, chunks)
    step = compose(posted(plan), equal_stages(plan))
    assert step.step_s == 3 * (number * chunks + ranks - 1)


# Messages that take time #


@settings(max_examples=40)
@given(priced_plans(), st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_the_parts_sum_to_the_step(
    priced: tuple[Plan, list[StagePrice]], activation_s: float, gradient_s: float
) -> None:
    plan, stages = priced

    def link(what: str, sender: int, receiver: int) -> float:
        return activation_s if what == "activation" else gradient_s

    forms = [posted(plan), fuse(posted(plan))]
    if plan.schedule in BLOCKING:
        forms.append(fuse(with_communication(plan)))
    for form in forms:
        step = compose(form, stages, link)
        check_sums(step, stages)
        if plan.flushes:
            assert step.step_s >= compose(form, stages).step_s * (1 - RELATIVE)
        for rank, price in zip(step.ranks, stages, strict=True):
            if plan.flushes:
                busy = sum(price.seconds(span.action, plan.micro_batches) for span in rank.spans)
                assert rank.compute_s == pytest.approx(busy, rel=RELATIVE)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_one_micro_batch_pays_each_message(ranks: int) -> None:
    """Nothing overlaps: all computation and all messages stand in a row."""
    plan = schedule("1f1b").plan(ranks, 1)
    step = compose(posted(plan), equal_stages(plan), lambda what, *_: 0.25 if what == "activation" else 0.5)
    assert step.step_s == 3 * ranks + 0.75 * (ranks - 1)
    assert step.ranks[0].exposed_p2p_s == 0.5  # the gradient
    assert step.ranks[-1].exposed_p2p_s == 0.25
    assert step.ranks[0].bubble_s == step.step_s - 3 - 0.5


def test_posted_messages_travel_while_ranks_compute() -> None:
    """GPipe's forwards: the first activation is exposed on rank 1, the others arrive while it works.

    Without posts each send holds rank 0 until rank 1 takes it, and rank 1 takes each only when it needs it.
    """
    plan = schedule("gpipe").plan(2, 4)
    stages = equal_stages(plan)
    step = compose(posted(plan), stages, lambda *_: 0.5)
    assert step.ranks[1].exposed_p2p_s == 0.5
    assert [span.start_s for span in step.ranks[1].spans[:4]] == [1.5, 2.5, 3.5, 4.5]
    blocking = compose(with_communication(plan), stages, lambda *_: 0.5)
    assert [span.start_s for span in blocking.ranks[1].spans[:4]] == [1.5, 3.0, 4.5, 6.0]
    assert blocking.ranks[1].exposed_p2p_s == 4 * 0.5 + 4 * 0.5  # gradients as well


def test_messages_of_a_direction_follow_each_other() -> None:
    """A link slower than the stages decides: an activation every 3 s."""
    plan = schedule("gpipe").plan(2, 5)
    step = compose(posted(plan), equal_stages(plan), lambda what, *_: 3.0 if what == "activation" else 0.0)
    assert [span.start_s for span in step.ranks[1].spans[:5]] == [4.0, 7.0, 10.0, 13.0, 16.0]
    assert step.ranks[1].exposed_p2p_s == 3 + 4 * 2


def test_links_inside_and_between_nodes() -> None:
    link = LinkPrice(
        message_bytes=1000,
        inside=Link(latency_s=1e-3, bytes_per_s=1e6),
        between=Link(latency_s=2e-3, bytes_per_s=1e5),
        nodes=(0, 0, 1),
    )
    assert link("activation", 0, 1) == link("gradient", 1, 0) == pytest.approx(2e-3)
    assert link("activation", 1, 2) == pytest.approx(12e-3)
    plan = schedule("gpipe").plan(3, 1)
    assert compose(posted(plan), equal_stages(plan), link).step_s == pytest.approx(9 + 2 * 14e-3)


# Stages that differ #


def test_first_and_last_micro_batches_have_prices_of_their_own() -> None:
    price = ActionPrice(seconds=1.0, first_s=2.0, last_s=4.0)
    assert [price.of(number, 3) for number in range(3)] == [2.0, 1.0, 4.0]
    assert price.of(0, 1) == 4.0
    assert ActionPrice(seconds=1.0, first_s=2.0).of(0, 1) == 2.0
    assert [ActionPrice(seconds=1.0).of(number, 2) for number in range(2)] == [1.0, 1.0]


def test_the_slowest_stage_sets_the_pace() -> None:
    plan = schedule("1f1b").plan(4, 64)
    stages = equal_stages(plan)
    slow = StagePrice(actions={("F", 0): ActionPrice(seconds=2.0), ("B", 0): ActionPrice(seconds=4.0)})
    step = compose(posted(plan), [*stages[:2], slow, *stages[3:]])
    assert step.ranks[2].compute_s == 6 * 64
    # Before it two forwards; its second forward ends before the last stage's first backward; after it two backwards.
    assert step.step_s == 2 + 6 * 64 + 1 + 4


def test_what_follows_the_last_action_may_hide_in_the_drain() -> None:
    """The last rank of GPipe ends 2 (p - 1) s before the first: so much of its optimizer costs nothing."""
    plan = schedule("gpipe").plan(4, 4)
    stages = equal_stages(plan)
    patient = StagePrice(actions=stages[0].actions, after_s=6.0)
    assert compose(posted(plan), [*stages[:3], patient]).step_s == compose(posted(plan), stages).step_s
    assert compose(posted(plan), [patient, *stages[1:]]).step_s == compose(posted(plan), stages).step_s + 6


# Without a flush #


def test_two_versions_of_the_weights_leave_no_bubble() -> None:
    plan = schedule("pipedream-2bw").plan(4, 8)
    step = compose(posted(plan), equal_stages(plan, after_s=0.5))
    assert step.step_s == 3 * 8 + 0.5
    assert all(rank.bubble_s == 0 for rank in step.ranks)
    flushed = schedule("1f1b").plan(4, 8)
    assert compose(posted(flushed), equal_stages(flushed, after_s=0.5)).step_s == 3 * (8 + 3) + 0.5


def test_without_a_flush_the_slowest_stage_alone_decides() -> None:
    plan = schedule("pipedream-2bw").plan(3, 9)
    stages = equal_stages(plan)
    slow = StagePrice(actions={("F", 0): ActionPrice(seconds=1.5), ("B", 0): ActionPrice(seconds=2.0)}, after_s=0.25)
    step = compose(posted(plan), [slow, *stages[1:]])
    assert step.step_s == pytest.approx(3.5 * 9 + 0.25, rel=RELATIVE)
    assert step.ranks[1].bubble_s == pytest.approx(0.5 * 9 + 0.25, rel=RELATIVE)


def test_the_window_of_a_steady_step() -> None:
    plan = schedule("pipedream-2bw").plan(2, 4)
    table = play(plan, lambda rank, action: 2 if action.kind == "B" else 1)
    for rank in range(2):
        begin, end = step_window(plan, table, rank)
        assert end - begin == 12


# Memory #


@settings(max_examples=20)
@given(plans(most_ranks=6, most=12))
def test_activations_over_time(plan: Plan) -> None:
    step = compose(posted(plan), equal_stages(plan), lambda *_: 0.1)
    for rank, peak in zip(step.ranks, peak_in_flight(plan), strict=True):
        times = [time_s for time_s, _ in rank.in_flight]
        assert times == sorted(times)
        assert max(count for _, count in rank.in_flight) == peak
        assert rank.in_flight[-1][1] == 0


def test_an_activation_is_kept_from_the_start_of_its_forward_to_the_end_of_its_weight_part() -> None:
    plan = schedule("zb-h1").plan(2, 1)
    step = compose(posted(plan), equal_stages(plan))
    assert step.ranks[0].spans[0].action == Action("F", 0, 0)
    assert step.ranks[0].in_flight == ((0.0, 1), (4.0, 1), (5.0, 0))


# What is refused #


def test_what_cannot_be_composed_is_refused() -> None:
    plan = schedule("1f1b").plan(3, 4)
    stages = equal_stages(plan)
    with pytest.raises(ValueError, match="prices of 2 stages for a plan of 3 ranks"):
        compose(posted(plan), stages[:2])
    with pytest.raises(ValueError, match=r"the 1f1b plan has no messages; add them by prefetch"):
        compose(plan, stages)
    with pytest.raises(ValueError, match=r"stages\[1\] has no price for 'B' of chunk 0"):
        compose(posted(plan), [stages[0], StagePrice(actions={("F", 0): ActionPrice(seconds=1.0)}), stages[2]])
    with pytest.raises(ValueError, match="1f1b: rank 0 waits forever after F2"):
        compose(with_communication(plan), stages)


def test_free_messages_are_free() -> None:
    assert free("activation", 0, 1) == 0.0
