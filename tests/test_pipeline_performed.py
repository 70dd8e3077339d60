"""Pipeline schedules performed on Gloo ranks: the same training as one process, in the order of the plan."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_models import SAMPLES, Batch, regression_batch, token_batch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from windtunnel.engine.communicator import CommunicationError, Handle, Letter
from windtunnel.engine.config import Config
from windtunnel.engine.engine import initialize
from windtunnel.engine.pipeline import PipelineEngine
from windtunnel.engine.stages import Layer, LayerList, run_layers
from windtunnel.engine.world import World
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights

TOLERANCE = 1e-10
"""float64; sums are taken in another order, and Adam enlarges rounding (tests/test_zero.py)."""

TINY = ModelSpec(
    name="tiny", layers=3, hidden=8, heads=2, ffn=12, vocab=17, seq=6,
    mlp="gelu", norm="layernorm", positions="learned", attention="causal", tied=False, bias=True,
)  # fmt: skip


class Added(nn.Module):
    """Takes two tensors; has a parameter that nobody uses, which weight decay must not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((5,), 0.7))
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        return h * self.weight + s


def gpt(**sizes: Any) -> Transformer:
    model = Transformer(replace(TINY, **sizes))
    initialize_weights(model, seed=1)
    return model


def layers() -> list[Callable[..., Any]]:
    """Of different widths, functions among them; at one place two tensors pass, and one layer begins in place."""
    torch.manual_seed(0)
    row = [
        nn.Linear(7, 11),
        torch.tanh,
        nn.Linear(11, 5),
        lambda h: (h, torch.sin(h)),
        Added(),
        nn.Linear(5, 9),
        nn.ReLU(),
        nn.Linear(9, 3),
    ]
    return [layer.double() if isinstance(layer, nn.Module) else layer for layer in row]


@dataclass(frozen=True)
class Model:
    make: Callable[[], Any]
    batch: Callable[[int], Batch]
    criterion: Callable[..., Tensor] | None = None


MODELS: dict[str, Model] = {
    "gpt": Model(lambda: gpt().double(), token_batch),
    "tied": Model(lambda: gpt(tied=True).double(), token_batch),
    "rope": Model(lambda: gpt(positions="rope", norm="rmsnorm", mlp="swiglu").double(), token_batch),
    "layers": Model(layers, regression_batch, functional.mse_loss),
}


@dataclass(frozen=True)
class Case:
    """A training on several ranks; `keys` has further ones of the section `pipeline`."""

    model: str
    schedule: str = "1f1b"
    pipeline: int = 2
    stage: int = 0
    micro_batches: int = 4
    recompute: str = "none"
    clip: float = 0.5
    steps: int = 10
    keys: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.model} {self.schedule} on {self.pipeline} stages, ZeRO {self.stage}, recompute {self.recompute}"

    def config(self) -> dict[str, Any]:
        return {
            "train_batch_size": SAMPLES,
            "gradient_accumulation_steps": self.micro_batches,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.stage},
            "activation_checkpointing": {"policy": self.recompute},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
            "pipeline_size": self.pipeline,
            "pipeline": {"schedule": self.schedule, **dict(self.keys)},
        }


class Alone(NamedTuple):
    """Losses and gradient norms by step, the parameters, and the loss of one more batch in evaluation mode."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]
    evaluated: float


@cache
def alone(name: str, clip: float, steps: int) -> Alone:
    """One process, whole batches, plain torch."""
    recipe = MODELS[name]
    made = recipe.make()
    model: nn.Module = made if isinstance(made, nn.Module) else LayerList(made)

    def loss_at(step: int) -> Tensor:
        x, y = recipe.batch(step)
        found: Tensor = model(x, y) if recipe.criterion is None else recipe.criterion(model(x), y)
        return found

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses, norms = [], []
    for step in range(steps):
        loss = loss_at(step)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Alone(losses, norms, {n: p.detach() for n, p in model.named_parameters()}, loss_at(steps).item())


class Found(NamedTuple):
    """What a rank found; `performed` are its actions of the last step, `tied` its own copy of the embedding."""

    losses: list[float]
    norms: list[float | None]
    parameters: dict[str, Tensor]
    evaluated: float
    performed: list[str]
    planned: list[str]
    tied: Tensor | None


def micro_batches(case: Case, step: int, rank: int, world: int) -> Iterator[Batch]:
    """A data-parallel rank's share of a global batch."""
    x, y = MODELS[case.model].batch(step)
    parts = case.micro_batches * world
    return zip(x.chunk(parts)[rank::world], y.chunk(parts)[rank::world], strict=True)


