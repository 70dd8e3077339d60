"""The loss scale alone, against two other tellings of it; and steps that all ranks skip, against one process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_precision import SGD, Numbers, Result, train_plainly
from small_models import Mlp, Run, micro_batches, start_engine
from torch import Tensor, nn
from torch.nn import functional
from windtunnel.engine.engine import Engine, initialize
from windtunnel.engine.loss_scale import LossScaleError, LossScaler, ScalePolicy, after, begin
from windtunnel.engine.world import World

# The state machine #

policies = st.builds(
    ScalePolicy,
    initial=st.integers(0, 20).map(lambda power: 2.0**power),
    skip=st.just(True),
    dynamic=st.booleans(),
    window=st.integers(1, 5),
    hysteresis=st.integers(1, 4),
    consecutive=st.booleans(),
    floor=st.just(2.0**-200),
)
histories = st.lists(st.booleans(), max_size=60)


def told_by_history(policy: ScalePolicy, history: list[bool]) -> float:
    """The scale after a history of overflows, by looking back from every step instead of keeping a state."""
    scale = policy.initial
    refilled = 0  # the first step whose overflow counts towards the hysteresis
    for step, overflow in enumerate(history):
        since = max((i for i in range(step + 1) if history[i]), default=-1)
        if not policy.dynamic:
            continue
        if overflow:
            scale /= 2 if sum(history[refilled : step + 1]) >= policy.hysteresis else 1
            continue
        doubles = (step - since) % policy.window == 0
        scale *= 2 if doubles else 1
        refilled = step + 1 if doubles or policy.consecutive else refilled
    return scale


@given(policy=policies, history=histories)
def test_the_scale_as_history_tells_it(policy: ScalePolicy, history: list[bool]) -> None:
    state = begin(policy)
    for step, overflow in enumerate(history):
        state = after(policy, state, overflow)
        assert state.scale == told_by_history(policy, history[: step + 1])
    assert state.skipped == sum(history)
    assert state.overflows == next((n for n, over in enumerate(reversed(history)) if not over), len(history))


@given(history=histories, window=st.integers(1, 5))
def test_without_hysteresis_it_is_the_scale_of_torch(history: list[bool], window: int) -> None:
    policy = ScalePolicy(initial=1024.0, skip=True, dynamic=True, window=window, hysteresis=1, floor=2.0**-200)
    state = begin(policy)
    scale, clean = torch.tensor(1024.0), torch.tensor(0, dtype=torch.int32)
    for overflow in history:
        state = after(policy, state, overflow)
        torch._amp_update_scale_(scale, clean, torch.tensor(float(overflow)), 2.0, 0.5, window)
        assert state.scale == scale.item()


@given(policy=policies, history=histories, cut=st.integers(0, 60))
def test_a_restored_scaler_goes_on_as_if_nothing_had_happened(
    policy: ScalePolicy, history: list[bool], cut: int
) -> None:
    whole, first, second = LossScaler(policy), LossScaler(policy), LossScaler(policy)
    for number, overflow in enumerate(history):
        whole.update(overflow)
        if number < cut:
            first.update(overflow)
    second.load_state_dict(first.state_dict())
    for overflow in history[cut:]:
        second.update(overflow)
    assert second.state == whole.state


def test_a_static_scale_is_the_configs_after_a_restore() -> None:
    before = LossScaler(ScalePolicy(initial=64.0, skip=True))
    before.update(overflow=True)
    restored = LossScaler(ScalePolicy(initial=128.0, skip=True))
    restored.load_state_dict(before.state_dict())
    assert (restored.scale, restored.state.skipped) == (128.0, 1)


def test_the_floor_is_reached_and_then_ends_it() -> None:
    scaler = LossScaler(ScalePolicy(initial=6.0, skip=True, dynamic=True, hysteresis=2, floor=2.0))
    seen = []
    for _ in range(3):
        scaler.update(overflow=True)
        seen.append(scaler.scale)
    assert seen == [6.0, 3.0, 2.0]
    message = r"loss scale = 2, its floor \(fp16.min_loss_scale = 2\), and 4 steps in a row overflowed: .*learning rate"
    with pytest.raises(LossScaleError, match=message):
        scaler.update(overflow=True)
    scaler.update(overflow=False)
    with pytest.raises(LossScaleError, match="1 step in a row overflowed"):
        scaler.update(overflow=True)


# Ranks #

AUTOCAST = Numbers(autocast="fp16", scale=0, power=10, window=2, hysteresis=1)
HALF = Numbers(parameters="fp16", scale=0, power=10, window=2, hysteresis=2)
STATIC = Numbers(autocast="fp16", scale=64.0)
BF16 = Numbers(parameters="bf16")

RUN = Run("mlp", dtype=torch.float32, steps=6, clip=0.3)


def poison(step: int, rank: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Steps 1, 2 and 4: an inf on one rank alone, another one each time."""
    x, y = batch
    return (x, y * torch.inf) if (step, rank) in ((1, 1), (2, 0), (4, 1)) else (x, y)


def warmup(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 8)


