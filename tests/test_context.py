"""Context parallelism: ranks that share each sequence train as one process; bytes are those of the closed forms."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from windtunnel.collectives.context import AttentionSize, attention_bytes, attention_elements
from windtunnel.collectives.groups import Placement
from windtunnel.collectives.shift import SHIFT
from windtunnel.collectives.tiers import Tier
from windtunnel.collectives.trace import Collective
from windtunnel.engine.blockwise import seen
from windtunnel.engine.communicator import SoloCommunicator
from windtunnel.engine.config import Config
from windtunnel.engine.context import ContextParallel, repeats
from windtunnel.engine.engine import initialize
from windtunnel.engine.pilot import Plan, fly
from windtunnel.engine.world import World
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights
from windtunnel.kernels.attention import block, block_backward, merge, plain_block, plain_block_backward
from windtunnel.sim.network import collective_seconds, sent_bytes
from windtunnel.sim.replay import sent_bytes_by_axis

TOLERANCE = 1e-10
"""float64; sums are taken in another order, and Adam enlarges rounding (tests/test_zero.py)."""

METHODS = ["ulysses", "all_gather", "ring"]
BATCH, SEQ, VOCAB, STEPS = 4, 16, 19, 3


class Case(NamedTuple):
    method: str
    heads: int = 4
    kv_heads: int = 4
    positions: str = "learned"
    attention: str = "causal"
    context: int = 2
    stage: int = 0
    policy: str = "none"
    placement: str = "zigzag"

    def build(self) -> nn.Module:
        spec = ModelSpec(
            name="long", layers=2, hidden=16, heads=self.heads, kv_heads=self.kv_heads, ffn=24, vocab=VOCAB, seq=SEQ,
            mlp="swiglu", norm="rmsnorm", positions=self.positions, attention=self.attention, tied=True, bias=False,
        )  # fmt: skip
        model = Transformer(spec)
        initialize_weights(model, seed=3)
        return model.double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(step))
    return x, (x + x.roll(1, 1)) % VOCAB


@cache
def alone(case: Case) -> dict[str, Tensor]:
    model = case.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        model(*batch(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def config(case: Case, world: int, **keys: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH * case.context // world,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": case.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "parallel": {
            "context": case.context,
            "context_attention": case.method,
            "context_placement": case.placement,
        },
        "activation_checkpointing": {"policy": case.policy},
        **keys,
    }


def train(rank: int, world: int, case: Case) -> dict[str, Tensor]:
    engine, *_ = initialize(case.build(), config=config(case, world), timeout_s=20.0)
    samples = engine.groups.axis("data")
    for step in range(STEPS):
        engine.backward(engine(*(part.chunk(samples.world)[samples.rank] for part in batch(step))))
        engine.step()
    parameters = engine.full_parameters()
    engine.close()
    return parameters


def check(world: World, case: Case) -> None:
    wanted = alone(case._replace(method="", context=1, stage=0, policy="none", placement=""))
    for found in world.run(train, case):
        for name, values in wanted.items():
            assert float((found[name] - values).norm()) <= TOLERANCE * float(values.norm()), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kv_heads", "positions", "attention"), [(4, "learned", "causal"), (2, "rope", "causal"), (1, "rope", "full")]
)
def test_two_ranks_equal_one_process(
    two_ranks: World, method: str, kv_heads: int, positions: str, attention: str
) -> None:
    check(two_ranks, Case(method, kv_heads=kv_heads, positions=positions, attention=attention))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kv_heads", "positions", "attention", "context", "stage", "policy"),
    [
        (2, "rope", "causal", 4, 0, "none"),
        (4, "learned", "full", 4, 3, "full"),
        (1, "learned", "causal", 2, 2, "selective"),
    ],
)
def test_four_ranks_equal_one_process(
    four_ranks: World, method: str, kv_heads: int, positions: str, attention: str, context: int, stage: int, policy: str
) -> None:
    """Also with ZeRO over context and data, and where blocks are computed again in backward."""
    check(four_ranks, Case(method, 4, kv_heads, positions, attention, context, stage, policy))


# Bytes #


def ledger(rank: int, world: int, case: Case) -> dict[tuple[str, str], int]:
    """Elements by kind and dtype on the axis "context" in one micro-step."""
    engine, *_ = initialize(case.build(), config=config(case, world), timeout_s=20.0)
    group = engine.groups.axis("context")
    group.ledger.clear()
    engine.backward(engine(*batch(0)))
    found: dict[tuple[str, str], int] = {}
    for entry, count in group.ledger.items():
        key = (entry.kind, entry.dtype)
        found[key] = found.get(key, 0) + count * entry.elements
    engine.close()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_what_is_sent_is_the_closed_form(two_ranks: World, method: str) -> None:
    case = Case(method, kv_heads=1, positions="rope")
    repeated = 2 if method == "ulysses" else 1  # one key head cannot be cut in two
    size = AttentionSize(batch=BATCH, tokens=SEQ, heads=4, kv_heads=repeated, head_size=4, element_bytes=8)
    expected = {(kind, "fp64"): 2 * n for kind, n in attention_elements(size, 2, method).items()}  # two layers
    for found in two_ranks.run(ledger, case):
        assert {key: n for key, n in found.items() if key[0] != "recv"} == expected


def spec_for_flight() -> ModelSpec:
    return ModelSpec(
        name="long", layers=3, hidden=32, heads=8, kv_heads=4, ffn=48, vocab=VOCAB, seq=64, mlp="gelu",
        norm="layernorm", positions="rope", attention="causal", tied=True, bias=True,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_flight_sends_the_closed_form(method: str) -> None:
    trace = fly(
        Plan(
            factory="windtunnel.experiments.transformer:for_flight",
            arguments={"spec": spec_for_flight(), "batch": 2, "seq": 64},
            config={"parallel": {"context": 4, "context_attention": method}, "bf16": {"enabled": True}},
            world=8,
            micro_steps=1,
        )
    )
    size = AttentionSize(batch=2, tokens=64, heads=8, kv_heads=4, head_size=4, element_bytes=2)
    assert sent_bytes_by_axis(trace, scalars=False)["context"] == 3 * attention_bytes(size, 4, method)


NEAR = Tier(name="intra_node", ranks=4, latency_s=1e-6, bytes_per_s=100e9)
FAR = Tier(name="inter_node", ranks=64, latency_s=5e-6, bytes_per_s=20e9, start_s=3e-6)


@given(
    inside=st.sampled_from([1, 2, 4, 8]),
    size=st.sampled_from([2, 4, 8]),
    nbytes=st.sampled_from([1024, 1 << 20, 1 << 26]),
)
def test_a_played_shift_takes_its_slowest_hop(inside: int, size: int, nbytes: int) -> None:
    """Also in groups with a stride, which share the links of their nodes."""
    op = Collective(SHIFT.kind, "context", nbytes // 4, "fp32", None, "keys and values")
    placement = Placement(size=size, stride=inside, world=64)
    events, computed = (collective_seconds(op, placement, (NEAR, FAR), each) for each in ("events", "closed_form"))
    assert events == pytest.approx(computed, rel=1e-9)  # float sums in another order
    assert sent_bytes(op, placement, (NEAR, FAR)) == nbytes


def test_a_shift_by_hand() -> None:
    op = Collective(SHIFT.kind, "context", 1 << 18, "fp32", None, "keys and values")
    for ranks, wanted in ((4, 1e-6 + (1 << 20) / 100e9), (8, 3e-6 + 5e-6 + (1 << 20) / 20e9)):
        assert collective_seconds(op, ranks, (NEAR, FAR), "closed_form") == pytest.approx(wanted, rel=1e-12)


# Blocks of attention #


def tensors(*shape: int, seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@given(
    queries=st.integers(1, 5),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    grouped=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_merged_blocks_are_the_softmax_over_all_keys(queries: int, cuts: list[int], grouped: int, seed: int) -> None:
    (query,) = tensors(2, 4, queries, 3, seed=seed, count=1)
    key, value = tensors(2, grouped, sum(cuts), 3, seed=seed + 1, count=2)
    found = None
    for k, v in zip(key.split(cuts, 2), value.split(cuts, 2), strict=True):
        here = block(query, k, v, causal=False, scale=0.7)
        found = here if found is None else merge(found, here)
    assert found is not None
    wanted = functional.scaled_dot_product_attention(query, key, value, scale=0.7, enable_gqa=True)
    assert torch.allclose(found.output, wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.logsumexp, plain_block(query, key, value, causal=False, scale=0.7).logsumexp)


@pytest.mark.parametrize(("causal", "keys"), [(True, 5), (False, 5), (False, 3)])
@pytest.mark.parametrize("backward", [block_backward, plain_block_backward])
def test_backward_of_blocks_adds_up(causal: bool, keys: int, backward: Callable[..., Any]) -> None:
    """A block with another one beside it that every query sees, against autograd through both at once."""
    query, gradient = tensors(2, 4, 5, 3, seed=1, count=2)
    k1, v1 = tensors(2, 2, keys, 3, seed=2, count=2)
    k2, v2 = tensors(2, 2, 4, 3, seed=3, count=2)
    for tensor in (query, k1, v1, k2, v2):
        tensor.requires_grad_()
    first = plain_block(query, k1, v1, causal=causal, scale=0.7)
    whole = merge(first, plain_block(query, k2, v2, causal=False, scale=0.7))
    wanted = torch.autograd.grad(whole.output, (query, k1, v1, k2, v2), gradient)
    whole = type(whole)(*(part.detach() for part in whole))
    query, k1, v1, k2, v2 = (tensor.detach() for tensor in (query, k1, v1, k2, v2))
    one = backward(gradient, query, k1, v1, whole, causal=causal, scale=0.7)
    two = backward(gradient, query, k2, v2, whole, causal=False, scale=0.7)
    for found, each in zip((one.query + two.query, one.key, one.value, two.key, two.value), wanted, strict=True):
        assert torch.allclose(found, each, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_neighbouring_tokens_equal_one_process(four_ranks: World, method: str) -> None:
    check(four_ranks, Case(method, kv_heads=2, positions="rope", context=4, placement="contiguous"))


@given(world=st.integers(1, 6), size=st.integers(1, 3), zigzag=st.booleans())
def test_blocks_cover_what_is_seen_and_nothing_else(world: int, size: int, zigzag: bool) -> None:
    """Every (query, key) pair of a causal mask is computed once; in zigzag every rank computes as many."""
    S, work = 2 * world * size, []
    placement = "zigzag" if zigzag else "contiguous"
    positions = [context("ring", rank, world, placement).positions(S) for rank in range(world)]
    assert sorted(torch.cat(positions).tolist()) == list(range(S))
    for rank in range(world):
        computed = 0
        for source in range(world):
            part = seen(rank, source, 2 * size, zigzag=zigzag, causal=True)
            wanted = positions[rank][:, None] >= positions[source][None, :]
            found = torch.zeros_like(wanted)
            if part is not None:
                block_of = torch.ones_like(found[part.queries, part.keys])
                found[part.queries, part.keys] = block_of.tril() if part.causal else block_of
            assert torch.equal(found, wanted)
            computed += int(found.sum())
        work.append(computed)
    assert not zigzag or len(set(work)) == 1


# Edges #


def context(method: str, rank: int, world: int, placement: str = "zigzag") -> ContextParallel:
    group = SoloCommunicator("context")
    group.rank, group.world = rank, world
    return ContextParallel(group, method, placement)


def test_each_rank_has_its_tokens_and_their_positions() -> None:
    x = torch.arange(8)[None].expand(3, 8)
    (cut,), keywords = context("ulysses", 1, 2).cut((x,), {"scores": torch.ones(3, 8)})
    assert cut.tolist() == [[4, 5, 6, 7]] * 3
    assert keywords["position_ids"].tolist() == [[4, 5, 6, 7]]
    assert keywords["scores"].shape == (3, 8)  # no tokens
    (cut,), keywords = context("ring", 0, 2).cut((x,), {"position_ids": x})
    assert cut.tolist() == keywords["position_ids"].tolist() == [[0, 1, 6, 7]] * 3


@pytest.mark.parametrize(
    ("heads", "shared", "ranks", "wanted"), [(8, 8, 4, 1), (8, 2, 4, 2), (6, 2, 3, 3), (12, 3, 4, 4)]
)
def test_key_heads_are_repeated_as_little_as_possible(heads: int, shared: int, ranks: int, wanted: int) -> None:
    assert repeats(heads, shared, ranks) == wanted


def test_what_does_not_fit_is_refused_by_name() -> None:
    q = torch.zeros(1, 3, 4, 2)
    with pytest.raises(ValueError, match=r"3 heads cannot be cut among parallel.context = 2 ranks"):
        context("ulysses", 0, 2).attention(q, q, q)
    with pytest.raises(ValueError, match="with a mask or a bias"):
        context("ring", 0, 2).attention(q, q, q, torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"dropout 0\.1 inside attention"):
        context("ring", 0, 2).attention(q, q, q, dropout_p=0.1)
    with pytest.raises(ValueError, match="with as many keys as queries"):
        context("ring", 0, 2).attention(q, q[:, :, :2], q[:, :, :2])
    with pytest.raises(ValueError, match=r"sequences of 6 tokens .*= 2 ranks .*'ring'; allowed: a multiple of 4"):
        context("ring", 0, 2).positions(6)
    x = torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"integer tensors of \[4, 6\] tokens"):
        context("ulysses", 0, 2).cut((x, x[:, :4]), {})
    with pytest.raises(ValueError, match=r"Linear\.forward has no argument 'position_ids'"):
        context("ulysses", 0, 2).check_positions([nn.Linear(2, 2)], "Linear.forward has no argument")
    with pytest.raises(ValueError, match="context_attention"):
        Config.read({"parallel": {"context_attention": "rign"}}, 1)


# What the engine says of it #


def evaluate(rank: int, world: int, case: Case) -> tuple[float, float, int]:
    engine, *_ = initialize(case.build(), config=config(case, world), timeout_s=20.0)
    found = engine.evaluate([batch(0), batch(1)])
    engine.close()
    return found


def test_evaluation_counts_a_sequence_once(two_ranks: World) -> None:
    case = Case("ring")
    with torch.no_grad():
        losses = [float(case.build()(*batch(step))) for step in (0, 1)]
    for found in two_ranks.run(evaluate, case):
        assert (found.weight, found.batches) == (2 * BATCH, 2)
        assert found.loss == pytest.approx(sum(losses) / 2, rel=1e-10)


def rates(rank: int, world: int, case: Case, folder: str) -> tuple[float, float]:
    """Samples and tokens per second, by a clock that says that two seconds have passed."""
    keys = config(case, world, jsonl_monitor={"enabled": True, "output_path": folder})
    engine, *_ = initialize(case.build(), config=keys, timeout_s=20.0)
    engine.backward(engine(*batch(0)))
    assert engine.monitor is not None
    engine.monitor._since_s = 0.0
    with mock.patch("time.perf_counter", return_value=2.0):
        values = engine.monitor._values({})
    engine.close()
    return values["samples_per_s"], values["tokens_per_s"]


def test_rates_count_a_sequence_once(two_ranks: World, tmp_path: Path) -> None:
    for found in two_ranks.run(rates, Case("ulysses"), str(tmp_path)):
        assert found == (BATCH / 2, BATCH * SEQ / 2)


# As torch sees it #


def autocast(rank: int, world: int, method: str) -> tuple[list[float], set[str]]:
    """Losses under torch.autocast, and what travels: rope has widened queries and keys, but not values."""
    case = Case(method, kv_heads=2, positions="rope")
    keys = config(case, world, torch_autocast={"enabled": True, "dtype": "bfloat16"})
    engine, *_ = initialize(case.build().float(), config=keys, timeout_s=20.0)
    losses = []
    for step in range(STEPS):
        loss = engine(*batch(step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    formats = {entry.dtype for entry in engine.groups.axis("context").ledger}
    engine.close()
    return losses, formats


def test_autocast(two_ranks: World) -> None:
    """The mean loss over ranks is that of the other methods up to bf16's rounding (2^-8 relative)."""
    losses = []
    for method in METHODS:
        ranks = two_ranks.run(autocast, method)
        losses.append([sum(each) / 2 for each in zip(*(found for found, _ in ranks), strict=True)])
        assert ranks[0][1] == ({"bf16"} if method == "ulysses" else {"bf16", "fp32"})  # sums of gradients are wide
    for others in losses[1:]:
        assert others == pytest.approx(losses[0], rel=2**-8)