def start(case: Case, **overrides: Any) -> PipelineEngine:
    recipe = MODELS[case.model]
    engine, *_ = initialize(recipe.make(), recipe.criterion, case.config() | overrides, timeout_s=20.0)
    assert isinstance(engine, PipelineEngine)
    return engine


def train(rank: int, world: int, case: Case) -> Found:
    engine = start(case)
    data, pipeline = engine.groups.axis("data"), engine.groups.axis("pipeline")
    losses, norms = [], []
    for step in range(case.steps):
        losses.append(engine.train_batch(micro_batches(case, step, data.rank, data.world)).item())
        norms.append(engine.get_global_grad_norm())
    performed = [str(action) for action in engine.actions]
    evaluated = engine.eval_batch(micro_batches(case, case.steps, data.rank, data.world)).item()
    engine.settle()
    own = dict(name_and_parameter for chunk in engine._chunks for name_and_parameter in chunk.named_parameters())
    tied = own["embedding.weight"].detach().clone() if case.model == "tied" and "embedding.weight" in own else None
    planned = [str(action) for action in engine.plan.actions(pipeline.rank)]
    found = Found(losses, norms, engine.full_parameters(), evaluated, performed, planned, tied)
    engine.close()
    return found


def check(world: World, case: Case) -> None:
    wanted = alone(case.model, case.clip, case.steps)
    ranks: list[Found] = world.run(train, case)
    for found in ranks:
        assert found.performed == found.planned
        assert found.losses == pytest.approx(wanted.losses, rel=TOLERANCE)
        assert found.norms == pytest.approx(wanted.norms, rel=TOLERANCE)
        assert found.evaluated == pytest.approx(wanted.evaluated, rel=TOLERANCE)
        assert found.parameters.keys() == wanted.parameters.keys()
        for name, values in wanted.parameters.items():
            assert float((found.parameters[name] - values).norm()) <= TOLERANCE * float(values.norm()), name
    tied = [found.tied for found in ranks if found.tied is not None]
    assert all(torch.equal(copy, tied[0]) for copy in tied)


