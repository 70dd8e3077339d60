"""What offload costs a training step, and how much of a drive's bandwidth the engine reaches.

    python -m windtunnel.experiments.bench.offload [--layers N --hidden H --steps K --path FOLDER --mebibytes M]

Two CPU ranks train the same model with its optimizer state on the device, on the host and in files, one step of each in
turn, so that whatever else the machine does hits all alike. `dd` with direct I/O on the same folder is the drive's own
measure. Writes results/offload.csv.
"""

import argparse
import platform
import statistics
import subprocess
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ...engine.engine import Engine, initialize
from ...engine.nvme import Buffer, Folder
from ...engine.world import World
from ..files import write_csv
from ..models import ModelSpec
from ..transformer import Transformer, initialize_weights

RESULTS = Path(__file__).parent / "results"
WARM_UP_STEPS = 2
DD_LIMIT_S = 300.0
STAGES = (1, 3)


def make_engine(spec: ModelSpec, stage: int, sections: dict[str, Any]) -> Engine:
    torch.manual_seed(0)
    model = Transformer(spec)
    initialize_weights(model, seed=0)
    config = {
        "zero_optimization": {"stage": stage, **sections},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }
    engine, *_ = initialize(model, config)
    return engine


def train(rank: int, world: int, spec: ModelSpec, stage: int, steps: int, path: str) -> list[dict[str, Any]]:
    """Rows of one stage: median seconds of a step and its ratio to none, bytes per second of each way of moving."""
    nvme = {"device": "nvme", "nvme_path": path}
    ways: dict[str, dict[str, Any]] = {
        "none": {},
        "host": {"offload_optimizer": {"device": "cpu"}},
        "nvme": {"offload_optimizer": nvme},
    }
    if stage == 3:
        ways["host, parameters too"] = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
        ways["nvme, parameters too"] = {"offload_optimizer": nvme, "offload_param": nvme}
    engines = {name: make_engine(spec, stage, sections) for name, sections in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens = torch.randint(spec.vocab, (4, spec.seq), generator=torch.Generator().manual_seed(rank))
    for _ in range(steps):
        for name, engine in engines.items():
            began = time.perf_counter()
            logits = engine(tokens)
            engine.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
            engine.step()
            engine.settle()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[WARM_UP_STEPS:]) for name, times in seconds.items()}
    rows = []
    for name, engine in engines.items():
        moved = {way: each.bytes_per_s for way, each in engine.offload_report().items()}
        rows.append(
            {
                "what": f"ZeRO-{stage}, offload: {name}",
                "step_s": medians[name],
                "ratio_to_none": medians[name] / medians["none"],
                **{f"{way}_bytes_per_s": moved.get(way, 0.0) for way in ("step", "from_nvme", "to_nvme")},
            }
        )
        engine.close()
    return rows


def engine_file(path: str, nbytes: int) -> dict[str, Any]:
    """A file as the engine moves one, with nothing else under way."""
    folder = Folder(path, 0)
    file = folder.file("bench", nbytes)
    buffer = Buffer(file.nbytes)
    buffer.tensor.random_()
    rates = []
    for move in (file.write, file.read):
        began = time.perf_counter()
        move(buffer)
        rates.append(file.nbytes / (time.perf_counter() - began))
    folder.close()
    return {
        "what": f"one file of the engine ({'direct' if file.direct else 'through the page cache'})",
        "to_nvme_bytes_per_s": rates[0],
        "from_nvme_bytes_per_s": rates[1],
    }


def dd(path: str, mebibytes: int) -> dict[str, Any]:
    """The drive by `dd` past the page cache, in requests of 16 MiB."""
    blocks = -(-mebibytes // 16)
    with tempfile.TemporaryDirectory(dir=path) as folder:
        file = f"{folder}/dd"
        rates = [
            _dd_bytes_per_s(["if=/dev/zero", f"of={file}", "oflag=direct"], blocks),
            _dd_bytes_per_s([f"if={file}", "of=/dev/null", "iflag=direct"], blocks),
        ]
    return {"what": "dd with direct I/O", "to_nvme_bytes_per_s": rates[0], "from_nvme_bytes_per_s": rates[1]}


def _dd_bytes_per_s(arguments: list[str], blocks: int) -> float:
    began = time.perf_counter()
    command = ["dd", "bs=16M", f"count={blocks}", *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=DD_LIMIT_S)
    return (blocks << 24) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--path", default=tempfile.gettempdir(), help="a folder on the drive")
    parser.add_argument("--mebibytes", type=int, default=1024, help="size of the file that dd writes and reads")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if chosen.steps <= WARM_UP_STEPS:
        parser.error(f"steps = {chosen.steps}; allowed: more than the {WARM_UP_STEPS} that warm up")
    spec = ModelSpec(
        name="bench", layers=chosen.layers, hidden=chosen.hidden, heads=6, ffn=4 * chosen.hidden, vocab=8192, seq=128,
        mlp="gelu", norm="layernorm", positions="learned", attention="causal", tied=True, bias=True,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    with World(2, timeout_s=600.0, threads=1) as world:
        for stage in STAGES:
            rows += world.run(train, spec, stage, chosen.steps, chosen.path)[0]
    rows += [engine_file(chosen.path, chosen.mebibytes << 20), dd(chosen.path, chosen.mebibytes)]
    columns = ("what", "step_s", "ratio_to_none", "step_bytes_per_s", "from_nvme_bytes_per_s", "to_nvme_bytes_per_s")
    device = f"{platform.processor() or platform.machine()}, 2 ranks of 1 thread, {spec.parameters} parameters"
    table = [
        {**{name: row.get(name, "") for name in columns}, "device": device, "date": date.today().isoformat()}
        for row in rows
    ]
    print(write_csv(chosen.out / "offload.csv", table))
    for row in table:
        print({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()})


if __name__ == "__main__":
    main()
