"""Prices: hand-computed jobs, tables that never say 0 where there is no price, and what failures add."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.experiments.failures import Faults, checkpoint_bytes, goodput, savings_by_size
from windtunnel.experiments.listings import list_hardware
from windtunnel.experiments.models import load_model
from windtunnel.experiments.prices import price_of, shape_rows, training, usd
from windtunnel.experiments.units import unit_of, with_unit
from windtunnel.sim.failures import load_failures
from windtunnel.sim.hardware import Cluster, cluster_names, load_cluster
from windtunnel.sim.prices import Price
from windtunnel.sim.result import StepResult

PRICE = Price(per_hour_usd=36.0, kind="on demand", region="nowhere", as_of="2026-01-31")


def priced(price: Price | None = PRICE) -> Cluster:
    base = load_cluster("dgx-a100")
    return replace(base, price=price, sources={**base.sources, "price": "made up"} if price else base.sources)


def result(gpus: int, tokens_per_s: float) -> StepResult:
    return StepResult(
        step_time_s=1.0,
        tokens_per_s=tokens_per_s,
        tflops_per_gpu=1.0,
        hardware_tflops_per_gpu=1.0,
        mfu=0.5,
        breakdown_s={},
        communication_s={},
        peak_memory_bytes={},
        fits=True,
        first_to_exceed=None,
        bytes_sent_per_gpu={},
        model_state_bytes=0,
        offloaded_bytes_per_node={},
        wall_s=0.0,
        events=0,
        layout={"gpus": gpus, "precision": "bf16"},
    )


def test_a_job_by_hand() -> None:
    # Two nodes at 36 USD an hour are 0.02 USD a second; at 10,000 tokens a second that is 2 USD for a million.
    price = price_of(result(16, 10_000), priced())
    assert price is not None
    assert (price["nodes"], price["per_hour_usd"]) == (2, 72.0)
    assert price["per_million_tokens_usd"] == pytest.approx(2.0)
    assert price["per_billion_tokens_usd"] == pytest.approx(2_000.0)
    assert (price["kind"], price["as_of"], price["source"]) == ("on demand", "2026-01-31", "made up")
    # 864 million tokens take 86,400 s: a day, 24 x 16 GPU hours, 1,728 USD.
    budget = training(result(16, 10_000), priced(), 864e6)
    assert budget["days"] == pytest.approx(1)
    assert budget["gpu_hours"] == pytest.approx(384)
    assert budget["price_usd"] == pytest.approx(1_728)


def test_a_node_that_is_used_in_part_is_paid_as_a_whole() -> None:
    one, nine = price_of(result(1, 100), priced()), price_of(result(9, 100), priced())
    assert one is not None
    assert nine is not None
    assert (one["per_hour_usd"], nine["per_hour_usd"]) == (36.0, 72.0)


@given(gpus=st.integers(1, 4096), seconds=st.floats(1, 1e7), per_hour=st.floats(0.01, 1000))
def test_price_arithmetic(gpus: int, seconds: float, per_hour: float) -> None:
    price = replace(PRICE, per_hour_usd=per_hour)
    job = price.job_usd(gpus=gpus, gpus_per_node=8, seconds=seconds)
    assert job == pytest.approx(math.ceil(gpus / 8) * per_hour * seconds / 3600)
    assert price.job_usd(gpus=gpus, gpus_per_node=8, seconds=2 * seconds) == pytest.approx(2 * job)


def test_without_a_price_nothing_is_free() -> None:
    assert price_of(result(8, 1e4), priced(None)) is None
    assert training(result(8, 1e4), priced(None), 1e9)["price_usd"] is None
    assert usd(None) == "no price"
    assert usd(1234.5) == "1,234 USD"
    assert usd(2.345) == "2.35 USD"


def test_shapes_are_ordered_by_the_price_of_a_token() -> None:
    clusters = [priced(None), priced(), priced(replace(PRICE, per_hour_usd=9.0))]
    answers = [
        {"layout": {"gpus": 8}, "step_time_s": 1.0, "tokens_per_s": 1e4, "mfu": 0.5, "fits": True}
        | {"price": price_of(result(8, 1e4), cluster)}
        for cluster in clusters
    ]
    rows = shape_rows(answers, clusters)
    assert [row["per_hour_usd"] for row in rows] == [9.0, 36.0, None]
    assert [row["per_billion_tokens_usd"] for row in rows] == [pytest.approx(250), pytest.approx(1000), None]


@pytest.mark.parametrize("name", cluster_names())
def test_prices_of_the_catalogue(name: str) -> None:
    cluster = load_cluster(name)
    if cluster.price is not None:
        assert 1 < cluster.price.per_hour_usd / cluster.gpus_per_node < 20
        assert cluster.price.as_of <= "2026-12-31"
    assert (cluster.price is None) == (name.startswith("dgx") or name in NOT_PRICED)


NOT_PRICED = [
    "frontier",
    "aws-p5e",
    "azure-nd96isr-h200-v5",
    "azure-nd96isr-mi300x-v5",
    "gcp-a3-megagpu-8g",
    "gcp-a4-highgpu-8g",
]


def test_a_user_s_price(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = 'base = "aws-p5"\n[price]\nper_hour_usd = 20.0\nkind = "reserved"\nregion = "here"\nas_of = 2026-02-28\n'
    path.write_text(text)
    mine = load_cluster(path)
    assert mine.price == Price(per_hour_usd=20.0, kind="reserved", region="here", as_of="2026-02-28")
    assert mine.sources["price"] == "given in mine.toml"
    path.write_text('base = "aws-p5"\nnodes = 4')
    assert load_cluster(path).price == load_cluster("aws-p5").price
    for other in ('gpu = "h200"', "gpus_per_node = 4"):  # another machine, whose price is not known
        path.write_text(f'base = "aws-p5"\n{other}')
        assert load_cluster(path).price is None
        assert "price" not in load_cluster(path).sources


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("36.0", "0.0", r"per_hour_usd must be > 0 and finite, got 0"),
        ('"2026-01-31"', '"31.1.2026"', r"as_of = '31\.1\.2026'; allowed: a date"),
        ('"on demand"', '" "', r"kind must be a word"),
    ],
)
def test_a_bad_price_gives_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = 'per_hour_usd = 36.0\nkind = "on demand"\nregion = "here"\nas_of = "2026-01-31"'
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "dgx-a100"\n[price]\n{text.replace(old, new)}')
    with pytest.raises(ValueError, match=message) as error:
        load_cluster(path)
    assert "\n" not in str(error.value)


def test_goodput_of_a_job_by_hand() -> None:
    parameters = load_model("gpt2").parameters
    found = goodput(result(16, 1e4), parameters, priced(), Faults(), tokens=864e6)
    profile = load_failures("llama3")
    assert checkpoint_bytes(parameters, "bf16") == 14 * parameters
    assert checkpoint_bytes(parameters, "fp32") == 12 * parameters
    assert found["checkpoint_s"] == pytest.approx(14 * parameters / (2 * profile.storage_bytes_per_s_per_node))
    assert found["mtbf_hours"] == pytest.approx(profile.mean_time_between_s(16, 8, 8) / 3600)
    assert found["tokens_per_s"] == pytest.approx(1e4 * found["share"])
    assert found["days"] == pytest.approx(1 / found["share"])
    assert found["price_usd"] == pytest.approx(1728 / found["share"])
    assert (
        goodput(result(8, 1e4), parameters, priced(), Faults())["mtbf_hours"] > 2 * found["mtbf_hours"]
    )  # no network between nodes


def test_goodput_of_what_a_user_gives() -> None:
    parameters = load_model("gpt2").parameters
    faults = Faults(mtbf_hours=24, restart_s=600, checkpoint_s=300)
    given_times = goodput(result(16, 1e4), parameters, priced(None), faults, tokens=864e6)
    assert given_times["failures"] is None
    assert given_times["interval_s"] / 60 == pytest.approx(117, rel=0.005)  # Daly 2006, figure 3
    assert given_times["price_usd"] is None
    assert given_times["days"] > 1
    with pytest.raises(ValueError, match="mtbf_hours must be > 0 and finite, got 0"):
        Faults(mtbf_hours=0)
    with pytest.raises(ValueError, match="restart_s must be >= 0 and finite, got -1"):
        Faults(restart_s=-1)
    larger = savings_by_size(result(16, 1e4), parameters, priced(), faults)
    assert list(larger) == [16, 64, 256, 1024, 4096, 16_384, 65_536]
    assert larger[64].mtbf_s == pytest.approx(6 * 3600)
    assert [saving.share for saving in larger.values()] == sorted((s.share for s in larger.values()), reverse=True)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("intra_node.bytes_per_s", 300e9, "300 GB/s"),
        ("latency_s", 3.4e-6, "3.4 us"),
        ("peak_flops.bf16", 312e12, "312 TFLOP/s"),
        ("host.memory_bytes", 512_000_000_000, "512 GB"),
        ("price.per_hour_usd", 24.48, "24.48 USD"),
        ("efficiency", 0.941, "0.941"),
        ("inter_node.nics", 8, "8"),
        ("start_s", 0, "0 s"),
        ("tile", [128, 256], "[128, 256]"),
    ],
)
def test_figures_with_their_units(name: str, value: object, text: str) -> None:
    assert with_unit(name, value) == text


def test_storage_has_a_unit_per_node() -> None:
    assert unit_of("storage_bytes_per_s_per_node") == "B/s per node"


def test_every_entry_of_the_catalogue_is_listed_once() -> None:
    everything = list_hardware(None).entries
    kernels = everything.pop("kernels")
    assert len(kernels) == len({(kernel["name"], kernel["device"]) for kernel in kernels})
    names = [entry["name"] for group in everything.values() for entry in group]
    assert len(names) == len(set(names))
    assert set(everything) == {"gpus", "clusters", "fabrics", "failures"}
    for name in ("mi300x", "aws-p5", "efa-1", "llama3"):
        one = list_hardware(name)
        assert sum(len(group) for group in one.entries.values()) == 1
        assert list(one.tables())