@pytest.mark.parametrize("schedule", ["sequential", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"])
def test_every_schedule_equals_one_process(two_ranks: World, schedule: str) -> None:
    check(two_ranks, Case("tied", schedule))


@pytest.mark.parametrize(
    "case",
    [
        Case("tied", "1f1b", 4),
        Case("tied", "1f1b", 2, stage=1, micro_batches=3),
        Case("tied", "zb-v", 2, stage=2, micro_batches=3),
        Case("gpt", "zb-h1", 2, stage=1, micro_batches=3, recompute="full"),
        Case("rope", "interleaved", 2, stage=2, micro_batches=2, recompute="selective"),
        Case("layers", "interleaved", 2, stage=1, micro_batches=6, keys=(("chunks", 3), ("ahead", 2))),
    ],
    ids=str,
)
def test_four_ranks_equal_one_process(four_ranks: World, case: Case) -> None:
    check(four_ranks, case)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_three_uneven_stages(world_of: Callable[[int], World], schedule: str) -> None:
    """Cut by number of layers: the second stage takes two tensors, the third begins with ReLU."""
    check(world_of(3), Case("layers", schedule, 3, keys=(("partition", "uniform"),)))


# Precision #

HALF = {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 3}}


class Half(NamedTuple):
    scale: float
    skipped: int
    parameters: dict[str, Tensor]


def train_in_half(rank: int, world: int, stages: int, schedule: str) -> Half:
    """fp16 with a loss scale that overflows at first, on pipeline stages or (one stage) by the ordinary engine."""
    case = Case("tied", schedule, stages)
    model = gpt(tied=True)
    pipeline = {} if stages > 1 else {"pipeline_size": 1, "pipeline": {}}
    engine, *_ = initialize(model, case.config() | HALF | pipeline | {"gradient_clipping": 0.0}, timeout_s=20.0)
    for step in range(8):
        batches = micro_batches(case, step, 0, 1)
        if isinstance(engine, PipelineEngine):
            engine.train_batch(batches)
            continue
        for x, y in batches:
            engine.backward(engine(x, y))
            engine.step()
    found = Half(engine.loss_scaler.scale, engine.skipped_steps, engine.full_parameters())
    engine.close()
    return found


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_an_overflow_on_one_stage_is_everyones(two_ranks: World, schedule: str) -> None:
    wanted = train_in_half(0, 1, 1, schedule)
    assert 0 < wanted.skipped < 8
    for found in two_ranks.run(train_in_half, 2, schedule):
        assert (found.scale, found.skipped) == (wanted.scale, wanted.skipped)
        for name, values in wanted.parameters.items():
            # The two halves of a tied gradient are rounded to fp16 before they are added.
            torch.testing.assert_close(found.parameters[name], values, rtol=2e-2, atol=2e-2)


# Data and metrics #


def from_a_loader(rank: int, world: int, folder: str) -> float:
    """The loader's micro-batches, more than an epoch of them."""
    x, y = regression_batch(0)
    metrics = {"jsonl_monitor": {"enabled": True, "output_path": folder, "job_name": "run"}}
    case = Case("layers")
    engine, _, loader, _ = initialize(
        layers(), functional.mse_loss, case.config() | metrics, training_data=TensorDataset(x, y), timeout_s=20.0
    )
    assert isinstance(engine, PipelineEngine)
    assert loader is not None
    for _ in range(3):
        loss = engine.train_batch()
    engine.close()
    return loss.item()


def test_a_loader_and_metrics(two_ranks: World, tmp_path: Path) -> None:
    first, second = two_ranks.run(from_a_loader, str(tmp_path))
    assert first == second
    (lines,) = [path.read_text().splitlines() for path in tmp_path.rglob("*.jsonl")]
    assert len(lines) == 3
    assert str(first)[:8] in lines[-1]


# Buffers #


def sent_from_a_landing(rank: int, world: int) -> tuple[int, int]:
    """How many messages were sent, and how many from where others are received.

    One chunk returns a view of what it takes. Landings are kept, so nothing else is ever at their addresses.
    """
    torch.manual_seed(0)
    row = [nn.Linear(7, 11).double(), flat, nn.Linear(11, 5).double(), nn.Linear(5, 3).double()]
    config = Case("layers", "interleaved", keys=(("partition", "uniform"),)).config()
    engine, *_ = initialize(row, functional.mse_loss, config, timeout_s=20.0)
    assert isinstance(engine, PipelineEngine)
    landings: set[int] = set()
    sent: list[bool] = []
    exchange = engine.pipeline.exchange

    def look(letters: Sequence[Letter]) -> list[Handle]:
        landings.update(letter.buffer.data_ptr() for letter in letters if is_landing(letter))
        sent.extend(letter.buffer.data_ptr() in landings for letter in letters if letter.kind == "send")
        return exchange(letters)

    engine.pipeline.exchange = look  # type: ignore[method-assign]
    engine.train_batch(micro_batches(Case("layers"), 0, 0, 1))
    engine.eval_batch(micro_batches(Case("layers"), 0, 0, 1))
    engine.close()
    return len(sent), sum(sent)


def is_landing(letter: Letter) -> bool:
    """It is received, and more than the description of shapes that comes once."""
    return letter.kind == "recv" and letter.buffer.is_floating_point()


def flat(h: Tensor) -> Tensor:
    return h.view(-1, 11)


def test_nothing_is_sent_from_where_something_is_received(two_ranks: World) -> None:
    for sent, from_landings in two_ranks.run(sent_from_a_landing):
        assert sent > 0
        assert from_landings == 0


# The whole model #


def with_statistics() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)).double()


