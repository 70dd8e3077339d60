"""A zoo of small models with seeded batches, what a rank does with one, and the plain torch loop to compare with.

The ranks import this module, so it imports nothing that only tests need.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from windtunnel.engine import optim
from windtunnel.engine.engine import Engine, initialize
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights

SAMPLES = 12
"""Samples in a global batch: 2 or 4 ranks and 1 or 3 micro-steps cut it evenly."""

VOCAB, SEQ = 17, 6

Batch = tuple[Tensor, Tensor]


# Models: each returns its loss, a mean over samples #


class Mlp(nn.Module):
    """Odd sizes: no parameter of it divides by 2 or 4."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.layers(x), y)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3)
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.stem(x.unflatten(1, (1, 1, 7)).expand(-1, -1, 7, -1) * x[:, None, :, None])
        for block in self.blocks:
            h = h + functional.gelu(block(h))
        return functional.mse_loss(self.head(h.mean(dim=(2, 3))), y)


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, VOCAB)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(self.lstm(self.embedding(x))[0][:, -1]), y[:, -1])


class Gpt(Transformer):
    """The loss in the model's own precision: the transformer's is in fp32, which would hide what float64 shows."""

    def __init__(self, tied: bool = False) -> None:
        spec = ModelSpec(
            name="tiny", layers=3, hidden=8, heads=2, ffn=15, vocab=VOCAB, seq=SEQ,
            mlp="gelu", norm="layernorm", positions="learned", attention="causal", tied=tied, bias=True,
        )  # fmt: skip
        super().__init__(spec)
        initialize_weights(self, seed=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(super().forward(x).flatten(0, 1), y.flatten())


class Checkpointed(Gpt):
    """A model that uses torch's checkpoint itself."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embedding(x) + self.positions.weight[:SEQ]
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False)
        return functional.cross_entropy(
            functional.linear(self.norm(h), self.embedding.weight).flatten(0, 1), y.flatten()
        )


class Residual(nn.Module):
    """An embedding, blocks that are listed, and a head: what the special cases below have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 7)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 7), nn.GELU()) for _ in range(3)])
        self.head = nn.Linear(7, VOCAB)

    def order(self) -> list[int]:
        return [0, 1, 2]

    def scaled(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embedding(x)
        for number in self.order():
            h = h + self.blocks[number](h)
        return functional.cross_entropy(self.head(self.scaled(h)).flatten(0, 1), y.flatten())


class Frozen(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)
        self.embedding.requires_grad_(False)
        self.blocks[2][1].bias.requires_grad_(False)


class OneElement(Residual):
    """Some ranks hold no element of a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.9))
        self.lonely = nn.ModuleList([Scale(), Scale()])

    def scaled(self, h: Tensor) -> Tensor:
        return self.lonely[1](self.lonely[0](h * self.scale))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.1))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale


class UsedTwice(Residual):
    def order(self) -> list[int]:
        return [0, 1, 2, 1, 0]


class NeverUsed(Residual):
    """Parameters that no rank uses: one in the root, one in a block, and a whole block."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)
        self.blocks[0].register_parameter("spare", nn.Parameter(torch.ones(5)))

    def order(self) -> list[int]:
        return [0, 2]


class SometimesUsed(Residual):
    """A sample's first token chooses its path, so some ranks or steps miss some parameters (see `routed_batch`)."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        odd = x[:, :1] % 2 == 1
        h = self.embedding(x[:, 1:]).mean(1)
        for block in self.blocks:
            h = h + block(h)
        even_path = h if odd.all() else self.even(h)
        odd_path = self.odd(h) if odd.any() else h
        return functional.cross_entropy(self.head(torch.where(odd, odd_path, even_path)), y[:, 1])


class Switch(nn.Module):
    """A block half of which only samples with an odd first token use."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, h: Tensor, odd: Tensor) -> Tensor:
        h = h + torch.tanh(self.always(h))
        return torch.where(odd, self.sometimes(h), h) if odd.any() else h


class SometimesUsedInBlocks(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Switch() for _ in range(3)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embedding(x[:, 1:]).mean(1)
        for block in self.blocks:
            h = block(h, x[:, :1] % 2 == 1)
        return functional.cross_entropy(self.head(h), y[:, 1])


# Batches #


def regression_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(SAMPLES, 7, generator=generator, dtype=torch.float64),
        torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64),
    )


def token_batch(step: int) -> Batch:
    x = torch.randint(VOCAB, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(step))
    return x, (x + x.roll(1, 1)) % VOCAB


def routed_batch(step: int) -> Batch:
    """First tokens: odd in the last half of the samples on every other step, even elsewhere."""
    x, y = token_batch(step)
    x[:, 0] = 2
    if step % 2 == 1:
        x[SAMPLES // 2 :, 0] = 3
    return x, y


@dataclass(frozen=True)
class Animal:
    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]


