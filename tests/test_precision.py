"""Every precision on Gloo ranks against one process that does the same arithmetic in plain torch."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hand_made import PROCESSOR
from plain_precision import SGD, Numbers, Result, train_plainly
from small_models import Mlp, Run, micro_batches, start_engine
from test_flight import SMALL, flight, units_of
from test_zero import live_storages
from torch import Tensor, nn
from windtunnel.collectives.trace import Collective, Kernel, Synchronize, Trace, walk
from windtunnel.collectives.zero import Zero, model_state_bytes, sent_bytes_per_step
from windtunnel.engine.config import Config
from windtunnel.engine.engine import Engine, initialize
from windtunnel.engine.world import World
from windtunnel.experiments.simulate import simulate
from windtunnel.sim.memory import replay_memory
from windtunnel.sim.replay import sent_bytes_by_axis

PRECISIONS = {
    "fp32": Numbers(),
    "bf16": Numbers(parameters="bf16"),
    "bf16, fp32 gradients": Numbers(parameters="bf16", gradients="fp32"),
    "fp32, bf16 gradients": Numbers(gradients="bf16"),
    "fp16 dynamic": Numbers(parameters="fp16", scale=0, power=12, window=2),
    "fp16 static": Numbers(parameters="fp16", scale=256.0),
    "fp16, fp32 gradients": Numbers(parameters="fp16", gradients="fp32", scale=0, power=10),
    "bf16 autocast": Numbers(autocast="bf16"),
    "fp16 autocast": Numbers(autocast="fp16", scale=0, power=12, window=2),
}

RUN = Run("mlp", dtype=torch.float32, clip=0.3, steps=4)

CASES = [replace(RUN, stage=stage, accumulation=accumulation) for stage in range(4) for accumulation in (1, 3)]

TOLERANCE = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 5e-4}
"""Of ||a - b|| / ||b|| over all parameters, and of losses and norms, by the coarsest format in use. Rank and loop round
alike but for the norm (a sum in another order) and the kernels that torch takes for memory that is aligned otherwise;
where that moves a number across a rounding boundary it is off by one unit of the format, 2^-8 or 2^-11."""


def tolerance(numbers: Numbers) -> float:
    used = {numbers.parameters, numbers.gradients, numbers.autocast}
    return next(TOLERANCE[name] for name in ("bf16", "fp16", "fp32") if name in used)


def train(rank: int, world: int, runs: list[Run], numbers: Numbers) -> list[Result]:
    return [train_once(run, numbers, rank, world) for run in runs]


def train_once(run: Run, numbers: Numbers, rank: int, world: int) -> Result:
    engine = start_engine(run, run.build(), **numbers.config, optimizer={"type": "SGD", "params": SGD})
    losses, scales = [], []
    for step in range(run.steps):
        for batch in micro_batches(run, step, rank, world):
            loss = engine(*numbers.cast(run, batch))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        scales.append(engine.loss_scaler.scale)
    result = Result(losses, scales, engine.full_parameters(), engine.get_global_grad_norm(), engine.skipped_steps)
    engine.close()
    return result


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """||a - b|| / ||b|| over all parameters."""
    off = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (off / sum(float(values.double().square().sum()) for values in expected.values())) ** 0.5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_stage_and_accumulation_as_one_process(two_ranks: World, precision: str) -> None:
    numbers = PRECISIONS[precision]
    allowed = tolerance(numbers)
    for run, *found in zip(CASES, *two_ranks.run(train, CASES, numbers), strict=True):
        expected = train_plainly(run, numbers, world=2)
        losses = list(itertools.chain(*zip(*(of_rank.losses for of_rank in found), strict=True)))
        assert losses == pytest.approx(expected.losses, rel=allowed)
        for of_rank in found:
            assert distance(of_rank.parameters, expected.parameters) <= allowed
            assert of_rank.scales == expected.scales
            assert of_rank.norm == pytest.approx(expected.norm, rel=allowed)
            assert of_rank.skipped == expected.skipped == 0


def test_the_norm_is_that_without_scale_and_before_clipping(two_ranks: World) -> None:
    """In one precision with a scale and one without, the same run has the same norm, above what it is clipped to."""
    for stage in (0, 2):
        run = replace(RUN, stage=stage, steps=1, clip=0.01)
        scaled = two_ranks.run(train, [run], PRECISIONS["fp16 autocast"])[0][0]
        plain = two_ranks.run(train, [run], PRECISIONS["fp32"])[0][0]
        assert scaled.norm is not None
        assert scaled.norm > 0.1
        assert scaled.norm == pytest.approx(plain.norm, rel=1e-2)  # fp16's products


# Gradients in their own dtype #


def accumulate(kind: str) -> tuple[Tensor, list[Tensor]]:
    """(the accumulated gradient, those of three micro-steps) of a bf16 parameter, in one process."""
    layer = nn.Linear(5, 3, bias=False)
    engine, *_ = initialize(
        layer,
        {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": kind},
            "gradient_accumulation_steps": 3,
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        },
    )
    gradients = []
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).bfloat16()
        twin = layer.weight.detach().clone().requires_grad_()
        (x @ twin.T).square().sum().backward()
        assert twin.grad is not None
        gradients.append(twin.grad)
        engine.backward(engine(x).square().sum())
        if step < 2:
            engine.step()
    return engine.runtime.units[0].gradient.view(3, 5), gradients


def test_narrow_gradients_are_widened_before_they_are_scaled() -> None:
    total, gradients = accumulate("fp32")
    assert total.dtype == torch.float32
    # Each product and each sum is rounded in fp32: three of each.
    torch.testing.assert_close(total.double(), sum(g.double() / 3 for g in gradients), rtol=1e-6, atol=1e-7)
    narrow, _ = accumulate("bf16")
    assert not torch.allclose(narrow.float(), total, rtol=1e-4)


def hold(rank: int, world: int, run: Run, parameters: str, gradients: str | None) -> tuple[int, int, int, int]:
    """(bytes of live storages, the formula's; payload of collectives in the last step, the formula's)."""
    before = live_storages()
    numbers = Numbers(parameters=parameters, gradients=gradients)
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2}}
    engine = start_engine(
        run, run.build(), **numbers.config, optimizer=optimizer, communication={"transport": "sockets"}
    )
    train_step(engine, run, numbers, rank, world)
    ledger = engine.communicator.ledger.copy()
    train_step(engine, run, numbers, rank, world)
    sent = engine.communicator.ledger - ledger
    engine.settle()
    engine.communicator.release_buffers()
    held = sum(storage.nbytes() for number, storage in live_storages().items() if number not in before)
    sizes, zero = [unit.size for unit in engine.runtime.units], Zero.of_stage(run.stage)
    state = model_state_bytes(sizes, zero, world, moments=2, master_bytes=4)
    width = {"fp32": 4, "bf16": 2, "fp16": 2}
    rounds = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
    payload = sum(
        count * rounds[entry.kind] * entry.elements * width[entry.dtype] * (world - 1) // world
        for entry, count in sent.items()
        if not entry.scalar
    )
    engine.close()
    return held, sum(state.values()), payload, sent_bytes_per_step(sizes, zero, world, run.accumulation)


def train_step(engine: Engine, run: Run, numbers: Numbers, rank: int, world: int) -> None:
    for batch in micro_batches(run, 0, rank, world):
        engine.backward(engine(*numbers.cast(run, batch)))
        engine.step()


@pytest.mark.parametrize(
    ("parameters", "gradients", "stage"),
    [("bf16", "fp32", 0), ("bf16", "fp32", 2), ("bf16", "fp32", 3), ("fp32", "bf16", 1)],
)
def test_measured_memory_and_payload_are_the_formulas(
    two_ranks: World, parameters: str, gradients: str, stage: int
) -> None:
    run = Run("mlp", stage=stage, accumulation=3, dtype=torch.float32)
    for rank, (held, state, payload, expected) in enumerate(two_ranks.run(hold, run, parameters, gradients)):
        assert payload == expected
        assert held == state if rank == 0 else 0.95 * state < held <= state  # the last shard may hold padding


# On the simulated device #

FLOWN = {
    "bf16": ({"bf16": {"enabled": True}}, 2, 2, "bf16"),
    "fp16": ({"fp16": {"enabled": True}}, 2, 2, "fp16"),
    "bf16, fp32 gradients": ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, 2, 4, "bf16"),
    "fp32, bf16 gradients": ({"data_types": {"grad_accum_dtype": "bf16"}}, 4, 2, "fp32"),
    "bf16 autocast": ({"torch_autocast": {"enabled": True}}, 4, 4, "bf16"),
    "fp16 autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, 4, 4, "fp16"),
}
"""Config, bytes per parameter and per gradient, and the dtype of matmuls."""


def last_step(trace: Trace) -> list[Any]:
    return [op for phase, _, _, op in walk(trace) if phase.step == 2]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", FLOWN)
def test_flights_have_the_formulas_bytes_and_memory(precision: str, stage: int) -> None:
    config, parameter, gradient, computed = FLOWN[precision]
    trace = flight(SMALL, stage=stage, micro_steps=2, **config)
    zero = Zero.of_stage(stage)
    units = [replace(unit, gradient_bytes=gradient) for unit in units_of(SMALL, 4, parameter)]
    assert sum(sent_bytes_by_axis(trace, scalars=False).values()) == sent_bytes_per_step(units, zero, 4, 2)
    assert replay_memory(trace, PROCESSOR).state == model_state_bytes(units, zero, 4, moments=2, master_bytes=4)
    matmuls = {op.dtype for op in last_step(trace) if isinstance(op, Kernel) and op.family in ("matmul", "attention")}
    assert matmuls == {computed}


@pytest.mark.parametrize(
    ("config", "looks"),
    [
        ({}, False),
        ({"bf16": {"enabled": True}}, True),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, False),
        ({"fp16": {"enabled": True}}, True),
        ({"communication_data_type": "fp16"}, True),
        ({"gradient_clipping": 1.0}, True),
    ],
)
def test_a_flight_looks_at_gradients_where_a_run_does(config: dict[str, Any], looks: bool) -> None:
    """One few-element reduction and one wait of the host, whatever is looked for."""
    step = last_step(flight(SMALL, stage=2, **config))
    assert [op.label for op in step if isinstance(op, Collective) and op.scalar] == ["gradient check"]
    assert sum(isinstance(op, Synchronize) for op in step) == 1
    assert any(isinstance(op, Kernel) and op.name == "linalg_vector_norm" for op in step) == looks


def test_autocast_with_recomputation_flies() -> None:
    trace = flight(SMALL, recompute="full", torch_autocast={"enabled": True})
    backward = [op for _, call, _, op in walk(trace) if call.key.startswith("backward") and isinstance(op, Kernel)]
    assert {op.dtype for op in backward if op.family == "matmul"} == {"bf16"}


def test_simulate_reads_formats(tmp_path: Any) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"bf16": {"enabled": true}, "data_types": {"grad_accum_dtype": "fp32"}}')
    wide = simulate("gpt-demo", "dgx-a100", config=path, gpus=2)
    narrow = simulate("gpt-demo", "dgx-a100", precision="bf16", gpus=2)
    assert wide.peak_memory_bytes["gradients"] == 2 * narrow.peak_memory_bytes["gradients"]
    path.write_text('{"torch_autocast": {"enabled": true}}')
    autocast = simulate("gpt-demo", "dgx-a100", config=path, gpus=2)
    assert autocast.layout["precision"] == "fp32"
    # Used against the peak of the products' dtype, not that of the parameters.
    assert autocast.mfu / autocast.tflops_per_gpu == pytest.approx(narrow.mfu / narrow.tflops_per_gpu)


# Autocast #


class Watching(nn.Module):
    """Tells in which dtype it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.seen.append(y.dtype)
        return y.float().square().mean()


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_autocast_holds_in_forward_alone(name: str, dtype: torch.dtype) -> None:
    model = Watching()
    autocast = {"enabled": True, "dtype": name}
    engine, *_ = initialize(model, {"torch_autocast": autocast, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    engine.backward(engine(torch.ones(2, 3)))
    model(torch.ones(2, 3))
    assert model.seen == [dtype, torch.float32]
    unit = engine.runtime.units[0]
    assert unit.full.dtype == unit.gradient.dtype == torch.float32
    assert engine.loss_scaler.policy.dynamic == (name == "float16")


# The loss that backward is called on #


def one_step(config: dict[str, Any], how: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    engine, *_ = initialize(Mlp(), {**config, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    x, y = torch.randn(4, 7), torch.randn(4, 3)
    loss = engine(x, y)
    match how:
        case "engine":
            engine.backward(loss)
        case "scaled":
            engine.scale_loss(loss).backward()
        case "two parts":
            (engine.scale_loss(loss * 0.25) + engine.scale_loss(loss * 0.75)).backward()
        case "bare":
            loss.backward()
    engine.step()
    return engine.full_parameters()


FP16_AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}, "fp16": {"initial_scale_power": 8}}


@pytest.mark.parametrize("how", ["scaled", "two parts"])
def test_a_users_own_backward_on_a_scaled_loss(how: str) -> None:
    expected, found = one_step(FP16_AUTOCAST, "engine"), one_step(FP16_AUTOCAST, how)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_a_bare_backward_is_refused_where_there_is_a_scale() -> None:
    with pytest.raises(RuntimeError, match=r"without the loss scale, which is 256: call engine\.backward\(loss\), or"):
        one_step(FP16_AUTOCAST, "bare")
    with pytest.raises(RuntimeError, match="without the loss scale"):  # a scaled loss before it does not count
        bare_after_scaled()


def bare_after_scaled() -> None:
    engine, *_ = initialize(Mlp(), {**FP16_AUTOCAST, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    x, y = torch.randn(4, 7), torch.randn(4, 3)
    engine.backward(engine(x, y))
    engine.step()
    engine(x, y).backward()


def test_a_bare_backward_is_right_where_there_is_none() -> None:
    expected, found = one_step({}, "engine"), one_step({}, "bare")
    assert all(torch.equal(found[name], values) for name, values in expected.items())


# The config #


def scaling(**fp16: Any) -> Any:
    return Config.read({"fp16": {"enabled": True, **fp16}}, 1).formats.scaling


def test_the_loss_scale_is_dynamic_by_default() -> None:
    policy = scaling()
    assert (policy.dynamic, policy.skip, policy.initial, policy.window) == (True, True, 65536.0, 1000)
    assert (policy.hysteresis, policy.consecutive, policy.floor) == (2, False, 1.0)
    assert scaling(loss_scale=128).initial == 128.0
    assert not scaling(loss_scale=128).dynamic


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fp16": {"loss_scale": -1}}, r"loss_scale = -1.0; allowed: a static scale > 0, or 0 for a dynamic one"),
        ({"fp16": {"initial_scale_power": 127}}, "initial_scale_power = 127; allowed: 0 to 126"),
        ({"fp16": {"loss_scale_window": 0}}, "loss_scale_window = 0; allowed: an integer >= 1"),
        ({"fp16": {"hysteresis": 0}}, "hysteresis = 0; allowed: an integer >= 1"),
        ({"fp16": {"min_loss_scale": 0}}, r"min_loss_scale = 0.0; allowed: above 0, at most the first scale 2\^16"),
        ({"fp16": {"auto_cast": True}}, "auto_cast = True; allowed: false, .*torch_autocast"),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "data_types.grad_accum_dtype = 'int8': .*'fp32', 'bf16' or"),
        ({"data_types": {"params_dtype": "fp32"}}, "unknown key 'data_types.params_dtype'; allowed: grad_accum_dtype"),
        ({"torch_autocast": {"dtype": "float64"}}, "torch_autocast.dtype = 'float64': input should be 'bfloat16'"),
        (
            {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}},
            "torch_autocast.lower_precision_safe_modules is not supported: torch knows its safe operators",
        ),
        (
            {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}},
            "bf16.enabled and torch_autocast.enabled are both true; allowed: at most one",
        ),
        ({"bf16": {"immediate_grad_update": True}}, "unknown key 'bf16.immediate_grad_update'"),
    ],
)
def test_what_is_not_honoured_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        Config.read(config, 1)
    assert "\n" not in str(refused.value)
