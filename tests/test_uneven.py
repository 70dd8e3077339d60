"""Jobs whose ranks are not alike: closed forms, every rank by itself, and nothing where nothing differs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expanded_ranks import expanded_ends_s, expanded_step_s
from hand_made import CLUSTER, PROCESSOR, gather, kernel, steps_of, two_steps, wait
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.collectives.groups import Mesh
from windtunnel.collectives.pipeline import Plan
from windtunnel.collectives.pipeline_messages import prefetch, with_communication
from windtunnel.collectives.pipeline_schedules import schedule
from windtunnel.collectives.trace import Collective, Op, Segment, Trace
from windtunnel.experiments.models import load_model
from windtunnel.experiments.simulate import simulate, timeline
from windtunnel.sim.hardware import Cluster, Fabric, load_cluster, load_processor
from windtunnel.sim.pipeline import compose
from windtunnel.sim.rank_classes import Kind, RankKinds, pipeline_classes, rank_kinds, seen_by
from windtunnel.sim.replay import replay
from windtunnel.sim.stages import Stage, compose_stages, price_stage, stage_price
from windtunnel.sim.uneven_pipeline import compose_uneven
from windtunnel.sim.unlike import NodesLike, Pace, Stragglers

EXACT = 1e-12
"""Sums of the same few floats in another order."""

NODES = replace(CLUSTER, nodes=None, inter_node=Fabric(bytes_per_s=1.0, latency_s=0.0))
"""Nodes of two ranks, as many as a job needs; every link moves a byte per second."""

SLOW = Pace(PROCESSOR, 3.0)


def kinds_of(world: int, slow: list[int], pace: Pace = SLOW, share: float = 1.0) -> RankKinds:
    of_rank = np.zeros(world, np.int64)
    of_rank[slow] = 1
    return RankKinds((Kind(Pace(PROCESSOR)), Kind(pace, share)), of_rank)


# Which ranks differ #


@given(st.integers(1, 5000), st.floats(0, 0.999), st.integers(0, 5))
def test_a_share_of_the_ranks_is_slow(world: int, share: float, seed: int) -> None:
    stragglers = Stragglers(ranks=share, factor=1.5, seed=seed)
    drawn = stragglers.drawn(world)
    assert len(set(drawn)) == len(drawn) == round(share * world)
    assert all(0 <= rank < world for rank in drawn)
    assert drawn == stragglers.drawn(world)
    found = rank_kinds(NODES, world, stragglers)
    slow = {number for number, kind in enumerate(found.kinds) if kind.pace.factor == 1.5}
    assert [rank for rank in range(world) if found.of_rank[rank] in slow] == list(drawn)


def test_seeds_draw_others() -> None:
    draws = {Stragglers(ranks=8, factor=2.0, seed=seed).drawn(1000) for seed in range(5)}
    assert len(draws) == 5
    assert all(len(drawn) == 8 for drawn in draws)


def test_none_differ() -> None:
    assert rank_kinds(NODES, 16, Stragglers()).even_on(NODES)
    assert rank_kinds(NODES, 16, Stragglers(ranks=0.5, factor=1.0)).even_on(NODES)
    same = replace(NODES, nodes_like=(NodesLike(first=1),))
    assert rank_kinds(same, 16, Stragglers()).even_on(same)
    elsewhere = replace(NODES, nodes_like=(NodesLike(first=8, inter_node_share=0.5),))
    assert rank_kinds(elsewhere, 16, Stragglers()).even_on(elsewhere)
    assert not rank_kinds(elsewhere, 18, Stragglers()).even_on(elsewhere)


def test_nodes_and_slow_ranks_together() -> None:
    other = replace(PROCESSOR, name="other")
    cluster = replace(NODES, nodes_like=(NodesLike(first=0, count=2, processor=other), NodesLike(first=3)))
    found = rank_kinds(cluster, 8, Stragglers(ranks=8, factor=2.0))
    assert [found.kinds[kind].pace for kind in found.of_rank] == [Pace(other, 2.0)] * 4 + [Pace(PROCESSOR, 2.0)] * 4
    whole = replace(NODES, nodes_like=(NodesLike(first=0, count=4, processor=other),))
    assert rank_kinds(whole, 8, Stragglers()).kinds == (Kind(Pace(other)),)
    assert not rank_kinds(whole, 8, Stragglers()).even_on(whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slow_ranks": -0.1}, "slow_ranks must be a share below 1, or a whole number of ranks, got -0.1"),
        ({"slow_ranks": 1.5}, "slow_ranks must be"),
        ({"slow_ranks": 9, "slow_factor": 2.0, "gpus": 8}, "slow_ranks = 9; allowed: at most the 8 ranks of the job"),
        ({"slow_factor": 0.5}, "slow_factor must be >= 1 and finite, got 0.5"),
    ],
)
def test_slow_ranks_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simulate("gpt-demo", "dgx-a100", **options)


# One group of ranks that wait for each other #


def test_a_slow_rank_is_the_job() -> None:
    """Two ranks gather for 4 s while they compute: the slow one takes 9 s for the 3 of the other."""
    trace = steps_of(kernel(2), gather(4), kernel(3), wait(1), kernel(1))
    assert replay(trace, CLUSTER).step_time_s == 2 + 4 + 1
    assert replay(trace, seen_by(CLUSTER, kinds_of(2, [1]).kinds)).step_time_s == 6 + 9 + 3


def test_who_is_slower_at_what() -> None:
    """Each of two GPUs is the slower one at half of the kernels: between collectives, the slower one counts."""
    lame = replace(PROCESSOR, kernel_floor_s=2.0)
    narrow = Pace(replace(PROCESSOR, memory_bytes_per_s=0.5))
    ops = (kernel(1), gather(1), wait(1), kernel(5), gather(1), wait(4))
    cluster = replace(CLUSTER, paced_by=(Pace(lame), narrow))
    # 1 s at half the bandwidth is 2 s, with the floor 3 s; 5 s are 10 s against 7 s.
    assert replay(steps_of(*ops), cluster).step_time_s == 3 + 1 + 10 + 1


def test_equal_members_change_nothing() -> None:
    trace = steps_of(kernel(2), gather(4), kernel(3), wait(1), kernel(1))
    even = RankKinds((Kind(Pace(PROCESSOR)),) * 2, np.array([0, 1]))
    assert replay(trace, seen_by(CLUSTER, even.kinds)) == replay(trace, CLUSTER)


@pytest.mark.parametrize(("share", "seconds"), [(1.0, 6.0), (0.5, 12.0), (0.25, 24.0)])
def test_a_narrow_link_is_as_slow_as_it_is_narrow(share: float, seconds: float) -> None:
    """A ring over 4 ranks on 2 nodes sends 3 of 4 parts of 8 bytes, and the link between nodes is the narrowest."""
    trace = two_steps([("forward", (gather(4), wait(0)), 1)], world={"data": 4})
    narrow = Kind(Pace(PROCESSOR), share)
    for members in [(narrow,), (Kind(Pace(PROCESSOR)), narrow)]:
        assert replay(trace, seen_by(NODES, members)).step_time_s == pytest.approx(seconds)


steps = st.lists(
    st.one_of(
        st.integers(1, 5).map(kernel),
        st.tuples(st.integers(1, 8), st.sampled_from(["tensor", "data"])).map(
            lambda pair: Collective("all_gather", pair[1], 4 * pair[0], "uint8", None, "parameters")
        ),
    ),
    min_size=1,
    max_size=12,
)


@st.composite
def programs(draw: st.DrawFn) -> Segment:
    """Kernels and collectives of two axes, each waited for somewhere behind it."""
    ops: list[Op] = list(draw(steps))
    for position in [number for number, op in enumerate(ops) if isinstance(op, Collective)]:
        if draw(st.booleans()):
            ops.append(wait(position))
            ops.append(kernel(draw(st.integers(1, 3))))
    return tuple(ops)


@settings(max_examples=60)
@given(
    program=programs(),
    slow=st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True),
    factor=st.floats(1.0, 4.0),
    fidelity=st.sampled_from(["closed_form", "events"]),
)
def test_the_class_is_what_all_ranks_by_themselves_come_to(
    program: Segment, slow: list[int], factor: float, fidelity: str
) -> None:
    trace = two_steps([("forward", program, 1)], world={"tensor": 2, "data": 4})
    ranks = kinds_of(8, slow, Pace(PROCESSOR, factor))
    one = replay(trace, seen_by(NODES, ranks.kinds), fidelity=fidelity)
    assert one.step_time_s == pytest.approx(expanded_step_s(trace, NODES, ranks, fidelity), rel=1e-9)


@given(program=programs(), slow=st.lists(st.integers(0, 7), min_size=1, unique=True), other_s=st.integers(0, 3))
def test_kinds_that_are_each_slower_at_something_are_bounded(program: Segment, slow: list[int], other_s: int) -> None:
    """Meeting at every run of kernels, and not at collectives alone, the class never ends before its members."""
    trace = two_steps([("forward", program, 1)], world={"tensor": 2, "data": 4})
    lame = replace(PROCESSOR, memory_bytes_per_s=2.0, kernel_floor_s=float(other_s))
    ranks = kinds_of(8, slow, Pace(lame))
    played = replay(trace, seen_by(NODES, ranks.kinds), record=True)
    assert max(span.end_s for span in played.phase_spans) >= expanded_ends_s(trace, NODES, ranks)[1] - 1e-9


# Pipelines #

UPDATE_S = 2
FORWARD_S, BACKWARD_S = 1, 2


def flight_of(mesh: Mesh) -> Trace:
    """A stage whose forward takes 1 s, its backward 2 s, its update 2 s of computation and a gather over data."""
    phases = [
        (f"{word} {which} 0", word, seconds)
        for which in ("first", "middle", "last")
        for word, seconds in (("forward", FORWARD_S), ("backward", BACKWARD_S))
    ]
    reduce = Collective("all_gather", "data", 4 * mesh.sizes["data"], "uint8", None, "gradients")
    segments: tuple[Segment, ...] = tuple((kernel(seconds),) for *_, seconds in phases)
    segments += ((kernel(UPDATE_S), reduce, wait(1, key="update")),)
    names = [*(name for name, *_ in phases), "update"]
    keys = [*(word for _, word, _ in phases), "update"]
    trace = two_steps([(key, segment, 1) for key, segment in zip(keys, segments, strict=True)], world=mesh.sizes)
    named = [replace(phase, name=names[number % len(names)]) for number, phase in enumerate(trace.phases)]
    return replace(trace, phases=tuple(named))


def plan_of(ranks: int, micro_batches: int) -> Plan:
    return prefetch(with_communication(schedule("1f1b").plan(ranks, micro_batches)))


def uneven_step_s(mesh: Mesh, plan: Plan, ranks: RankKinds, cluster: Cluster = NODES, nbytes: int = 0) -> float:
    def stage_on(rank: int, seen: Cluster) -> Stage:
        return price_stage(flight_of(mesh), seen, plan, "closed_form")

    uneven = compose_uneven(plan, stage_on, cluster, mesh, ranks, nbytes)
    for lived in uneven.step.ranks:
        assert sum(lived.breakdown_s.values()) == pytest.approx(uneven.step.step_s, rel=EXACT)
        assert min(lived.breakdown_s.values()) >= -1e-9
    return uneven.step.step_s


def test_one_kind_makes_the_step_of_an_even_job() -> None:
    mesh, plan = Mesh.of({"tensor": 2, "data": 2, "pipeline": 3}), plan_of(3, 5)
    stage = price_stage(flight_of(mesh), NODES, plan, "closed_form")
    even = compose_stages(plan, [stage] * 3, NODES, mesh, 7)
    same = RankKinds((Kind(Pace(PROCESSOR)),) * 2, np.arange(12) % 2)
    assert uneven_step_s(mesh, plan, same, nbytes=7) == even.step_s


@pytest.mark.parametrize("slow", range(4))
@pytest.mark.parametrize("copy", [0, 2])
def test_a_slow_stage_sets_the_pace_of_its_pipeline(slow: int, copy: int) -> None:
    """A micro-batch passes the slow stage at a time; what is before it and behind it is paid once.

    1F1B (Narayanan et al. 2021, section 2.2) with one slow stage: m (t_f + t_b) of that one and at most (p - 1)
    (t_f + t_b) of the others, in whichever copy of the model it is. Its update is slow as well.
    """
    mesh, number = Mesh.of({"data": 4, "pipeline": 4}), 8
    step_s = uneven_step_s(mesh, plan_of(4, number), kinds_of(16, [4 * slow + copy]))
    micro_s, gather_s = FORWARD_S + BACKWARD_S, replay(flight_of(mesh), NODES).step_time_s
    paced_s = number * SLOW.factor * micro_s
    assert paced_s + SLOW.factor * UPDATE_S <= step_s <= paced_s + 3 * micro_s + SLOW.factor * UPDATE_S + gather_s


@settings(max_examples=25)
@given(st.sets(st.integers(0, 23), min_size=1, max_size=6), st.floats(1.0, 3.0))
def test_pipelines_meet_at_their_updates(slow: set[int], factor: float) -> None:
    """Each of the copies by itself, then each stage's update when its last copy is ready: all by hand."""
    mesh, plan = Mesh.of({"tensor": 2, "data": 4, "pipeline": 3}), plan_of(3, 4)
    pace = Pace(PROCESSOR, factor)
    ranks = kinds_of(24, sorted(slow), pace)
    trace = flight_of(mesh)
    sets = {kinds: price_stage(trace, seen_by(NODES, kinds), plan, "closed_form") for kinds in
            [(Kind(Pace(PROCESSOR)),), (Kind(pace),)]}  # fmt: skip
    ready = np.zeros((3, 4))
    for copy in range(4):
        prices = []
        for stage in range(3):
            members = {8 * stage + 2 * copy, 8 * stage + 2 * copy + 1}
            kind = Kind(pace) if members & slow else Kind(Pace(PROCESSOR))
            prices.append(replace(stage_price(plan, stage, sets[(kind,)]), after_s=0.0))
        ready[:, copy] = [rank.ends_s[-1] for rank in compose(plan, prices).ranks]
    ends = []
    for stage in range(3):
        kind = Kind(pace) if slow & set(range(8 * stage, 8 * stage + 8)) else Kind(Pace(PROCESSOR))
        ends.append(ready[stage].max() + sum(sets[(kind,)].update_s.values()))
    assert uneven_step_s(mesh, plan, ranks) == pytest.approx(max(ends), rel=1e-9)


