"""Small transformers and batches for ranks that share layers. The ranks import this module."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from windtunnel.engine.engine import Engine, initialize
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights

SAMPLES, VOCAB, SEQ = 4, 17, 8

GPT = ModelSpec(
    name="tiny", layers=2, hidden=16, heads=4, ffn=15, vocab=VOCAB, seq=SEQ,
    mlp="gelu", norm="layernorm", positions="learned", attention="causal", tied=True, bias=True,
)  # fmt: skip

LLAMA = replace(GPT, kv_heads=2, ffn=13, mlp="swiglu", norm="rmsnorm", positions="rope", tied=False, bias=False)

SPECS = {"gpt": GPT, "llama": LLAMA, "alibi": replace(GPT, positions="alibi", tied=False)}

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}


def build(name: str, seed: int = 1) -> Transformer:
    model = Transformer(SPECS[name]).double()
    initialize_weights(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # a bias of zero or a norm of one would hide what is added twice
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(VOCAB, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(step))
    return x, (x + x.roll(1, 1)) % VOCAB


def started(model: nn.Module, config: dict[str, Any], **arguments: Any) -> Engine:
    engine, *_ = initialize(model, config, timeout_s=20.0, **arguments)
    return engine
