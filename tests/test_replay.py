"""Replays of traces that are small enough to be played by hand."""

from dataclasses import replace

import pytest
from hand_made import CLUSTER, cluster_with, gather, kernel, steps_of, two_steps, wait
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.collectives.trace import Collective, Kernel, Op, Ref, Synchronize, Trace, Wait
from windtunnel.engine.pilot import Plan, fly
from windtunnel.experiments.models import load_model
from windtunnel.sim.hardware import Cluster, load_cluster
from windtunnel.sim.replay import ATTENTION_BACKWARD_SHARE, Replay, replay, sent_bytes_by_axis
from windtunnel.sim.runs import Runs

SYNC = Synchronize()

ROUNDING = 1e-9
"""Relative: times are differences of sums of floats, each rounded to 1e-16."""


def times(result: Replay) -> tuple[float, float, float, float]:
    """(step, compute, exposed communication, host)."""
    parts = result.breakdown_s
    assert parts["bubble"] == parts["offload"] == 0.0
    return result.step_time_s, parts["compute"], parts["exposed_communication"], parts["host"]


BY_HAND = {
    "pure compute": ([kernel(3), kernel(4)], (7, 7, 0, 0)),
    "fully hidden": ([kernel(2), gather(3), kernel(5), wait(1), kernel(1)], (8, 8, 0, 0)),
    "hidden to the second": ([kernel(2), gather(5), kernel(5), wait(1), kernel(1)], (8, 8, 0, 0)),
    "partly exposed": ([kernel(2), gather(6), kernel(4), wait(1), kernel(1)], (9, 7, 2, 0)),
    "fully exposed": ([kernel(2), gather(6), wait(1), kernel(1)], (9, 3, 6, 0)),
    "waited for twice as late": ([gather(4), kernel(1), kernel(1), wait(0), kernel(1)], (5, 3, 2, 0)),
    # The second one begins when the first has ended, at 4, and ends at 7; then the first is no wait at all.
    "first in, first out": ([gather(4), gather(3), wait(1), kernel(1), wait(0)], (8, 1, 7, 0)),
    # The second one may begin at 2, but the first one takes until 4.
    "queued behind": ([gather(4), kernel(2), gather(3), kernel(1), wait(2), kernel(1), wait(0)], (8, 4, 4, 0)),
    "a read makes no gap": ([kernel(3), SYNC, kernel(4), SYNC], (7, 7, 0, 0)),
    # The host reads before it starts the collective: nothing runs beside it.
    "a read delays a start": ([kernel(3), SYNC, gather(5), kernel(4), wait(2)], (8, 7, 1, 0)),
}


