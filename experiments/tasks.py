"""Toy tasks that a tiny GPT learns in seconds: what training must be able to do whatever its precision or traffic.

A sequence of a task is prompt, separator, answer: x1 ... xL | y1 ... yL. The model sees it shifted by one and is asked
for the answer alone; targets of the prompt are -100, which cross-entropy leaves out.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..engine.loader import generator_for
from .corpus import corpus_bytes
from .models import ModelSpec
from .transformer import Transformer, initialize_weights

IGNORED = -100
"""The target that torch's cross-entropy leaves out."""

Kind = Literal["copy", "reverse", "sort"]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sequences(Dataset[Pair]):
    """Random prompts and their answers; sample i depends on `seed` and i alone.

    Attributes:
        kind: the answer is the prompt, the prompt backwards, or the prompt in ascending order.
        symbols: how many different ones there are; the separator is one more.
        length: of the prompt, and of the answer.
    """

    kind: Kind
    symbols: int = 8
    length: int = 6
    samples: int = 4096
    seed: int = 0

    @property
    def vocab(self) -> int:
        return self.symbols + 1

    @property
    def seq(self) -> int:
        """Tokens of a sample."""
        return 2 * self.length

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Pair:
        """(tokens, targets), both [seq] int64."""
        if not 0 <= index < self.samples:
            raise IndexError(index)
        prompt = torch.randint(self.symbols, (self.length,), generator=generator_for(self.seed, index))
        whole = torch.cat((prompt, torch.tensor([self.symbols]), answer(self.kind, prompt)))
        targets = whole[1:].clone()
        targets[: self.length] = IGNORED
        return whole[:-1], targets


def answer(kind: Kind, prompt: Tensor) -> Tensor:
    """What a task wants to hear."""
    if kind == "copy":
        return prompt
    return prompt.flip(0) if kind == "reverse" else prompt.sort().values


@dataclass(frozen=True)
class Characters(Dataset[Pair]):
    """Windows of real text (experiments/corpus.py), bytes as tokens: the next byte is to be foretold.

    Attributes:
        skipped_bytes: where the text begins: another part of the corpus is held out.
    """

    seq: int = 32
    samples: int = 2048
    skipped_bytes: int = 0
    vocab: int = 256

    def __post_init__(self) -> None:
        text = corpus_bytes(self.skipped_bytes + self.samples * self.seq + 1)[self.skipped_bytes :]
        object.__setattr__(self, "_text", torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Pair:
        """(tokens, targets), both [seq] int64: windows do not overlap."""
        if not 0 <= index < self.samples:
            raise IndexError(index)
        window = self._text[index * self.seq : (index + 1) * self.seq + 1].long()  # type: ignore[attr-defined]
        return window[:-1], window[1:]


Task = Sequences | Characters


def tiny_gpt(task: Task, *, hidden: int = 32, layers: int = 2, heads: int = 2, seed: int = 1) -> Transformer:
    """A GPT of the task's vocabulary and length, with weights."""
    spec = ModelSpec(
        name=f"tiny-{hidden}", layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, vocab=task.vocab,
        seq=task.seq, mlp="gelu", norm="layernorm", positions="learned", attention="causal", tied=False, bias=True,
    )  # fmt: skip
    model = Transformer(spec)
    initialize_weights(model, seed)
    return model


def stacked(task: Task, start: int, count: int) -> Pair:
    """Samples `start` to `start` + `count` as one batch, both [count, seq]."""
    tokens, targets = zip(*(task[index] for index in range(start, start + count)), strict=True)
    return torch.stack(tokens), torch.stack(targets)


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor, targets: Tensor) -> float:
    """Share of the asked-for tokens that are the model's first choice, given those before (teacher forcing)."""
    asked = targets != IGNORED
    return float((model(tokens).argmax(-1) == targets)[asked].double().mean())
