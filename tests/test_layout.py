"""Options with every default filled in, and bad ones refused in one line."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.experiments.layout import ADAMW, Options, engine_config, from_deepspeed, resolve
from windtunnel.experiments.models import load_model
from windtunnel.sim.hardware import load_cluster

GPT = load_model("gpt2")
A100 = load_cluster("dgx-a100")
V100 = load_cluster("dgx-2")
FOUR_NODES = replace(A100, nodes=4)


def refused(message: str, *, cluster: Any = A100, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(Options(**options), GPT, cluster)
    assert "\n" not in str(caught.value)


def test_the_defaults_of_the_contract() -> None:
    layout = resolve(Options(), GPT, FOUR_NODES)
    assert asdict(layout) == {
        "model": "gpt2", "cluster": "dgx-a100", "gpus": 32, "dp": 32, "tp": 1, "pp": 1, "cp": 1, "ep": 1,
        "interleave": 1,
        "schedule": "1f1b", "zero": 0, "micro_batch": 1, "global_batch": 32, "accumulation": 1, "seq": 1024,
        "sequence_parallel": False, "recompute": "none", "recompute_budget": None, "offload": "none",
        "offload_to": "host", "precision": "bf16", "fidelity": "closed_form", "fusion": "none", "clip": 0.0,
        "slow_ranks": 0.0, "slow_factor": 1.0, "slow_seed": 0, "engine": "{}",
        "attention": "fused", "overlap": True, "counts": "tokens", "expandable_segments": False,
    }  # fmt: skip


def test_gpus_follow_from_dp_and_from_the_cluster() -> None:
    assert resolve(Options(dp=3), GPT, A100).gpus == 3
    assert resolve(Options(), GPT, A100).gpus == 8  # as many nodes as needed: one
    assert resolve(Options(gpus=12), GPT, A100).dp == 12


def test_precision_follows_from_the_gpu() -> None:
    assert resolve(Options(), GPT, V100).precision == "fp16"
    assert resolve(Options(precision="fp32"), GPT, V100).precision == "fp32"
    refused(r"precision = bf16; allowed: fp32, fp16 on v100", cluster=V100, precision="bf16")


@given(dp=st.integers(1, 4096), micro_batch=st.integers(1, 64), accumulation=st.integers(1, 64))
def test_batches_that_fit(dp: int, micro_batch: int, accumulation: int) -> None:
    batch = dp * micro_batch * accumulation
    layout = resolve(Options(dp=dp, micro_batch=micro_batch, global_batch=batch), GPT, A100)
    assert (layout.gpus, layout.micro_batch, layout.global_batch) == (dp, micro_batch, batch)
    assert layout.accumulation == accumulation
    implied = resolve(Options(gpus=dp, micro_batch=micro_batch), GPT, A100)
    assert (implied.accumulation, implied.global_batch) == (1, dp * micro_batch)


@given(dp=st.integers(1, 500), micro_batch=st.integers(1, 20), batch=st.integers(1, 20_000))
def test_batches_fit_or_are_refused(dp: int, micro_batch: int, batch: int) -> None:
    options = Options(dp=dp, micro_batch=micro_batch, global_batch=batch)
    if batch % (dp * micro_batch) == 0:
        layout = resolve(options, GPT, A100)
        assert layout.accumulation * layout.micro_batch * layout.dp == layout.global_batch == batch
        return
    product = f"{micro_batch} \\* {dp} = {micro_batch * dp}"
    with pytest.raises(
        ValueError, match=f"global-batch = {batch}; allowed: a multiple of micro-batch \\* dp = {product}"
    ):
        resolve(options, GPT, A100)


@pytest.mark.parametrize("name", ["gpus", "dp", "micro_batch", "global_batch", "seq"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_at_least_one(name: str, value: int) -> None:
    refused(rf"^{name.replace('_', '-')} = {value}; allowed: an integer >= 1$", **{name: value})


@pytest.mark.parametrize("name", ["tp", "pp", "interleave"])
def test_parallel_sizes_are_at_least_one(name: str) -> None:
    refused(rf"^{name} = 0; allowed: ", **{name: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"recompute": "ful"},
            "recompute = ful; allowed: none, selective, attention, full, budget; did you mean 'full'?",
        ),
        ({"fidelity": "event"}, "fidelity = event; allowed: closed_form, events; did you mean 'events'?"),
        ({"precision": "bf61"}, "precision = bf61; allowed: fp32, bf16, fp16; did you mean 'bf16'?"),
        ({"schedule": "gpip"}, "schedule = gpip; allowed: sequential, gpipe, 1f1b, .*; did you mean 'gpipe'?"),
        ({"interleave": 2}, "interleave = 2; allowed: 1 without pipeline stages"),
        ({"sequence_parallel": True}, "sequence-parallel = True; allowed: with tp > 1"),
        ({"gpus": 8, "pp": 8, "interleave": 2}, "pp = 8; allowed: pp \\* interleave = 8 \\* 2 at most the 12 layers"),
        ({"gpus": 8, "pp": 2, "zero": 3}, "zero = 3; allowed: 0, 1 or 2 with a pipeline"),
        ({"gpus": 8, "pp": 2, "schedule": "zb-v"}, "interleave = 1; allowed: at least 2 with schedule = zb-v"),
        ({"offload": "optimiser"}, "offload = optimiser; allowed: none, optimizer, parameters; did you mean"),
        ({"offload_to": "disk"}, "offload-to = disk; allowed: host, nvme"),
        ({"zero": 4}, "zero stage = 4; allowed: 0, 1, 2, 3"),
        ({"zero": -1}, "zero stage = -1; allowed: 0, 1, 2, 3"),
        ({"gpus": 8, "dp": 4}, r"dp = 4; allowed: .* 4 \* 1 \* 1 \* 1 = 4 and gpus = 8"),
        ({"seq": 1025}, "seq = 1025; allowed: at most 1024, the learned positions of gpt2"),
    ],
)
def test_bad_choices_name_field_value_and_what_is_allowed(options: dict[str, Any], message: str) -> None:
    refused(message.replace("?", r"\?"), **options)


@pytest.mark.parametrize("data", [{"mp_size": 2, "pipeline_size": 4}, {"parallel": {"tensor": 2, "pipeline": 4}}])
def test_a_file_divides_the_model(data: dict[str, Any]) -> None:
    layout = resolve(from_deepspeed({**data, "pipeline": {"schedule": "gpipe"}}, Options(gpus=16)), GPT, A100)
    assert (layout.tp, layout.pp, layout.dp, layout.schedule) == (2, 4, 2, "gpipe")
    given = Options(gpus=16, tp=4, schedule="zb-h1")
    layout = resolve(from_deepspeed(data, given), GPT, A100)
    assert (layout.tp, layout.pp, layout.dp, layout.schedule) == (4, 4, 1, "zb-h1")


def test_more_gpus_than_there_are() -> None:
    refused("gpus = 33, but cluster 'dgx-a100' has 32", cluster=FOUR_NODES, gpus=33)
    refused("gpus = 33, but cluster 'dgx-a100' has 32", cluster=FOUR_NODES, dp=33)


def test_longer_sequences_where_positions_are_computed() -> None:
    llama = load_model("llama3-8b")
    assert resolve(Options(seq=2 * llama.seq), replace(llama, positions="none"), A100).seq == 2 * llama.seq


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": "budget"}, "recompute: policy = 'budget' without budget_bytes"),
        ({"recompute_budget": 7}, "recompute: budget_bytes = 7 with policy = 'none'"),
        ({"recompute": "full", "recompute_budget": 7}, "recompute: budget_bytes = 7 with policy = 'full'"),
    ],
)
def test_a_budget_goes_with_its_policy(options: dict[str, Any], message: str) -> None:
    refused(message, **options)


# DeepSpeed's JSON #


def write(folder: Path, text: str) -> Path:
    path = folder / "ds.json"
    path.write_text(text)
    return path


FILE = """{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "gradient_clipping": 0.5,
           "zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}"""


def test_a_file_fills_in_what_was_not_given(tmp_path: Path) -> None:
    found = from_deepspeed(write(tmp_path, FILE), Options(gpus=4))
    assert found == Options(
        gpus=4, zero=2, micro_batch=2, global_batch=24, precision="fp16", clip=0.5, recompute="none"
    )


def test_what_was_given_wins(tmp_path: Path) -> None:
    given_options = Options(dp=4, zero=0, micro_batch=1, global_batch=8, precision="bf16", clip=2.0, recompute="full")
    assert from_deepspeed(write(tmp_path, FILE), given_options) == given_options


def test_a_file_without_precision_means_fp32(tmp_path: Path) -> None:
    assert from_deepspeed(write(tmp_path, "{}"), Options(gpus=4)).precision == "fp32"


def test_batch_sizes_in_a_file_need_a_number_of_ranks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gpus is missing; allowed: an integer >= 1"):
        from_deepspeed(write(tmp_path, FILE), Options())


@pytest.mark.parametrize("options", [{"gpus": 0}, {"dp": 0}, {"gpus": 4, "tp": 0}, {"gpus": 4, "pp": 8}])
def test_a_file_with_impossible_ranks_is_bad_input(tmp_path: Path, options: dict[str, int]) -> None:
    path = write(tmp_path, '{"train_batch_size": 24}')
    with pytest.raises(ValueError, match=r"^[a-z-]+ = \d+; allowed: "):
        resolve(from_deepspeed(path, Options(**options)), GPT, A100)


def test_the_engine_that_is_flown_honours_the_rest_of_the_file() -> None:
    """What options say wins in its sections; everything else reaches the engine as it is written."""
    data = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3, "zero_quantized_weights": True, "overlap_comm": True},
        "fp16": {"enabled": True, "loss_scale": 128.0},
        "bf16": {"enabled": False},
        "communication": {"transport": "sockets"},
        "activation_checkpointing": {"policy": "budget", "budget_bytes": 5, "contiguous_memory_optimization": True},
    }
    layout = resolve(from_deepspeed(data, Options(gpus=4, zero=2, precision="bf16", recompute="full")), GPT, A100)
    assert engine_config(layout) == {
        "gradient_clipping": 0.5,
        "optimizer": data["optimizer"],
        "zero_optimization": {"stage": 2, "zero_quantized_weights": True, "overlap_comm": True},
        "fp16": {"enabled": False, "loss_scale": 128.0},
        "bf16": {"enabled": True},
        "communication": {"transport": "sockets"},
        "activation_checkpointing": {"policy": "full", "budget_bytes": None, "contiguous_memory_optimization": True},
    }
    assert engine_config(resolve(Options(), GPT, A100))["optimizer"] == ADAMW