@pytest.mark.parametrize(("ops", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_by_hand(ops: list[Op], expected: tuple[float, ...]) -> None:
    assert times(replay(steps_of(*ops), CLUSTER)) == pytest.approx(expected)


LAUNCHED_BY_HAND = {
    # launches of 3 s: kernel k is issued at 3 (k + 1) and runs for a second
    "host-bound": (3, [kernel(1)] * 4, (12, 4, 0, 8)),
    "host runs ahead": (1, [kernel(5)] * 3, (15, 15, 0, 0)),
    # the host waits for the end of each kernel and then needs a second to issue the next
    "host waits": (1, [kernel(5), SYNC, kernel(5), SYNC], (12, 10, 0, 2)),
    # small kernels are issued behind the long one, and do not wait for the host
    "caught up": (2, [kernel(6), kernel(1), kernel(1)], (8, 8, 0, 0)),
    # issued at 2, the first kernel runs until 3 and the collective until 7; the second kernel from 4 to 5
    "collective after a launch": (2, [kernel(1), gather(4), kernel(1), wait(1), SYNC], (7, 2, 2, 3)),
}


@pytest.mark.parametrize(("launch_s", "ops", "expected"), LAUNCHED_BY_HAND.values(), ids=LAUNCHED_BY_HAND)
def test_launches_by_hand(launch_s: float, ops: list[Op], expected: tuple[float, ...]) -> None:
    assert times(replay(steps_of(*ops), cluster_with(launch_s=launch_s))) == pytest.approx(expected)


def test_a_host_that_computes_itself_pays_for_every_launch() -> None:
    """2 + 4 s of kernels and half a second for each; a host that runs ahead hides the launches behind the kernels."""
    ops = (kernel(2), kernel(4))
    assert replay(steps_of(*ops), cluster_with(launch_s=0.5, asynchronous=False)).step_time_s == pytest.approx(7)
    assert replay(steps_of(*ops), cluster_with(launch_s=0.5)).step_time_s == pytest.approx(6)


INTERFERENCE_BY_HAND = {
    # 4 s of work beside 4 s of communication, each at half speed: 8 s
    "as one after the other": (0.5, 0.5, [gather(4), kernel(4), wait(0)], (8, 8, 0, 0)),
    # both at half speed until the kernel ends at 4; then 4 of the 6 s are left at full speed
    "communication goes on": (0.5, 0.5, [gather(6), kernel(2), wait(0)], (8, 4, 4, 0)),
    # the collective ends at 4 and the kernel has 4 of 6 s left
    "compute goes on": (0.5, 0.5, [gather(2), kernel(6), wait(0)], (8, 8, 0, 0)),
    "only compute suffers": (0.25, 1.0, [gather(4), kernel(3), wait(0)], (6, 6, 0, 0)),
    "only communication suffers": (1.0, 0.5, [gather(4), kernel(4), wait(0)], (6, 4, 2, 0)),
    "nothing beside it": (0.5, 0.5, [kernel(3), gather(4), wait(1), kernel(2)], (9, 5, 4, 0)),
}


@pytest.mark.parametrize(("compute", "communication", "ops", "expected"), INTERFERENCE_BY_HAND.values(),
                         ids=INTERFERENCE_BY_HAND)  # fmt: skip
def test_interference_by_hand(compute: float, communication: float, ops: list[Op], expected: tuple[float, ...]) -> None:
    cluster = cluster_with(compute_rate_under_communication=compute, communication_rate_under_compute=communication)
    assert times(replay(steps_of(*ops), cluster)) == pytest.approx(expected)


WITHOUT_OVERLAP = {
    # the last update's gather and the reduction take 5 s beside 4 of backward; then a second of update
    "overlapped": (True, "gradients", (6, 5, 1, 0)),
    # 4 of backward, 3 of reduction, 1 of update, 2 of gather
    "one after the other": (False, "gradients", (10, 5, 5, 0)),
    # what is no reduction of gradients stays beside backward; the update's gather ends in it
    "other collectives": (False, "activations", (7, 5, 2, 0)),
}


@pytest.mark.parametrize(("overlap", "label", "expected"), WITHOUT_OVERLAP.values(), ids=WITHOUT_OVERLAP)
def test_without_overlap_the_update_reduces_and_gathers(overlap: bool, label: str, expected: tuple[float, ...]) -> None:
    backward = (gather(3, label), kernel(4), wait(0, "backward"))
    update = (kernel(1), gather(2))
    trace = two_steps([("backward", backward, 1), ("update", update, 1)])
    named = tuple(replace(phase, name="update") if "1" in phase.name else phase for phase in trace.phases)
    assert times(replay(replace(trace, phases=named), CLUSTER, overlap=overlap)) == pytest.approx(expected)


def test_the_second_step_is_the_one_that_counts() -> None:
    # The second step waits for what the first one started: 10 s less the 1 s of its own kernel before.
    first, second = (kernel(1), gather(10)), (kernel(1), wait(1, age=1), kernel(1), gather(10))
    trace = steps_of(*first)
    trace = replace(
        trace,
        segments=(first, second),
        phases=(trace.phases[0], replace(trace.phases[1], calls=(trace.phases[1].calls[0]._replace(segment=1),))),
    )
    assert times(replay(trace, CLUSTER)) == pytest.approx((11, 2, 9, 0))


REPEATED = {
    "compute": (0, (kernel(3), kernel(1))),
    "exposed": (0, (gather(5), kernel(2), wait(0), kernel(1))),
    "host-bound": (3, (kernel(1), kernel(2))),
    "synchronized": (1, (kernel(2), SYNC, gather(3), wait(2))),
}


@pytest.mark.parametrize(("launch_s", "ops"), REPEATED.values(), ids=REPEATED)
@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 10])
def test_a_phase_ten_times_is_ten_phases(launch_s: float, ops: tuple[Op, ...], repeats: int) -> None:
    cluster = cluster_with(launch_s=launch_s)
    ends = [("begin", (kernel(2),), 1), ("end", (kernel(4), SYNC), 1)]
    short = replay(two_steps([ends[0], ("forward", ops, repeats), ends[1]]), cluster)
    long = replay(two_steps([ends[0], *[("forward", ops, 1)] * repeats, ends[1]]), cluster)
    assert times(short) == pytest.approx(times(long), rel=ROUNDING)
    assert short.sent_bytes == long.sent_bytes
    if repeats == 10:  # only some of them are played, and no more of a thousand
        assert short.events < long.events
        assert short.events == replay(two_steps([ends[0], ("forward", ops, 1000), ends[1]]), cluster).events


