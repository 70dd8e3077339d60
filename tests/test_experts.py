"""Mixture of experts: gating against a loop over tokens, ranks against one process, bytes in closed form."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from windtunnel.collectives.experts import ExpertsSize, exchanged_bytes, exchanged_elements
from windtunnel.engine.communicator import SoloCommunicator
from windtunnel.engine.config import Config
from windtunnel.engine.engine import initialize
from windtunnel.engine.experts import ExpertLinear, MixtureOfExperts, spread_experts
from windtunnel.engine.pilot import Plan, fly
from windtunnel.engine.world import World
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights
from windtunnel.kernels.gating import combine, dispatch, route
from windtunnel.sim.replay import sent_bytes_by_axis

TOLERANCE = 1e-10
"""float64; sums are taken in another order, and Adam enlarges rounding (tests/test_zero.py)."""

# Gating #


class Gated(NamedTuple):
    """By a loop over choices and tokens: what each token gets, and how full each expert is."""

    out: list[list[float]]
    taken: list[int]
    balance: float


def by_hand(logits: Tensor, tokens: Tensor, top_k: int, capacity: int) -> Gated:
    """Expert i multiplies its tokens by i + 1."""
    T, E = logits.shape
    gates = [[float(g) for g in row] for row in logits.softmax(-1)]
    ranked = [sorted(range(E), key=lambda e: -row[e])[:top_k] for row in gates]
    taken, chosen = [0] * E, [0] * E
    out = [[0.0] * tokens.shape[1] for _ in range(T)]
    for choice in range(top_k):
        for t in range(T):
            expert = ranked[t][choice]
            chosen[expert] += 1
            if taken[expert] == capacity:
                continue
            taken[expert] += 1
            weight = gates[t][expert] / (sum(gates[t][e] for e in ranked[t]) if top_k > 1 else 1)
            for d, value in enumerate(tokens[t].tolist()):
                out[t][d] += weight * (expert + 1) * value
    balance = E * sum(chosen[e] / (top_k * T) * sum(gates[t][e] for t in range(T)) / T for e in range(E))
    return Gated(out, taken, balance)


@given(
    tokens=st.integers(1, 12),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    capacity=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_tokens_go_where_a_loop_sends_them(tokens: int, experts: int, top_k: int, capacity: int, seed: int) -> None:
    top_k = min(top_k, experts)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, 3, generator=generator, dtype=torch.float64)
    routing = route(logits, top_k, capacity)
    laid_out = dispatch(x, routing, experts)
    factors = torch.arange(1, experts + 1, dtype=torch.float64)[:, None, None]
    out = combine(laid_out * factors, routing, tokens)
    wanted = by_hand(logits, x, top_k, capacity)
    assert torch.allclose(out, torch.tensor(wanted.out, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert (laid_out != 0).any(-1).sum(1).tolist() == wanted.taken
    assert float(routing.balance) == pytest.approx(wanted.balance, rel=1e-12)


def layer(top_k: int, capacity_factor: float = 1.0) -> MixtureOfExperts:
    torch.manual_seed(5)
    bank = nn.Sequential(ExpertLinear(4, 3, 5), nn.Tanh(), ExpertLinear(4, 5, 3))
    return MixtureOfExperts(nn.Linear(3, 4), bank, top_k=top_k, capacity_factor=capacity_factor).double()


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_of_gate_experts_and_tokens(top_k: int) -> None:
    """Against finite differences: the gate learns from the outputs (for one choice too) and from the balance loss."""
    mixture = layer(top_k)
    names = [name for name, _ in mixture.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(mixture, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *mixture.parameters()))
    mixture.zero_grad()
    mixture(x)[0].square().sum().backward()
    assert float(mixture.gate.weight.grad.norm()) > 1e-3  # type: ignore[union-attr]


def test_even_choices_have_a_balance_of_one_and_drop_nothing() -> None:
    routing = route(5.0 * torch.eye(4).repeat(3, 1), 1, 3)
    assert float(routing.balance) == pytest.approx(1.0, rel=1e-6)  # fp32
    assert sorted(routing.slots.tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("factor", "top_k", "wanted"), [(1.0, 1, 4), (1.25, 1, 5), (1.1, 2, 9), (100.0, 2, 16), (0.01, 1, 1)]
)
def test_capacity(factor: float, top_k: int, wanted: int) -> None:
    assert ExpertsSize(tokens=16, experts=4, top_k=top_k, capacity_factor=factor, width=1).capacity == wanted


# Expert parallelism #

BATCH, SEQ, VOCAB, STEPS = 8, 6, 17, 3


class Case(NamedTuple):
    expert: int = 2
    stage: int = 0
    accumulation: int = 1
    top_k: int = 2
    mlp: str = "gelu"
    policy: str = "none"
    optimizer: str = "AdamW"

    def build(self) -> nn.Module:
        spec = ModelSpec(
            name="mixed", layers=2, hidden=8, heads=2, ffn=12, vocab=VOCAB, seq=SEQ, mlp=self.mlp, norm="layernorm",
            positions="learned", attention="causal", tied=True, bias=self.mlp == "gelu", experts=4, top_k=self.top_k,
            capacity_factor=0.8, balance=0.1,
        )  # fmt: skip
        model = Transformer(spec)
        initialize_weights(model, seed=3)
        for module in model.modules():  # gates that tell tokens apart, and drop some
            if isinstance(module, MixtureOfExperts):
                module.gate.weight.data.mul_(30)
        return model.double()

    def config(self) -> dict[str, Any]:
        return {
            "train_batch_size": BATCH,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": self.stage},
            "optimizer": {"type": self.optimizer, "params": {"lr": 1e-2, "weight_decay": 0.1}},
            "parallel": {"expert": self.expert},
            "activation_checkpointing": {"policy": self.policy},
        }


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(step))
    return x, (x + x.roll(1, 1)) % VOCAB


class Outcome(NamedTuple):
    parameters: dict[str, Tensor]
    norms: list[float]


@cache
def alone(case: Case, shares: int) -> Outcome:
    """One process whose micro-steps are the shares of the ranks: the same tokens compete for the same room."""
    model, norms = case.build(), []
    optimizer = getattr(torch.optim, case.optimizer)(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(STEPS):
        for x, y in zip(*(part.chunk(shares) for part in batch(step)), strict=True):
            (model(x, y) / shares).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return Outcome({name: parameter.detach() for name, parameter in model.named_parameters()}, norms)


def train(rank: int, world: int, case: Case) -> Outcome:
    engine, *_ = initialize(case.build(), config=case.config(), timeout_s=20.0)
    norms = []
    for step in range(STEPS):
        parts = case.accumulation * world
        for x, y in zip(*(part.chunk(parts)[rank::world] for part in batch(step)), strict=True):
            engine.backward(engine(x, y))
            engine.step()
        norms.append(engine.get_global_grad_norm())
    parameters = engine.full_parameters()
    engine.close()
    return Outcome(parameters, norms)


def check(world: World, case: Case) -> None:
    plain = case._replace(expert=1, stage=0, accumulation=1, policy="none")
    wanted = alone(plain, world.size * case.accumulation)
    for found in world.run(train, case):
        assert found.norms == pytest.approx(wanted.norms, rel=TOLERANCE)
        for name, values in wanted.parameters.items():
            assert found.parameters[name].shape == values.shape
            assert float((found.parameters[name] - values).norm()) <= TOLERANCE * float(values.norm()), name


def test_the_loss_has_the_balance_of_every_block() -> None:
    model, balances = Case().build(), []
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.register_forward_hook(lambda m, x, out: balances.append(float(out[1])))
    x, y = batch(0)
    with torch.no_grad():
        plain = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        balances.clear()
        loss = model(x, y)
    assert len(balances) == 2
    assert float(loss) == pytest.approx(float(plain) + 0.1 * sum(balances), rel=1e-12)
    assert min(balances) > 1e-3


@pytest.mark.parametrize("case", [Case(), Case(stage=2, top_k=1, mlp="swiglu"), Case(expert=1, stage=3)])
def test_two_ranks_equal_one_process(two_ranks: World, case: Case) -> None:
    check(two_ranks, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(stage=0, accumulation=2),
        Case(stage=1, mlp="swiglu"),
        Case(stage=2, accumulation=2, policy="full"),
        Case(stage=3, top_k=1),
        Case(expert=4, stage=2, policy="selective"),
    ],
)
def test_four_ranks_equal_one_process(four_ranks: World, case: Case) -> None:
    check(four_ranks, case)


def save_and_load(rank: int, world: int, folder: str, saved: Case, loaded: Case) -> float:
    """Go on for a step from a checkpoint with experts elsewhere: the largest difference from having gone on."""
    first, *_ = initialize(saved.build(), config=saved.config(), timeout_s=20.0)
    again, *_ = initialize(loaded.build(), config=loaded.config(), timeout_s=20.0)
    for step, engines in enumerate(((first,), (first, again))):
        if step == 1:
            first.save_checkpoint(folder)
            again.load_checkpoint(folder)
        for engine in engines:
            engine.backward(engine(*(part.chunk(world)[rank] for part in batch(step))))
            engine.step()
    ours, theirs = first.full_parameters(), again.full_parameters()
    first.close()
    again.close()
    return max(float((ours[name] - theirs[name]).norm() / ours[name].norm()) for name in ours)


@pytest.mark.parametrize(
    ("saved", "loaded"), [(Case(stage=2), Case(expert=1, stage=1)), (Case(expert=1, stage=3), Case(stage=0))]
)
def test_checkpoints_load_with_experts_elsewhere(two_ranks: World, tmp_path: Path, saved: Case, loaded: Case) -> None:
    for difference in two_ranks.run(save_and_load, str(tmp_path), saved, loaded):
        assert difference <= TOLERANCE


def evaluate(rank: int, world: int, case: Case) -> tuple[float, int]:
    engine, *_ = initialize(case.build(), config=case.config(), timeout_s=20.0)
    found = engine.evaluate([tuple(part[:2] for part in batch(step)) for step in range(2 - rank)])
    engine.close()
    return found.loss, found.batches


def test_a_rank_that_runs_out_of_batches_serves_its_experts(two_ranks: World) -> None:
    model = Case().build()
    with torch.no_grad():
        losses = [float(model(*(part[:2] for part in batch(step)))) for step in (0, 1, 0)]
    for loss, batches in two_ranks.run(evaluate, Case()):
        assert batches == 3
        assert loss == pytest.approx(sum(losses) / 3, rel=1e-10)


# Bytes #


def ledger(rank: int, world: int, case: Case) -> dict[str, int]:
    """Elements by kind on the axis "expert" in one micro-step."""
    engine, *_ = initialize(case.build(), config=case.config(), timeout_s=20.0)
    group = engine.groups.axis("expert")
    group.ledger.clear()
    x, y = (part.chunk(world)[rank] for part in batch(0))
    engine.backward(engine(x, y))
    found: dict[str, int] = {}
    for entry, count in group.ledger.items():
        found[entry.kind] = found.get(entry.kind, 0) + count * entry.elements
    engine.close()
    return found


def size(tokens: int) -> ExpertsSize:
    return ExpertsSize(tokens=tokens, experts=4, top_k=2, capacity_factor=0.8, width=8)


def test_what_is_sent_is_the_closed_form(four_ranks: World) -> None:
    expected = {"all_to_all": 2 * exchanged_elements(size(BATCH // 4 * SEQ))}  # two layers
    assert expected["all_to_all"] == 2 * 4 * 4 * 5 * 8  # by hand: 12 tokens, room for ceil(0.8 * 2 * 12 / 4) = 5
    for found in four_ranks.run(ledger, Case()):
        assert found == expected


def test_a_flight_sends_the_closed_form() -> None:
    spec = ModelSpec(
        name="mixed", layers=3, hidden=32, heads=4, ffn=48, vocab=VOCAB, seq=64, mlp="swiglu", norm="layernorm",
        positions="learned", attention="causal", tied=True, bias=True, experts=8, top_k=2,
    )  # fmt: skip
    trace = fly(
        Plan(
            factory="windtunnel.experiments.transformer:for_flight",
            arguments={"spec": spec, "batch": 2, "seq": 64},
            config={"parallel": {"expert": 4}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
            world=8,
            micro_steps=1,
        )
    )
    size = ExpertsSize(tokens=128, experts=8, top_k=2, capacity_factor=1.25, width=32)
    sent = sent_bytes_by_axis(trace, scalars=False)
    assert sent["expert"] == 3 * exchanged_bytes(size, 4, 2)
    experts = 3 * 2 * (3 * 32 * 48 + 48 + 48 + 32)  # two of the eight, in each of three blocks
    assert sent["expert_data"] == 2 * experts * 2 * 1 // 2  # stage 2: a reduce-scatter and a gather over two ranks


# Edges #


def test_the_cases_drop_tokens() -> None:
    """Else the drops of the tests above would be none."""
    model, seen = Case().build(), []
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.register_forward_pre_hook(lambda m, x: seen.append(route(m._logits(x[0].flatten(0, 1)), 2, 5)))
    model(*(part[:2] for part in batch(0)))
    assert all(int((routing.slots == 4 * 5).sum()) > 0 for routing in seen)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("keys", "world", "words"),
    [
        ({"parallel": {"expert": 3}}, 4, r"parallel\.expert = 3 does not divide the ranks: 3 \* 1 = 3"),
        ({"parallel": {"expert": 0}}, 4, r"parallel\.expert = 0"),
        ({"parallel": {"expert": 2, "context": 2}}, 4, r"parallel\.expert = 2 and parallel\.context = 2"),
        (
            {"parallel": {"expert": 2}, "zero_optimization": {"stage": 2, "mics_shard_size": 2}},
            4,
            r"parallel\.expert = 2 with zero_optimization\.mics_shard_size",
        ),
        ({"parallel": {"expert": 2}, "local_updates": {"every": 2}}, 4, r"parallel\.expert = 2 with .*local_updates"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(keys: dict[str, Any], world: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config.read(keys, world)


def test_layers_and_models_that_do_not_fit() -> None:
    group = SoloCommunicator("expert")
    group.world = 3
    with pytest.raises(
        ValueError, match=r"expert = 3 does not divide the 4 experts of blocks\.0\.mlp; allowed: 1, 2, 4"
    ):
        spread_experts(Case().build(), group)
    with pytest.raises(ValueError, match="the model has no MixtureOfExperts"):
        spread_experts(nn.Linear(2, 2), group)
    with pytest.raises(ValueError, match="top_k = 5; allowed: 1 to 4"):
        MixtureOfExperts(nn.Linear(3, 4), nn.Identity(), top_k=5)
    with pytest.raises(ValueError, match="capacity_factor = 0; allowed"):
        MixtureOfExperts(nn.Linear(3, 4), nn.Identity(), top_k=1, capacity_factor=0)
    with pytest.raises(ValueError, match=r"'weight' of the experts has shape \[5, 3\].*first dimension 4"):
        MixtureOfExperts(nn.Linear(3, 4), nn.Linear(3, 5), top_k=1)
