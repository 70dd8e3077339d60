"""Attention in separate kernels is the same attention; its kernels, and what it keeps, are those of Megatron-LM's."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from windtunnel.collectives.recompute import activation_bytes
from windtunnel.collectives.trace import Kernel
from windtunnel.engine.activation_section import ActivationSection
from windtunnel.engine.recompute import cores_of, recompute_blocks
from windtunnel.experiments.layout import Options, resolve
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.simulate import flight, simulate
from windtunnel.experiments.transformer import Transformer, initialize_weights
from windtunnel.kernels.core_attention import head_products, masked_softmax
from windtunnel.sim.hardware import load_cluster

GPT = ModelSpec(
    name="gpt", layers=4, hidden=256, heads=4, vocab=512, seq=512, mlp="gelu", norm="layernorm", positions="learned",
    attention="causal", tied=True, bias=True, attention_kernel="plain",
)  # fmt: skip
A100 = load_cluster("dgx-a100")

sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 5))


@settings(max_examples=30)
@given(shape=sizes, causal=st.booleans(), biased=st.booleans(), seed=st.integers(0, 99))
def test_it_is_the_fused_operator(shape: tuple[int, ...], causal: bool, biased: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn((1, shape[1], shape[2], shape[2]), generator=generator, dtype=torch.float64) if biased else None
    causal = causal and bias is None
    shares = masked_softmax(head_products(q, k.mT), bias, causal, shape[-1] ** -0.5)
    mixed = head_products(shares, v)
    wanted = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    torch.testing.assert_close(mixed, wanted)
    seeds = torch.randn(mixed.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(mixed, (q, k, v), seeds), torch.autograd.grad(wanted, (q, k, v), seeds), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def losses_and_gradients(spec: ModelSpec, policy: str) -> tuple[float, list[torch.Tensor]]:
    model = Transformer(spec)
    initialize_weights(model, seed=1)
    section = ActivationSection(policy=policy)  # type: ignore[arg-type]
    recompute_blocks(model, list(model.blocks), section, torch.device("cpu"))
    torch.manual_seed(2)
    tokens = torch.randint(spec.vocab, (2, 16))
    loss = model(tokens, tokens)
    loss.backward()
    return float(loss.detach()), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kernel", ["plain", "fused"])
def test_its_recomputation_is_the_same_training(kernel: str) -> None:
    spec = replace(GPT, layers=2, hidden=32, vocab=64, seq=16, attention_kernel=kernel, dropout=0.2)
    loss, gradients = losses_and_gradients(spec, "none")
    again, same = losses_and_gradients(spec, "attention")
    assert again == loss
    for one, other in zip(gradients, same, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_model_with_it_is_the_same_model() -> None:
    spec = replace(GPT, layers=2, hidden=32, heads=4, kv_heads=2, vocab=64, seq=16)
    plain, gradients = losses_and_gradients(spec, "none")
    fused, same = losses_and_gradients(replace(spec, attention_kernel="fused"), "none")
    assert plain == pytest.approx(fused, rel=1e-6)  # fp32 sums in another order
    for one, other in zip(gradients, same, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_recomputation_of_attention_needs_a_core() -> None:
    with pytest.raises(ValueError, match="no module in a Linear is called 'core_attention'; allowed: policy 'full'"):
        cores_of([torch.nn.Linear(2, 2)])


def test_its_products_are_priced_as_products() -> None:
    trace = flight(GPT, resolve(Options(gpus=1, micro_batch=2), GPT, A100))
    kernels = [op for segment in trace.segments for op in segment if isinstance(op, Kernel)]
    scores = [kernel for kernel in kernels if kernel.name == "head_products"]
    S, E = GPT.seq, GPT.head_size
    assert {kernel.shape for kernel in scores} == {(8, S, S, E), (8, S, E, S), (8, E, S, S)}
    assert all(kernel.family == "matmul" and kernel.flops == 2 * 8 * S * S * E for kernel in scores)
    softmax = next(kernel for kernel in kernels if kernel.name == "masked_softmax")
    assert (softmax.read_bytes, softmax.write_bytes) == (2 * 8 * S * S, 2 * 8 * S * S)
    assert not any(kernel.name == "attention" for kernel in kernels)


def test_model_flops_do_not_depend_on_the_kernel() -> None:
    plain, fused = (simulate(GPT, A100, gpus=1, micro_batch=2, attention=kernel) for kernel in ("plain", "fused"))
    for result in (plain, fused):
        assert result.tflops_per_gpu * 1e12 * result.step_time_s == pytest.approx(3 * GPT.forward_flops(2, GPT.seq))


KEPT = {"none": "none", "attention": "selective", "full": "full"}


@pytest.mark.parametrize("policy", KEPT)
def test_what_a_layer_keeps_is_the_closed_form(policy: str) -> None:
    """Korthikanti et al. 2022, table 2: 34 s b h + 5 a s^2 b, without the scores where the core is computed again."""
    spec = replace(GPT, dropout=0.1)
    least, most = (
        simulate(replace(spec, layers=layers), A100, gpus=1, micro_batch=4, recompute=policy, precision="fp16")
        for layers in (4, 8)
    )
    kept = (most.peak_memory_bytes["activations"] - least.peak_memory_bytes["activations"]) / 4
    wanted = activation_bytes(KEPT[policy], seq=spec.seq, batch=4, hidden=spec.hidden, heads=spec.heads)  # type: ignore[arg-type]
    # The paper leaves out means and variances of norms: 16 of 34 * 256 bytes per token.
    assert kept == pytest.approx(wanted, rel=0.01)
