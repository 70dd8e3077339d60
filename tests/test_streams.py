"""Streams against recurrences that go kernel by kernel, and work that interferes against closed forms."""

from itertools import pairwise

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.sim.streams import CommunicationStream, ComputeStream, Interference, Run, Span

ROUNDING = 1e-12
"""Sums of at most a few dozen floats, each rounded to 1e-16."""

seconds = st.floats(0, 100)
kernel_lists = st.lists(seconds, min_size=1, max_size=12).map(lambda ds: [(f"k{i}", d) for i, d in enumerate(ds)])
rates = st.floats(0.1, 1)


def near(value: float) -> object:
    return pytest.approx(value, rel=ROUNDING, abs=1e-9)


def end_kernel_by_kernel(kernels: list[tuple[str, float]], launch_s: float, issued_at: float, free_at: float) -> float:
    """The host takes `launch_s` per kernel, one after the other; the stream runs each when both are ready."""
    host, stream = issued_at, free_at
    for _, duration in kernels:
        host += launch_s
        stream = max(stream, host) + duration
    return stream


@given(kernel_lists, seconds)
def test_a_run_ends_when_its_kernels_do(kernels: list[tuple[str, float]], launch_s: float) -> None:
    run = Run.of(kernels, launch_s)
    assert run.seconds == near(sum(duration for _, duration in kernels))
    assert run.latest_s == near(end_kernel_by_kernel(kernels, launch_s, issued_at=0.0, free_at=0.0))


@given(st.lists(st.tuples(kernel_lists, seconds), min_size=1, max_size=4), seconds)
def test_a_stream_takes_runs_in_order(runs: list[tuple[list[tuple[str, float]], float]], launch_s: float) -> None:
    """(kernels, pause of the host before it issues them): the end, and what is busy and what waits for the host."""
    env = simpy.Environment()
    stream = ComputeStream(env, alone(env), record=True)
    ended = env.event()

    def host() -> simpy.events.ProcessGenerator:
        for kernels, pause_s in runs:
            yield env.timeout(pause_s)
            stream.run(Run.of(kernels, launch_s))
            yield env.timeout(launch_s * len(kernels))
        stream.mark(ended.succeed)

    env.process(host())
    env.run(ended)
    now = end = work = 0.0
    for kernels, pause_s in runs:
        now += pause_s
        end = end_kernel_by_kernel(kernels, launch_s, now, end)
        now += launch_s * len(kernels)
        work += sum(duration for _, duration in kernels)
    assert env.now == near(end)
    assert stream.busy.compute == near(work)
    assert stream.busy.exposed_communication == 0.0
    assert stream.busy.host == near(end - work)
    check_spans(stream.spans or [], work)


def check_spans(spans: list[Span], work: float) -> None:
    """One after the other, and as long as the work all together."""
    for before, after in pairwise(spans):
        assert before.end_s <= after.start_s + 1e-9
    assert sum(span.end_s - span.start_s for span in spans) == near(work)


def alone(env: simpy.Environment) -> Interference:
    return Interference(env, {"compute": 1.0, "communication": 1.0})


def ends(works: list[tuple[str, float, float]], rate: dict[str, float]) -> list[float]:
    """When each work (kind, start, seconds) ends."""
    env = simpy.Environment()
    shared = Interference(env, rate)
    ended = [0.0] * len(works)

    def work(number: int, kind: str, start: float, duration: float) -> simpy.events.ProcessGenerator:
        yield env.timeout(start)
        yield from shared.work(kind, duration)
        ended[number] = env.now

    for number, (kind, start, duration) in enumerate(works):
        env.process(work(number, kind, start, duration))
    env.run()
    return ended


def test_two_that_halve_each_other_take_what_one_after_the_other_would() -> None:
    halves = {"compute": 0.5, "communication": 0.5}
    assert ends([("compute", 0, 4), ("communication", 0, 4)], halves) == [8, 8]
    assert ends([("compute", 0, 4), ("communication", 0, 10)], halves) == [8, 14]
    assert ends([("compute", 0, 4), ("communication", 3, 4)], halves) == [5, 8]
    assert ends([("compute", 0, 4), ("communication", 4, 4)], halves) == [4, 8]


def test_the_same_kind_does_not_slow_itself_down() -> None:
    halves = {"compute": 0.5, "communication": 0.5}
    assert ends([("communication", 0, 4), ("communication", 1, 4)], halves) == [4, 5]
    # Two collectives beside a kernel: it goes at half speed for as long as either is under way.
    assert ends([("compute", 0, 10), ("communication", 0, 2), ("communication", 2, 3)], halves) == [14, 4, 8]


@given(a=seconds, b=seconds, late=seconds, rate_a=rates, rate_b=rates)
def test_overlap_in_closed_form(a: float, b: float, late: float, rate_a: float, rate_b: float) -> None:
    """A works from 0, B from `late`; while both are under way each has its lower rate."""
    if a == 0 or b == 0 or late >= a:  # they never meet
        expected = [a, late + b]
    else:
        left_s, other_s = (a - late) / rate_a, b / rate_b  # how long each would take beside the other
        if left_s < other_s:
            expected = [late + left_s, late + left_s + b - left_s * rate_b]
        else:
            expected = [late + other_s + (a - late) - other_s * rate_a, late + other_s]
    found = ends([("compute", 0, a), ("communication", late, b)], {"compute": rate_a, "communication": rate_b})
    assert found == [near(expected[0]), near(expected[1])]


def test_collectives_go_one_after_the_other_when_they_may() -> None:
    env = simpy.Environment()
    stream = CommunicationStream(env, "data", alone(env), record=True)
    late, soon = env.timeout(5), env.timeout(1)
    first = stream.start("first", 2, after=late)
    second = stream.start("second", 3, after=soon)
    done: dict[str, float] = {}
    for name, event in (("first", first), ("second", second)):
        event.callbacks.append(lambda _, name=name: done.setdefault(name, env.now))
    env.run()
    assert done == {"first": 7, "second": 10}
    assert [(span.stream, span.name, span.start_s, span.end_s) for span in stream.spans] == [
        ("communication data", "first", 5, 7),
        ("communication data", "second", 7, 10),
    ]
