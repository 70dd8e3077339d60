"""The JSON config: what is refused and how, and the arithmetic of batch sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.zero import Zero
from windtunnel.engine.config import Config
from windtunnel.engine.loss_scale import ScalePolicy
from windtunnel.engine.mesh import Parallelism
from windtunnel.engine.precision import Precision
from windtunnel.engine.sections import OptimizerSection

REFUSED: dict[str, tuple[Any, str]] = {
    "key": (
        {"zero_optimisation": {}},
        "unknown key 'zero_optimisation'; allowed: .*; did you mean 'zero_optimization'?",
    ),
    "key of DeepSpeed": (
        {"zero_optimization": {"overlap_comm": False}},
        "overlap_comm = False; allowed: true, because",
    ),
    "inner key": ({"zero_optimization": {"stag": 1}}, "unknown key 'zero_optimization.stag'.*did you mean 'stage'?"),
    "fp16 key": ({"fp16": {"loss_scal": 1.0}}, "unknown key 'fp16.loss_scal'.*did you mean 'loss_scale'?"),
    "optimizer key": ({"optimizer": {"type": "SGD", "parms": {}}}, "unknown key 'optimizer.parms'.*'params'?"),
    "stage": ({"zero_optimization": {"stage": 4}}, "zero_optimization: stage = 4; allowed: 0, 1, 2, 3"),
    "stage as a flag": ({"zero_optimization": {"stage": True}}, "zero_optimization.stage = True"),
    "stage as text": ({"zero_optimization": {"stage": "1"}}, "zero_optimization.stage = '1'"),
    "section": ({"zero_optimization": 3}, "zero_optimization = 3"),
    "batch": ({"train_batch_size": 0}, "train_batch_size = 0; allowed: an integer >= 1"),
    "batch as text": ({"train_batch_size": "8"}, "train_batch_size = '8': input should be a valid integer"),
    "micro batch": ({"train_micro_batch_size_per_gpu": -2}, "train_micro_batch_size_per_gpu = -2; allowed: an integer"),
    "steps": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps = 0; allowed: an integer >= 1"),
    "steps as float": ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps = 1.5"),
    "clipping": (
        {"gradient_clipping": -1},
        r"gradient_clipping = -1.0; allowed: a finite number >= 0 \(0 clips nothing\)",
    ),
    "clipping as text": ({"gradient_clipping": "x"}, "gradient_clipping = 'x': input should be a valid number"),
    "bf16": ({"bf16": {"enabled": 1}}, "bf16.enabled = 1: input should be a valid boolean"),
    "loss scale": ({"fp16": {"loss_scale": -1.0}}, "loss_scale = -1.0; allowed: a static scale > 0"),
    "both": ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled and fp16.enabled are both true"),
    "kind of collective": ({"communication": {"algorithms": {"all_sum": "ring"}}}, "kind = 'all_sum' is no collective"),
    "algorithm": ({"communication": {"algorithms": {"all_reduce": "rign"}}}, "algorithm = 'rign'.*'ring'"),
    "transport": ({"communication": {"transport": "tcp"}}, "communication.transport = 'tcp'"),
    "tier": ({"communication": {"tiers": [{"name": "a", "rank": 2}]}}, "tiers: .*'rank'; allowed: the fields of Tier"),
    "no type": ({"optimizer": {"params": {}}}, "'optimizer.type' is missing"),
    "type": ({"optimizer": {"type": 3}}, "optimizer.type = 3: input should be a valid string"),
    "seed": ({"seed": 1.5}, "seed = 1.5: input should be a valid integer"),
    "ranks": ({"train_batch_size": 7}, "train_batch_size = 7 does not fit 4 ranks.*allowed: a multiple of 4"),
    "product": (
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2},
        r"train_batch_size = 16; allowed: 4 ranks \* 3 \* 2 = 24",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_one_line_that_names_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        Config.read(config, 4)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("config: ")


def test_defaults() -> None:
    assert Config.read(None, 4) == Config(
        zero=Zero(),
        micro_batch=1,
        accumulation=1,
        clip=0.0,
        optimizer=None,
        seed=1234,
        parallelism=Parallelism(data=4),
        formats=Precision(parameters="as is", gradients="as parameters", autocast="off", scaling=ScalePolicy()),
    )


def test_every_key() -> None:
    config = {
        "train_batch_size": 48,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
        "fp16": {"enabled": True, "loss_scale": 1024},
        "seed": 7,
    }
    assert Config.read(config, 4) == Config(
        zero=Zero.of_stage(2),
        micro_batch=4,
        accumulation=3,
        clip=1.0,
        formats=Precision(parameters="fp16", scaling=ScalePolicy(initial=1024.0, skip=True)),
        optimizer=OptimizerSection(type="AdamW", params={"lr": 1e-3, "betas": [0.9, 0.95]}),
        seed=7,
        parallelism=Parallelism(data=4),
    )


def test_bf16_scales_no_loss() -> None:
    config = Config.read({"bf16": {"enabled": True}, "fp16": {"loss_scale": 8.0}}, 1)
    assert (config.precision, config.formats.scaling) == ("bf16", ScalePolicy(skip=True))


sizes = st.integers(1, 1000)


@given(ranks=sizes, micro=sizes, steps=sizes, known=st.sets(st.sampled_from(["batch", "micro", "steps"]), min_size=2))
def test_any_two_sizes_give_the_third(ranks: int, micro: int, steps: int, known: set[str]) -> None:
    keys = {
        "batch": ("train_batch_size", ranks * micro * steps),
        "micro": ("train_micro_batch_size_per_gpu", micro),
        "steps": ("gradient_accumulation_steps", steps),
    }
    config = Config.read(dict(keys[name] for name in known), ranks)
    assert (config.micro_batch, config.accumulation) == (micro, steps)


@given(ranks=sizes, per_rank=sizes)
def test_the_batch_alone_means_one_micro_step(ranks: int, per_rank: int) -> None:
    config = Config.read({"train_batch_size": ranks * per_rank}, ranks)
    assert (config.micro_batch, config.accumulation) == (per_rank, 1)


@given(ranks=sizes, micro=sizes | st.none(), steps=sizes | st.none(), batch=st.integers(1, 10**6))
def test_a_batch_fits_exactly_or_is_refused(ranks: int, micro: int | None, steps: int | None, batch: int) -> None:
    config = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    per_step = ranks * (micro or 1) * (steps or 1)
    if batch % per_step != 0 or (micro and steps and batch != per_step):
        with pytest.raises(ValueError, match=f"train_batch_size = {batch}"):
            Config.read(config, ranks)
        return
    read = Config.read(config, ranks)
    assert ranks * read.micro_batch * read.accumulation == batch
    assert micro in (None, read.micro_batch)
    assert steps in (None, read.accumulation)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert Config.read(path, 1).zero.stage == 3
    assert Config.read(str(path), 1).zero.stage == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "ds.json: not JSON: "),
        ("[1]", "ds.json: expected a JSON object, got list"),
        ('{"x": 1}', "unknown key 'x'"),
    ],
)
def test_a_bad_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        Config.read(path, 1)
    assert "\n" not in str(refused.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config: cannot read '.*nowhere\.json'"):
        Config.read(tmp_path / "nowhere.json", 1)