ZOO: dict[str, Animal] = {
    "mlp": Animal(Mlp, regression_batch),
    "cnn": Animal(Cnn, regression_batch),
    "lstm": Animal(Lstm, token_batch),
    "gpt": Animal(Gpt, token_batch),
    "tied": Animal(lambda: Gpt(tied=True), token_batch),
    "recomputed": Animal(lambda: Checkpointed(tied=True), token_batch),
    "frozen": Animal(Frozen, token_batch),
    "one element": Animal(OneElement, token_batch),
    "used twice": Animal(UsedTwice, token_batch),
    "never used": Animal(NeverUsed, token_batch),
    "sometimes used": Animal(SometimesUsed, routed_batch),
    "sometimes used in blocks": Animal(SometimesUsedInBlocks, routed_batch),
}


# Training #


@dataclass(frozen=True)
class Run:
    """A training run; everything but the stage and the accumulation means the same to one process."""

    model: str
    stage: int = 0
    accumulation: int = 1
    clip: float = 0.0
    optimizer: str = "AdamW"
    schedule: bool = False
    dtype: torch.dtype = torch.float64
    steps: int = 20

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return ZOO[self.model].make().to(self.dtype)

    def batch(self, step: int) -> Batch:
        x, y = ZOO[self.model].batch(step)
        return (x.to(self.dtype) if x.is_floating_point() else x), (y.to(self.dtype) if y.is_floating_point() else y)


# Configured by name, with arguments that torch and the JSON share. Weight decay shows a step that should not be taken.
CONFIGURED: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "Adam": {"lr": 1e-2},
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Lion": {"lr": 1e-2, "weight_decay": 0.1},
    "Lamb": {"lr": 3e-2, "weight_decay": 0.1},
    "Adagrad": {"lr": 3e-2},
    "RMSprop": {"lr": 1e-2, "momentum": 0.5},
    "NAdam": {"lr": 1e-2},
    "plain": {"lr": 0.1},
}

TYPES = {"plain": "SGD"}
"""Class of an optimizer whose name in CONFIGURED is another."""


def momentum_sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)


def grouped_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Matrices decay; vectors do not, and have another learning rate."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() > 1]
    vectors = [parameter for parameter in trainable if parameter.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}], lr=1e-2
    )


def whole_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    if run.optimizer == "grouped":
        return grouped_adamw(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if run.optimizer == "momentum":
        return momentum_sgd(trainable)
    return getattr(optim, TYPES.get(run.optimizer, run.optimizer))(trainable, **CONFIGURED[run.optimizer])


def warmup(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 8))


@dataclass(frozen=True)
class Outcome:
    """Losses by step (of a rank: the mean over its micro-steps), the parameters, and the gradient norms if clipped."""

    losses: list[float]
    parameters: dict[str, Tensor]
    norms: list[float]


def train_alone(run: Run) -> Outcome:
    """One process, whole batches, plain torch."""
    model = run.build()
    optimizer = whole_optimizer(run, model)
    scheduler = warmup(optimizer) if run.schedule else None
    losses, norms = [], []
    for step in range(run.steps):
        loss = model(*run.batch(step))
        loss.backward()
        if run.clip:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)))
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return Outcome(losses, {name: parameter.detach() for name, parameter in model.named_parameters()}, norms)


def start_engine(run: Run, model: nn.Module, *, timeout_s: float = 20.0, **overrides: Any) -> Engine:
    """The engine for a run; `overrides` are keys of the config."""
    config: dict[str, Any] = {
        "train_batch_size": SAMPLES,
        "gradient_accumulation_steps": run.accumulation,
        "gradient_clipping": run.clip,
        "zero_optimization": {"stage": run.stage},
    }
    optimizer: Any = None
    match run.optimizer:
        case "grouped":
            optimizer = grouped_adamw(model)
        case "momentum":
            optimizer = momentum_sgd
        case name:
            config["optimizer"] = {"type": TYPES.get(name, name), "params": CONFIGURED[name]}
    config.update(overrides)
    scheduler = warmup if run.schedule else None
    engine, *_ = initialize(model, config, optimizer=optimizer, lr_scheduler=scheduler, timeout_s=timeout_s)
    return engine


def micro_batches(run: Run, step: int, rank: int, world: int) -> list[Batch]:
    """This rank's share of a global batch: of each micro-step's samples the rank-th part."""
    x, y = run.batch(step)
    parts = run.accumulation * world
    return list(zip(x.chunk(parts)[rank::world], y.chunk(parts)[rank::world], strict=True))


def train_step(engine: Engine, run: Run, step: int, rank: int, world: int) -> float:
    losses = []
    for x, y in micro_batches(run, step, rank, world):
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def train_rank(rank: int, world: int, run: Run, zero: Mapping[str, Any] | None = None) -> Outcome:
    """The same run on one of `world` ranks; `zero` has further keys of `zero_optimization`."""
    engine = start_engine(run, run.build(), zero_optimization={"stage": run.stage, **(zero or {})})
    losses, norms = [], []
    for step in range(run.steps):
        losses.append(train_step(engine, run, step, rank, world))
        if (norm := engine.get_global_grad_norm()) is not None:
            norms.append(norm)
    outcome = Outcome(losses, engine.full_parameters(), norms)
    engine.close()
    return outcome
