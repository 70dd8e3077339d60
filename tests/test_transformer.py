"""The module: as many parameters as its numbers say, the right function, and no need of real memory to be built."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from windtunnel.engine.activation_section import ActivationSection
from windtunnel.engine.recompute import recompute_blocks
from windtunnel.experiments.models import ModelSpec, load_model, model_names
from windtunnel.experiments.transformer import Transformer, alibi_bias, initialize_weights, rotate

Policy = Literal["none", "full", "selective"]

TINY = ModelSpec(
    name="tiny",
    layers=2,
    hidden=32,
    heads=4,
    vocab=50,
    seq=12,
    mlp="gelu",
    norm="layernorm",
    positions="learned",
    attention="causal",
    tied=True,
    bias=True,
)
SPECS = {
    "gpt": TINY,
    "llama": replace(TINY, kv_heads=2, mlp="swiglu", ffn=48, norm="rmsnorm", positions="rope", tied=False, bias=False),
    "bloom": replace(TINY, positions="alibi", heads=8, kv_heads=8),
    "bert": replace(TINY, attention="full"),
    "full-alibi": replace(TINY, positions="alibi", attention="full", kv_heads=1),
    "bare": replace(TINY, positions="none", bias=False, tied=False),
}


def build(spec: ModelSpec, recompute: Policy = "none", seed: int = 0) -> Transformer:
    model = Transformer(spec)
    initialize_weights(model, seed)
    recompute_blocks(model, list(model.blocks), ActivationSection(policy=recompute), torch.device("cpu"))
    return model


def text(spec: ModelSpec, seq: int | None = None) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(spec.vocab, (2, 2, seq or spec.seq), generator=torch.Generator().manual_seed(3))
    return drawn[0], drawn[1]


def loss_and_grads(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(*text(model.spec))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating tensors are built with this dtype (fake parameters cannot be swapped by `Module.to`)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, word: str) -> int:
        return sum(word in name and "backward" not in name for name in self.names)


@pytest.mark.parametrize("name", [*model_names(), *SPECS])
def test_module_has_the_parameters_of_its_numbers(name: str) -> None:
    spec = SPECS.get(name) or load_model(name)
    with torch.device("meta"):
        model = Transformer(spec)
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.parameters


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_loss_is_the_cross_entropy_of_the_logits_and_every_parameter_learns(spec: ModelSpec) -> None:
    model = build(spec)
    tokens, targets = text(spec)
    logits = model(tokens)
    assert logits.shape == (2, spec.seq, spec.vocab)
    loss, grads = loss_and_grads(model)
    assert loss.shape == ()
    torch.testing.assert_close(loss, functional.cross_entropy(logits.reshape(-1, spec.vocab), targets.reshape(-1)))
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_later_token_changes_earlier_logits_only_in_full_attention(spec: ModelSpec) -> None:
    model = build(spec)
    tokens, _ = text(spec)
    changed = tokens.clone()
    changed[:, -3] = (changed[:, -3] + 1) % spec.vocab
    before, after = model(tokens)[:, : spec.seq - 3], model(changed)[:, : spec.seq - 3]
    if spec.attention == "causal":
        torch.testing.assert_close(before, after, rtol=0, atol=0)
    else:
        assert not torch.allclose(before, after)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_shorter_sequence_sees_the_same_positions(spec: ModelSpec) -> None:
    model = build(replace(spec, attention="causal"))
    tokens, _ = text(spec)
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5])
    with pytest.raises(ValueError, match="got 13 tokens per sequence, but seq = 12"):
        model(text(spec, seq=13)[0])


def test_grouped_heads_equal_repeated_heads() -> None:
    grouped = build(replace(TINY, kv_heads=2))
    repeated = build(TINY)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if "qkv" in name:
            q, k, v = weight.split([32, 16, 16])
            k, v = (part.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v))
            weights[name] = torch.cat((q, k, v))
    repeated.load_state_dict(weights)
    tokens, _ = text(TINY)
    torch.testing.assert_close(grouped(tokens), repeated(tokens))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_attention_runs_as_one_operator(spec: ModelSpec) -> None:
    model = build(spec)
    with Operators() as operators:
        model(text(spec)[0])
    assert operators.count("flash_attention") == spec.layers
    assert operators.count("softmax") == 0


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_recomputing_changes_neither_loss_nor_gradients(spec: ModelSpec, recompute: Policy) -> None:
    loss, grads = loss_and_grads(build(spec))
    loss_again, grads_again = loss_and_grads(build(spec, recompute))
    assert torch.equal(loss, loss_again)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-6, atol=1e-8, msg=name)


def test_full_recompute_repeats_the_matmuls_and_selective_only_the_rest() -> None:
    counts = {}
    policies: tuple[Policy, ...] = ("none", "full", "selective")
    for recompute in policies:
        model = build(TINY, recompute)
        with Operators() as operators:
            loss_and_grads(model)
        counts[recompute] = [operators.count(word) for word in ("addmm", "flash_attention", "gelu")]
    assert counts["none"] == [8, 2, 2]
    assert counts["selective"] == [8, 2, 4]
    assert counts["full"][1:] == [4, 4]
    assert counts["full"][0] > 8


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_flies_on_fake_tensors(spec: ModelSpec) -> None:
    with FakeTensorMode(), default_dtype(torch.bfloat16):
        model = Transformer(spec)
        tokens = torch.zeros(2, spec.seq, dtype=torch.int64)
        loss = model(tokens, tokens)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Transformer(load_model("gpt3-175b"))
        logits = model(torch.zeros(1, 128, dtype=torch.int64))
    assert logits.shape == (1, 128, 50257)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_bf16_is_near_fp32(spec: ModelSpec) -> None:
    exact, _ = loss_and_grads(build(spec))
    rounded, grads = loss_and_grads(build(spec).to(torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in grads.values())
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_model_built_on_meta_is_complete_once_initialized(spec: ModelSpec) -> None:
    with torch.device("meta"):
        moved = Transformer(spec)
    moved.to_empty(device="cpu")
    initialize_weights(moved, seed=0)
    torch.testing.assert_close(moved(text(spec)[0]), build(spec)(text(spec)[0]), rtol=0, atol=0)


def test_weights_follow_the_seed_and_have_the_stated_spread() -> None:
    first, second = build(load_model("gpt-demo")), build(load_model("gpt-demo"), seed=1)
    assert not torch.equal(first.embedding.weight, second.embedding.weight)
    block = first.blocks[0]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.02)
    assert not block.mlp.up.bias.any()
    assert (first.norm.weight == 1).all()


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    model = Transformer(SPECS["llama"])
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    turned = [rotate(x.expand(1, 1, 12, 8), model.rope)[0, 0] for x in (q, k)]
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm().expand(12))
    scores = turned[0] @ turned[1].T
    torch.testing.assert_close(scores.diagonal(2), scores[0, 2].expand(10))


def test_alibi_slopes_are_those_of_the_paper() -> None:
    slopes_8 = -alibi_bias(8, 2, causal=True)[0, :, 1, 0]
    torch.testing.assert_close(slopes_8, torch.tensor([2.0**-i for i in range(1, 9)]))
    slopes_6 = -alibi_bias(6, 2, causal=True)[0, :, 1, 0]
    torch.testing.assert_close(slopes_6, torch.tensor([2.0**-i for i in (2, 4, 6, 8, 1, 3)]))
    assert alibi_bias(6, 3, causal=True)[0, 0, 0, 1] == -float("inf")


def test_a_position_dependent_model_learns() -> None:
    model = build(TINY)
    tokens, targets = text(TINY)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_experts_are_as_many_as_counted(mlp: str) -> None:
    spec = replace(TINY, mlp=mlp, experts=4, top_k=2)
    assert sum(parameter.numel() for parameter in Transformer(spec).parameters()) == spec.parameters
