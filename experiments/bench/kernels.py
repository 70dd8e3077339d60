"""The fused kernels against torch's operators, torch.compile and (where installed) DeepSpeed's Adam for CPUs.

    python -m windtunnel.experiments.bench.kernels [--device cpu|cuda --threads 1 2 --parameters P --rounds R --builds
                                                    --tokens N --vocab V --width D --only adamw ... --out FOLDER]

Contenders of a case take turns, so that whatever else the machine does hits all alike; the first one is what the others
are compared to. Bytes are the fewest that an operation must move (each operand once), and `copy_share` is their rate as
a share of what `copy_` of large tensors reaches on the same device and threads. Peak memory is measured in a run of its
own. Writes results/kernels_DEVICE.csv.
"""

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...engine.device import synchronize
from ..files import write_csv
from .kernel_cases import CASES, Case, Contender, Sizes

RESULTS = Path(__file__).parent / "results"
COPY_BYTES = 256 << 20


class Timed(NamedTuple):
    """Medians over the rounds."""

    seconds: float
    cpu_seconds: float


def take_turns(contenders: Sequence[Contender], rounds: int, device: torch.device) -> list[Timed]:
    """Each contender once per round, after one round that warms up."""
    samples: list[list[tuple[float, float]]] = [[] for _ in contenders]
    for number in range(rounds + 1):
        for contender, mine in zip(contenders, samples, strict=True):
            synchronize(device)
            began, cpu_began = time.perf_counter(), time.process_time()
            contender.run()
            synchronize(device)
            if number:
                mine.append((time.perf_counter() - began, time.process_time() - cpu_began))
    return [Timed(*(statistics.median(column) for column in zip(*mine, strict=True))) for mine in samples]


def copy_bytes_per_s(device: torch.device, rounds: int) -> float:
    """Read and written by `copy_` from one large tensor to another."""
    source, target = (torch.ones(COPY_BYTES // 4, device=device) for _ in range(2))
    (timed,) = take_turns([Contender("copy", lambda: target.copy_(source))], rounds, device)
    return 2 * COPY_BYTES / timed.seconds


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """What a run allocates at most above what there was before it."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    from ..witness import watch_allocations

    def once(mark: object) -> None:
        run()

    return watch_allocations(once).peak_bytes()


def rows_of(
    case: Case, sizes: Sizes, device: torch.device, rounds: int, copied: float, *, builds: bool
) -> Iterator[dict[str, Any]]:
    """One row for each contender that runs here; those that compile first only if they may."""
    made = case.make(sizes, device)
    contenders = [each for each in made.contenders if (builds or not each.builds) and _runs(each)]
    times = take_turns(contenders, rounds, device)
    for contender, timed in zip(contenders, times, strict=True):
        rate = made.least_bytes / timed.seconds
        yield {
            "what": case.name,
            "contender": contender.name,
            "elements": made.elements,
            "seconds": timed.seconds,
            "ratio": timed.seconds / times[0].seconds,
            "cpu_seconds": timed.cpu_seconds,
            "least_bytes": made.least_bytes,
            "bytes_per_s": rate,
            "copy_share": rate / copied,
            "peak_bytes": peak_bytes(contender.run, device) if case.weighs else "",
            "max_error": contender.error() if contender.error is not None else "",
        }


def _runs(contender: Contender) -> bool:
    """Whether it works here; else the reason goes to stderr."""
    try:
        contender.run()
    except (RuntimeError, ImportError, OSError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = str(error).strip().splitlines() or [repr(error)]
        print(f"{contender.name}: left out: {reason[0]}", file=sys.stderr)
        return False
    return True


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line for line in _cpu_info() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the CPU; each is measured")
    parser.add_argument("--parameters", type=int, default=50_000_000, help="that an optimizer steps")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--builds", action="store_true", help="also what compiles for up to minutes: torch.compile, DeepSpeed's Adam"
    )
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="by default all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    sizes = Sizes(chosen.parameters, chosen.tokens, chosen.vocab, chosen.width)
    rows: list[dict[str, Any]] = []
    for threads in chosen.threads if device.type == "cpu" else [1]:
        torch.set_num_threads(threads)
        copied = copy_bytes_per_s(device, chosen.rounds)
        about = {"device": device_name(device), "threads": threads, "copy_bytes_per_s": copied}
        for case in CASES:
            if chosen.only is not None and case.name not in chosen.only:
                continue
            for row in rows_of(case, sizes, device, chosen.rounds, copied, builds=chosen.builds):
                rows.append({**row, **about, "torch": torch.__version__, "date": date.today().isoformat()})
                print(
                    f"{case.name:22} {row['contender']:28} {threads} threads {row['seconds'] * 1e3:9.2f} ms"
                    f" ratio {row['ratio']:.3f} share of copy {row['copy_share']:.2f} peak {row['peak_bytes']}"
                    f" error {row['max_error']}"
                )
            gc.collect()
    print(write_csv(chosen.out / f"kernels_{device.type}.csv", rows))


if __name__ == "__main__":
    main()
