"""kernels/one_pass.cpp, compiled once by this machine's C++ compiler and kept; nothing is compiled at import.

torch's fused optimizers read and write each value once, but the norm of the gradients, their scaling and the copy in 16
bits are passes of their own. On chunks that fit in cache, calls and waiting threads cost more than that saves: 1.4 to
1.8 times torch's time with one thread on an AMD EPYC, where this loop takes 0.65 to 0.77 times (20 M parameters).
"""

import ctypes
import hashlib
import logging
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adamw import AdamW
from .dispatch import compiler
from .lion import Lion
from .one_pass import Rule, Shards, check, chunked_step_
from .sgd import Sgd

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("one_pass.cpp")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC",
)  # fmt: skip
TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
NO_COPY = 0

LEAST_PER_THREAD = 1 << 15
"""Elements that are worth another thread: some 10 microseconds of work."""

COMPILE_LIMIT_S = 300.0


def folder() -> Path:
    """Where libraries are kept: windtunnel/kernels in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "windtunnel" / "kernels"


@cache
def library() -> Any:
    """The compiled loop; None where it cannot be had, which the log says."""
    command = compiler()
    if command is None:
        log.warning("no C++ compiler (CXX, c++, g++, clang++): optimizers step with torch's operators")
        return None
    path = folder() / f"one_pass-{_key(command)}.so"
    try:
        if not path.exists():
            _compile(command, path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("%s cannot be compiled: %s: optimizers step with torch's operators", SOURCE.name, reason)
        return None
    loaded.windtunnel_step.restype = ctypes.c_double
    whole, place = ctypes.c_int64, ctypes.c_void_p
    loaded.windtunnel_step.argtypes = [ctypes.c_int] * 3 + [whole, place, place, place, whole, whole, whole]
    return loaded


def _key(command: str) -> str:
    """Of the source, the flags, the compiler and the processor, for which it is compiled."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    told = [SOURCE.read_text(), *FLAGS, command, platform.machine(), platform.processor(), flags]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _compile(command: str, path: Path) -> None:
    """Beside it and renamed into place: several ranks may do this at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:
        made = Path(beside) / path.name
        subprocess.run(
            [command, *FLAGS, "-o", str(made), str(SOURCE)],
            check=True,
            capture_output=True,
            text=True,
            timeout=COMPILE_LIMIT_S,
        )
        made.replace(path)
    log.info("%s compiled by %s in %.1f s: %s", SOURCE.name, command, time.perf_counter() - began, path)


def native_step_(rule: Rule, shards: Shards, *, multiplier: float = 1.0) -> Tensor:
    """`plain_step_` of kernels/one_pass.py, for fp32 masters on the CPU; others, and all of them where nothing can be
    compiled, go through torch's operators.

    Sums of squares are of fp32 within 2048 elements, of float64 over those. It takes torch.get_num_threads() threads.
    """
    loaded = library()
    if loaded is None or not _suits(shards):
        return chunked_step_(rule, shards, multiplier=multiplier)
    check(rule, shards)
    number, values = _values(rule, shards, multiplier)
    tensors = len(shards.masters)
    columns: list[Sequence[Tensor]] = [shards.masters, shards.gradients, *shards.moments]
    columns += [()] * (4 - len(columns)) + [shards.copies]
    pointers = [column[n].data_ptr() if column else 0 for n in range(tensors) for column in columns]
    sizes = [master.numel() for master in shards.masters]
    arguments = (
        number,
        TYPES[shards.gradients[0].dtype],
        TYPES[shards.copies[0].dtype] if shards.copies else NO_COPY,
        tensors,
        (ctypes.c_int64 * tensors)(*sizes),
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_float * len(values))(*values),
        len(values) // tensors,
    )
    squares = _in_threads(lambda begin, end: loaded.windtunnel_step(*arguments, begin, end), sum(sizes))
    return torch.tensor(math.fsum(squares) if all(map(math.isfinite, squares)) else math.nan, dtype=torch.float64)


def _in_threads(part: Any, elements: int) -> list[float]:
    """What `part(begin, end)` returns of equal parts of the elements; ctypes lets threads run beside each other."""
    threads = max(1, min(torch.get_num_threads(), elements // LEAST_PER_THREAD))
    if threads == 1:
        return [part(0, elements)]
    bounds = [elements * n // threads for n in range(threads + 1)]
    return list(_pool(threads).map(part, bounds[:-1], bounds[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="windtunnel-kernel")


def _suits(shards: Shards) -> bool:
    """Whether the loop was compiled for their dtypes, each list having one."""
    for tensors, dtypes in ((shards.masters, {torch.float32}), (shards.gradients, TYPES), (shards.copies, TYPES)):
        found = {tensor.dtype for tensor in tensors}
        if len(found) > 1 or not found <= set(dtypes):
            return False
    return bool(shards.masters)


def _values(rule: Rule, shards: Shards, multiplier: float) -> tuple[int, list[float]]:
    """The number of a rule in one_pass.cpp, and its values there for each tensor, one after another."""
    match rule:
        case AdamW():
            (b1, b2), decay = rule.betas, rule.weight_decay
            fixed = [1 - rule.lr * decay if rule.decoupled else 1.0, 0.0 if rule.decoupled else decay]
            found: list[float] = []
            for step in shards.steps:
                t = float(step)
                rate, spread = rule.lr / (1 - b1**t), 1 / math.sqrt(1 - b2**t)
                found += [multiplier, *fixed, b1, 1 - b1, b2, 1 - b2, rate, spread, rule.eps]
            return 0, found
        case Sgd():
            mu, share = (0.0, 1.0) if rule.first else (rule.momentum, 1 - rule.dampening)
            ways = (rule.momentum, 1.0) if rule.nesterov else (1.0, 0.0)
            values = [multiplier, rule.lr, rule.weight_decay, mu, share, *ways]
            return (2 if rule.moments else 1), values * len(shards.masters)
        case Lion():
            (b1, b2), keep = rule.betas, 1 - rule.lr * rule.weight_decay
            return 3, [multiplier, rule.lr, keep, b1, 1 - b1, b2, 1 - b2] * len(shards.masters)
    raise ValueError(f"{type(rule).__name__} is not in {SOURCE.name}; allowed: AdamW, Sgd, Lion")
