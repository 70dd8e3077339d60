"""Pictures of a step show what they say they do."""

from dataclasses import replace
from pathlib import Path

import pytest
from hand_made import CLUSTER
from hand_made_pipeline import pipelined
from test_plots import has_colour, pixels, step
from windtunnel.collectives.job_file import Job
from windtunnel.experiments.plots import CAUSES, MEASURED
from windtunnel.experiments.plots_step import (
    CATEGORIES,
    KINDS,
    UPDATE_COLOUR,
    MemoryPicture,
    differing,
    plot_breakdown,
    plot_memory,
    plot_pipeline,
)
from windtunnel.sim.job import record_job
from windtunnel.sim.recording import MemoryTrack

WIDE = replace(CLUSTER, gpus_per_node=8)


def test_the_breakdown_has_a_bar_of_causes_for_each_layout(tmp_path: Path) -> None:
    layouts = [
        {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "zero": zero, "gpus": 8, "model": "m", "cluster": "c"} for zero in (0, 3)
    ]
    results = [replace(step(8), layout=layout) for layout in layouts]
    picture = pixels(plot_breakdown(results, tmp_path / "breakdown.png"))
    for cause in ("compute", "exposed_communication"):
        assert has_colour(picture, CAUSES[cause])
    assert not has_colour(picture, CAUSES["bubble"])
    assert not has_colour(picture, CAUSES["offload"])


def test_layouts_are_told_by_what_tells_them_apart() -> None:
    one = {"model": "m", "gpus": 8, "dp": 8, "tp": 1, "pp": 1, "cp": 1, "ep": 1, "zero": 3, "global_batch": 8}
    assert differing([one]) == ["gpus 8, zero 3"]
    assert differing([one, {**one, "zero": 1}]) == ["zero 3", "zero 1"]
    assert differing([one, {**one, "gpus": 16, "dp": 16, "global_batch": 16}]) == ["gpus 8", "gpus 16"]
    assert differing([one, {**one, "tp": 2, "dp": 4}]) == ["tp 1", "tp 2"]
    quiet = {**one, "sequence_parallel": False}
    loud = {**quiet, "tp": 4, "dp": 2, "zero": 0, "sequence_parallel": True}
    assert differing([quiet, loud]) == ["zero 3", "tp 4, zero 0, sequence-parallel"]


def picture_of(capacity_bytes: int) -> MemoryPicture:
    track = MemoryTrack(
        (0.0, 1.0, 2.0, 3.0),
        {"parameters": (4, 4, 4, 4), "activations": (0, 4, 2, 0), "temporary": (0, 0, 0, 0)},
    )
    scaled = replace(track, nbytes={name: tuple(v * 10**9 for v in own) for name, own in track.nbytes.items()})
    return MemoryPicture(
        title="memory", track=scaled, begin_s=0.0, end_s=3.5, capacity_bytes=capacity_bytes, reserved_bytes=9 * 10**9
    )


@pytest.mark.parametrize("gigabytes", [6, 10, 80])
def test_memory_is_stacked_by_category_below_its_capacity(gigabytes: int, tmp_path: Path) -> None:
    picture = pixels(plot_memory(picture_of(gigabytes * 10**9), tmp_path / "memory.png"))
    assert has_colour(picture, CATEGORIES["parameters"])
    assert has_colour(picture, CATEGORIES["activations"])
    assert not has_colour(picture, CATEGORIES["temporary"])
    # A capacity far above is said instead of drawn: it would press all else to the floor.
    assert has_colour(picture, MEASURED) == (gigabytes < 80)


def test_the_pipeline_shows_forwards_backwards_updates_and_idle_time(tmp_path: Path) -> None:
    def draw(job: Job) -> tuple[bool, ...]:
        record = record_job(job, WIDE)
        assert record.plan is not None
        assert record.step is not None
        picture = pixels(plot_pipeline(record.plan, record.step, "a pipeline", tmp_path / "pipeline.png"))
        return tuple(has_colour(picture, colour) for colour in (KINDS["F"][1], KINDS["B"][1], UPDATE_COLOUR))

    assert draw(pipelined(3, 5)) == (True, True, True)
