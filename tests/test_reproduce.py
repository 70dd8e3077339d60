"""Reproductions: what there is, what they say, and that the published points are met."""

import csv
from pathlib import Path

import pytest
from test_cli import Command, check_refused, command  # noqa: F401  (a fixture)
from windtunnel.engine.world import World
from windtunnel.experiments.bench.collectives import BUCKETS_BYTES, priced_gain
from windtunnel.experiments.choices import GPUS
from windtunnel.experiments.choices import reproduce as choices
from windtunnel.experiments.curves import (
    HERE,
    NODES,
    TRANSPORTS,
    Point,
    _time_algorithms,
    mean_error,
    network,
    priced_here,
    priced_nodes,
    published_points,
)
from windtunnel.experiments.fit_network import MIB
from windtunnel.experiments.pipelines import plot_schedules, sentence, study
from windtunnel.experiments.plots import plot_curves
from windtunnel.experiments.reproduce import REPRODUCTIONS, listing, reproduce, to_dict

MEAN_ERROR = 0.08
"""Aim of the price of what NCCL does inside one node, from 1 MiB to 1 GiB."""


def test_there_is_a_list(command: Command) -> None:  # noqa: F811
    answer = command("reproduce", "--list")
    assert answer.code == 0
    assert [line.partition(":")[0] for line in answer.out.splitlines()] == list(REPRODUCTIONS) == list(listing())


def test_an_unknown_name_is_refused(command: Command) -> None:  # noqa: F811
    check_refused(command("reproduce", "choises"), "unknown reproduction 'choises'", "did you mean 'choices'?")


def test_choices_are_a_picture_a_table_and_a_sentence(tmp_path: Path) -> None:
    (item,) = reproduce(["choices"], tmp_path)
    assert item.plot.read_bytes().startswith(b"\x89PNG")
    with item.csv.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(item.rows)
    for gpus in GPUS:
        kinds = [row["kind"] for row in item.rows if row["gpus"] == gpus and row["from_bytes"] == 0]
        assert len(kinds) == len(set(kinds)) == 6
    assert f"{GPUS[-1]:,} GPUs" in item.sentence
    (answer,) = to_dict([item])["items"]
    assert set(answer) == {"name", "plot", "csv", "rows", "sentence"}
    assert [table.row_count for table in item.tables] == [
        sum(row["gpus"] == gpus for row in item.rows) for gpus in GPUS
    ]
    assert choices(tmp_path, print) == item


@pytest.mark.parametrize("gpu", NODES)
def test_published_all_reduces_are_met(gpu: str) -> None:
    published = [point for point in published_points() if point.network == network(gpu)]
    assert min(point.nbytes for point in published) == MIB
    assert max(point.nbytes for point in published) == 1024 * MIB
    assert mean_error(published, priced_nodes(published_points()), network(gpu)) <= MEAN_ERROR


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    point = Point(network="n", witness="published", algorithm="NCCL", ranks=8, nbytes=8_000, seconds=1e-3)
    assert point.bus_bytes_per_s == pytest.approx(8_000 / 1e-3 * 14 / 8)


def test_every_algorithm_is_measured_and_priced(four_ranks: World, tmp_path: Path) -> None:
    points = []
    for transport, shared in TRANSPORTS.items():
        for nbytes in (4096, 65536):
            by_rank = four_ranks.run(_time_algorithms, shared, nbytes)
            for name, *seconds in zip(HERE, *by_rank, strict=True):
                assert all(taken > 0 for taken in seconds)
                points.append(
                    Point(
                        network=f"this machine, 4 ranks, {transport}",
                        witness="measured",
                        algorithm=name,
                        ranks=4,
                        nbytes=nbytes,
                        seconds=max(seconds),
                    )
                )
    priced = priced_here(points)
    assert {(point.network, point.algorithm) for point in priced} == {
        (point.network, point.algorithm) for point in points if point.algorithm != "native"
    }
    published = published_points()
    picture = plot_curves([*published, *priced_nodes(published), *points, *priced], tmp_path / "curves.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_larger_buckets_save_more_latency() -> None:
    gains = [priced_gain(bucket_bytes) for bucket_bytes in BUCKETS_BYTES]
    assert gains == sorted(gains)
    assert gains[0] > 1


def test_simulated_schedules_lie_on_their_closed_forms(tmp_path: Path) -> None:
    rows = study(ranks=4, micro_batches=(4, 16))
    assert len(rows) == 8 * 2
    for row in rows:
        if row.closed_form is not None:
            assert row.bubble == pytest.approx(row.closed_form, abs=1e-12)
    assert "15.79% gpipe (16 kept), 15.79% 1f1b (4 kept)" in sentence(rows, 16)
    assert plot_schedules(rows, tmp_path / "schedules.png").read_bytes().startswith(b"\x89PNG")
