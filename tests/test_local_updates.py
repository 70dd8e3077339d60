"""Ranks that step by themselves, against a loop in one process over as many workers."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Outcome, Run, micro_batches, start_engine, train_alone, train_step, whole_optimizer
from torch import Tensor, nn
from windtunnel.collectives.ring import RING
from windtunnel.collectives.zero import UnitSize, Zero, agreement_bytes, model_state_bytes, padded
from windtunnel.engine.config import Config
from windtunnel.engine.engine import Engine, initialize
from windtunnel.engine.gloo import GlooCommunicator
from windtunnel.engine.redundancy import LocalUpdates
from windtunnel.engine.sockets import framing_bytes
from windtunnel.engine.wire import written_bytes
from windtunnel.engine.world import World
from windtunnel.experiments.ranks import live_bytes

TOLERANCE = 1e-10
"""float64, where means are taken in another order; Adam enlarges rounding (tests/test_zero.py)."""

Parameters = dict[str, Tensor]


# One process #


def workers(run: Run, local: LocalUpdates, count: int) -> list[Parameters]:
    """What `count` workers have in the end, as Stich (2019) and Douillard et al. (2023), algorithm 1, write it down."""
    models = [run.build() for _ in range(count)]
    optimizers = [whole_optimizer(run, model) for model in models]
    agreed = [parameter.detach().clone() for parameter in models[0].parameters()]
    outer = torch.optim.SGD(agreed, lr=local.outer_lr, momentum=local.outer_momentum, nesterov=True)
    for step in range(1, run.steps + 1):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for x, y in micro_batches(run, step - 1, worker, count):
                (model(x, y) / run.accumulation).backward()
            if step > local.warmup_steps:
                step_alone(run, model, optimizer)
        if step <= local.warmup_steps:
            step_together(run, models, optimizers)
            agreed_now(agreed, models[0])
        elif (step - local.warmup_steps) % local.every == 0:
            agree(local, models, agreed, outer)
    return [{name: p.detach() for name, p in model.named_parameters()} for model in models]


def step_alone(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if run.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
    optimizer.step()
    optimizer.zero_grad()


def step_together(run: Run, models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
    for same in zip(*(model.parameters() for model in models), strict=True):
        mean = torch.stack([parameter.grad for parameter in same]).mean(0)
        for parameter in same:
            parameter.grad = mean.clone()
    for model, optimizer in zip(models, optimizers, strict=True):
        step_alone(run, model, optimizer)


@torch.no_grad()
def agreed_now(agreed: list[Tensor], model: nn.Module) -> None:
    for last, parameter in zip(agreed, model.parameters(), strict=True):
        last.copy_(parameter)


@torch.no_grad()
def agree(local: LocalUpdates, models: list[nn.Module], agreed: list[Tensor], outer: torch.optim.Optimizer) -> None:
    for last, *same in zip(agreed, *(model.parameters() for model in models), strict=True):
        mean = torch.stack(same).mean(0)
        if local.outer == "average":
            last.copy_(mean)
        else:
            last.grad = last - mean
    if local.outer == "nesterov":
        outer.step()
    for model in models:
        for last, parameter in zip(agreed, model.parameters(), strict=True):
            parameter.copy_(last)


@cache
def simulated(run: Run, local: LocalUpdates, count: int) -> list[Parameters]:
    return workers(run, local, count)


# Many processes #


def settings(local: LocalUpdates) -> dict[str, Any]:
    """As the JSON has them."""
    keys: dict[str, Any] = {"every": local.every, "outer": local.outer, "warmup_steps": local.warmup_steps}
    if local.outer == "nesterov":
        keys |= {"outer_lr": local.outer_lr, "outer_momentum": local.outer_momentum}
    return {"local_updates": keys}


def train(rank: int, world: int, run: Run, local: LocalUpdates) -> Outcome:
    engine = start_engine(run, run.build(), **settings(local))
    losses = [train_step(engine, run, step, rank, world) for step in range(run.steps)]
    outcome = Outcome(losses, engine.full_parameters(), [])
    engine.close()
    return outcome


def check(world: World, run: Run, local: LocalUpdates) -> None:
    outcomes = world.run(train, run, local)
    for outcome, wanted in zip(outcomes, simulated(run, local, world.size), strict=True):
        for name, values in wanted.items():
            assert float((outcome.parameters[name] - values).norm()) <= TOLERANCE * float(values.norm()), name


OUTER = {
    "average": LocalUpdates(every=3),
    "nesterov": LocalUpdates(every=3, outer="nesterov"),
    "post-local": LocalUpdates(every=2, warmup_steps=3),
    "warm DiLoCo": LocalUpdates(every=2, outer="nesterov", outer_lr=0.5, outer_momentum=0.6, warmup_steps=2),
    "every step": LocalUpdates(every=1, outer="nesterov"),
}


@pytest.mark.parametrize("choice", OUTER)
def test_ranks_do_what_workers_in_a_loop_do(four_ranks: World, choice: str) -> None:
    """Seven steps end between agreements: each rank is compared with its own worker."""
    check(four_ranks, Run("tied", steps=7, clip=0.5), OUTER[choice])


@pytest.mark.parametrize("outer", ["average", "nesterov"])
def test_with_accumulation_and_unused_parameters(two_ranks: World, outer: Any) -> None:
    """Of "sometimes used" a rank misses parameters that another uses: its own optimizer leaves them alone."""
    run = Run("sometimes used", steps=6, accumulation=3)
    check(two_ranks, run, LocalUpdates(every=2, outer=outer))


def test_averaging_every_step_of_plain_sgd_is_synchronous_sgd(four_ranks: World) -> None:
    """The mean of steps is the step along the mean where steps are linear in the gradient."""
    run = Run("mlp", steps=8, optimizer="plain")
    alone = train_alone(run)
    for outcome in four_ranks.run(train, run, LocalUpdates(every=1)):
        for name, wanted in alone.parameters.items():
            assert float((outcome.parameters[name] - wanted).norm()) <= TOLERANCE * float(wanted.norm())


# Between agreements #


def watch(rank: int, world: int, run: Run, local: LocalUpdates) -> list[tuple[int, int, float]]:
    """After each step: (payload elements sent, collectives of any kind so far, norm of all parameters)."""
    engine = start_engine(run, run.build(), **settings(local))
    seen = []
    for step in range(run.steps):
        train_step(engine, run, step, rank, world)
        ledger = engine.communicator.ledger
        sent = sum(count * entry.elements for entry, count in ledger.items() if not entry.scalar)
        norm = sum(float(values.square().sum()) for values in engine.full_parameters().values())
        seen.append((sent, ledger.total(), norm))
    engine.close()
    return seen


def units_of(run: Run, ranks: int) -> list[UnitSize]:
    """All parameters of the MLP, whose odd layers lie in one unit."""
    return [UnitSize(elements=padded(sum(p.numel() for p in run.build().parameters()), ranks), element_bytes=8)]


def test_nothing_is_sent_between_agreements(four_ranks: World) -> None:
    run = Run("mlp", steps=6, clip=0.5)
    reports = four_ranks.run(watch, run, LocalUpdates(every=3))
    for report in reports:
        sent = [elements for elements, _, _ in report]
        calls = [count for _, count, _ in report]
        assert calls == [0, 0, calls[2], calls[2], calls[2], 2 * calls[2]]
        assert sent[5] == 2 * sent[2] > 0
    assert 2 * sent[2] * 3 // 4 * 8 == agreement_bytes(units_of(run, 4), 4, 8)
    norms = [{report[step][2] for report in reports} for step in range(6)]
    assert [len(each) for each in norms] == [4, 4, 1, 4, 4, 1]  # four copies, and one where the ranks agreed


def account(rank: int, world: int, run: Run, local: LocalUpdates) -> tuple[int, int, int, int]:
    """(formula, kernel) of the payload of one agreement, and (formula, walk over storages) of the model states."""
    before = live_bytes()
    model = run.build()
    over_sockets = {"transport": "sockets", "algorithms": dict.fromkeys(RING, "ring")}
    engine = start_engine(run, model, **settings(local), communication=over_sockets)
    communicator = engine.communicator
    assert isinstance(communicator, GlooCommunicator)
    train_step(engine, run, 0, rank, world)
    train_step(engine, run, 1, rank, world)
    communicator.ledger.clear()
    written = written_bytes()
    train_step(engine, run, 2, rank, world)
    train_step(engine, run, 3, rank, world)
    written = written_bytes() - written
    for entry, count in communicator.ledger.items():
        written -= count * framing_bytes(communicator.steps(entry))
    communicator.release_buffers()
    kept = live_bytes() - before
    units = [unit.size for unit in engine.runtime.units]
    outer = 2 if local.outer == "nesterov" else 0
    state = model_state_bytes(units, Zero.of_stage(0), 1, moments=2, master_bytes=8, outer_values=outer)
    engine.close()
    return agreement_bytes(units, world, 8), written, sum(state.values()), kept


@pytest.mark.parametrize("outer", ["average", "nesterov"])
def test_bytes_and_memory(four_ranks: World, outer: Any) -> None:
    """Two steps, one agreement: exactly what the formulas say, by the kernel's counter and a walk over storages."""
    for payload, written, state, kept in four_ranks.run(
        account, Run("mlp", steps=4), LocalUpdates(every=2, outer=outer)
    ):
        assert written == payload > 0
        assert kept == state