@st.composite
def programs(draw: st.DrawFn) -> list[Op]:
    """Kernels, collectives and waits for any of those under way (each waited for at most once), and reads."""
    ops: list[Op] = []
    started: list[int] = []
    for kind in draw(st.lists(st.sampled_from(["kernel", "kernel", "gather", "wait", "read"]), max_size=16)):
        if kind == "kernel":
            ops.append(kernel(draw(st.integers(0, 9))))
        elif kind == "gather":
            started.append(len(ops))
            ops.append(gather(draw(st.integers(0, 9))))
        elif kind == "wait" and started:
            ops.append(wait(started.pop(draw(st.integers(0, len(started) - 1)))))
        elif kind == "read":
            ops.append(SYNC)
    return ops


def second_step_op_by_op(ops: list[Op], launch_s: float) -> tuple[float, float, float, float]:
    """The same without events: when the host, the compute stream and the communication stream are next free."""
    host = stream = communication = compute = exposed = 0.0
    marks = []
    for _ in range(2):
        done: dict[int, float] = {}
        for position, op in enumerate(ops):
            if isinstance(op, Kernel):
                host += launch_s
                stream = max(stream, host) + op.write_bytes
                compute += op.write_bytes
            elif isinstance(op, Collective):
                stream = max(stream, host)
                communication = done[position] = max(communication, stream) + op.elements / 2
            elif isinstance(op, Wait):
                stream = max(stream, host)
                exposed += max(0.0, done[op.ref.op] - stream)
                stream = max(stream, done[op.ref.op])
            elif isinstance(op, Synchronize):
                host = stream = max(stream, host)
        stream = max(stream, host)
        marks.append((stream, compute, exposed, stream - compute - exposed))
    first, second = marks
    step, *parts = (after - before for before, after in zip(first, second, strict=True))
    return step, *parts


@given(programs(), st.sampled_from([0, 1, 3]))
def test_any_program_takes_what_a_recurrence_says(ops: list[Op], launch_s: int) -> None:
    result = replay(steps_of(*ops), cluster_with(launch_s=launch_s))
    # Whole numbers of seconds: exact but for the sums of them.
    assert times(result) == pytest.approx(second_step_op_by_op(ops, launch_s), rel=ROUNDING, abs=ROUNDING)


@given(programs(), st.sampled_from([0, 1, 3]), st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from([0.25, 0.5, 1.0]))
def test_the_breakdown_accounts_for_every_second(
    ops: list[Op], launch_s: int, compute: float, communication: float
) -> None:
    cluster = cluster_with(
        launch_s=launch_s, compute_rate_under_communication=compute, communication_rate_under_compute=communication
    )
    result = replay(steps_of(*ops, kernel(1), SYNC), cluster, record=True)
    parts = result.breakdown_s
    assert all(value >= -ROUNDING for value in parts.values())
    assert sum(parts.values()) == pytest.approx(result.step_time_s)
    # The spans have their own clock. Both steps end with a kernel, so that its ends are a step apart.
    kernels = [span for span in result.spans if span.stream == "compute"]
    half = len(kernels) // 2
    assert kernels[-1].end_s - kernels[half - 1].end_s == pytest.approx(result.step_time_s, abs=ROUNDING)
    assert sum(s.end_s - s.start_s for s in kernels[half:]) == pytest.approx(parts["compute"], abs=ROUNDING)


def test_flops_and_bytes_are_those_of_the_second_step() -> None:
    def flops(name: str, count: float) -> Kernel:
        return Kernel(name, "attention", count, 0, 1, "fp32", (1, 1, 1, 1, 1))

    gathered = gather(8)
    norm = Collective("all_reduce", "data", 4, "fp32", None, "gradient norm", scalar=True)
    trace = two_steps(
        [
            ("forward", (flops("attention", 30.0), gathered), 5),
            ("forward.after", (flops("attention", 1.0),), 1),
            ("backward", (flops("attention_backward", 75.0), norm), 1),
        ]
    )
    result = replay(trace, CLUSTER)
    assert result.forward_flops == 5 * 30 + 1
    assert result.executed_flops == 5 * 30 + 1 + 75 * ATTENTION_BACKWARD_SHARE == 5 * 30 + 1 + 60
    # An all-gather of 16 bytes over two ranks sends 8, an all-reduce of 4 floats 2 * 8.
    assert result.sent_bytes == sent_bytes_by_axis(trace) == {"data": 5 * 8 + 16}
    assert sent_bytes_by_axis(trace, scalars=False) == {"data": 5 * 8}


