"""Cross-entropy without whole logits: against torch, alone and with a shared vocabulary, in a run, on `sim`."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_flight import BATCH, SMALL, flight
from torch import Tensor
from torch.nn import functional
from windtunnel.collectives.trace import Alloc, Collective, Kernel, Trace, walk
from windtunnel.engine.engine import Engine, initialize
from windtunnel.engine.fused_modules import FusedReadout
from windtunnel.engine.world import World
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights
from windtunnel.kernels.linear_cross_entropy import (
    IGNORED,
    Found,
    Whole,
    in_chunks,
    linear_cross_entropy,
    plain_linear_cross_entropy,
)
from windtunnel.sim.replay import flops


def inputs(tokens: int, width: int, rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + width + rows)
    hidden = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    targets = torch.randint(rows, (tokens,), generator=generator)
    targets[::3] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@given(
    tokens=st.integers(0, 12), width=st.integers(1, 5), rows=st.integers(1, 9), chunk=st.integers(1, 300),
    wanted=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
def test_loss_and_gradients_are_torchs(
    tokens: int, width: int, rows: int, chunk: int, wanted: tuple[bool, bool]
) -> None:
    hidden, weight, targets = inputs(tokens, width, rows)
    loss = plain_linear_cross_entropy(hidden, weight, targets)
    expected = torch.autograd.grad(loss, (hidden, weight))
    found = in_chunks(hidden.detach(), weight.detach(), targets, Whole(rows), IGNORED, wanted, chunk)
    torch.testing.assert_close(found.loss, loss.detach())
    for gradient, asked, value in zip((found.hidden, found.weight), wanted, expected, strict=True):
        assert (gradient is not None) == asked
        if gradient is not None:
            torch.testing.assert_close(gradient, value)


def test_gradients_are_those_of_finite_differences() -> None:
    hidden, weight, targets = inputs(5, 3, 7)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets) / 3, (hidden, weight))


def test_without_gradients_none_are_made() -> None:
    hidden, weight, targets = inputs(5, 3, 7)
    made: list[Found] = []

    def watched(*given: Any, **named: Any) -> Found:
        made.append(in_chunks(*given, **named))
        return made[-1]

    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, compute=watched)
    linear_cross_entropy(hidden.detach(), weight, targets, compute=watched)
    assert [(each.hidden is None, each.weight is None) for each in made] == [(True, True), (True, False)]
    torch.testing.assert_close(loss, plain_linear_cross_entropy(hidden, weight, targets).detach())


def test_a_retained_graph_gives_the_same_twice() -> None:
    hidden, weight, targets = inputs(5, 3, 7)
    loss = linear_cross_entropy(hidden, weight, targets) * 0.5
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_lower_precision_it_is_as_good_as_whole_logits(dtype: torch.dtype) -> None:
    exact = inputs(40, 16, 50)
    wanted = torch.autograd.grad(plain_linear_cross_entropy(*exact), exact[:2])

    def error(function: Any) -> float:
        narrow = inputs(40, 16, 50, dtype)
        loss = function(*narrow)
        assert loss.dtype == torch.float32
        found = torch.autograd.grad(loss, narrow[:2])
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))

    assert error(linear_cross_entropy) <= 1.2 * error(plain_linear_cross_entropy)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [2.0], [-1.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert loss.item() == 1e4
    assert torch.isfinite(torch.autograd.grad(loss, weight)[0]).all()


def test_autocast_multiplies_in_its_dtype() -> None:
    hidden, weight, targets = inputs(9, 4, 6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
        wanted = functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((torch.zeros(2, 3, dtype=torch.int64), None, None), "hidden states are torch.int64 and weights torch.float64"),
        ((torch.zeros(2, 4, dtype=torch.float64), None, None), r"hidden states are \(2, 4\) and weights \(7, 3\)"),
        (
            (None, None, torch.zeros(4, dtype=torch.int64)),
            r"targets are torch.int64 \(4,\); allowed: torch.int64 \(5,\)",
        ),
    ],
)
def test_what_is_not_allowed(change: tuple[Any, ...], message: str) -> None:
    given = [b if a is None else a for a, b in zip(change, inputs(5, 3, 7), strict=True)]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*given)


# In a run #

SPEC = ModelSpec(
    name="fused", layers=2, hidden=8, heads=2, ffn=12, vocab=26, seq=6,
    mlp="swiglu", norm="rmsnorm", positions="rope", attention="causal", tied=False, bias=False,
)  # fmt: skip
ALL: dict[str, Any] = {"kernels": {"fused": True}}


def built(tied: bool = False) -> Transformer:
    model = Transformer(replace(SPEC, tied=tied)).double()
    initialize_weights(model, seed=0)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(SPEC.vocab, (4, SPEC.seq), generator=torch.Generator().manual_seed(step))
    return x, (x * 5 + 1) % SPEC.vocab


def trained(config: dict[str, Any], tied: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    adamw = {"type": "AdamW", "params": {"lr": 1e-2}}
    engine, *_ = initialize(built(tied), {"optimizer": adamw, "gradient_clipping": 1.0, **config})
    samples = engine.groups.axis("data")
    losses = [one_step(engine, step, samples.rank, samples.world) for step in range(8)]
    state = engine.full_state_dict()
    with torch.no_grad():
        state["logits"] = engine(batch(0)[0])
    engine.close()
    return losses, state


def one_step(engine: Engine, step: int, rank: int, world: int) -> float:
    loss = engine(*(each.chunk(world)[rank] for each in batch(step)))
    engine.backward(loss)
    engine.step()
    return loss.item()


def compare(found: tuple[list[float], dict[str, Tensor]], wanted: tuple[list[float], dict[str, Tensor]]) -> None:
    """float64 in another order of operations, 8 steps of Adam: see test_zero.py."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-9)
    for name, value in wanted[1].items():
        assert float((found[1][name] - value).norm() / value.norm()) <= 1e-9, name


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_with_everything_fused_is_the_plain_run(tied: bool) -> None:
    compare(trained(ALL, tied), trained({}, tied))


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_it_goes_with_recomputation_and_stage_3(policy: str) -> None:
    beside = {"activation_checkpointing": {"policy": policy}, "zero_optimization": {"stage": 3}}
    compare(trained({**ALL, **beside}), trained({}))


