"""Reproductions of papers: rows as jobs, sentences that follow their rows, and what is simulated on tiny models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from windtunnel.experiments import selective_recompute, weak_scaling, zero3_against_3d, zero_memory
from windtunnel.experiments.models import load_model
from windtunnel.experiments.papers import CLUSTERS, Job, convention_flops, errors_said, job_of, published_rows

DEMO = load_model("gpt-demo")


def a_row(**changed: str) -> dict[str, str]:
    row = {
        "row_id": "x-1", "group": "G", "model": "GPT X", "layers": "2", "hidden": "32", "heads": "4", "vocab": "100",
        "seq": "16", "gpu": "A100-SXM4-80GB", "n_gpus": "16", "dp": "2", "tp": "4", "pp": "2", "interleave": "",
        "zero_stage": "", "act_recompute": "full", "seq_parallel": "yes", "micro_batch": "3", "global_batch": "12",
        "target_iter_time_s": "1.5",
    }  # fmt: skip
    return {**row, **changed}


def test_a_row_is_a_job() -> None:
    job = job_of(a_row())
    assert (job.model.layers, job.model.hidden, job.model.vocab, job.model.seq) == (2, 32, 100, 16)
    assert job.cluster == "dgx-a100"
    assert job.published_s == 1.5
    assert dict(job.options) == {
        "gpus": 16, "dp": 2, "tp": 4, "pp": 2, "interleave": 1, "zero": 0, "micro_batch": 3, "global_batch": 12,
        "recompute": "full", "sequence_parallel": True, "precision": "fp16",
    }  # fmt: skip
    assert job_of(a_row(target_iter_time_s="")).published_s is None


@pytest.mark.parametrize("column", ["gpu", "act_recompute"])
def test_a_cell_of_an_unknown_kind_is_refused(column: str) -> None:
    with pytest.raises(ValueError, match=f"row x-1: {column} = 'other'; allowed: "):
        job_of(a_row(**{column: "other"}))


def test_every_job_of_the_papers_is_read() -> None:
    assert len(weak_scaling.jobs()) == 10
    assert [job.options["gpus"] for job in weak_scaling.jobs()] == sorted(
        job.options["gpus"] for job in weak_scaling.jobs()
    )
    assert {(job.options["zero"], job.options["gpus"]) for job in zero3_against_3d.jobs() if job.published_s} == {
        (zero, gpus) for zero in (0, 3) for gpus in (384, 768, 1536)
    }
    assert len(zero3_against_3d.jobs()) == 12
    assert len(published_rows(zero_memory.FILE, zero_memory.GROUP)) == 54
    assert all(job.options["gpus"] == job.options["dp"] * 8 * job.options["pp"] for job in weak_scaling.jobs()[3:7])
    with pytest.raises(ValueError, match="no row of group 'Table 9'"):
        published_rows(zero_memory.FILE, "Table 9")
    assert set(CLUSTERS.values()) == {"dgx-a100"}


def test_published_speeds_are_those_of_the_papers_own_formula() -> None:
    for row in published_rows(weak_scaling.FILE, weak_scaling.GROUP):
        job = job_of(row)
        tflops = convention_flops(job.model, int(row["global_batch"])) / float(row["target_iter_time_s"]) / 1e12
        # Printed without decimals: 135 to 148.
        assert tflops / int(row["n_gpus"]) == pytest.approx(float(row["tflops_per_gpu"]), abs=0.5)


# Sentences #


def step(gpus: int, simulated: float, published: float | None, *, zero: int = 0, billions: float = 1.0) -> dict:
    """A row of `papers.simulated_row`, made by hand: speeds are 100 / seconds."""
    return {
        "model": f"GPT {billions:g}B", "parameters": int(billions * 1e9), "gpus": gpus, "zero": zero,
        "published_s": published, "simulated_s": simulated, "fits": True,
        "error": None if published is None else simulated / published - 1,
        "published_tflops": None if published is None else 100 / published, "simulated_tflops": 100 / simulated,
    }  # fmt: skip


def test_errors_are_said() -> None:
    rows = [step(8, 1.1, 1.0), step(16, 0.7, 1.0), step(32, 5.0, None)]
    assert errors_said(rows) == (
        "step times of 2 published jobs are met within 20.0% in the mean, -30.0% at worst (GPT 1B on 16 GPUs)"
    )


def test_weak_scaling_says_what_its_rows_say() -> None:
    rows = [step(8, 1.0, 1.0, billions=1.7), step(64, 2.0, None, billions=1000.0)]
    said = weak_scaling.sentence(rows)
    assert "from 8 GPUs and 1.7 B parameters to 64 and 1,000 B, each GPU is simulated to do 100 and 50 TFLOP/s" in said


def against_rows() -> list[dict]:
    return [
        step(32, 4.0, None, zero=3, billions=175.0),
        step(8, 1.0, 1.0, zero=3, billions=175.0),
        step(8, 1.0, None, billions=175.0),
        step(32, 1.25, 1.0, billions=175.0),
    ]


def test_zero_3_against_3d_says_what_its_rows_say() -> None:
    said = zero3_against_3d.sentence(against_rows())
    assert "at 175 B from 8 to 32 GPUs ZeRO 3 keeps 25% of the speed of each and 3D 80%" in said
    assert "which then is 3.2 times as fast" in said


def memory_row(simulated: float, published: float | None, *, stage: int = 1, ranks: int = 64) -> dict:
    parts = {f"{category}_gb": simulated / 3 for category in zero_memory.CATEGORIES}
    error = None if published is None else simulated / published - 1
    return {
        "model": "7.5B", "zero": stage, "ranks": ranks, "published_gb": published, "simulated_gb": simulated,
        "error": error, **parts,
    }  # fmt: skip


def memory_rows() -> list[dict]:
    return [
        memory_row(120.0, None, stage=0),
        memory_row(31.42, 31.4),
        memory_row(1.884, 1.88, stage=3),
        memory_row(40.0, 30.0, ranks=16),
    ]


def test_zero_memory_says_what_its_rows_say() -> None:
    said = zero_memory.sentence(memory_rows())
    assert "2 of 3 entries of the table come out" in said
    assert "the others within 33.3%" in said
    assert "take 120 GB at stage 0, 31.4 GB at stage 1, 1.88 GB at stage 3 on 64 ranks" in said


@pytest.mark.parametrize(
    ("simulated", "published", "same"),
    [(1.885, 1.88, True), (1.90, 1.88, False), (512.6, 512.0, True), (514.0, 512.0, False), (0.117, 0.12, True)],
)
def test_digits_are_those_that_are_printed(simulated: float, published: float, same: bool) -> None:
    assert zero_memory.same_digits(memory_row(simulated, published)) is same


def recompute_rows() -> list[dict]:
    job = Job(model=replace(DEMO, name="GPT 1B"), cluster="dgx-a100", options={})
    full = replace(job, options={"recompute": "full", "sequence_parallel": False})
    less = replace(job, options={"recompute": "selective", "sequence_parallel": True})
    row = selective_recompute._row
    return [
        row(full, selective_recompute.STEP_S, 1.5, 1.4),
        row(less, selective_recompute.STEP_S, 1.0, 1.0),
        row(full, selective_recompute.ACTIVATIONS, 0.05, 0.05),
        row(less, selective_recompute.ACTIVATIONS, 0.2, 0.22),
    ]


def test_selective_recompute_says_what_its_rows_say() -> None:
    said = selective_recompute.sentence(recompute_rows())
    assert "GPT 1B is 40% faster than with full recomputation (published 50%) and keeps 22% of the activations" in said
    assert "mean error of step times 3.3%, of activations 5.0%" in said


@pytest.mark.parametrize(
    ("plot", "rows"),
    [
        (weak_scaling.plot, lambda: [step(8, 1.0, 1.0), step(64, 2.0, None)]),
        (zero3_against_3d.plot, against_rows),
        (zero_memory.plot, memory_rows),
        (selective_recompute.plot, recompute_rows),
    ],
)
def test_every_item_is_drawn(plot: Callable[..., Path], rows: Callable[[], list[dict]], tmp_path: Path) -> None:
    assert plot(rows(), tmp_path / "item.png").read_bytes().startswith(b"\x89PNG")


# What is simulated #


def test_flown_state_is_the_papers_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rajbhandari et al. 2020, section 3.1: 2, 2 and 12 bytes per parameter, divided by ranks as the stage says."""
    monkeypatch.setitem(zero_memory.FLOWN, "7.5B", DEMO)
    padding = 1e-3  # of units of some hundred parameters to chunks, and storages to 512 bytes
    for stage, shared in ((0, 0), (2, 14), (3, 16)):
        row = zero_memory.row_of("7.5B", 1e9, stage, 4, 1.0)
        assert row["simulated_gb"] == pytest.approx(16 - shared + shared / 4, rel=padding)
        assert row["error"] == row["simulated_gb"] - 1
        assert row["optimizer_gb"] == pytest.approx(12 / 4 if stage else 12, rel=padding)


def test_a_recomputed_layer_keeps_its_input_alone() -> None:
    options: dict[str, Any] = {"tp": 1, "micro_batch": 2, "precision": "fp16"}
    job = Job(model=DEMO, cluster="dgx-a100", options=options)
    full, none = (
        selective_recompute.layer_activation_bytes(job, recompute=recompute, sequence_parallel=False)
        for recompute in ("full", "none")
    )
    assert full == 2 * 2 * DEMO.seq * DEMO.hidden
    assert none > 5 * full