# Checkpoints #


def resume(rank: int, world: int, run: Run, local: LocalUpdates, stop: int) -> float:
    """Train to the end in one go, and again from the state after `stop` steps: the largest difference."""
    straight = start_engine(run, run.build(), **settings(local))
    kept: dict[str, Any] = {}
    for step in range(run.steps):
        if step == stop:
            kept = keep(straight)
        train_step(straight, run, step, rank, world)
    again = start_engine(run, run.build(), **settings(local))
    put(again, kept)
    for step in range(stop, run.steps):
        train_step(again, run, step, rank, world)
    ours, theirs = straight.full_parameters(), again.full_parameters()
    straight.close()
    again.close()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def keep(engine: Engine) -> dict[str, Any]:
    assert engine.local_updates is not None
    state = engine.local_updates.state_dict()
    copied = {key: {n: t.clone() for n, t in state[key].items()} for key in ("outer", "momentum")}
    masters = [unit.master.clone() for unit in engine.runtime.units]
    return {"local": {**copied, "steps": state["steps"]}, "masters": masters}


def put(engine: Engine, kept: dict[str, Any]) -> None:
    assert engine.local_updates is not None
    for unit, values in zip(engine.runtime.units, kept["masters"], strict=True):
        unit.master.copy_(values)
    engine.local_updates.load_state_dict(kept["local"])


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_outer_state_survives_a_restart(two_ranks: World, stop: int) -> None:
    """Plain SGD inside, which has no state of its own: stopped in the warm-up, before the first agreement, after it."""
    local = LocalUpdates(every=2, outer="nesterov", warmup_steps=2)
    assert two_ranks.run(resume, Run("mlp", steps=8, optimizer="plain"), local, stop) == [0.0, 0.0]