def test_a_stage_steps_as_its_slowest_copy_does_in_all_copies() -> None:
    """Copy 0 is slow in two stages and ends last; in the third stage another copy is slow, and its update is shared."""
    mesh, plan = Mesh.of({"data": 4, "pipeline": 3}), plan_of(3, 4)

    def stage_on(rank: int, seen: Cluster) -> Stage:
        return price_stage(flight_of(mesh), seen, plan, "closed_form")

    uneven = compose_uneven(plan, stage_on, NODES, mesh, kinds_of(12, [0, 4, 9]), 0)
    slow = price_stage(flight_of(mesh), seen_by(NODES, (Kind(SLOW),)), plan, "closed_form")
    assert [rank.after_s for rank in uneven.step.ranks] == [sum(slow.update_s.values())] * 3
    assert [stage.update_s for stage in uneven.stages] == [slow.update_s] * 3
    assert [rank.compute_s for rank in uneven.step.ranks] == [36, 36, 12]


def test_a_narrow_node_slows_the_messages_and_the_reductions_that_touch_it() -> None:
    """Three stages of two copies on a node each; the node of the middle stage sends at half the rate."""
    mesh, plan = Mesh.of({"data": 2, "pipeline": 3}), plan_of(3, 1)
    cluster = replace(NODES, nodes_like=(NodesLike(first=1, inter_node_share=0.5),))
    ranks = rank_kinds(cluster, 6, Stragglers())
    # One micro-batch crosses each boundary twice, 4 bytes at 1 byte per second for each of the node's two ranks.
    even = uneven_step_s(mesh, plan, kinds_of(6, []), NODES, nbytes=4)
    narrow = uneven_step_s(mesh, plan, ranks, cluster, nbytes=4)
    assert narrow - even == pytest.approx(4 * 4 * 2)
    ends = replace(NODES, nodes_like=(NodesLike(first=2, inter_node_share=0.5),))
    assert uneven_step_s(mesh, plan, rank_kinds(ends, 6, Stragglers()), ends, 4) - even == pytest.approx(2 * 4 * 2)