def collect(rank: int, world: int) -> dict[str, Tensor]:
    config = Case("layers", keys=(("partition", "uniform"),)).config()
    engine, *_ = initialize(with_statistics(), functional.mse_loss, config, timeout_s=20.0)
    engine.train_batch(micro_batches(Case("layers"), 0, 0, 1))
    whole = engine.full_state_dict()
    engine.close()
    return whole


def test_buffers_come_from_the_stage_that_has_them(two_ranks: World) -> None:
    """Each stage's statistics have seen each micro-batch once: finding out shapes leaves no trace."""
    first, second = two_ranks.run(collect)
    assert first.keys() == second.keys() == with_statistics().state_dict().keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert not value.isnan().any()
    assert first["1.num_batches_tracked"] == first["3.num_batches_tracked"] == 4
    assert first["3.running_mean"].abs().min() > 0


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_a_list_of_layers_in_one_process(schedule: str) -> None:
    case = Case("layers", schedule, 1)
    wanted = alone("layers", case.clip, case.steps)
    found = train(0, 1, case)
    assert found.performed == found.planned
    assert found.losses == pytest.approx(wanted.losses, rel=TOLERANCE)


# What is refused #


def say(rank: int, world: int, overrides: dict[str, Any], make: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the words are compared by the test)
        initialize(make(), Case("layers").config() | overrides, timeout_s=20.0)
    return str(error.value)


class Unlisted(nn.Sequential):
    """A layer that it has is not in its row."""

    def pipeline_layers(self) -> list[Any]:
        return list(LayerList(list(self)[:2]).pipeline_layers())


def two_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def unlisted() -> nn.Module:
    return Unlisted(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))


def without_parameters() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh())


def lstm() -> nn.Module:
    return nn.LSTM(2, 2)


@pytest.mark.parametrize(
    ("overrides", "make", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, two_linear, r"stage = 3 with a pipeline.*allowed: 0, 1, 2"),
        ({"pipeline": {"schedule": "zb-v"}}, two_linear, r"2 layers, and the pipeline 4 chunks"),
        ({"pipeline": {"schedule": "pipedream-2bw"}}, two_linear, r"pipedream-2bw.*priced, not performed"),
        ({"pipeline": {"schedule": "2f2b"}}, two_linear, r"2f2b.*1f1b"),
        ({"pipeline": {"partition": "cost", "costs": [1.0]}}, two_linear, r"1 pipeline.costs; .* each of the 2 layers"),
        ({"pipeline": {"partition": "cost"}}, two_linear, r"0 costs and partition = 'cost'"),
        ({}, unlisted, r"parameter '2.weight' is in no layer"),
        ({}, without_parameters, r"stages \[1\] have no parameters to train"),
        ({}, lstm, r"LSTM cannot be cut.*pipeline_layers"),
    ],
)
def test_what_a_pipeline_refuses(
    two_ranks: World, overrides: dict[str, Any], make: Callable[[], Any], words: str
) -> None:
    assert all(re.search(words, said) for said in two_ranks.run(say, overrides, make))


