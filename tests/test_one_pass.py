"""Optimizers in one pass: against torch's and the reference, for any shapes and dtypes; in the engine; on `sim`."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import Run, start_engine, train_step
from test_flight import SMALL, flight
from test_zero import largest_difference, reference
from torch import Tensor
from windtunnel.collectives.trace import Kernel, Trace, walk
from windtunnel.engine import optim
from windtunnel.engine.engine import Engine
from windtunnel.kernels import dispatch, native
from windtunnel.kernels.adamw import AdamW
from windtunnel.kernels.dispatch import choice, choices, optimizer_step
from windtunnel.kernels.lion import Lion
from windtunnel.kernels.native import native_step_
from windtunnel.kernels.one_pass import Rule, Shards, chunked_step_, chunks, plain_step_
from windtunnel.kernels.sgd import Sgd

RULES: list[Rule] = [
    AdamW(lr=1e-2, weight_decay=0.1),
    AdamW(lr=1e-2, weight_decay=0.1, decoupled=False),
    Sgd(lr=0.1, weight_decay=0.1),
    Sgd(lr=0.1, momentum=0.9, weight_decay=0.1, first=True),
    Sgd(lr=0.1, momentum=0.9, dampening=0.5),
    Sgd(lr=0.1, momentum=0.9, nesterov=True),
    Lion(lr=1e-2, weight_decay=0.1),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = st.lists(st.integers(0, 40), max_size=5)


def shards(
    rule: Rule,
    sizes: list[int],
    *,
    seed: int = 0,
    wide: torch.dtype = torch.float64,
    gradient: torch.dtype = torch.float64,
    copy: torch.dtype | None = torch.bfloat16,
) -> Shards:
    generator = torch.Generator().manual_seed(seed)

    def draw(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(size, dtype=torch.float64, generator=generator).to(dtype) for size in sizes]

    moments = tuple([tensor.abs() for tensor in draw(wide)] for _ in rule.moments)
    steps = [torch.tensor(3.0) for _ in sizes] if isinstance(rule, AdamW) else []
    copies = [] if copy is None else [torch.full((size,), 7.0, dtype=copy) for size in sizes]
    return Shards(draw(wide), draw(gradient), moments, steps, copies)


def clone(given: Shards) -> Shards:
    return Shards(
        [t.clone() for t in given.masters],
        [t.clone() for t in given.gradients],
        tuple([t.clone() for t in moment] for moment in given.moments),
        given.steps,
        [t.clone() for t in given.copies],
    )


def same(found: Shards, wanted: Shards, **tolerance: float) -> None:
    torch.testing.assert_close(list(found.masters), list(wanted.masters), **tolerance)
    torch.testing.assert_close([list(m) for m in found.moments], [list(m) for m in wanted.moments], **tolerance)
    torch.testing.assert_close(list(found.gradients), list(wanted.gradients), rtol=0, atol=0)


# Against the reference, and the reference against torch #


@given(
    rule=st.sampled_from(RULES), sizes=SIZES, seed=st.integers(0, 99), chunk=st.integers(1, 30),
    gradient=st.sampled_from(DTYPES), copy=st.sampled_from([None, *DTYPES]), multiplier=st.sampled_from([1.0, 0.3]),
)  # fmt: skip
def test_chunks_give_what_the_reference_gives(
    rule: Rule, sizes: list[int], seed: int, chunk: int, gradient: torch.dtype, copy: torch.dtype, multiplier: float
) -> None:
    given = shards(rule, sizes, seed=seed, gradient=gradient, copy=copy)
    plain, chunked = clone(given), clone(given)
    wanted = plain_step_(rule, plain, multiplier=multiplier)
    found = chunked_step_(rule, chunked, multiplier=multiplier, chunk=chunk)
    # float64 in another order of operations
    same(chunked, plain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0.0)
    for copied, master in zip(chunked.copies, chunked.masters, strict=bool(chunked.copies)):
        assert torch.equal(copied, master.to(copied.dtype))


TORCHS: list[tuple[Rule, Callable[..., torch.optim.Optimizer]]] = [
    (RULES[0], lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
    (RULES[1], lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1)),
    (RULES[2], lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)),
    (replace(RULES[4], dampening=0.0), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),  # type: ignore[type-var]
    (RULES[4], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5)),
    (RULES[5], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    (RULES[6], lambda p: optim.Lion(p, lr=1e-2, weight_decay=0.1)),
]


@pytest.mark.parametrize(
    ("rule", "make"), TORCHS, ids=[f"{type(rule).__name__}{n}" for n, (rule, _) in enumerate(TORCHS)]
)
def test_the_reference_gives_what_torch_gives(rule: Rule, make: Callable[..., torch.optim.Optimizer]) -> None:
    """Five steps from the beginning, each with another gradient."""
    state = shards(rule, [11], copy=None)
    for moment in state.moments:
        moment[0].zero_()
    parameter = torch.nn.Parameter(state.masters[0].clone())
    optimizer = make([parameter])
    for step in range(5):
        state.gradients[0].copy_(torch.randn(11, generator=torch.Generator().manual_seed(step)))
        parameter.grad = state.gradients[0].clone()
        optimizer.step()
        counted = state._replace(steps=[torch.tensor(step + 1.0)] if state.steps else [])
        first = {"first": step == 0} if isinstance(rule, Sgd) and rule.momentum else {}
        plain_step_(replace(rule, **first), counted)  # type: ignore[type-var]
    torch.testing.assert_close(state.masters[0], parameter.detach(), rtol=1e-12, atol=1e-14)


@given(sizes=SIZES, elements=st.integers(1, 50))
def test_chunks_cover_each_element_once(sizes: list[int], elements: int) -> None:
    rule = RULES[0]
    given = shards(rule, sizes)
    for part in chunks(given, elements):
        assert sum(master.numel() for master in part.masters) <= elements
        for master in part.masters:
            master.add_(100.0)
    assert torch.cat([*given.masters, torch.tensor([100.0], dtype=torch.float64)]).sub(100).abs().max() < 10


@pytest.mark.parametrize("step", [plain_step_, chunked_step_, native_step_])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_shows_in_the_sum_of_squares(step: Callable[..., Tensor], value: float) -> None:
    given = shards(RULES[0], [9, 5], wide=torch.float32, gradient=torch.float16)
    assert torch.isfinite(step(RULES[0], clone(given)))
    given.gradients[1][2] = value
    assert not torch.isfinite(step(RULES[0], given))


@pytest.mark.parametrize("step", [partial(chunked_step_, chunk=7), native_step_])
def test_a_copy_may_take_the_gradients_memory(step: Callable[..., Tensor]) -> None:
    given = shards(RULES[0], [50], wide=torch.float32, gradient=torch.bfloat16, copy=None)
    wanted = clone(given)
    plain_step_(RULES[0], wanted, multiplier=0.5)
    shared = given._replace(copies=given.gradients)
    step(RULES[0], shared, multiplier=0.5)
    assert torch.equal(shared.copies[0], shared.masters[0].bfloat16())
    torch.testing.assert_close(shared.masters[0], wanted.masters[0])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"masters": [torch.zeros(4, dtype=torch.bfloat16)]}, "masters.0. is torch.bfloat16; allowed: torch.float32"),
    ({"gradients": [torch.zeros(4, dtype=torch.int64)]}, "gradients.0. is torch.int64; allowed: torch.float64"),
    ({"gradients": [torch.zeros(8)[::2]]}, "gradients.0. is not contiguous"),
    ({"gradients": [torch.zeros(5)]}, "gradients.0. has 5 elements; allowed: 4"),
    ({"gradients": []}, "0 gradients for 1 masters"),
    ({"moments": ([torch.zeros(4)],)}, "AdamW got 1 lists of moments; allowed: 2, exp_avg, exp_avg_sq"),
    (
        {"moments": ([torch.zeros(4)], [torch.zeros(4).half()])},
        "exp_avg_sq.0. is torch.float16; allowed: torch.float32",
    ),
    ({"copies": [torch.zeros(4, device="meta")]}, "copies.0. is on meta; allowed: cpu"),
]


@pytest.mark.parametrize(("changed", "message"), BAD)
def test_what_is_not_allowed(changed: dict[str, Any], message: str) -> None:
    given = shards(RULES[0], [4], wide=torch.float32, gradient=torch.float32)
    with pytest.raises(ValueError, match=message):
        chunked_step_(RULES[0], given._replace(**changed))


# In C++ #

needs_compiler = pytest.mark.skipif(dispatch.compiler() is None, reason="this machine has no C++ compiler")


@needs_compiler
@given(
    rule=st.sampled_from(RULES), sizes=st.lists(st.sampled_from([0, 1, 7, 33, 3000]), max_size=4),
    seed=st.integers(0, 99), gradient=st.sampled_from(DTYPES[1:]), copy=st.sampled_from([None, *DTYPES[1:]]),
    multiplier=st.sampled_from([1.0, 0.3]),
)  # fmt: skip
def test_the_compiled_loop_gives_what_the_reference_gives(
    rule: Rule, sizes: list[int], seed: int, gradient: torch.dtype, copy: torch.dtype | None, multiplier: float
) -> None:
    given = shards(rule, sizes, seed=seed, wide=torch.float32, gradient=gradient, copy=copy)
    plain, fast = clone(given), clone(given)
    wanted = plain_step_(rule, plain, multiplier=multiplier)
    found = native_step_(rule, fast, multiplier=multiplier)
    same(fast, plain, rtol=1e-5, atol=1e-6)  # some roundings of fp32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)
    for copied, master in zip(fast.copies, fast.masters, strict=bool(fast.copies)):
        assert torch.equal(copied, master.to(copied.dtype))


def bit_patterns() -> Tensor:
    """fp32 numbers of all kinds: every bf16, the halves between fp16 numbers and their neighbours, random ones."""
    brains = torch.arange(1 << 16, dtype=torch.int32) << 16
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16).float().view(torch.int32)
    near = [halves + offset for offset in (-1, 1, 1 << 12, (1 << 12) - 1, (1 << 12) + 1)]
    anything = torch.randint(-(2**31), 2**31, (1 << 18,), generator=torch.Generator().manual_seed(0))
    return torch.cat([brains, halves, *near, anything.to(torch.int32)]).view(torch.float32)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_conversions_are_torchs(dtype: torch.dtype) -> None:
    """Every number of 16 bits is widened, and every kind of fp32 number is rounded, as torch does it."""
    values = bit_patterns()
    copy, zeros = torch.empty_like(values, dtype=dtype), torch.zeros_like(values)
    native_step_(Lion(lr=0.0), Shards([values.clone()], [zeros], ([zeros.clone()],), [], [copy]))
    torch.testing.assert_close(copy, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    all_of_them = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    master = torch.zeros(1 << 16)
    native_step_(Sgd(lr=1.0), Shards([master], [all_of_them], (), []))
    torch.testing.assert_close(-master, all_of_them.float(), rtol=0, atol=0, equal_nan=True)


@needs_compiler
def test_threads_share_the_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LEAST_PER_THREAD", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    given = shards(RULES[0], [50, 1, 31], wide=torch.float32, gradient=torch.bfloat16)
    wanted = clone(given)
    squares = plain_step_(RULES[0], wanted)
    torch.testing.assert_close(native_step_(RULES[0], given), squares, rtol=1e-5, atol=0.0)
    same(given, wanted, rtol=1e-5, atol=1e-6)


# Which one runs #


def test_what_runs_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "compiler", lambda: "/bin/c++")
    dispatch.chosen.cache_clear()
    with caplog.at_level("INFO"):
        assert optimizer_step("adamw", "cpu") is native_step_
        optimizer_step("adamw", "cpu")
    assert [record.message for record in caplog.records] == [
        "kernel adamw on cpu: C++, compiled here (C++ compiler: /bin/c++)"
    ]
    assert optimizer_step("adamw", "another") is plain_step_
    assert {each.kernel for each in choices()} >= {"adamw", "sgd", "lion"}
    with pytest.raises(ValueError, match="kernel = 'adam'; allowed: adamw"):
        choice("adam", "cpu")
    monkeypatch.setattr(dispatch, "compiler", lambda: None)
    dispatch.chosen.cache_clear()
    assert optimizer_step("adamw", "cpu") is chunked_step_
    dispatch.chosen.cache_clear()


def test_without_a_compiler_torch_steps_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that is missing, and one that fails."""
    given = shards(RULES[0], [9], wide=torch.float32, gradient=torch.float32)
    wanted = clone(given)
    chunked_step_(RULES[0], wanted)
    for found, message in ((None, "no C++ compiler"), (shutil.which("false"), "one_pass.cpp cannot be compiled")):
        monkeypatch.setattr(native, "compiler", lambda found=found: found)
        monkeypatch.setattr(native, "folder", lambda: tmp_path)
        native.library.cache_clear()
        stepped = clone(given)
        native_step_(RULES[0], stepped)
        assert torch.equal(stepped.masters[0], wanted.masters[0])
        assert message in caplog.text
    native.library.cache_clear()
    assert list(tmp_path.iterdir()) == []


