"""How fast the simulator answers: the processor time of whole commands, and of layouts in one process.

    python -m windtunnel.experiments.bench.speed

Writes results/speed.csv. "first ever" is a command that flies everything anew; "cold" is one whose flights another
process has flown before (experiments/flights.py); "warm" is another layout of a model that this process has simulated.
Processor time is of all processes together: other work on the machine does not count.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from ..files import write_csv
from ..simulate import simulate

RESULTS = Path(__file__).parent / "results" / "speed.csv"

JOBS: dict[str, dict[str, Any]] = {
    "175B, tp 8, pp 16, dp 8": {
        "model": "gpt3-175b", "cluster": "dgx-a100", "tp": 8, "pp": 16, "dp": 8, "global_batch": 512,
        "recompute": "full",
    },
    "175B, the same interleaved in 3": {
        "model": "gpt3-175b", "cluster": "dgx-a100", "tp": 8, "pp": 16, "dp": 8, "global_batch": 512,
        "interleave": 3, "recompute": "full",
    },
    "1T, 3,072 GPUs": {
        "model": "gpt-1t", "cluster": "dgx-a100", "tp": 8, "pp": 64, "dp": 6, "global_batch": 3072,
        "recompute": "full",
    },
    "175B, 131,072 GPUs": {
        "model": "gpt3-175b", "cluster": "dgx-a100", "tp": 8, "pp": 16, "dp": 1024, "global_batch": 32_768,
        "zero": 1, "recompute": "full",
    },
    "175B, 131,072 GPUs, 1 % slow": {
        "model": "gpt3-175b", "cluster": "dgx-a100", "tp": 8, "pp": 16, "dp": 1024, "global_batch": 32_768,
        "zero": 1, "recompute": "full", "slow_ranks": 0.01, "slow_factor": 1.3,
    },
}  # fmt: skip

SWEEP = tuple(
    {"tp": tp, "pp": pp, "dp": 1024 // tp // pp, "global_batch": 512} for tp in (8, 4) for pp in (1, 2, 4, 8, 16)
)
"""Ten layouts of 175B on 1,024 GPUs."""


def processor_s() -> float:
    """Seconds of processor time of this process and those of its children that have ended."""
    return sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def command(job: dict[str, Any], folder: str) -> tuple[float, float, float]:
    """(processor seconds, seconds, most bytes of a process) of the whole command."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in job.items()]
    began_s, spent_s = time.perf_counter(), processor_s()
    subprocess.run(
        [sys.executable, "-m", "windtunnel.experiments.cli", "simulate", *options, "--json"],
        check=True, stdout=subprocess.DEVNULL, env={**os.environ, "WINDTUNNEL_FLIGHTS": folder},
    )  # fmt: skip
    most_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return processor_s() - spent_s, time.perf_counter() - began_s, most_bytes


def here(job: dict[str, Any]) -> tuple[float, float, float]:
    """The same of a call in this process."""
    began_s, spent_s = time.perf_counter(), processor_s()
    simulate(**job)
    return processor_s() - spent_s, time.perf_counter() - began_s, 0.0


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def note(what: str, how: str, measured: tuple[float, float, float]) -> None:
        spent_s, wall_s, most_bytes = measured
        found.append(
            {
                "what": what, "how": how, "processor_s": round(spent_s, 4), "wall_s": round(wall_s, 4),
                "most_bytes": int(most_bytes), "date": date.today().isoformat(),
            }
        )  # fmt: skip
        print(f"{what}: {how}: {spent_s:.3f} s of processor time, {wall_s:.3f} s", flush=True)

    for name, job in JOBS.items():
        with tempfile.TemporaryDirectory() as folder:
            note(name, "first ever", command(job, folder))
            note(name, "cold", command(job, folder))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WINDTUNNEL_FLIGHTS"] = folder
        layouts = [{"model": "gpt3-175b", "cluster": "dgx-a100", "recompute": "full", **each} for each in SWEEP]
        began = [here(layout) for layout in layouts]
        note("175B, ten layouts", "first ever, here", (sum(one[0] for one in began), sum(one[1] for one in began), 0.0))
        for layout in layouts:
            name = f"175B, tp {layout['tp']}, pp {layout['pp']}, dp {layout['dp']}"
            note(name, "warm, another batch", here({**layout, "global_batch": 1024}))
    return found


def main() -> None:
    write_csv(RESULTS, rows())


if __name__ == "__main__":
    main()