def test_classes_of_a_very_large_job_are_few() -> None:
    mesh = Mesh.of({"tensor": 8, "data": 1024, "pipeline": 16})
    cluster = replace(NODES, gpus_per_node=8)
    ranks = rank_kinds(cluster, mesh.world, Stragglers(ranks=0.001, factor=1.3))
    classes = pipeline_classes(ranks, mesh)
    assert set(np.unique(classes.kinds)) == {1, 3}
    assert classes.closing == (3,) * 16
    assert len(classes.kinds) < 64
    assert (classes.kinds == 3).any(axis=0).all()


# Jobs #

DEMO = replace(load_model("gpt-demo"), layers=4, hidden=4096, heads=32, kv_heads=32, ffn=16384, seq=1024, tied=False)
"""Its kernels take long enough that the host is never late."""


def job(cluster: str | Cluster = "dgx-a100", **options: Any) -> Any:
    return simulate(DEMO, cluster, **options)


def test_a_data_parallel_job_waits_for_one_slow_rank() -> None:
    plain, even, slow = (
        job(gpus=8, zero=1, slow_ranks=count, slow_factor=factor) for count, factor in ((0, 1.0), (1, 1.0), (1, 1.5))
    )
    assert replace(even, layout=plain.layout, wall_s=plain.wall_s) == plain
    assert plain.step_time_s < slow.step_time_s <= 1.5 * plain.step_time_s
    # Collectives disturb the slow rank's kernels for as long as the others', which is a smaller part of them.
    longest_s, rate = 1.5 * plain.breakdown_s["compute"], load_processor("a100-80gb").compute_rate_under_communication
    assert (1 + rate) / 2 * longest_s < slow.breakdown_s["compute"] < 1.02 * longest_s
    assert slow.peak_memory_bytes == plain.peak_memory_bytes
    assert slow.bytes_sent_per_gpu == plain.bytes_sent_per_gpu
    assert sum(slow.breakdown_s.values()) == pytest.approx(slow.step_time_s, rel=EXACT)
    assert timeline(DEMO, "dgx-a100", slow) != timeline(DEMO, "dgx-a100", plain)