# In the engine #


def trained(run: Run, **config: Any) -> Engine:
    engine = start_engine(run, run.build(), kernels={"fused": ["optimizer"]}, **config)
    for step in range(run.steps):
        train_step(engine, run, step, 0, 1)
    return engine


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Lion", "Lamb", "momentum", "grouped", "plain"])
def test_a_whole_run_is_torchs(optimizer: str) -> None:
    """float64, 20 steps, parameters that some steps do not use, a learning rate that changes, clipping."""
    run = Run("sometimes used", optimizer=optimizer, clip=0.5, schedule=True)
    engine = trained(run)
    expected = reference(run)
    outcome = replace(expected, parameters=engine.full_parameters())
    engine.close()
    assert largest_difference([outcome], expected) <= 1e-10  # see test_zero.py


@pytest.mark.parametrize(
    "config",
    [
        {"bf16": {"enabled": True}},
        {"fp16": {"enabled": True, "initial_scale_power": 4}},
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
    ],
    ids=["bf16", "fp16", "bf16 on the host", "parameters on the host"],
)
def test_low_precision_and_offload_are_as_without_it(config: dict[str, Any]) -> None:
    """The same formula in another order of operations: a rounding of fp32 in masters, at times one of 16 bits."""
    run = Run("sometimes used", dtype=torch.float32, steps=8, clip=0.5)
    found = []
    for fused in (True, False):
        engine = start_engine(run, run.build(), **{"kernels": {"fused": ["optimizer"] if fused else []}, **config})
        losses = [train_step(engine, run, step, 0, 1) for step in range(run.steps)]
        found.append((losses, engine.full_parameters(), [u.gathered_master().clone() for u in engine.runtime.units]))
        engine.close()
    (losses, parameters, masters), (plain_losses, plain_parameters, plain_masters) = found
    assert losses == pytest.approx(plain_losses, rel=1e-2)
    for one, other in zip(masters, plain_masters, strict=True):
        assert float((one - other).norm() / other.norm()) <= 1e-3
    for name, value in plain_parameters.items():
        assert float((parameters[name] - value).norm() / value.norm()) <= 1e-2, name


