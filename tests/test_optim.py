"""Lion and LAMB against their papers' formulas, every optimizer on shards against one process, and who is refused."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import windtunnel
from conftest import WorldOf
from hypothesis import given
from hypothesis import strategies as st
from small_models import SAMPLES, Mlp, Run, micro_batches, start_engine
from test_flight import SMALL, flight
from test_zero import check
from torch import Tensor, nn
from torch.testing import assert_close
from windtunnel.collectives.trace import Collective, walk
from windtunnel.engine import optim
from windtunnel.engine.engine import initialize
from windtunnel.engine.optim import unsharded
from windtunnel.engine.sections import OptimizerSection
from windtunnel.engine.world import World
from windtunnel.kernels.lamb import squared_norms, trust_ratios

# The formulas #

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=4)
rates = st.floats(1e-4, 0.5)
decays = st.sampled_from([0.0, 0.1])
betas = st.tuples(st.floats(0, 0.99), st.floats(0, 0.999))


def tensors(shapes: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, dtype=torch.float64, generator=generator) for size in shapes]


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for parameter, gradient in zip(parameters, tensors([p.numel() for p in parameters], 100 + step), strict=True):
            parameter.grad = gradient
        optimizer.step()


@given(shapes=sizes, lr=rates, decay=decays, beta=betas)
def test_lion_is_the_papers(shapes: list[int], lr: float, decay: float, beta: tuple[float, float]) -> None:
    parameters = [nn.Parameter(t) for t in tensors(shapes, 0)]
    stepped(optim.Lion(parameters, lr=lr, betas=beta, weight_decay=decay), parameters, 3)
    for number, (x, found) in enumerate(zip(tensors(shapes, 0), parameters, strict=True)):
        m = torch.zeros_like(x)
        for step in range(3):
            g = tensors(shapes, 100 + step)[number]
            c = beta[0] * m + (1 - beta[0]) * g
            x = x - lr * (torch.sign(c) + decay * x)
            m = beta[1] * m + (1 - beta[1]) * g
        torch.testing.assert_close(found.data, x)


@given(shapes=sizes, lr=rates, decay=decays, beta=betas)
def test_lamb_is_the_papers(shapes: list[int], lr: float, decay: float, beta: tuple[float, float]) -> None:
    parameters = [nn.Parameter(t) for t in tensors(shapes, 0)]
    stepped(optim.Lamb(parameters, lr=lr, betas=beta, weight_decay=decay, eps=1e-6), parameters, 3)
    for number, (x, found) in enumerate(zip(tensors(shapes, 0), parameters, strict=True)):
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for t in (1, 2, 3):
            g = tensors(shapes, 99 + t)[number]
            m, v = beta[0] * m + (1 - beta[0]) * g, beta[1] * v + (1 - beta[1]) * g**2
            u = (m / (1 - beta[0] ** t)) / ((v / (1 - beta[1] ** t)).sqrt() + 1e-6) + decay * x
            x = x - lr * float((x.norm() / u.norm()).clamp(0.01, 10.0)) * u
        torch.testing.assert_close(found.data, x)


@given(cuts=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 1000))
def test_squared_norms_of_pieces_add_up(cuts: list[int], seed: int) -> None:
    x, u = tensors([40, 40], seed)
    bounds = [0, *sorted(cuts), 40]
    pieces = [squared_norms(x[a:b], u[a:b]) for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(torch.stack(pieces).sum(0), squared_norms(x, u))


def test_a_tensor_without_a_norm_moves_by_its_direction() -> None:
    squares = torch.tensor([[0.0, 4.0], [4.0, 0.0], [4.0, 16.0], [1e6, 1.0], [1e-9, 1e9]])
    assert trust_ratios(squares, min_coeff=0.01, max_coeff=10.0).tolist() == [1.0, 1.0, 0.5, 10.0, pytest.approx(0.01)]


# On shards #


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("size", [2, 4])
def test_lamb_on_shards(world_of: WorldOf, size: int, stage: int) -> None:
    """Odd sizes: parameters are cut between ranks, and some ranks have no piece of a unit."""
    check(world_of(size), Run("one element", stage=stage, optimizer="Lamb", clip=0.5, steps=8))


@pytest.mark.parametrize("model", ["sometimes used", "frozen", "tied"])
def test_lamb_on_special_parameters(two_ranks: World, model: str) -> None:
    check(two_ranks, Run(model, stage=2, accumulation=3, optimizer="Lamb", steps=8))


@pytest.mark.parametrize(
    ("stage", "optimizer"), [(0, "Lion"), (3, "Lion"), (2, "Adagrad"), (1, "RMSprop"), (3, "NAdam")]
)
def test_element_wise_optimizers_on_shards(two_ranks: World, stage: int, optimizer: str) -> None:
    check(two_ranks, Run("one element", stage=stage, optimizer=optimizer, clip=0.5, steps=8))


def lamb_messages(rank: int, world: int) -> tuple[int, int]:
    """(scalar reductions in a step, units)."""
    run = Run("gpt", stage=2, optimizer="Lamb")
    engine = start_engine(run, run.build())
    for x, y in micro_batches(run, 0, rank, world):
        engine.backward(engine(x, y))
        engine.step()
    found = sum(count for entry, count in engine.communicator.ledger.items() if entry.scalar)
    units = len(engine.runtime.units)
    engine.close()
    return found, units


def test_lamb_costs_a_small_reduction_per_unit(two_ranks: World) -> None:
    for found, units in two_ranks.run(lamb_messages):
        assert found == units + 1


# Parameter groups #


def grouped(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    """Matrices and vectors differ in learning rate, decay and betas."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.3, "betas": (0.8, 0.9)},
        {"params": vectors, "weight_decay": 0.0, "lr": 3e-3},
    ]
    made: torch.optim.Optimizer = getattr(optim, kind)(groups, lr=1e-2)
    return made


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    """Each group has a schedule of its own."""
    rates = [lambda step: min(1.0, (step + 1) / 4), lambda step: 0.5**step]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rates)


