"""A small model that is cut by hand along a tensor and a pipeline axis, and the plain torch loop to compare with.

Ranks of the tensor axis share each layer in the manner of Megatron (Shoeybi et al. 2019, section 3): a column-parallel
matrix, a row-parallel one, and a sum. The two towers are the stages: each has a loss of its own, so that no activation
is sent between them, while names, clipping and checkpoints are those of one model.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from windtunnel.engine import optim
from windtunnel.engine.communicator import Communicator, SoloCommunicator
from windtunnel.engine.config import Config
from windtunnel.engine.device import communicator_for
from windtunnel.engine.engine import Engine
from windtunnel.engine.groups import groups_for
from windtunnel.engine.mesh import Parallelism
from windtunnel.engine.roles import Role, Whole, give_role

WIDTH, HIDDEN, ROWS = 6, 5, 9
"""No size divides by the ranks: parts are uneven, and the table is padded."""

SAMPLES = 8


class _Spread(torch.autograd.Function):
    """The same values on all ranks into parts that differ: gradients are summed."""

    @staticmethod
    def forward(context: Any, values: Tensor, group: Communicator) -> Tensor:
        context.group = group
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return summed(gradient, context.group), None


class _Sum(torch.autograd.Function):
    """Terms of a sum into the sum, on all ranks."""

    @staticmethod
    def forward(context: Any, values: Tensor, group: Communicator) -> Tensor:
        return summed(values, group)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def summed(values: Tensor, group: Communicator) -> Tensor:
    result = values.contiguous().clone()
    group.all_reduce(result.view(-1), "test activations").wait()
    return result


class Block(nn.Module):
    """A gated layer: the matrix of gate and values is fused, and cut along rows in two ranges."""

    group: Communicator = SoloCommunicator()

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Parameter(torch.randn(2 * HIDDEN, WIDTH) / 2)
        self.up_bias = nn.Parameter(torch.randn(2 * HIDDEN) / 2)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.down = nn.Parameter(torch.randn(WIDTH, HIDDEN) / 2)
        self.down_bias = nn.Parameter(torch.randn(WIDTH) / 2)

    def forward(self, x: Tensor) -> Tensor:
        inside = functional.linear(_Spread.apply(self.norm(x), self.group), self.up, self.up_bias)
        gate, values = inside.chunk(2, -1)
        own = functional.linear(torch.tanh(gate) * values * self.gain, self.down)
        return x + _Sum.apply(own, self.group) + self.down_bias


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(2 * HIDDEN, WIDTH) / 2)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Model(nn.Module):
    """Two towers, and a table that every stage has, whose values only a loss of its own changes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.register_buffer("seen", torch.zeros(()))
        self.first: Tower | None = Tower()
        self.second: Tower | None = Tower()
        del self.second.own  # so that ZeRO cuts the table elsewhere on the other stage
        self.second.table = self.table  # the name that the last stage has for it besides

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.seen += 1
        loss = self.table.square().sum() / 2
        if self.first is not None:
            loss = loss + functional.mse_loss(self.first(x), y) + self.first.own.square().sum()
        if self.second is not None:
            loss = loss + functional.mse_loss(self.second(x), -y)
        return loss


def whole_model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return x, y


# Cutting #


def sections(size: int, parts: int, part: int) -> tuple[int, int]:
    return size * part // parts, size * (part + 1) // parts


def whole_of(name: str, shape: tuple[int, ...], parts: int, part: int) -> tuple[Whole, int] | None:
    """Where a rank's part is, and rows of padding; None where all ranks have the same."""
    start, stop = sections(HIDDEN, parts, part)
    match name.rpartition(".")[2]:
        case "up" | "up_bias" | "own":
            return Whole(shape, 0, ((start, stop), (HIDDEN + start, HIDDEN + stop))), 0
        case "down":
            return Whole(shape, 1, ((start, stop),)), 0
        case "table":  # which a rank may have no row of
            rows = -(-ROWS // parts)
            start, stop = min(ROWS, part * rows), min(ROWS, (part + 1) * rows)
            return Whole(shape, 0, ((start, stop),)), rows - (stop - start)
    return None


def cut(model: nn.Module, parts: int, part: int) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):
            give_role(parameter, Role(partial=("tensor",)))
        found = whole_of(name, tuple(parameter.shape), parts, part)
        if found is not None:
            whole, padding = found
            values = [parameter.data.narrow(whole.dim, start, stop - start) for start, stop in whole.ranges]
            if padding:
                values.append(parameter.data.new_zeros(padding, WIDTH))
            parameter.data = torch.cat(values, whole.dim)
            give_role(parameter, Role(cut=("tensor",), whole=whole))


# Training #


@dataclass(frozen=True)
class Layout:
    """Ranks by axis, and what ZeRO shards."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    stage: int = 0
    accumulation: int = 1
    clip: float = 0.0
    optimizer: str = "AdamW"
    order: tuple[str, ...] = ("tensor", "context", "data", "pipeline")

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline

    def place(self, rank: int) -> dict[str, int]:
        """Coordinates by axis."""
        parallelism = Parallelism(data=self.data, tensor=self.tensor, pipeline=self.pipeline, order=self.order)
        found, rest = {}, rank
        for name, size in parallelism.sizes.items():
            rest, found[name] = divmod(rest, size)
        return found

    @property
    def config(self) -> dict[str, Any]:
        return {
            "train_batch_size": SAMPLES,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.stage},
            "optimizer": {"type": self.optimizer, "params": {"lr": 1e-2, "weight_decay": 0.1}},
            "parallel": {"tensor": self.tensor, "pipeline": self.pipeline, "order": list(self.order)},
        }


def engine_of(model: nn.Module, layout: Layout) -> Engine:
    """Of a model that is cut already, not by `initialize`, which would do that itself."""
    communicator = communicator_for(torch.device("cpu"), 20.0)
    settings = Config.read(layout.config, communicator.world)
    optimizer = getattr(optim, layout.optimizer)(model.parameters(), lr=1e-2, weight_decay=0.1)
    return Engine(model, settings, groups_for(communicator, settings), optimizer, timeout_s=20.0)


def start(rank: int, layout: Layout) -> Engine:
    model, place = whole_model(), layout.place(rank)
    cut(model, layout.tensor, place["tensor"])
    if layout.pipeline == 2:
        setattr(model, ("second", "first")[place["pipeline"]], None)
    engine = engine_of(model, layout)
    for module in model.modules():
        if isinstance(module, Block):
            module.group = engine.groups.axis("tensor")
    return engine


def step(engine: Engine, layout: Layout, rank: int) -> float | None:
    """One step; the gradient norm, if gradients are clipped."""
    x, y = batch(engine.global_steps)
    data, micro_steps = layout.place(rank)["data"], layout.accumulation
    for micro_step in range(micro_steps):
        part = micro_step * layout.data + data
        mine = [each.chunk(layout.data * micro_steps)[part] for each in (x, y)]
        engine.backward(engine(*mine))
        engine.step()
    return engine.get_global_grad_norm()


def train_alone(steps: int, clip: float = math.inf, kind: str = "AdamW") -> tuple[dict[str, Tensor], list[float]]:
    """Plain torch: the parameters and the gradient norms."""
    model = whole_model()
    optimizer = getattr(optim, kind)(model.parameters(), lr=1e-2, weight_decay=0.1)
    norms = []
    for number in range(steps):
        model(*batch(number)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, norms