@pytest.mark.parametrize(
    "optimizer",
    [
        {"type": "AdamW", "params": {"lr": 1e-2}},
        {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}},
        {"type": "SGD", "params": {"lr": 0.1}},
        {"type": "Lion", "params": {"lr": 1e-2}},
        {"type": "Lamb", "params": {"lr": 1e-2}},
    ],
    ids=["AdamW", "SGD with momentum", "SGD", "Lion", "Lamb"],
)
def test_its_state_is_torchs(optimizer: dict[str, Any]) -> None:
    run = Run("mlp", steps=2)
    engine = trained(run, optimizer=optimizer)
    plain = start_engine(run, run.build(), optimizer=optimizer)
    for step in range(run.steps):
        train_step(plain, run, step, 0, 1)
    for mine, others in zip(engine.optimizer.held(), plain.optimizer.held(), strict=True):
        one, other = engine.optimizer.values(mine), plain.optimizer.values(others)
        assert set(one) == {name for name, value in other.items() if value is not None}
        for name in one:
            value = other[name]
            torch.testing.assert_close(one[name], value, rtol=1e-10, atol=1e-12)
    engine.close()
    plain.close()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"type": "RMSprop"}, "kernels.fused 'optimizer' with RMSprop; allowed: Adam, AdamW, SGD, Lion, Lamb"),
        ({"type": "AdamW", "params": {"amsgrad": True}}, "kernels.fused 'optimizer' with amsgrad = true"),
    ],
)
def test_an_optimizer_without_a_pass_is_refused(optimizer: dict[str, Any], message: str) -> None:
    run = Run("mlp")
    with pytest.raises(ValueError, match=message):
        start_engine(run, run.build(), optimizer=optimizer, kernels={"fused": ["optimizer"]})