def refuse(rank: int, world: int) -> list[str]:
    """What each rank is told of batches that the first one cannot send on."""
    case = Case("layers", steps=1)
    x, y = regression_batch(1)
    said = []
    for batches in ([(x, y)] * 4, [(x[:3], y[:3])] * 2, [x[:3]] * 4):
        engine = start(case)
        engine.train_batch(micro_batches(case, 0, 0, 1))
        given = iter(batches) if rank == 0 else micro_batches(case, 1, 0, 1)
        with pytest.raises((ValueError, CommunicationError)) as error:
            engine.train_batch(given)
        said.append(str(error.value))
        engine.close()
    return said


def test_batches_that_are_refused_are_heard_of_by_all(two_ranks: World) -> None:
    """By the others at once, with the cause: at the end of the time that they wait they would know of none."""
    first, second = two_ranks.run(refuse)
    words = (
        "micro-batch 0 has inputs of shapes [(12, 7)], but the first one of the run [(3, 7)]",
        "data_iter ended at micro-batch 2 of 4",
        "gave a Tensor",
    )
    for said, heard, cause in zip(first, second, words, strict=True):
        assert cause in said
        assert "rank 0 gave up: ValueError" in heard
        assert cause in heard


def refuse_calls(rank: int, world: int) -> bool:
    engine = start(Case("layers", steps=1))
    for call in (lambda: engine(1), lambda: engine.backward(1), engine.step):
        with pytest.raises(RuntimeError, match="train_batch"):
            call()
    loss = engine.train_batch(micro_batches(Case("layers"), 0, 0, 1))
    engine.close()
    return bool(torch.isfinite(loss))


def test_a_pipeline_has_no_steps_but_its_own(two_ranks: World) -> None:
    assert all(two_ranks.run(refuse_calls))


# Parameters that some stages use #


class HeldTwice(nn.Module):
    """Layers at both ends hold `weight`, but the last one does not read it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(7, dtype=torch.float64))
        self.middle, self.last = nn.Linear(7, 5).double(), nn.Linear(5, 3).double()

    def pipeline_layers(self) -> list[Layer]:
        return [
            Layer(lambda x: x * self.weight, ("weight",)),
            Layer(self.middle, ("middle",)),
            Layer(self.last, ("last", "weight")),
        ]

    def forward(self, x: Tensor) -> Any:
        return run_layers(self.pipeline_layers(), (x,))


def train_held_twice(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """(the tied parameter after two steps here, as this stage holds it; in one process)"""
    case = Case("layers", micro_batches=4, keys=(("partition", "layers"), ("layers", (2, 1))))
    model = HeldTwice()
    engine, *_ = initialize(model, functional.mse_loss, case.config(), timeout_s=20.0)
    for step in range(2):
        engine.train_batch(micro_batches(case, step, 0, 1))
    engine.close()
    whole = HeldTwice()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(2):
        x, y = regression_batch(step)
        functional.mse_loss(whole(x), y).backward()
        nn.utils.clip_grad_norm_(whole.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.weight.detach().clone(), whole.weight.detach()


def test_a_tied_parameter_that_one_stage_uses_is_stepped_on_all(two_ranks: World) -> None:
    for found, wanted in two_ranks.run(train_held_twice):
        assert (found - wanted).norm() / wanted.norm() <= TOLERANCE


def test_the_ordinary_engine_names_what_it_lacks() -> None:
    engine, *_ = initialize(nn.Sequential(nn.Linear(2, 2)), {})
    with pytest.raises(AttributeError, match="pipeline_size"):
        engine.train_batch(None)
    engine.close()


def test_the_section_is_read() -> None:
    read = Config.read({"pipeline": {"schedule": "interleaved", "chunks": 3}, "pipeline_size": 2}, 4)
    assert (read.pipeline.schedule, read.pipeline.chunks, read.pipeline.ahead) == ("interleaved", 3, 1)
    for section, words in (({"chunks": 0}, "chunks = 0"), ({"ahead": -1}, "ahead = -1")):
        with pytest.raises(ValueError, match=words):
            Config.read({"pipeline": section}, 1)
