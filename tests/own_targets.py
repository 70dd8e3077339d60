"""Models of a user's own for `simulate`: tiny ones of transformers, recurrent and convolutional ones, impossible ones.

The pilot imports this module. transformers is imported by the functions that need it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB, SEQ, SAMPLES = 61, 12, 4

Sample = tuple[nn.Module, Any]


def tokens(samples: int = SAMPLES, seq: int = SEQ) -> Tensor:
    return torch.randint(VOCAB, (samples, seq), generator=torch.Generator().manual_seed(0))


def labelled() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def bert() -> Sample:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    return BertForMaskedLM(config), {**labelled(), "attention_mask": torch.ones(SAMPLES, SEQ, dtype=torch.int64)}


def xlnet() -> Sample:
    from transformers import XLNetConfig, XLNetLMHeadModel

    return XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=2, n_head=2, d_inner=24)), labelled()


def t5(attention: str = "eager") -> Sample:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
        attn_implementation=attention,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), labelled()


def t5_fused() -> Sample:
    """Its mask is a learned bias."""
    return t5("sdpa")


class Recurrent(nn.Module):
    """Tokens to logits by way of an LSTM or GRU; returns (loss, logits)."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.recurrent = kind(8, 10, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(20, VOCAB)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _ = self.recurrent(self.embedding(inputs))
        logits = self.head(hidden)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits


def lstm() -> Sample:
    return Recurrent(nn.LSTM), (tokens(), tokens())


def gru() -> Sample:
    return Recurrent(nn.GRU), (tokens(), tokens())


class Cnn(nn.Module):
    """Strided, grouped and dilated convolutions, norms with running statistics, a pool; images to a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).square().mean()


def cnn() -> Sample:
    return Cnn(), torch.randn(SAMPLES, 3, 16, 16)


WIDE, DEEP = 40_000, 20


class Chain(nn.Module):
    """32 G parameters, and a constructor that looks at values, as one with a drop-path rate for each layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, DEEP)]
        self.blocks = nn.ModuleList([nn.Linear(WIDE, WIDE, bias=False) for _ in range(DEEP)])
        shared = nn.Parameter(torch.ones(WIDE))
        self.scale = shared
        self.same = shared

    def forward(self, x: Tensor) -> Tensor:
        for block, rate in zip(self.blocks, self.rates, strict=True):
            x = block(x * self.same) * (1 - rate)
        return x.mean()


def chain() -> Sample:
    print("what a user's module prints is no part of the answer")
    return Chain(), torch.randn(2, WIDE)


def block_chain() -> Sample:
    """No loss: the mean of the output stands for it."""
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(3)]
    return nn.Sequential(*blocks), torch.randn(SAMPLES, 32)


class Looks(nn.Module):
    """Wraps a layer that needs values, as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = Looking(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean()


class Looking(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)
        self.offset = torch.zeros(4)  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if self.kind == "branch":
            return y if y.sum() > 0 else -y
        if self.kind == "select":
            return y[y > 0]
        return y + self.offset


def branch() -> Sample:
    return Looks("branch"), torch.randn(2, 4)


def select() -> Sample:
    return Looks("select"), torch.randn(2, 4)


def elsewhere() -> Sample:
    return Looks("device"), torch.randn(2, 4)


def wrong_batch() -> Sample:
    return nn.Linear(4, 4), torch.randn(2, 5)


def no_model() -> Any:
    return torch.randn(2)


def fails() -> Sample:
    raise KeyError("weights")


def two_sizes() -> Sample:
    return Recurrent(nn.LSTM), (tokens(), tokens(samples=2, seq=2 * SEQ))


def batches() -> tuple[nn.Module, list[Any]]:
    """As `verify` wants them."""
    model, batch = lstm()
    return model, [batch, batch]