def test_an_unknown_name_is_refused() -> None:
    run = Run("mlp")
    with pytest.raises(ValueError, match=r"fused = 'optimiser'; allowed: true, .*did you mean 'optimizer'"):
        start_engine(run, run.build(), kernels={"fused": ["optimiser"]})


# On `sim` #


def test_a_flight_sees_one_operator_with_the_bytes_of_one_pass() -> None:
    trace = flight(SMALL, stage=1, world=2, bf16={"enabled": True}, kernels={"fused": ["optimizer"]})
    plain = flight(SMALL, stage=1, world=2, bf16={"enabled": True})
    updates = _updates(trace)
    passes = [op for op in updates if op.name == "optimizer_step"]
    elements = sum(op.read_bytes for op in passes) // 14  # fp32 master and two moments, bf16 gradient
    assert [op.write_bytes for op in passes] == [op.read_bytes for op in passes]  # bf16 copy in the gradient's place
    assert 0 <= elements - SMALL.parameters // 2 <= 64  # two ranks; padding
    assert not any("adam" in op.name for op in updates)
    moved = [sum(op.read_bytes + op.write_bytes for op in _updates(each)) for each in (trace, plain)]
    assert moved[0] < 0.8 * moved[1]


def _updates(trace: Trace) -> list[Kernel]:
    """Kernels of the second step's update."""
    return [op for phase, *_, op in walk(trace) if (phase.name, phase.step) == ("update", 2) and isinstance(op, Kernel)]
