"""Published rows are read right, errors are what they say, and a price that breaks makes the check fail."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.experiments import published_figures
from windtunnel.experiments.published_figures import (
    COLLECTIVE,
    MEMORY,
    TIME,
    Figure,
    Unusable,
    memory_figures,
    rows_of,
    run,
    step_figure,
    table_figures,
    vtrain_row,
)
from windtunnel.experiments.published_rows import NEEDED, ExcludedError, Row, read_job, software_of
from windtunnel.experiments.validate import Case, mean_abs_error, spread, summarise, to_dict, validate
from windtunnel.experiments.validate_sources import SOURCES
from windtunnel.sim import replay


def row(**changes: object) -> Row:
    base = next(one for one in rows_of("megatron_sc21_a100") if one["row_id"] == "msc21-005")
    return {**base, **{name: str(value) for name, value in changes.items()}}


def test_a_row_is_read() -> None:
    job = read_job(row())
    options = dict(job.options)
    assert (job.spec.layers, job.spec.hidden, job.spec.heads, job.spec.ffn) == (48, 8192, 64, 32768)
    assert (job.spec.vocab, job.spec.seq, job.spec.tied, job.spec.attention) == (51200, 2048, True, "causal")
    assert (job.spec.attention_kernel, job.spec.dropout) == ("plain", 0.1)  # Megatron-LM of April 2021
    assert job.cluster.processor.name == "a100-80gb"
    assert job.cluster.inter_node is not None
    assert (job.cluster.gpus_per_node, job.cluster.inter_node.bytes_per_s) == (8, 200e9)
    assert {name: options[name] for name in ("gpus", "tp", "pp", "interleave", "zero", "micro_batch")} == {
        "gpus": 512, "tp": 8, "pp": 2, "interleave": 1, "zero": 0, "micro_batch": 4
    }  # fmt: skip
    assert (options["recompute"], options["precision"], options["overlap"], options["fusion"]) == (
        "full", "fp16", False, "elementwise"
    )  # fmt: skip


@given(
    layers=st.integers(1, 200),
    heads=st.integers(1, 128),
    head_size=st.integers(1, 200),
    tp=st.sampled_from([1, 2, 4, 8]),
    vocab=st.integers(1, 300_000),
    gbps=st.integers(1, 3200),
    nodes=st.integers(1, 64),
)
def test_sizes_are_read_as_they_stand(
    layers: int, heads: int, head_size: int, tp: int, vocab: int, gbps: int, nodes: int
) -> None:
    hidden = heads * head_size
    one = row(layers=layers, heads=heads, hidden=hidden, ffn="", kv_heads="", vocab=vocab, tp=tp, pp=1,
              inter_node_gbps=gbps, n_gpus=8 * nodes)  # fmt: skip
    job = read_job(one)
    assert (job.spec.layers, job.spec.heads, job.spec.hidden, job.spec.ffn) == (layers, heads, hidden, 4 * hidden)
    assert job.spec.vocab % (128 * tp) == 0
    assert 0 <= job.spec.vocab - vocab < 128 * tp
    assert job.cluster.inter_node is not None
    assert job.cluster.inter_node.bytes_per_s == gbps * 1e9 / 8
    assert dict(job.options)["gpus"] == 8 * nodes


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_not_stated_is_named(name: str) -> None:
    with pytest.raises(ExcludedError, match=f"^not stated: {name}$"):
        read_job(row(**{name: ""}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "TPU v4"}, "gpu 'TPU v4' is on no cluster"),
        ({"framework": "Foo 1.0"}, "framework 'Foo 1.0'"),
        ({"act_recompute": ""}, "not stated: act_recompute"),
        ({"act_recompute": "selective per-op"}, "no policy of the engine does that"),
        ({"precision": "fp8"}, "precision 'fp8' is not simulated"),
        ({"offload": "some of it"}, "it is not clear what rested where"),
        ({"inter_node_gbps": ""}, "several nodes, and the network between them is not stated"),
        ({"model": "T5-11B", "family": "T5"}, "its layers are not described"),
        ({"heads": 7}, "must be a multiple of heads"),
    ],
)
def test_a_row_that_cannot_be_simulated_says_why(changes: Mapping[str, object], reason: str) -> None:
    with pytest.raises(ExcludedError, match=reason):
        read_job(row(**changes))
    (found,) = table_figures("a source", [row(**changes)])
    assert isinstance(found, Unusable)
    assert found.name == "msc21-005"


def test_every_row_has_a_figure_or_a_reason() -> None:
    for name, source in SOURCES.items():
        for found in source.figures(name):
            assert found.source == name
            assert isinstance(found, Figure) or found.reason


def test_every_row_of_a_table_counts_once() -> None:
    listed = {found.name.split()[0] for name in ("mpt-fsdp", "bloom") for found in SOURCES[name].figures(name)}
    assert listed >= {one["row_id"] for table in ("mpt_fsdp", "bloom_a100") for one in rows_of(table)}


def test_the_software_of_a_run_is_said_by_its_framework() -> None:
    old, later = software_of("Megatron-LM (Apr 2021)"), software_of("Megatron-LM (May 2022)")
    assert (old.gradients, later.gradients) == (None, "fp32")
    assert software_of("Composer FSDP").attention == "fused"
    assert all(one.why for one in (old, later))


def test_rates_in_flops_are_counted_as_the_source_does() -> None:
    printed = row(target_iter_time_s="", samples_per_s="")
    figure = step_figure("sc21-table-1", printed)
    # Table 1's own time is 14.453 s at 138 TFLOP/s: the formula turns one into the other.
    layers, h, s, V, batch = 48, 8192, 2048, 51200, 1536
    flops = 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + V / (16 * layers * h))
    assert flops / 512 / 14.453 / 1e12 == pytest.approx(figure.published, rel=0.01)
    assert figure.unit == "TFLOP/s per GPU"


def test_model_states_of_zero_are_the_closed_form() -> None:
    tables = [one for one in rows_of("zero_sc20_memory") if one["group"].startswith("ZeRO Table 1")]
    figures = [figure for one in tables for figure in memory_figures("zero", one)]
    assert len(figures) == 54
    for figure in figures:  # printed with three or four digits, and the last one cut off
        assert figure.predict() == pytest.approx(figure.published, rel=0.05)
        assert figure.kind == MEMORY


def test_rows_of_the_single_node_set() -> None:
    lines = rows_of("vtrain_single_node_a100")
    job = read_job(vtrain_row(lines[0], 1))
    assert len(lines) == 714
    assert (job.spec.hidden, job.spec.layers, dict(job.options)["pp"]) == (1024, 24, 2)


case_values = st.floats(0.1, 10.0)


@given(published=st.lists(case_values, min_size=1, max_size=8), factor=st.floats(0.5, 2.0))
def test_errors_are_relative_to_what_was_published(published: list[float], factor: float) -> None:
    cases = [
        Case(name=str(n), source="bloom", kind=TIME, published=value, predicted=factor * value, unit="s")
        for n, value in enumerate(published)
    ]
    (summary,) = summarise(cases)
    assert summary.mean_error == pytest.approx(factor - 1, abs=1e-12)
    assert summary.mean_abs_error == pytest.approx(abs(factor - 1), abs=1e-12)
    means = mean_abs_error(cases)
    assert means["overall"] == means["by_kind"][TIME] == means["by_source"]["bloom"][TIME]


@given(count=st.integers(2, 20), of=st.integers(1, 100))
def test_a_sample_is_spread_over_all(count: int, of: int) -> None:
    figures = [
        Figure(name=str(n), source="", kind=TIME, published=1.0, unit="s", predict=lambda: 1.0) for n in range(of)
    ]
    chosen = [int(figure.name) for figure in spread(figures, count)]
    assert len(set(chosen)) == len(chosen) == min(count, of)
    assert chosen[0] == 0
    assert chosen[-1] == of - 1


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"source = 'blom'; allowed: .*did you mean 'bloom'"):
        validate(sources=["blom"])
    with pytest.raises(ValueError, match="kind = 'speed'; allowed: iteration time"):
        validate(kinds=["speed"])


SMALL = {
    "sc21-table-1": "msc21-001",
    "megatron-2020-v100": "m1920-009",
    "internevo": "intern-001",
    "mpt-fsdp": "mpt-181",
}
"""A row of some sources whose flight is short."""


def error_of(source: str) -> float:
    figure = next(found for found in SOURCES[source].figures(source) if found.name == SMALL[source])
    assert isinstance(figure, Figure)
    return figure.predict() / figure.published - 1


@pytest.mark.parametrize("source", SMALL)
def test_a_row_is_within_the_threshold_of_its_source(source: str) -> None:
    assert abs(error_of(source)) <= SOURCES[source].thresholds[TIME]


def test_a_step_without_its_matrix_products_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replay.kernel_seconds
    monkeypatch.setattr(replay, "kernel_seconds", lambda kernel, *on: (kernel.flops == 0) * whole(kernel, *on))
    run.cache_clear()
    try:
        for source in SMALL:
            assert abs(error_of(source)) > SOURCES[source].thresholds[TIME]
    finally:
        run.cache_clear()


@pytest.mark.parametrize("factor", [0.0, 1.3])
def test_collectives_are_within_their_threshold_and_a_broken_price_is_not(
    factor: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = validate(sources=["nccl-one-node"], out=tmp_path)
    assert found.ok
    answer = to_dict(found)
    assert json.loads(json.dumps(answer))["mean_abs_error"]["by_source"]["nccl-one-node"][COLLECTIVE] > 0
    assert {"cases", "mean_abs_error", "excluded", "fitted"} <= set(answer)
    assert answer["fitted"]["nccl-one-node"]
    assert len((tmp_path / "validate.csv").read_text().splitlines()) == 1 + len(found.cases)
    assert (tmp_path / "validate.png").stat().st_size > 0
    whole = published_figures.collective_seconds
    monkeypatch.setattr(published_figures, "collective_seconds", lambda *told: factor * whole(*told))
    assert not validate(sources=["nccl-one-node"]).ok
