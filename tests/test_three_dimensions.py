"""Data, tensor and pipeline ranks together: the same training as one process, and bytes that were predicted."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from windtunnel.collectives.groups import JOINED
from windtunnel.collectives.tensor import Sent, SharedLayers, sent_bytes
from windtunnel.collectives.zero import UnitSize, Zero, sent_bytes_per_step
from windtunnel.engine.world import World
from windtunnel.experiments import layout as jobs
from windtunnel.experiments.axis_bytes import RINGS, Counted, count, predicted
from windtunnel.experiments.pipeline import message_bytes
from windtunnel.experiments.ranks import Task
from windtunnel.experiments.reference import Known
from windtunnel.experiments.three_dimensions import (
    SPEC,
    TOLERANCE,
    Layout,
    alone,
    compared,
    layouts,
    start,
    step,
)
from windtunnel.sim.hardware import load_cluster

STEPS = 3

Alone = tuple[Task, Known]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return alone(STEPS, tmp_path_factory.mktemp("alone"))


# The same training #


@pytest.mark.parametrize(
    "layout",
    [
        Layout(data=2, tensor=2, pipeline=2, schedule="1f1b", zero=1),
        Layout(data=2, tensor=2, pipeline=2, schedule="zb-v", zero=2, sequence_parallel=True),
    ],
    ids=str,
)
def test_eight_ranks_equal_one_process(world_of: Callable[[int], World], one_process: Alone, layout: Layout) -> None:
    row = compared(world_of(8), layout, *one_process)
    assert row.ok, row


def test_what_is_off_is_named(two_ranks: World, one_process: Alone, tmp_path: Path) -> None:
    """One tensor of the process that the ranks are held against is changed a little."""
    task, known = one_process
    kept = torch.load(task.snapshot_path(STEPS - 1))
    kept["parameter", "blocks.1.mlp.up.bias"] += 1e-8
    moved = replace(task, folder=str(tmp_path))
    torch.save(kept, moved.snapshot_path(STEPS - 1))
    row = compared(two_ranks, Layout(tensor=2), moved, known)
    assert (row.ok, row.tensor) == (False, "blocks.1.mlp.up.bias")


def test_the_study_has_every_schedule_at_every_place() -> None:
    """Every performed schedule on each mesh with stages; each mesh cuts the batch evenly."""
    found = list(layouts())
    assert {layout.world for layout in found} == {6, 8}
    schedules = {layout.schedule for layout in found}
    assert schedules == {"sequential", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"}
    for sizes in ("2x2x2", "1x2x4", "2x1x4", "1x2x3"):
        assert {layout.schedule for layout in found if layout.sizes == sizes} == schedules
    assert {layout.zero for layout in found if layout.sizes == "4x2x1"} == {0, 1, 2, 3}
    assert all(24 % (layout.data * layout.micro_batches) == 0 for layout in found)


# Checkpoints #


def go_on(rank: int, world: int, layout: Layout, folder: str, until: int) -> dict[str, Tensor]:
    """From the latest checkpoint to a number of steps, and save."""
    engine = start(layout)
    engine.load_checkpoint(folder)
    while engine.global_steps < until:
        step(engine, layout, engine.global_steps)
    engine.save_checkpoint(folder)
    whole = engine.full_parameters()
    engine.close()
    return whole


def test_a_checkpoint_of_three_dimensions_loads_anywhere(
    world_of: Callable[[int], World], one_process: Alone, tmp_path: Path
) -> None:
    """2 x 2 x 2, then 1 x 4 x 2 in another order of work, then one process; moments included."""
    task, _ = one_process
    for until, layout in (
        (1, Layout(data=2, tensor=2, pipeline=2, zero=1)),
        (2, Layout(tensor=4, pipeline=2, schedule="zb-v", zero=2, sequence_parallel=True)),
    ):
        everyones = world_of(8).run(go_on, layout, str(tmp_path), until)
        for found in everyones[1:]:
            assert all(torch.equal(found[name], value) for name, value in everyones[0].items())
    lone = go_on(0, 1, Layout(), str(tmp_path), STEPS)
    known = torch.load(task.snapshot_path(STEPS - 1))
    wanted = {name: value for (what, name), value in known.items() if what == "parameter"}
    assert lone.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((lone[name] - value).norm() / value.norm()) <= TOLERANCE, name


# Bytes #


EVEN = replace(SPEC, layers=4, ffn=16)
"""Tensor ranks have equal parts of it: a flight is of the first one, which else has the largest."""

MACHINE = load_cluster("dgx-a100")
"""Any will do: no algorithm is chosen here."""


def job(data: int, tensor: int, pipeline: int, schedule: str, zero: int, cut: bool) -> jobs.Layout:
    options = jobs.Options(
        gpus=data * tensor * pipeline,
        tp=tensor,
        pp=pipeline,
        schedule=schedule,
        interleave=2 if schedule in ("interleaved", "zb-v") else 1,
        zero=zero,
        micro_batch=2,
        global_batch=8 * data,
        sequence_parallel=cut,
        precision="fp32",
        clip=0.5,
        engine=json.dumps(RINGS),
    )
    return jobs.resolve(options, EVEN, MACHINE)


def expected(layout: jobs.Layout, counted: Counted) -> dict[str, int]:
    """What a rank sends on the axes data, pipeline and tied: closed forms of its flat buffers and messages."""
    units = [UnitSize(elements=elements, element_bytes=4) for elements, _ in counted.units]
    found = {
        "data": sent_bytes_per_step(units, Zero.of_stage(layout.zero), layout.dp, layout.accumulation),
        "pipeline": counted.messages * message_bytes(EVEN, layout),
    }
    if tied := reduced(layout, counted, "tied"):
        found["tied"] = sent_bytes(tied, 2)
    return found


def reduced(layout: jobs.Layout, counted: Counted, axis: str) -> Counter[Sent]:
    """The sums over an axis that a rank takes once a step, of what it keeps of a gradient."""
    kept = layout.dp if layout.zero else 1
    return Counter(Sent("all_reduce", elements // kept, 4) for elements, partial in counted.units if axis in partial)


def check_bytes(world: World, layout: jobs.Layout) -> None:
    forecast = predicted(EVEN, layout, MACHINE)
    ranks: list[Counted] = world.run(count, EVEN, layout)
    few_elements = 0
    for counted in ranks:
        said, sent = (
            {name: size for name, size in each.items() if JOINED not in name}
            for each in (forecast[counted.pipeline_rank], counted.by_axis)
        )
        assert sent == said
        shared = sent.pop("tensor", 0)
        assert (shared > 0) == (layout.tp > 1)
        assert sent == expected(layout, counted)
        assert counted.written == sum(counted.by_axis.values())
        few_elements += sum(size for name, size in counted.by_axis.items() if JOINED in name)
    # Of a buffer smaller than the ring some ranks send more than others: what is predicted is their mean.
    assert few_elements == sum(size for each in forecast for name, size in each.items() if JOINED in name) * (
        world.size // layout.pp
    )
    layers = SharedLayers(
        layers=EVEN.layers, batch=layout.micro_batch, seq=layout.seq, hidden=EVEN.hidden, ranks=layout.tp,
        sequence_parallel=layout.sequence_parallel, element_bytes=4,
    )  # fmt: skip
    if layout.tp > 1:
        pipeline = [next(each for each in ranks if each.pipeline_rank == stage) for stage in range(layout.pp)]
        sums = sum((reduced(layout, each, "tensor") for each in pipeline), Counter())
        whole = layers.step(layout.accumulation) + sums
        assert sum(each.by_axis["tensor"] for each in pipeline) == sent_bytes(whole, layout.tp)


@pytest.mark.parametrize(
    "layout",
    [(1, 2, 2, "1f1b", 0, False), (2, 1, 2, "zb-v", 2, False)],
    ids=str,
)
def test_what_four_ranks_send_was_predicted(four_ranks: World, layout: tuple[int, int, int, str, int, bool]) -> None:
    check_bytes(four_ranks, job(*layout))


def test_what_eight_ranks_send_was_predicted(world_of: Callable[[int], World]) -> None:
    check_bytes(world_of(8), job(2, 2, 2, "zb-h1", 1, True))
