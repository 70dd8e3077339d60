"""Tiny models of transformers with random weights, and what a rank does with one.

The ranks import this module; where transformers is not installed, nothing does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from windtunnel.engine.engine import initialize
from windtunnel.engine.partition import repeated_blocks

VOCAB, SEQ, SAMPLES = 67, 12, 8

SGD = {"lr": 0.2, "momentum": 0.9}
"""Not Adam, which turns a gradient that is zero but for rounding (a key's bias) into a step of either sign."""


def gpt2(attention: str = "sdpa", recompute: bool = False) -> nn.Module:
    """Tied embeddings."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=attention, loss_type="ForCausalLM",
    )  # fmt: skip
    return _trained(GPT2LMHeadModel(config), recompute)


def llama(attention: str = "sdpa", recompute: bool = False) -> nn.Module:
    """Grouped heads, a head of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, attn_implementation=attention,
    )  # fmt: skip
    return _trained(LlamaForCausalLM(config), recompute)


def _trained(model: Any, recompute: bool) -> nn.Module:
    if recompute:  # its name changes with version 6 of transformers
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
        model.config.use_cache = False
    return model.train()


MODELS: dict[str, Callable[..., nn.Module]] = {"gpt2": gpt2, "llama": llama}
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}


def batch(step: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCAB, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens, "labels": tokens.clone()}


def sample(model: str, attention: str, recompute: bool) -> tuple[nn.Module, Callable[[], tuple]]:
    """For a flight: a model made for real, and a batch, as shapes on the simulated device."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from windtunnel.experiments.samples import to_sim

    with unset_fake_temporarily(), torch.device("cpu"):
        made, data = MODELS[model](attention, recompute), batch(0)
    return to_sim(made, data)


@dataclass(frozen=True)
class HfRun:
    model: str
    attention: str = "sdpa"
    recompute: bool = False
    stage: int = 0
    steps: int = 6

    def build(self) -> nn.Module:
        return MODELS[self.model](self.attention, self.recompute).double()


@dataclass(frozen=True)
class HfOutcome:
    losses: list[float]
    parameters: dict[str, Tensor]
    blocks: bool
    generated: list[int]


def train_rank(rank: int, world: int, run: HfRun) -> HfOutcome:
    """The whole output of the model goes to `backward`; every other step, its loss does."""
    model: Any = run.build()
    config = {"zero_optimization": {"stage": run.stage}, "optimizer": {"type": "SGD", "params": SGD}}
    engine, *_ = initialize(model=model, config=config, timeout_s=20.0)
    listed = list(engine.module.get_submodule(BLOCKS[run.model]))
    found = repeated_blocks(model) == listed and {unit.block for unit in engine.runtime.units} == {-1, 0, 1, 2}
    losses = []
    for step in range(run.steps):
        part = {name: tensor.chunk(world)[rank] for name, tensor in batch(step).items()}
        outputs = engine(**part)
        engine.backward(outputs if step % 2 else outputs.loss)
        engine.step()
        losses.append(outputs.loss.item())
    generated = engine.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, do_sample=False, pad_token_id=0)
    outcome = HfOutcome(losses, engine.full_parameters(), found, generated[0].tolist())
    assert engine.config is model.config
    engine.close()
    return outcome


def train_alone(run: HfRun) -> HfOutcome:
    """One process, whole batches, plain torch."""
    model: Any = run.build()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    losses = []
    for step in range(run.steps):
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    generated = model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, do_sample=False, pad_token_id=0)
    return HfOutcome(losses, {name: p.detach() for name, p in model.named_parameters()}, True, generated[0].tolist())


def save(rank: int, world: int, folder: str) -> None:
    """Whole weights of a model that is in shards, in the library's own format."""
    model: Any = gpt2()
    engine, *_ = initialize(model, {"zero_optimization": {"stage": 3}}, timeout_s=20.0)
    state = engine.full_state_dict()
    if rank == 0:
        engine.module.save_pretrained(folder, state_dict=state)
    engine.close()
