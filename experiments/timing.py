"""Times the primitives on all ranks at once: bodies for a World, and what they return.

Every sample starts at a barrier, so that ranks compete for memory and cores as they do in training. Samples of all
primitives are interleaved in rounds: a disturbance of the machine costs each of them a sample, which the median drops.
"""

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional

from ..collectives.tiers import RING_STEPS
from ..collectives.trace import Kernel
from ..engine.communicator import Communicator
from ..engine.device import communicator_for
from ..engine.gloo import GlooCommunicator
from ..engine.world import World
from .primitives import Run, operators, products, recorded, small_module

ROUNDS = 5

SAMPLE_S = 200e-6
"""Shorter calls are repeated until a sample takes about as long."""

ENOUGH_S = 4.0
"""No more rounds are begun after this time: a busy machine gets a coarser profile, not a later one."""

RING_BYTES = tuple(4096 * 8**power for power in range(5))
"""4 KiB to 16 MiB."""

OVERLAP_S = 0.05
"""About how long the work is that shows how computation and communication disturb each other."""

OVERLAP_RING_BYTES = 4 << 20

TIMEOUT_S = 60.0


class Overlap(NamedTuple):
    """Work done alone, and both kinds started together: how long each then took."""

    compute_alone_s: float
    communication_alone_s: float
    compute_together_s: float
    communication_together_s: float


class RingTime(NamedTuple):
    """A ring collective on a whole buffer of `nbytes`."""

    kind: str
    nbytes: int
    seconds: float


class KernelTime(NamedTuple):
    kernel: Kernel
    seconds: float


class ModuleTime(NamedTuple):
    """Forward and backward of a small module, and the kernels that it starts."""

    kernels: tuple[Kernel, ...]
    seconds: float


class Timings(NamedTuple):
    """What was measured, each a mean over ranks of a median over rounds."""

    products: list[KernelTime]
    operators: list[KernelTime]
    module: ModuleTime
    rings: list[RingTime]
    overlap: Overlap
    framework_bytes: int


def time_everything(world: World, progress: Callable[[str], None]) -> Timings:
    """Run all the bodies below on a world of ranks."""
    framework_bytes = max(world.run(resident_bytes))
    progress("matrix products")
    timed_products = _mean(world.run(time_products))
    progress("operators that move memory")
    timed_operators = _mean(world.run(time_operators))
    progress("torch's overhead per operator")
    modules = world.run(time_module)
    progress("ring collectives")
    rings = world.run(time_rings)
    progress("computation and communication at once")
    overlaps = world.run(time_overlap)
    return Timings(
        products=timed_products,
        operators=timed_operators,
        module=ModuleTime(modules[0].kernels, fmean(module.seconds for module in modules)),
        rings=[
            RingTime(same[0].kind, same[0].nbytes, fmean(r.seconds for r in same)) for same in zip(*rings, strict=True)
        ],
        overlap=Overlap(*(fmean(column) for column in zip(*overlaps, strict=True))),
        framework_bytes=framework_bytes,
    )


def _mean(by_rank: list[list[KernelTime]]) -> list[KernelTime]:
    return [KernelTime(same[0].kernel, fmean(s for _, s in same)) for same in zip(*by_rank, strict=True)]


# On a rank #


