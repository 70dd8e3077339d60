"""Plots are pictures with something on them."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hand_made import CLUSTER, gather, kernel, steps_of, wait
from matplotlib import image
from windtunnel.experiments.demo import Run, ScalingPoint
from windtunnel.experiments.plots import CAUSES, plot_demo, plot_scaling
from windtunnel.sim.result import StepResult, price


def step(gpus: int, *, exposed: int = 4, fits: bool = True) -> StepResult:
    trace = steps_of(kernel(6), gather(exposed), wait(1), kernel(2))
    layout = {"model": "a model", "cluster": "a cluster", "zero": 3}
    result = price(trace, CLUSTER, precision="fp32", tokens_per_step=8, layout=layout)
    return replace(result, fits=fits, tflops_per_gpu=100.0 / gpus, layout={**result.layout, "gpus": gpus})


def pixels(path: Path) -> np.ndarray:
    """[height, width, 3], after a look at the file's own structure: signature, size and a sound first chunk."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    (length,) = struct.unpack(">I", data[8:12])
    (check,) = struct.unpack(">I", data[16 + length : 20 + length])
    assert zlib.crc32(data[12 : 16 + length]) == check
    assert data.endswith(b"IEND\xaeB`\x82")
    return image.imread(path)[..., :3]


def has_colour(picture: np.ndarray, colour: str) -> bool:
    """Whether a good part of the picture (0.1 %, a bar rather than a letter) has that colour."""
    wanted = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    near = np.abs(picture - wanted).max(axis=-1) < 0.02
    return bool(near.mean() > 0.001)


def test_the_scaling_plot_shows_where_time_goes(tmp_path: Path) -> None:
    path = plot_scaling([step(1), step(8), step(64, fits=False)], tmp_path / "folder" / "scaling.png")
    assert path == tmp_path / "folder" / "scaling.png"
    picture = pixels(path)
    assert picture.shape[0] > 400
    assert picture.shape[1] > 800
    assert has_colour(picture, CAUSES["compute"])
    assert has_colour(picture, CAUSES["exposed_communication"])
    assert not has_colour(picture, CAUSES["offload"])  # a cause that took no time is not drawn
    other = pixels(plot_scaling([step(1), step(8, exposed=40), step(64)], tmp_path / "other.png"))
    assert not np.array_equal(picture, other)


def test_the_demo_plot_shows_both_witnesses(tmp_path: Path) -> None:
    runs = [
        Run(
            zero=zero,
            measured_step_s=0.02 + 0.001 * zero,
            predicted_step_s=0.021,
            expected_bytes=1_000_000,
            predicted_bytes=None if zero == 3 else 1_000_000,  # a model that does not fly has no prediction
            measured_bytes=1_000_000,
            expected_model_state_bytes=10,
            predicted_model_state_bytes=10,
            measured_model_state_bytes=10,
        )
        for zero in range(4)
    ]
    points = [ScalingPoint(gpus=2**power, step_time_s=1.0, tflops_per_gpu=150 - power) for power in range(11)]
    picture = pixels(plot_demo(runs, points, tmp_path / "demo.png"))
    assert has_colour(picture, "#c8553d")
    assert has_colour(picture, "#2b6f8f")


@pytest.mark.parametrize(("ending", "signature"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_ending_of_the_name_is_the_format(tmp_path: Path, ending: str, signature: bytes) -> None:
    assert plot_scaling([step(1)], tmp_path / f"plot.{ending}").read_bytes().startswith(signature)


def test_a_plot_is_left_open_by_nobody(tmp_path: Path) -> None:
    from matplotlib import pyplot

    plot_scaling([step(1)], tmp_path / "plot.png")
    assert pyplot.get_fignums() == []