def train_poisoned(rank: int, world: int, runs: list[Run], numbers: Numbers) -> list[Result]:
    results = []
    for run in runs:
        engine = start_engine(run, run.build(), **numbers.config, optimizer={"type": "SGD", "params": SGD})
        losses, scales = [], []
        for step in range(run.steps):
            for batch in micro_batches(run, step, rank, world):
                loss = engine(*numbers.cast(run, poison(step, rank, batch)))
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            scales.append(engine.loss_scaler.scale)
        results.append(
            Result(losses, scales, engine.full_parameters(), engine.get_global_grad_norm(), engine.skipped_steps)
        )
        engine.close()
    return results


@pytest.mark.parametrize("numbers", [AUTOCAST, HALF, STATIC, BF16], ids=["autocast", "half", "static", "bf16"])
def test_an_overflow_on_one_rank_is_skipped_by_all(two_ranks: World, numbers: Numbers) -> None:
    runs = [replace(RUN, stage=stage, accumulation=accumulation) for stage, accumulation in enumerate((1, 3, 3, 1))]
    for run, *found in zip(runs, *two_ranks.run(train_poisoned, runs, numbers), strict=True):
        expected = train_plainly(run, numbers, world=2, prepare=poison)
        assert expected.skipped == 3
        for of_rank in found:
            assert of_rank.skipped == 3
            assert of_rank.scales == expected.scales
            for name, values in expected.parameters.items():
                # One unit of bf16 is 2^-8; see test_precision.py.
                assert torch.isfinite(of_rank.parameters[name]).all()
                torch.testing.assert_close(of_rank.parameters[name], values, rtol=2**-7, atol=2**-9)


def state_of(engine: Engine) -> list[Tensor]:
    tensors = [unit.shard for unit in engine.runtime.units] + [unit.master for unit in engine.optimizer.units]
    for state in engine.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def skip_one(rank: int, world: int, stage: int, compression: dict[str, Any]) -> dict[str, Any]:
    """What a skipped step changes: one rank's input of the second step is inf."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        **compression,
    }
    model = nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3))  # 47 parameters: two ranks pad them
    engine, _, _, scheduler = initialize(model, config, lr_scheduler=warmup, timeout_s=20.0)
    x, y = torch.randn(4, 7), torch.randn(4, 3)

    def step(factor: float) -> None:
        engine.backward(functional.mse_loss(engine(x).float(), y * factor))
        engine.step()
        engine.settle()

    step(1.0)
    before, rate, sent = state_of(engine), scheduler.get_last_lr(), engine.communicator.ledger.copy()
    step(float("inf") if rank == 1 else 1.0)
    seen = {
        "untouched": all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True)),
        "rate": scheduler.get_last_lr() == rate,
        "gathers": sum(n for entry, n in (engine.communicator.ledger - sent).items() if entry.kind == "all_gather"),
        "scalars": sum(n for entry, n in (engine.communicator.ledger - sent).items() if entry.scalar),
        "counted": (engine.skipped_steps, engine.global_steps, engine.optimizer.overflow),
    }
    step(1.0)
    seen["goes on"] = all(torch.isfinite(tensor).all() for tensor in state_of(engine))
    seen["moves on"] = scheduler.get_last_lr() != rate and not engine.optimizer.overflow
    engine.close()
    return seen


SKIPPING: dict[str, dict[str, Any]] = {
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "float16"}, "fp16": {"initial_scale_power": 4}},
    "compressed": {"communication_compression": {"gradients": "int8", "min_elements": 0}},
}


@pytest.mark.parametrize("config", SKIPPING.values(), ids=SKIPPING)
@pytest.mark.parametrize("stage", range(4))
def test_a_skipped_step_touches_nothing(two_ranks: World, stage: int, config: dict[str, Any]) -> None:
    for seen in two_ranks.run(skip_one, stage, config):
        gathers = seen.pop("gathers")
        assert seen == {
            "untouched": True,
            "rate": True,
            "scalars": 1,
            "counted": (1, 2, True),
            "goes on": True,
            "moves on": True,
        }
        assert gathers == 0 or stage in (0, 3) or "communication_compression" in config  # nothing is published


def step_on_inf(config: dict[str, Any]) -> Engine:
    engine, *_ = initialize(Mlp(), {**config, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    x, y = torch.ones(2, 7, dtype=engine.runtime.units[0].full.dtype), torch.full((2, 3), torch.inf)
    engine.backward(engine(x, y.to(x.dtype)))
    engine.step()
    return engine


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_elsewhere_a_step_is_taken_as_torch_takes_it(clip: float) -> None:
    for config in ({}, {"bf16": {"enabled": True, "check_grad_overflow": False}}):
        engine = step_on_inf({**config, "gradient_clipping": clip})
        assert engine.skipped_steps == 0
        assert torch.isnan(engine.full_parameters()["layers.4.bias"]).all() or clip == 0.0
        assert not torch.isfinite(engine.full_parameters()["layers.4.bias"]).any()


def test_an_overflow_at_the_floor_ends_the_training_with_parameters_intact(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LossScaleError, match="loss scale = 1, its floor"):
        step_on_inf({"fp16": {"enabled": True, "initial_scale_power": 0, "hysteresis": 1}})
    engine = step_on_inf({"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}})
    assert engine.loss_scaler.scale == 8.0
    assert "step skipped: a gradient is inf or nan at loss scale 16; the next scale is 8" in caplog.text
    assert all(torch.isfinite(values).all() for values in engine.full_parameters().values())