def test_communication_is_exposed_or_hidden_by_axis() -> None:
    # A kernel of 4 s hides the first 4 of a gather's 6; another of 3 s hides 3 of the next one's 4.
    ops = (gather(6), kernel(4), wait(0), gather(4), kernel(3), wait(3))
    result = replay(steps_of(*ops), CLUSTER)
    assert result.communication_s == {"data": pytest.approx({"exposed_s": 2 + 1, "hidden_s": 4 + 3})}
    assert result.breakdown_s["exposed_communication"] == pytest.approx(3)
    [(_, phase)] = result.phases_communication_s
    assert phase == result.communication_s


def test_what_overlaps_slows_the_kernel_down() -> None:
    # At half speed beside a gather of 4 s, a kernel of 3 s has 2 done when the gather ends, and 1 left.
    result = replay(steps_of(gather(4), kernel(3)), cluster_with(compute_rate_under_communication=0.5))
    assert result.breakdown_s["compute"] == pytest.approx(4 + 1)
    assert result.communication_s["data"] == pytest.approx({"exposed_s": 0, "hidden_s": 4})


# A real flight #


@pytest.fixture(scope="module")
def flown() -> Trace:
    """Two micro-steps of a small GPT under ZeRO 3 on 32 ranks."""
    plan = Plan(
        factory="windtunnel.experiments.transformer:for_flight",
        arguments={"spec": load_model("gpt-demo"), "batch": 2, "seq": 64},
        config={"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        world=32,
        micro_steps=2,
    )
    return fly(plan)


def faster(cluster: Cluster, gpu: float, network: float) -> Cluster:
    """Kernels `gpu` times as fast, links `network` times as fast."""
    chip = cluster.processor
    peaks = {dtype: gpu * rate for dtype, rate in chip.peak_flops.items()}
    assert cluster.inter_node is not None
    links = {
        name: replace(
            fabric,
            bytes_per_s=network * fabric.bytes_per_s,
            latency_s=fabric.latency_s / network,
            start_s=fabric.start_s and fabric.start_s / network,
            local_bytes_per_s=fabric.local_bytes_per_s and fabric.local_bytes_per_s * network,
        )
        for name, fabric in (("intra_node", cluster.intra_node), ("inter_node", cluster.inter_node))
    }
    chip = replace(
        chip,
        peak_flops=peaks,
        memory_bytes_per_s=gpu * chip.memory_bytes_per_s,
        kernel_floor_s=chip.kernel_floor_s / gpu,
        matmul_start_s=chip.matmul_start_s / gpu,
        cache_bytes_per_s=chip.cache_bytes_per_s and chip.cache_bytes_per_s * gpu,
        launch_s=chip.launch_s / gpu,
    )
    return replace(cluster, processor=chip, **links)


@settings(max_examples=25, deadline=None)
@given(gpu=st.floats(1, 1000), network=st.floats(1, 1000), slow=st.floats(0.001, 1000))
def test_nothing_faster_makes_a_step_longer(flown: Trace, gpu: float, network: float, slow: float) -> None:
    before = faster(load_cluster("dgx-a100"), 1.0, slow)
    step_s = replay(flown, before).step_time_s
    for after in (faster(before, gpu, 1.0), faster(before, 1.0, network)):
        assert replay(flown, after).step_time_s <= step_s * (1 + ROUNDING)


def test_a_cluster_twice_as_fast_takes_half_the_time(flown: Trace) -> None:
    slow = load_cluster("dgx-a100")
    halves, wholes = (replay(flown, faster(slow, factor, factor)).breakdown_s for factor in (2.0, 1.0))
    assert halves == pytest.approx({name: seconds / 2 for name, seconds in wholes.items()}, rel=ROUNDING)


def test_ages_count_the_plays_of_a_phase_as_one() -> None:
    """Flown: first, middle, last of two steps, a run of a segment each. Played: the middle twice."""
    runs = Runs()
    numbers = []
    for plays in (1, 2, 1, 1, 2, 1):
        for _ in range(plays):
            runs.play()
            numbers.append(runs.begin("backward", 0))
        runs.end()
    before_last, last = numbers[-2:]

    def meant(age: int) -> list[int]:
        return list(runs.back(Ref("backward", 0, False, age, 0), 0))

    assert [meant(age) for age in range(4)] == [[last] * 2, [before_last] * 2, [numbers[4]] * 2, [numbers[3]] * 2]


def test_ages_inside_a_phase_that_is_played_again() -> None:
    runs = Runs()
    first, middle, again = (begin(runs) for begin in (_phase, _play, _play))
    assert list(runs.back(Ref("backward", 0, False, 1, 0), 0)) == [middle, first]
    assert list(runs.back(Ref("backward", 0, False, 0, 0), 0)) == [again, again]


def _play(runs: Runs) -> int:
    runs.play()
    return runs.begin("backward", 0)


def _phase(runs: Runs) -> int:
    number = _play(runs)
    runs.end()
    return number
