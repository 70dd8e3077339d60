"""How far parallel training strays from one process in fp32: ZeRO 0 to 3 beside DDP, in one run.

    python -m windtunnel.experiments.bench.distance [ranks ...]

Writes results/distance.csv: after 20 steps, ||a - b|| / ||b|| over all parameters, and the largest relative difference
of a step's mean loss. float64 rows show the largest distance of any one tensor.
"""

import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ...engine.world import World
from ..comparison import PARAMETER
from ..files import write_csv
from ..judgement import distances
from ..ranks import LEARNING_RATE, Task, measure
from ..reference import Known, reference
from ..samples import run_model, share

TARGET = "windtunnel.experiments.demo:sample"
STEPS = 20
RESULTS = Path(__file__).parent / "results" / "distance.csv"


def ddp(rank: int, world: int, task: Task, one: Known) -> tuple[float, float, float]:
    """(parameters' distance over all, of the worst tensor, loss's) of DistributedDataParallel from one process."""
    model, batches = task.sample()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    known = torch.load(task.snapshot_path(STEPS - 1))
    worst = 0.0
    for batch, wanted in zip(batches, one.losses, strict=True):
        loss = run_model(parallel, share(batch, world, rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().double() / world
        dist.all_reduce(mean)
        worst = max(worst, abs(float(mean) - wanted) / abs(wanted))
    pairs = [(p.detach().double(), known[PARAMETER, name].double()) for name, p in model.named_parameters()]
    off = sum(float((a - b).norm()) ** 2 for a, b in pairs) ** 0.5
    size = sum(float(b.norm()) ** 2 for _, b in pairs) ** 0.5
    return off / size, max(float((a - b).norm() / b.norm()) for a, b in pairs), worst


def rows_for(world: World, precision: str, folder: str) -> list[dict[str, Any]]:
    task = Task(TARGET, STEPS, precision, 1, 60.0, folder)
    known = world.run(reference, task, (STEPS - 1,))[0]
    overall, tensor, loss = world.run(ddp, task, known)[0]
    rows = [_row(world.size, precision, "DDP", overall, tensor, loss)]
    for stage in range(4):
        overall, tensor, loss = distances(world.run(measure, task, stage, (STEPS - 1,)), known)
        rows.append(_row(world.size, precision, f"ZeRO {stage}", overall, tensor, loss))
    return rows


def _row(ranks: int, precision: str, who: str, overall: float, tensor: float, loss: float) -> dict[str, Any]:
    row = {
        "date": date.today().isoformat(),
        "ranks": ranks,
        "precision": precision,
        "who": who,
        "all_parameters": f"{overall:.2e}",
        "worst_tensor": f"{tensor:.2e}",
        "loss": f"{loss:.2e}",
    }
    print(*row.values(), flush=True)
    return row


def main() -> None:
    rows = []
    for ranks in [int(argument) for argument in sys.argv[1:]] or [2, 4]:
        with World(ranks) as world, tempfile.TemporaryDirectory() as folder:
            for precision in ("fp32", "fp64"):
                rows += rows_for(world, precision, folder)
    write_csv(RESULTS, rows)


if __name__ == "__main__":
    main()