def test_a_pipelined_job_with_slow_ranks() -> None:
    options: dict[str, Any] = {"gpus": 32, "pp": 4, "global_batch": 64}
    plain, few, all_of_them = (job(**options, slow_ranks=count, slow_factor=1.5) for count in (0, 2, 32))
    assert plain.step_time_s < few.step_time_s <= all_of_them.step_time_s
    assert sum(few.breakdown_s.values()) == pytest.approx(few.step_time_s, rel=1e-9)


def test_two_gpu_types_in_one_job(tmp_path: Path) -> None:
    """Nodes of V100 beside A100, as a file says: the slower one sets the pace, the smaller one the memory."""
    tables = '[[nodes_like]]\nfirst = 1\ncount = 2\ngpu = "v100-32gb"\n'
    (tmp_path / "mixed.toml").write_text(f'base = "dgx-a100"\n{tables}')
    (tmp_path / "all.toml").write_text(f'base = "dgx-a100"\n{tables.replace("first = 1", "first = 0")}')
    options: dict[str, Any] = {"gpus": 16, "zero": 1, "precision": "fp16"}
    fast, mixed, slow = (job(name, **options) for name in ("dgx-a100", tmp_path / "mixed.toml", tmp_path / "all.toml"))
    assert fast.step_time_s < mixed.step_time_s
    assert mixed.step_time_s == pytest.approx(slow.step_time_s, rel=0.1)
    peaks = [load_cluster("dgx-a100").processor.peak_flops["fp16"], slow.tflops_per_gpu * 1e12 / slow.mfu]
    assert mixed.tflops_per_gpu * 1e12 / mixed.mfu == pytest.approx(sum(peaks) / 2)
    with pytest.raises(ValueError, match="which processor 'v100-32gb' does not have"):
        job(tmp_path / "mixed.toml", gpus=16, precision="bf16")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("first = -1", "nodes_like.first must be >= 0"),
        ("count = 0", "nodes_like.count must be >= 1"),
        ("inter_node_share = 1.5", "nodes_like.inter_node_share must be > 0 and <= 1"),
        ('gpu = "v100"', "unknown processor 'v100'"),
        ("share = 0.5", "share"),
        ("count = 3\n[[nodes_like]]\nfirst = 2", "node 2 is in two tables"),
    ],
)
def test_tables_that_cannot_be(tmp_path: Path, table: str, words: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(f'base = "dgx-a100"\n[[nodes_like]]\n{table}\n')
    with pytest.raises(ValueError, match=words):
        load_cluster(path)