GROUPED = Run("mlp", steps=6, clip=0.2)


def train_grouped(rank: int, world: int, kind: str, stage: int) -> tuple[dict[str, Tensor], list[float]]:
    run = replace(GROUPED, stage=stage, accumulation=3)
    model = run.build()
    config = {
        "train_batch_size": SAMPLES,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": run.clip,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = initialize(model, config, optimizer=grouped(kind, model), lr_scheduler=schedule, timeout_s=20.0)
    for step in range(run.steps):
        for x, y in micro_batches(run, step, rank, world):
            engine.backward(engine(x, y))
            engine.step()
    outcome = engine.full_parameters(), [group["lr"] for group in engine.optimizer.param_groups]
    engine.close()
    return outcome


@pytest.mark.parametrize(("kind", "stage"), [("AdamW", 1), ("AdamW", 3), ("Lion", 2), ("Lamb", 3)])
def test_groups_keep_their_own_values_and_schedules(two_ranks: World, kind: str, stage: int) -> None:
    model = GROUPED.build()
    optimizer = grouped(kind, model)
    scheduler = schedule(optimizer)
    for step in range(GROUPED.steps):
        model(*GROUPED.batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GROUPED.clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    for found, rates in two_ranks.run(train_grouped, kind, stage):
        assert rates == pytest.approx([group["lr"] for group in optimizer.param_groups])
        for name, parameter in model.named_parameters():
            # float64: see TENSOR_TOLERANCE in test_zero.py.
            torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-8, atol=1e-10)


# By name #


@pytest.mark.parametrize(
    ("name", "params", "kind", "values"),
    [
        ("Adam", {}, "AdamW", {"weight_decay": 0.0}),
        ("adam", {"weight_decay": 0.1}, "AdamW", {"weight_decay": 0.1}),
        ("ADAM", {"adam_w_mode": False, "weight_decay": 0.1}, "Adam", {"weight_decay": 0.1}),
        ("AdamW", {"adam_w_mode": False, "torch_adam": True}, "AdamW", {"weight_decay": 0.01}),
        ("sgd", {"momentum": 0.9}, "SGD", {"momentum": 0.9}),
        ("LAMB", {"max_coeff": 5.0}, "Lamb", {"max_coeff": 5.0, "min_coeff": 0.01}),
        ("lion", {"betas": [0.95, 0.98]}, "Lion", {"betas": (0.95, 0.98)}),
        ("Adagrad", {}, "Adagrad", {"lr": 0.01}),
        ("RAdam", {}, "RAdam", {}),
    ],
)
def test_configured_optimizers(name: str, params: dict[str, Any], kind: str, values: dict[str, Any]) -> None:
    made = unsharded(nn.Linear(2, 2).parameters(), OptimizerSection(type=name, params=params))
    assert type(made).__name__ == kind
    assert {key: made.param_groups[0][key] for key in values} == values


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("AdamV", {}, r"optimizer.type = 'AdamV'; allowed: ASGD, Adadelta, .*Lamb, Lion.*; did you mean 'Adam"),
        ("muon", {}, "optimizer.type = 'muon' cannot step shards: it makes whole matrices orthogonal; allowed"),
        ("LBFGS", {}, "cannot step shards: it searches along a line with a closure"),
        ("SparseAdam", {}, "cannot step shards: it wants sparse gradients"),
        ("Adafactor", {}, "cannot step shards: its second moments are means over whole rows"),
        ("OneBitAdam", {}, "it reduces gradients itself; communication_compression.gradients = 'one_bit'"),
        ("Lion", {"amsgrad": True}, "optimizer.params for Lion: .*unexpected keyword argument 'amsgrad'"),
        ("LAMB", {"max_grad_norm": 1.0}, "optimizer.params for LAMB: .*'max_grad_norm'"),
        ("LAMB", {"min_coeff": 3, "max_coeff": 2}, "min_coeff = 3, max_coeff = 2; allowed: 0 < min_coeff <= max_"),
        ("Lion", {"betas": [1.0, 0.9]}, r"betas = \(1.0, 0.9\); allowed: two numbers from 0 to below 1"),
        ("Lion", {"lr": -1.0}, "optimizer.params for Lion: lr = -1.0; allowed: at least 0"),
        ("AdamW", {"lr": -1.0}, "optimizer.params for AdamW: Invalid learning rate"),
    ],
)
def test_refused_optimizers(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        unsharded(nn.Linear(2, 2).parameters(), OptimizerSection(type=name, params=params))
    assert "\n" not in str(refused.value)


def test_an_optimizer_that_is_not_known_is_refused() -> None:
    class Own(torch.optim.SGD):
        pass

    model = Mlp()
    with pytest.raises(ValueError, match="optimizer Own cannot step shards: whether it updates each element by itself"):
        initialize(model, optimizer=Own(model.parameters(), lr=0.1))


@pytest.mark.parametrize("kind", [optim.Lion, optim.Lamb])
def test_a_closure_is_refused(kind: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(ValueError, match=r"step\(closure\) is not supported"):
        kind(nn.Linear(2, 2).parameters()).step(lambda: 0.0)


def test_the_public_names() -> None:
    model = nn.Linear(3, 3)
    assert type(windtunnel.optim.Adam(model.parameters(), lr=1e-3)) is torch.optim.Adam
    for name in windtunnel.optim.__all__:
        assert issubclass(getattr(windtunnel.optim, name), torch.optim.Optimizer)
    code = "import sys, windtunnel; windtunnel.__all__.index('optim'); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


# In the air #


@pytest.mark.parametrize("name", ["Lion", "LAMB", "Adagrad", "RMSprop"])
def test_they_fly(name: str) -> None:
    trace = flight(SMALL, stage=2, optimizer={"type": name, "params": {"lr": 1e-3}})
    labels = [
        op.label for phase, _, _, op in walk(trace) if phase.step == 2 and isinstance(op, Collective) and op.scalar
    ]
    assert labels == ["gradient check"] + ["parameter norms"] * (3 if name == "LAMB" else 0)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_parameters_of_a_unit_may_begin_in_different_steps(kind: type[torch.optim.Optimizer]) -> None:
    """In fp64, in the same order as torch's own; its fused SGD alone would refuse the mixture of momenta."""
    options = {"lr": 0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    ours, plain = (nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double() for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    engine, *_ = initialize(ours, optimizer=lambda parameters: kind(parameters, **options))
    reference = kind(plain.parameters(), **options)
    inputs = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    for depth in (1, 3, 3, 1, 3):
        engine.backward(engine.module[:depth](inputs).square().mean())
        engine.step()
        plain[:depth](inputs).square().mean().backward()
        reference.step()
        reference.zero_grad()
    for (name, value), expected in zip(engine.full_parameters().items(), plain.parameters(), strict=True):
        assert_close(value, expected.detach(), rtol=1e-12, atol=0.0, msg=name)
