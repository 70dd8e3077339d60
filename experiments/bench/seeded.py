"""Models on which gradients are easily lost or counted twice: how far is a step from one process's?

    python -m windtunnel.experiments.bench.seeded

A module that two checkpointed calls share, and two backwards between two steps, trained for one step of plain SGD on
two ranks by our engine, DDP, FSDP2 and DeepSpeed (extra "peers"). An error is ||g - g1|| / ||g1|| over all parameters,
with the step g taken and the step g1 of one process on the whole batch; whoever refuses is reported with its words.
Writes results/seeded.csv.
"""

import os
import sys
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...engine.engine import initialize
from ...engine.world import World, WorldError
from ..files import write_csv
from .peers import available

RESULTS = Path(__file__).parent / "results" / "seeded.csv"
WIDTH, SAMPLES, RANKS = 16, 8, 2
LIMIT_S = 60.0


class Shared(nn.Module):
    """One block, called twice; each call is checkpointed if there is a kind of checkpoint to do it with."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(WIDTH, WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(2):
            h = h + (
                self.block(h) if self.reentrant is None else checkpoint(self.block, h, use_reentrant=self.reentrant)
            )
        return self.last(h).square().mean()


class Loop(NamedTuple):
    """How somebody trains: the forward, what calls backward, the step, and the parameters afterwards by name."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    parameters: Callable[[], dict[str, Tensor]]


def one_loss(loop: Loop, x: Tensor) -> None:
    loop.backward(loop.forward(x))


def two_losses(loop: Loop, x: Tensor) -> None:
    loop.backward(loop.forward(x))
    loop.backward(loop.forward(x.flip(1)))


SITUATIONS: dict[str, tuple[bool | None, Callable[[Loop, Tensor], None]]] = {
    "plain": (None, one_loss),
    "shared by two checkpointed calls": (False, one_loss),
    "shared by two reentrant checkpointed calls": (True, one_loss),
    "two backwards between steps": (None, two_losses),
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


def plain(model: nn.Module) -> Loop:
    optimizer = sgd(model)
    return Loop(model, lambda loss: loss.backward(), optimizer.step, lambda: whole(model))


def whole(model: nn.Module) -> dict[str, Tensor]:
    values = {name.removeprefix("module."): parameter.detach() for name, parameter in model.named_parameters()}
    return {name: getattr(value, "full_tensor", lambda value=value: value)().clone() for name, value in values.items()}


def ddp(model: nn.Module) -> Loop:
    from torch.nn.parallel import DistributedDataParallel

    return plain(DistributedDataParallel(model))


def fsdp2(model: nn.Module) -> Loop:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model.get_submodule("block"), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return plain(model)


def deepspeed(stage: int) -> Callable[[nn.Module], Loop]:
    def make(model: nn.Module) -> Loop:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
        import deepspeed as theirs

        config = {
            "train_micro_batch_size_per_gpu": SAMPLES // RANKS,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = theirs.initialize(model=model, optimizer=sgd(model), config=config, dist_init_required=False)

        def parameters() -> dict[str, Tensor]:
            with theirs.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
                return whole(model)

        return Loop(engine, engine.backward, engine.step, parameters)

    return make


def ours(stage: int) -> Callable[[nn.Module], Loop]:
    def make(model: nn.Module) -> Loop:
        config = {"zero_optimization": {"stage": stage}, "optimizer": {"type": "SGD", "params": {"lr": 1.0}}}
        engine, *_ = initialize(model, config, timeout_s=LIMIT_S)
        return Loop(engine, engine.backward, engine.step, engine.full_parameters)

    return make


CONTENDERS: dict[str, Callable[[nn.Module], Loop]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    **{f"deepspeed zero {stage}": deepspeed(stage) for stage in range(4)},
    **{f"windtunnel zero {stage}": ours(stage) for stage in range(4)},
}


def step_taken(loop: Loop, before: dict[str, Tensor], situation: str, x: Tensor) -> Tensor:
    """[parameters] what one step took off them."""
    SITUATIONS[situation][1](loop, x)
    loop.step()
    after = loop.parameters()
    return torch.cat([(before[name] - after[name]).flatten() for name in before])


def error(rank: int, world: int, name: str, situation: str) -> float:
    """The distance of this rank's step from one process's."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    alone, model = (Shared(SITUATIONS[situation][0]) for _ in range(2))
    model.load_state_dict(alone.state_dict())
    x = torch.randn(SAMPLES, WIDTH).requires_grad_()
    before = whole(alone)
    expected = step_taken(plain(alone), before, situation, x)
    mine = x.detach().chunk(world)[rank].requires_grad_()
    found = step_taken(CONTENDERS[name](model), before, situation, mine)
    return float((found - expected).norm() / expected.norm())


def outcome(name: str, situation: str) -> tuple[str, str]:
    """(error, what it said if it refused)"""
    with World(RANKS, threads=1, timeout_s=LIMIT_S) as world:
        try:
            return f"{max(world.run(error, name, situation, limit_s=2 * LIMIT_S)):.1e}", ""
        except WorldError as refusal:
            return "", str(refusal).splitlines()[0][:200]


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name in available(list(CONTENDERS)):
        for situation in SITUATIONS:
            off, said = outcome(name, situation)
            rows.append(
                {"date": date.today().isoformat(), "contender": name, "situation": situation, "off": off, "said": said}
            )
            print(name, situation, off or said, sep="\t", file=sys.stdout, flush=True)
    write_csv(RESULTS, rows)


if __name__ == "__main__":
    main()