def resident_bytes(rank: int, world: int) -> int:
    """Memory of a rank that has torch and a process group, and no model yet."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def time_products(rank: int, world: int) -> list[KernelTime]:
    timed = list(products())
    return [KernelTime(p.kernel, s) for p, s in zip(timed, medians([p.run for p in timed]), strict=True)]


@torch.no_grad()
def time_operators(rank: int, world: int) -> list[KernelTime]:
    timed = list(operators())
    return [KernelTime(p.kernel, s) for p, s in zip(timed, medians([p.run for p in timed]), strict=True)]


def time_module(rank: int, world: int) -> ModuleTime:
    run = small_module()
    return ModuleTime(tuple(recorded(run)), medians([run], rounds=20)[0])


def medians(runs: Sequence[Run], rounds: int = ROUNDS) -> list[float]:
    """Seconds of one call of each, on a rank. All ranks call this with the same runs."""
    _widen_heap()
    calls = [_calls(run) for run in runs]
    samples: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    for _ in range(rounds):
        for run, times, taken in zip(runs, calls, samples, strict=True):
            dist.barrier()
            taken.append(_seconds(run, times) / times)
        if _agree(time.perf_counter() - began > ENOUGH_S):
            break
    return [median(taken) for taken in samples]


def _widen_heap() -> None:
    """Make glibc keep what is freed.

    It maps a block anew for each allocation that is at least as large as the largest mapped one freed so far, up to 32
    MiB (mallopt(3), M_MMAP_THRESHOLD). A training process has passed that stage after its first steps.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _seconds(run: Run, times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - began


def _calls(run: Run) -> int:
    """How many calls make a sample. The first call was the one that was recorded; these complete the warm-up."""
    seconds = _seconds(run, 1)
    if seconds < 10 * SAMPLE_S:
        seconds = _seconds(run, 3) / 3
    return max(1, round(SAMPLE_S / seconds))


def time_rings(rank: int, world: int, sizes: Sequence[int] = RING_BYTES) -> list[RingTime]:
    """Each ring through the engine's communicator, on a buffer that stays."""
    communicator = _rings_over_sockets()
    cases = [(kind, nbytes) for kind in RING_STEPS for nbytes in sizes]
    runs = [_ring(communicator, kind, nbytes) for kind, nbytes in cases]
    calls = [max(1, min(10, (1 << 20) // nbytes)) for _, nbytes in cases]  # equal on all ranks: they meet in each
    samples: list[list[float]] = [[] for _ in cases]
    for _ in range(ROUNDS + 1):
        for run, times, taken in zip(runs, calls, samples, strict=True):
            dist.barrier()
            taken.append(_seconds(run, times) / times)
    communicator.close()
    return [RingTime(*case, median(taken[1:])) for case, taken in zip(cases, samples, strict=True)]


def _rings_over_sockets() -> Communicator:
    """What `verify` and `demo` train with."""
    communicator = communicator_for(torch.device("cpu"), TIMEOUT_S, shared_memory=False)
    if isinstance(communicator, GlooCommunicator):
        communicator.force("ring")
    return communicator


def _ring(communicator: Communicator, kind: str, nbytes: int) -> Run:
    start = getattr(communicator, kind)
    buffer = torch.zeros(nbytes // 4)
    return lambda: start(buffer, "calibration").wait()


@torch.no_grad()
def time_overlap(rank: int, world: int) -> Overlap:
    """A block's worth of products and memory-bound operators, rings, and both."""
    communicator = _rings_over_sockets()
    x, weight, bias = torch.randn(512, 512), torch.randn(512, 512), torch.randn(512)
    ring = _ring(communicator, "all_reduce", OVERLAP_RING_BYTES)

    def compute() -> None:
        functional.gelu(torch.addmm(bias, x, weight), approximate="tanh") + x

    compute()
    repeats = _agree(max(1, round(OVERLAP_S / medians([compute])[0])))
    _seconds(ring, 3)
    rings = _agree(max(1, round(OVERLAP_S / (_seconds(ring, 5) / 5))))
    rounds = []
    for _ in range(ROUNDS):
        dist.barrier()
        compute_alone_s = _seconds(compute, repeats)
        dist.barrier()
        communication_alone_s = _seconds(ring, rings)
        dist.barrier()
        rounds.append((compute_alone_s, communication_alone_s, *_together(compute, repeats, ring, rings)))
    communicator.close()
    return Overlap(*(median(column) for column in zip(*rounds, strict=True)))


def _together(compute: Run, repeats: int, ring: Run, rings: int) -> tuple[float, float]:
    """Seconds until the computation ended and until the rings ended; the latter are waited for by a thread."""
    communication_s = []
    began = time.perf_counter()
    waiter = threading.Thread(target=lambda: communication_s.append(_seconds(ring, rings)))
    waiter.start()
    _seconds(compute, repeats)
    compute_s = time.perf_counter() - began
    waiter.join()
    return compute_s, communication_s[0]


def _agree(number: int) -> int:
    """The largest of all ranks' numbers: they must take part in the same rings."""
    largest = torch.tensor([number])
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
