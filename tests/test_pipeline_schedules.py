"""Pipeline schedules as data: orders that can be proved, bubbles and activations that equal their closed forms."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.collectives.pipeline import (
    Action,
    Exchange,
    Plan,
    Post,
    Recv,
    Send,
    Wait,
    messages,
    peak_in_flight,
    sent_messages,
)
from windtunnel.collectives.pipeline_clock import Costs, bubble_fraction, play
from windtunnel.collectives.pipeline_diagram import diagram
from windtunnel.collectives.pipeline_messages import fuse, prefetch, with_communication
from windtunnel.collectives.pipeline_proof import BUFFERED, RENDEZVOUS, prove
from windtunnel.collectives.pipeline_schedules import SCHEDULES, schedule

BLOCKING = ("sequential", "gpipe", "1f1b", "zb-h1", "pipedream-2bw")
"""Schedules whose fused exchanges, which hold a rank until they have met, never wait for each other in a circle."""


@st.composite
def plans(draw: st.DrawFn, names: tuple[str, ...] = tuple(SCHEDULES), most_ranks: int = 9, most: int = 24) -> Plan:
    """A plan of one of the schedules that can order its micro-batches."""
    one = schedule(draw(st.sampled_from(names)))
    ranks = draw(st.integers(1, most_ranks))
    number = draw(st.integers(1, most))
    if one.whole_groups:
        number = ranks * -(-number // ranks)
    if not one.flushes:
        number = max(number, ranks)
    chunks = draw(st.integers(2, 4)) if one.chunks[1] is None else one.chunks[0]
    return one.plan(ranks, number, chunks)


costs = st.builds(
    Costs,
    forward=st.fractions(min_value=Fraction(1, 9), max_value=9, max_denominator=9),
    input=st.fractions(min_value=Fraction(1, 9), max_value=9, max_denominator=9),
    weight=st.fractions(min_value=Fraction(1, 9), max_value=9, max_denominator=9),
)


# Promises #


@settings(max_examples=60)
@given(plans())
def test_every_schedule_is_proved_in_every_form(plan: Plan) -> None:
    prove(plan)
    communicating = with_communication(plan)
    prove(communicating, [BUFFERED])
    for ahead in (0, 1, 3):
        prove(prefetch(communicating, ahead))
    prove(fuse(prefetch(communicating)))
    if plan.schedule in BLOCKING:
        prove(fuse(communicating))


def test_sends_that_hold_their_rank_need_fusion() -> None:
    plan = with_communication(schedule("1f1b").plan(4, 8))
    with pytest.raises(
        ValueError, match=r"1f1b: deadlock \(rendezvous\): rank 0 can never send activation 3 to rank 1"
    ):
        prove(plan)
    prove(fuse(plan))


@pytest.mark.parametrize(("name", "chunks"), [("interleaved", 2), ("zb-v", 2)])
def test_where_ranks_form_a_circle_fusion_is_not_enough(name: str, chunks: int) -> None:
    plan = fuse(with_communication(schedule(name).plan(4, 8, chunks)))
    prove(plan, [BUFFERED])
    with pytest.raises(ValueError, match="deadlock"):
        prove(plan, [RENDEZVOUS])


@settings(max_examples=40)
@given(plans(), costs)
def test_activations_are_those_promised(plan: Plan, costs: Costs) -> None:
    """The promise is kept, and not too large where micro-batches are many."""
    peak = peak_in_flight(plan)
    assert all(there <= most for there, most in zip(peak, plan.most_in_flight, strict=True))
    if plan.micro_batches >= 2 * plan.ranks:
        assert peak == plan.most_in_flight


@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_activations_in_closed_form(ranks: int) -> None:
    number = 4 * ranks
    peaks = {name: peak_in_flight(one.plan(ranks, number)) for name, one in SCHEDULES.items()}
    assert peaks["sequential"] == (1,) * ranks
    assert peaks["gpipe"] == (number,) * ranks
    assert peaks["1f1b"] == peaks["pipedream-2bw"] == tuple(range(ranks, 0, -1))
    # Narayanan et al. 2021: 1 + (p - 1)/(p v) of 1F1B's memory on the first rank, in units of a chunk: v p + p - 1.
    assert peaks["interleaved"][0] == 2 * ranks + ranks - 1
    assert peaks["zb-h1"] == (max(peaks["1f1b"]),) * ranks
    assert peaks["zb-v"] == (2 * max(peaks["1f1b"]),) * ranks  # of chunks that are half as large


# Bubbles #


@settings(max_examples=60)
@given(plans(("sequential", "gpipe", "1f1b", "interleaved", "pipedream-2bw")), costs)
def test_the_bubble_is_the_closed_form_exactly(plan: Plan, costs: Costs) -> None:
    """For any time of a backward: both passes fill and drain alike."""
    expected = schedule(plan.schedule).bubble(plan.ranks, plan.micro_batches_per_step, plan.chunks)
    assert bubble_fraction(plan, costs) == expected


@settings(max_examples=30)
@given(plans(("zb-h1", "zb-v"), most=32))
def test_the_bubble_of_equal_parts_is_the_closed_form_exactly(plan: Plan) -> None:
    expected = schedule(plan.schedule).bubble(plan.ranks, plan.micro_batches, plan.chunks)
    if expected is not None:
        assert bubble_fraction(plan) == expected


@pytest.mark.parametrize(
    ("name", "ranks", "number", "chunks", "expected"),
    [
        ("gpipe", 64, 128, 1, Fraction(63, 191)),
        ("1f1b", 64, 512, 1, Fraction(63, 575)),
        ("interleaved", 35, 70, 3, Fraction(34, 244)),
        ("zb-h1", 64, 128, 1, Fraction(63, 447)),
        ("zb-v", 64, 128, 2, Fraction(63, 831)),
    ],
)
def test_the_bubble_of_large_pipelines(name: str, ranks: int, number: int, chunks: int, expected: Fraction) -> None:
    plan = schedule(name).plan(ranks, number, chunks)
    assert bubble_fraction(plan) == expected == schedule(name).bubble(ranks, number, chunks)


def test_a_large_pipeline_is_proved() -> None:
    prove(prefetch(with_communication(schedule("1f1b").plan(64, 128))))
    prove(prefetch(with_communication(schedule("interleaved").plan(35, 70, 3))))


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(1, 30))
def test_zero_bubble_schedules_idle_less(ranks: int, number: int) -> None:
    idle = {name: bubble_fraction(schedule(name).plan(ranks, number)) for name in ("1f1b", "zb-h1", "zb-v")}
    assert idle["zb-h1"] < idle["1f1b"]
    assert idle["zb-v"] <= idle["zb-h1"]


def test_zb_v_is_near_zero() -> None:
    assert bubble_fraction(schedule("zb-v").plan(8, 64)) < Fraction(2, 100)


def test_a_rank_of_zb_v_has_no_idle_time_of_its_own() -> None:
    """What is left of its bubble lies before its first action or after its last."""
    plan = schedule("zb-v").plan(6, 24)
    for slots in play(plan, lambda rank, action: 1):
        assert slots[-1].end - slots[0].start == len(slots)


def test_interleaving_divides_idle_time() -> None:
    ideal = 3 * 16

    def idle_time(name: str, chunks: int) -> Fraction:
        fraction = Fraction(bubble_fraction(schedule(name).plan(8, 16, chunks)))
        return fraction / (1 - fraction) * ideal

    assert idle_time("interleaved", 4) == idle_time("1f1b", 1) / 4


# Messages #


@settings(max_examples=40)
@given(plans())
def test_messages_are_those_of_the_borders_between_ranks(plan: Plan) -> None:
    communicating = with_communication(plan)
    for form in (communicating, prefetch(communicating), fuse(communicating)):
        assert [tuple(form.actions(rank)) for rank in range(plan.ranks)] == [
            tuple(plan.actions(rank)) for rank in range(plan.ranks)
        ]
        for rank in range(plan.ranks):
            onward = [plan.stage(rank, chunk) for chunk in range(plan.chunks)]
            borders = [stage for stage in onward if stage + 1 < plan.stages and plan.place(stage + 1).rank != rank]
            back = [stage for stage in onward if stage > 0 and plan.place(stage - 1).rank != rank]
            assert sent_messages(form, rank) == {
                "activation": len(borders) * plan.micro_batches,
                "gradient": len(back) * plan.micro_batches,
            }


@given(plans(most_ranks=5, most=6))
def test_stages_and_places_are_inverse(plan: Plan) -> None:
    stages = [plan.stage(rank, chunk) for rank in range(plan.ranks) for chunk in range(plan.chunks)]
    assert sorted(stages) == list(range(plan.stages))
    for stage in stages:
        assert plan.stage(*plan.place(stage)) == stage


def test_the_passes_by_example() -> None:
    plan = schedule("1f1b").plan(2, 2)
    communicating = with_communication(plan)
    f0, f1, b0, b1 = Action("F", 0, 0), Action("F", 0, 1), Action("B", 0, 0), Action("B", 0, 1)
    sends = [Send("activation", 0, number, 1) for number in range(2)]
    gradients = [Recv("gradient", 0, number, 1) for number in range(2)]
    assert communicating.programs[0] == (f0, sends[0], f1, sends[1], gradients[0], b0, gradients[1], b1)
    assert fuse(communicating).programs[0] == (
        f0, sends[0], f1, Exchange((sends[1], gradients[0])), b0, gradients[1], b1,
    )  # fmt: skip
    posted = prefetch(communicating)
    assert posted.programs[0] == (
        f0, Post((sends[0],)), Post((gradients[0],)), f1, Post((sends[1],)), Post((gradients[1],)),
        Wait(gradients[0]), b0, Wait(gradients[1]), b1,
    )  # fmt: skip
    assert fuse(posted).programs[0][1] == Post((sends[0], gradients[0]))


@settings(max_examples=20)
@given(plans(most_ranks=6, most=12), st.integers(0, 3))
def test_prefetch_posts_no_more_than_asked_for(plan: Plan, ahead: int) -> None:
    for program in prefetch(with_communication(plan), ahead).programs:
        posted: dict[Recv, int] = {}
        done = 0
        for item in program:
            for message in messages(item):
                if isinstance(message, Recv):
                    posted[message] = done
            if isinstance(item, Wait):
                assert done - posted.pop(item.message) == min(ahead, done)
            done += isinstance(item, Action)
        assert not posted


# What is refused #


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("1f1b", (0, 4), "ranks = 0 for the pipeline schedule '1f1b'; allowed: 1 or more"),
        ("gpipe", (4, 0), "micro_batches = 0"),
        ("gpipe", (4, 8, 2), "chunks = 2 per rank for the schedule 'gpipe'; allowed: 1"),
        ("interleaved", (4, 8, 1), "chunks = 1 per rank for the schedule 'interleaved'; allowed: 2 or more"),
        ("interleaved", (4, 6, 2), "micro_batches = 6 .* on 4 pipeline ranks; allowed: multiples of 4, e.g. 8"),
        ("zb-v", (4, 6, 3), "allowed: 2"),
        ("pipedream-2bw", (4, 3), "allowed: 4 or more"),
    ],
)
def test_sizes_that_do_not_suit_are_refused(name: str, sizes: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        schedule(name).plan(*sizes)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown pipeline schedule '1f1'; there are sequential, gpipe, 1f1b"):
        schedule("1f1")


def test_passes_refuse_what_has_been_passed() -> None:
    communicating = with_communication(schedule("1f1b").plan(2, 4))
    with pytest.raises(ValueError, match="has messages already"):
        with_communication(communicating)
    for done in (fuse(communicating), prefetch(communicating)):
        with pytest.raises(ValueError, match="posted or fused already"):
            prefetch(done)
    with pytest.raises(ValueError, match="ahead = -1"):
        prefetch(communicating, -1)


def test_only_the_asynchronous_schedule_is_not_performed() -> None:
    assert [name for name, one in SCHEDULES.items() if not one.performed] == ["pipedream-2bw"]
    assert SCHEDULES["pipedream-2bw"].weight_versions == 2


# Pictures #


def test_the_textbook_picture() -> None:
    assert diagram(schedule("1f1b").plan(3, 4)) == "\n".join(
        [
            "1f1b on 3 ranks, 4 micro-batches",
            "rank 0 | 0  1  2  .  .  .  .  b0 =  3  b1 =  .  b2 =  .  b3 =",
            "rank 1 | .  0  1  .  .  b0 =  2  b1 =  3  b2 =  .  b3 =  .  .",
            "rank 2 | .  .  0  b0 =  1  b1 =  2  b2 =  3  b3 =  .  .  .  .",
        ]
    )
    assert diagram(schedule("zb-v").plan(2, 1)).splitlines()[1:] == [
        "rank 0 | 0    .    .    0.1  i0.1 w0.1 .    .    i0   w0",
        "rank 1 | .    0    0.1  .    .    i0.1 w0.1 i0   w0   .",
    ]


@pytest.mark.parametrize("cost", [0, Fraction(1, 2), 1.5])
def test_a_picture_needs_slots(cost: float | Fraction) -> None:
    with pytest.raises(ValueError, match="allowed: whole numbers"):
        diagram(schedule("gpipe").plan(2, 2), Costs(forward=cost))


# Proofs find what is broken #


def _edited(plan: Plan, rank: int, program: list[object]) -> Plan:
    programs = list(plan.programs)
    programs[rank] = tuple(program)  # type: ignore[arg-type]  # a mutant
    return replace(plan, programs=tuple(programs))


@settings(max_examples=60)
@given(plans(most_ranks=5, most=8), st.data())
def test_a_program_that_lacks_an_item_is_refused(plan: Plan, data: st.DataObject) -> None:
    whole = prefetch(with_communication(plan))
    rank = data.draw(st.integers(0, plan.ranks - 1))
    program = list(whole.programs[rank])
    del program[data.draw(st.integers(0, len(program) - 1))]
    with pytest.raises(ValueError, match=r"rank \d"):
        prove(_edited(whole, rank, program))


@settings(max_examples=60)
@given(plans(most_ranks=5, most=8), st.data())
def test_a_program_that_repeats_an_item_is_refused(plan: Plan, data: st.DataObject) -> None:
    whole = prefetch(with_communication(plan))
    rank = data.draw(st.integers(0, plan.ranks - 1))
    program = list(whole.programs[rank])
    at = data.draw(st.integers(0, len(program) - 1))
    if isinstance(program[at], Wait):
        return  # a message may be waited for twice
    with pytest.raises(ValueError, match=r"rank \d"):
        prove(_edited(whole, rank, [*program[:at], program[at], *program[at:]]))


@settings(max_examples=60)
@given(plans(most_ranks=5, most=8), st.data())
def test_a_backward_before_its_forward_is_refused(plan: Plan, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.ranks - 1))
    for form in (plan, with_communication(plan)):
        program = list(form.programs[rank])
        action = data.draw(st.sampled_from([item for item in plan.actions(rank) if item.kind != "F"]))
        before = Action("I" if action.kind == "W" else "F", action.chunk, action.micro_batch)
        here, there = program.index(action), program.index(before)
        program[here], program[there] = before, action
        with pytest.raises(ValueError, match=r"rank \d"):
            prove(_edited(form, rank, program))


@pytest.mark.parametrize("rule", [BUFFERED, RENDEZVOUS])
def test_messages_that_overtake_each_other(rule: str) -> None:
    """Two sends that change places: tags find them, an order does not."""
    plan = prefetch(with_communication(schedule("gpipe").plan(2, 3)))
    program = list(plan.programs[1])
    first, second = (at for at, item in enumerate(program[:4]) if isinstance(item, Post))
    program[first], program[second] = program[second], program[first]
    swapped = _edited(plan, 1, program)
    if rule == BUFFERED:
        prove(swapped, [rule])
    else:
        with pytest.raises(ValueError, match=r"rank . does|meets rank"):
            prove(swapped, [rule])


def test_a_promise_that_is_broken() -> None:
    plan = schedule("gpipe").plan(3, 4)
    with pytest.raises(ValueError, match="gpipe: rank 1 keeps 4 activations; promised: at most 3"):
        prove(replace(plan, most_in_flight=(4, 3, 4)))


def test_a_forward_without_its_input() -> None:
    plan = with_communication(schedule("1f1b").plan(2, 2))
    program = [item for item in plan.programs[1] if item != Recv("activation", 0, 1, 0)]
    with pytest.raises(ValueError, match="rank 1 does F1, but did not receive activation 1 from rank 0"):
        prove(_edited(plan, 1, program), [BUFFERED])


def test_a_message_sent_twice() -> None:
    """Each rule sees it in its own way."""
    plan = prefetch(with_communication(schedule("gpipe").plan(2, 2)))
    twice = _edited(plan, 0, [*plan.programs[0], Post((Send("activation", 0, 1, 1),))])
    with pytest.raises(ValueError, match="rank 0: send activation 1 to rank 1, for the second time"):
        prove(twice, [BUFFERED])
    with pytest.raises(ValueError, match="rank 0: send activation 1 to rank 1, which never meets its partner"):
        prove(twice, [RENDEZVOUS])


@pytest.mark.parametrize("rule", [BUFFERED, RENDEZVOUS])
def test_a_receive_that_nobody_feeds(rule: str) -> None:
    plan = prefetch(with_communication(schedule("gpipe").plan(3, 2)))
    idle = _edited(plan, 0, [*plan.programs[0], Post((Recv("gradient", 0, 1, 2),))])
    with pytest.raises(ValueError, match="rank 0: receive gradient 1 from rank 2, which never meets its partner"):
        prove(idle, [rule])


def test_a_send_before_its_action() -> None:
    plan = with_communication(schedule("gpipe").plan(2, 2))
    program = list(plan.programs[0])
    program[0], program[1] = program[1], program[0]
    with pytest.raises(ValueError, match="rank 0: send activation 0 to rank 1, which nothing before has made"):
        prove(_edited(plan, 0, program))


def test_a_message_to_nobody() -> None:
    plan = with_communication(schedule("1f1b").plan(2, 2))
    program = [
        Send("activation", 0, 0, 2) if item == Send("activation", 0, 0, 1) else item for item in plan.programs[0]
    ]
    with pytest.raises(ValueError, match="rank 0: send activation 0 to rank 2, which is no other rank"):
        prove(_edited(plan, 0, program), [BUFFERED])