def train_here(rank: int, world: int, config: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    return trained(config)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_that_share_the_vocabulary_give_the_same(two_ranks: World, sequence_parallel: bool) -> None:
    parallel = {"parallel": {"tensor": 2, "sequence_parallel": sequence_parallel}}
    wanted = trained({})
    for found in two_ranks.run(train_here, {**ALL, **parallel}):
        compare(found, wanted)


def test_what_a_model_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="a Transformer has nothing that it fuses"):
        initialize(built(), {"kernels": {"fused": ["norm", "dropout"]}})


def test_no_memory_holds_the_logits() -> None:
    """The largest thing that is saved for backward is as large as the weights."""
    readout = FusedReadout(lambda hidden, weight, targets: hidden @ weight.T)
    hidden, weight, targets = inputs(3000, 4, 50, torch.float32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        readout(hidden[None], weight, targets[None])
    assert max(saved) == 3000 * 4


# On `sim` #


def second_step(trace: Trace, kind: type) -> list[Any]:
    return [op for phase, *_, op in walk(trace) if phase.step == 2 and isinstance(op, kind)]


def test_a_flight_sees_one_product_three_times_as_large() -> None:
    trace = flight(SMALL, stage=0, world=2, kernels={"fused": ["cross_entropy"]})
    (kernel,) = [op for op in second_step(trace, Kernel) if op.name == "linear_cross_entropy"]
    tokens = BATCH * SMALL.seq
    assert (kernel.family, kernel.shape) == ("matmul", (3, tokens, SMALL.vocab, SMALL.hidden))
    assert kernel.flops == 3 * 2.0 * math.prod(kernel.shape[1:])
    plain = flight(SMALL, stage=0, world=2)
    for forward_only in (True, False):  # what a model's FLOPs are does not depend on when they are done
        totals = [flops(each, forward_only=forward_only) for each in (trace, plain)]
        assert totals[0] == pytest.approx(totals[1], rel=1e-12)
    operands = 4 * (tokens * SMALL.hidden + SMALL.vocab * SMALL.hidden)
    logits = 4 * tokens * SMALL.vocab
    assert kernel.read_bytes == operands + 8 * tokens + 7 * logits
    assert kernel.write_bytes == 4 + operands + 4 * logits
    assert max(op.nbytes for op in second_step(trace, Alloc)) <= max(logits, 4 * SMALL.vocab * SMALL.hidden)


def test_a_flight_of_everything_fused_sees_each_operator() -> None:
    spec = replace(SMALL, mlp="swiglu", norm="rmsnorm", positions="rope", bias=False)
    names = {op.name for op in second_step(flight(spec, stage=3, world=2, **ALL), Kernel)}
    assert {"rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotary", "optimizer_step"} <= names
    assert not {"silu", "pow", "mean", "_log_softmax"} & names


def test_a_flight_with_a_shared_vocabulary_sends_three_numbers_for_each_token() -> None:
    trace = flight(replace(SMALL, heads=2, kv_heads=2), stage=0, world=2, mp_size=2, **ALL)
    sent = {op.label: op.elements for op in second_step(trace, Collective) if op.label in ("largest logits", "sums")}
    tokens = BATCH * SMALL.seq
    assert sent == {"largest logits": tokens, "sums": 2 * tokens}
