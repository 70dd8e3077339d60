"""Scripts as people write them for DeepSpeed, with another import; and each name that they use, by itself."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import windtunnel
from hypothesis import given
from hypothesis import strategies as st
from scripts import classifier, gathered, snippet
from torch import Tensor, nn
from windtunnel import comm, zero
from windtunnel.collectives.groups import Mesh
from windtunnel.engine.communicator import Communicator, SoloCommunicator
from windtunnel.engine.config import Config
from windtunnel.engine.dialect import ALWAYS, AUTO, REFUSED, RENAMED, translated
from windtunnel.engine.engine import Engine, initialize
from windtunnel.engine.loss import loss_of
from windtunnel.engine.queries import UNSUPPORTED
from windtunnel.engine.world import World

# Whole scripts #


def run_classifier(rank: int, world: int, words: list[str]) -> None:
    classifier.main(words)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_script_with_arguments_and_a_file(two_ranks: World, tmp_path: Path, stage: int) -> None:
    path = tmp_path / "ds.json"
    config = {
        "train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 5.0,
        "steps_per_print": 10,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02}},
        "zero_optimization": {"stage": stage, "overlap_comm": True, "contiguous_gradients": True},
    }
    path.write_text(json.dumps(config))
    two_ranks.run(run_classifier, ["--deepspeed_config", str(path), "--report", str(tmp_path), "--epochs", "6"])
    for rank in range(2):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert (report["rank"], report["local_rank"], report["world"]) == (rank, -1, 2)
        # 48 samples, of which a rank sees 24 in micro-batches of 4: 6 a pass, two of them to a step.
        assert (report["micro_steps"], report["steps"], report["samples"]) == (36, 18, 18 * 16)
        assert (report["batch"], report["lr"]) == (16, [0.02])
        assert 0 < report["norm"] < 50
        assert report["last"] < report["first"]
        assert report["accuracy"] > 0.6  # a third by chance


def run_gathered(rank: int, world: int, stage: int, precision: str) -> dict[str, Any]:
    return gathered.main(stage, precision)


def plainly_gathered() -> dict[str, Tensor]:
    """What `gathered.main` does, in one process and plain torch."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 7), nn.Linear(7, 1))
    model[0].weight.data.fill_(0.25)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.95))
    for step in (0, 2):
        parts = [
            torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * micro + rank))
            for micro in (step, step + 1)
            for rank in range(2)
        ]
        model(torch.cat(parts)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_weights_that_one_rank_sets_are_trained_on(two_ranks: World, stage: int) -> None:
    wanted = plainly_gathered()
    for report in two_ranks.run(run_gathered, stage, "fp32"):
        assert (report["whole"], report["hidden"], report["steps"]) == (True, stage == 3, 2)
        assert report["boundaries"] == [(False, False), (True, True)] * 2
        for name, value in report["weights"].items():
            # fp32, two steps: sums in another order cost about 1e-6, a lost change 0.2.
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_masters_follow_weights_that_are_set(two_ranks: World, stage: int) -> None:
    """In bf16 the optimizer steps fp32 masters; left behind, they would bring the old weights back."""
    for report in two_ranks.run(run_gathered, stage, "bf16"):
        # Two steps of Adam at 0.01 move a weight by at most 0.02, and bf16 rounds 0.25 by less than 0.002.
        assert (report["weights"]["0.weight"] - 0.25).abs().max() < 0.025


def run_snippet(rank: int, world: int, config: dict[str, Any]) -> tuple[float, float]:
    return snippet.main(config, samples=60)


def plain_snippet(samples: int) -> tuple[float, float]:
    """What `snippet.main` does, in plain torch; there every rank sees every sample, so ranks change nothing."""
    torch.manual_seed(0)
    model = nn.Linear(10, 1)
    data = torch.randn(samples, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    means = []
    for _ in range(10):
        total = 0.0
        for x in data:
            loss = nn.functional.mse_loss(model(x), x.sum(0, keepdim=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        means.append(total / samples)
    return means[0], means[-1]


def test_a_model_a_criterion_and_a_mesh(two_ranks: World) -> None:
    for first, last in two_ranks.run(run_snippet, {"mp_size": 1, "dp_size": 2, "pipeline_size": 1}):
        # fp32, 600 steps: Adam makes of rounding at most a step of 1e-3 in weights of 1.
        assert (first, last) == pytest.approx(plain_snippet(samples=60), rel=1e-3)
        assert last < 0.8 * first


def test_the_mesh_of_eight_needs_eight() -> None:
    config = {"mp_size": 2, "dp_size": 2, "pipeline_size": 2}
    with pytest.raises(ValueError, match=r"dp_size \* mp_size \* pipeline_size = 2 \* 2 \* 2 = 8, but world = 1"):
        snippet.main(config)


class OneOfEight(SoloCommunicator):
    """A rank that stands for all eight, until it would have to meet the others."""

    def __init__(self) -> None:
        super().__init__()
        self.world = 8

    def among(self, members: Sequence[tuple[int, ...]], axis: str) -> Communicator:
        raise AssertionError(f"ranks are joined along {axis!r}")


def test_a_linear_has_no_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before ranks are joined, by what has to change first: with a tensor plan it still could not be cut."""
    monkeypatch.setattr("windtunnel.engine.engine.communicator_for", lambda device, timeout_s: OneOfEight())
    words = r"a Linear cannot be cut into pipeline stages; allowed: an nn.Sequential, .*; or leave out pipeline_size"
    with pytest.raises(ValueError, match=words):
        snippet.main({"mp_size": 2, "dp_size": 2, "pipeline_size": 2})


@given(data=st.integers(1, 8), tensor=st.integers(1, 4), pipeline=st.integers(1, 4), world=st.integers(1, 64))
def test_meshes(data: int, tensor: int, pipeline: int, world: int) -> None:
    keys = {"dp_size": data, "mp_size": tensor, "pipeline_size": pipeline}
    product = data * tensor * pipeline
    if product != world:
        with pytest.raises(ValueError, match=f"= {product}, but world = {world}"):
            Config.read(keys, world)
    found = Config.read(keys, product).parallelism
    mesh = found.mesh(Mesh.of({"data": data}))
    assert mesh.world == product
    assert found.sizes == {"tensor": tensor, "context": 1, "data": data, "pipeline": pipeline}
    assert list(mesh.sizes) == [name for name, size in found.sizes.items() if size > 1 or name == "data"]


@pytest.mark.parametrize("key", ["dp_size", "mp_size", "pipeline_size"])
def test_a_mesh_has_no_empty_axis(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} = 0; allowed: an integer >= 1"):
        Config.read({key: 0}, 4)


# Arguments of initialize #


def test_a_criterion_or_a_config_comes_second() -> None:
    criterion = nn.MSELoss()
    engine, *_ = initialize(nn.Linear(2, 1), criterion, {"gradient_clipping": 0.5})
    assert engine.criterion is criterion
    assert engine.gradient_clipping() == 0.5
    engine, *_ = initialize(nn.Linear(2, 1), {"gradient_clipping": 0.25})
    assert engine.criterion is None
    assert engine.gradient_clipping() == 0.25
    with pytest.raises(ValueError, match="initialize got two configs"):
        initialize(nn.Linear(2, 1), {}, {})
    with pytest.raises(ValueError, match="criterion is a int; allowed: a function of outputs and targets"):
        initialize(nn.Linear(2, 1), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="criterion Linear has trainable parameters; make it part of the model"):
        initialize(nn.Linear(2, 1), nn.Linear(1, 1))


def test_arguments_name_the_file_and_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "5")
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = windtunnel.add_config_arguments(parser)
    assert vars(parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json"])) == {
        "deepspeed": True, "deepspeed_config": "ds.json", "local_rank": 5,
    }  # fmt: skip
    assert parser.parse_args(["--local_rank", "1"]).local_rank == 1
    engine, *_ = initialize(nn.Linear(2, 1))
    assert (engine.local_rank, engine.global_rank, engine.world_size) == (5, 0, 1)


def test_alone_there_is_nobody_to_join() -> None:
    windtunnel.init_distributed()
    windtunnel.init_distributed(dist_init_required=False)
    assert not comm.is_initialized()


# The loss in an output #


class Boxed:
    def __init__(self, loss: Any) -> None:
        self.loss, self.logits = loss, torch.zeros(3)


@pytest.mark.parametrize(
    "box", [lambda loss: loss, Boxed, lambda loss: {"logits": 1, "loss": loss}, lambda loss: (loss, 2), lambda x: [x]]
)
def test_backward_takes_what_the_model_returned(box: Any) -> None:
    twin, model = nn.Linear(2, 1), nn.Linear(2, 1)
    model.load_state_dict(twin.state_dict())
    engine, *_ = initialize(model, {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}})
    x = torch.ones(3, 2)
    twin(x).sum().backward()
    engine.backward(box(engine(x).sum()))
    engine.step()
    torch.testing.assert_close(model.weight, twin.weight - twin.weight.grad)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"logits": 1}, r"the loss in a dict is None \(were labels given\?\)"),
        (Boxed(None), r"the loss in a Boxed is None \(were labels given\?\)"),
        ("text", "the loss in a str is a str; allowed: a tensor"),
        ((), "the loss in a tuple is a tuple"),
        ((1.0,), "the loss in a tuple is a float"),
    ],
)
def test_an_output_without_a_loss(output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(output)


# Attributes #


class Named(nn.Linear):
    vocabulary = 17

    def generate(self, start: int) -> int:
        return start + self.vocabulary


def test_what_the_engine_lacks_is_the_modules() -> None:
    engine, *_ = initialize(Named(2, 1))
    assert engine.generate(3) == 20
    assert engine.in_features == 2
    assert engine.weight is engine.module.weight


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("get_lrs", "neither Engine nor its module Named has an attribute 'get_lrs'; did you mean 'get_lr'?"),
        ("vocabluary", "did you mean 'vocabulary'?"),
        *((name, f"Engine does not support '{name}': ") for name in UNSUPPORTED),
    ],
)
def test_an_attribute_that_nobody_has(name: str, message: str) -> None:
    engine, *_ = initialize(Named(2, 1))
    with pytest.raises(AttributeError) as refused:
        getattr(engine, name)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_unsupported_is_not_there() -> None:
    assert not [name for name in UNSUPPORTED if hasattr(Engine, name)]


def test_the_package_names_the_nearest() -> None:
    with pytest.raises(AttributeError, match="did you mean 'init_distributed'"):
        windtunnel.init_distribute  # noqa: B018
    assert windtunnel.zero is zero
    assert windtunnel.comm is comm


def test_gradients_are_not_dropped_between_micro_steps() -> None:
    engine, optimizer, *_ = initialize(nn.Linear(2, 1), {"gradient_accumulation_steps": 3})
    for clear in (engine.zero_grad, optimizer.zero_grad):
        clear()
        engine.backward(engine(torch.ones(1, 2)).sum())
        with pytest.raises(RuntimeError, match="of 3 micro-steps would drop their gradients"):
            clear()
        for _ in range(2):
            engine.step()
            engine.backward(engine(torch.ones(1, 2)).sum())
        engine.step()
        clear()


def test_questions_of_one_process() -> None:
    config = {"train_batch_size": 6, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 1}}
    engine, optimizer, *_ = initialize(nn.Linear(2, 1), {**config, "bf16": {"enabled": True}})
    assert engine.device == torch.device("cpu")
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (6, 3)
    assert (engine.gradient_accumulation_steps(), engine.zero_optimization_stage()) == (2, 1)
    assert (engine.zero_optimization(), engine.fp16_enabled(), engine.bfloat16_enabled()) == (True, False, True)
    assert (engine.get_lr(), engine.get_mom()) == ([1e-3], [(0.9, 0.999)])
    assert engine.get_global_grad_norm() is None
    assert engine.optimizer is optimizer


def test_parameters_of_no_engine_are_whole_already() -> None:
    plain = nn.Linear(2, 1)
    with zero.GatheredParameters(plain.weight, modifier_rank=0):
        plain.weight.data.fill_(3.0)
    assert plain.weight.tolist() == [[3.0, 3.0]]
    engine, *_ = initialize(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="modifier_rank = 1; allowed: 0 to 0, or None"):
        zero.GatheredParameters(engine.module.weight, modifier_rank=1).__enter__()


def test_init_sets_the_dtype_for_a_while() -> None:
    with zero.Init(dtype=torch.float64):
        assert nn.Linear(2, 1).weight.dtype == torch.float64
    with zero.Init(dtype=torch.float64, enabled=False):
        assert nn.Linear(2, 1).weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


# Keys that are not settings #


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("path", ALWAYS)
def test_a_key_that_says_what_is_always_so(path: str) -> None:
    values = ALWAYS[path].values
    for value in values or (True, False, 7):
        assert Config.read(nested(path, value), 1) == Config.read(None, 1)
    if values is not None:
        with pytest.raises(ValueError, match=rf"^config: {path} = 'other'; allowed: .*, because "):
            Config.read(nested(path, "other"), 1)


def test_one_is_not_true() -> None:
    with pytest.raises(ValueError, match="overlap_comm = 1; allowed: true"):
        Config.read({"zero_optimization": {"overlap_comm": 1}}, 1)


@pytest.mark.parametrize("path", REFUSED)
def test_a_key_that_asks_for_what_is_not_done(path: str) -> None:
    with pytest.raises(ValueError, match=f"^config: {path} is not supported: ") as refused:
        Config.read(nested(path, {"enabled": True}), 1)
    assert REFUSED[path] in str(refused.value)
    for off in ({"enabled": False}, False, None):
        assert Config.read(nested(path, off), 1) == Config.read(None, 1)


@pytest.mark.parametrize("path", RENAMED)
def test_a_key_that_has_another_name_by_now(path: str) -> None:
    with pytest.raises(ValueError, match=f"^config: {path} is called {RENAMED[path]} now$"):
        Config.read(nested(path, True), 1)


AUTOMATIC = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": "auto", "weight_decay": "auto"}},
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}
ARGUMENTS = SimpleNamespace(
    per_device_train_batch_size=3, gradient_accumulation_steps=2, max_grad_norm=0.5, learning_rate=0.25,
    adam_epsilon=1e-6, weight_decay=0.125, bf16=True, fp16=False,
)  # fmt: skip


def test_auto_is_taken_from_the_arguments() -> None:
    config = Config.read(AUTOMATIC, 4, ARGUMENTS)
    assert (config.micro_batch, config.accumulation, config.clip, config.precision) == (3, 2, 0.5, "bf16")
    assert config.optimizer is not None
    assert config.optimizer.params == {"lr": 0.25, "eps": 1e-6, "weight_decay": 0.125}
    assert AUTOMATIC["train_batch_size"] == "auto"  # the caller's dict is left as it is


@pytest.mark.parametrize("path", [*AUTO, "seed", "zero_optimization.stage"])
def test_auto_without_an_argument(path: str) -> None:
    hint = f"a value, or args with {AUTO[path]}" if path in AUTO else "a value, no argument stands for it"
    with pytest.raises(ValueError, match=f"^config: {path} = 'auto'; allowed: {hint}"):
        Config.read(nested(path, "auto"), 1, None)


def test_other_keys_pass_as_they_are() -> None:
    data = {"seed": 3, "zero_optimization": {"stage": 2, "overlap_comm": True}, "unheard": [1]}
    assert translated(data, "config") == {"seed": 3, "zero_optimization": {"stage": 2}, "unheard": [1]}