# What is refused #


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"local_updates": {"every": 0}}, "every = 0; allowed: an integer >= 1"),
        ({"local_updates": {}}, "every"),
        ({"local_updates": {"every": 2, "outer": "adam"}}, "outer"),
        ({"local_updates": {"every": 2, "outer_lr": 0.5}}, "belong to outer = 'nesterov'"),
        ({"local_updates": {"every": 2, "outer": "nesterov", "outer_momentum": 1.0}}, "outer_momentum = 1.0"),
        ({"local_updates": {"every": 2}, "zero_optimization": {"stage": 1}}, "stage = 1: a shard is stepped for all"),
        ({"local_updates": {"every": 2}, "communication_data_type": "bf16"}, "sends parameters and no gradients"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config.read(keys, 4)


def test_state_dict_is_refused_for_another_model() -> None:
    engine = start_engine(run := Run("mlp"), run.build(), **settings(OUTER["nesterov"]))
    assert engine.local_updates is not None
    state = engine.local_updates.state_dict()
    del state["outer"]["layers.0.bias"]
    with pytest.raises(ValueError, match=r"outer state: layers\.0\.bias is missing"):
        engine.local_updates.load_state_dict(state)


def save_between(rank: int, world: int, folder: Path) -> str:
    """What a save between agreements says; the one at the next agreement succeeds."""
    engine, *_ = initialize(
        nn.Linear(3, 1),
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "local_updates": {"every": 2}},
        timeout_s=10.0,
    )
    message = ""
    for _ in range(2):
        engine.backward(engine(torch.full((2, 3), rank + 1.0)).sum())
        engine.step()
        if not message:
            with pytest.raises(ValueError, match="agreements") as refused:
                engine.save_checkpoint(folder)
            message = str(refused.value)
    engine.save_checkpoint(folder)
    engine.close()
    return message


def test_a_checkpoint_is_of_what_ranks_agree_on(two_ranks: World, tmp_path: Path) -> None:
    for message in two_ranks.run(save_between, tmp_path):
        assert "save_checkpoint after step 1" in message
        assert "do it after one, every 2 steps" in message
    assert (tmp_path / "latest").read_text() == "global_step2"
