"""Which implementation of a kernel runs on which device: the one place that decides. Importing it loads no torch.

Each kernel has a plain-torch reference, which every device can run. A fast version stands in where there is one:
C++ or torch's own fused operators on the CPU, Triton on CUDA if the package `triton` is installed. What was taken is
logged once for each kernel and device, and `windtunnel hardware` lists it.
"""

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from .one_pass import Rule, Shards

log = logging.getLogger(__name__)

REFERENCE, CHUNKS, WHOLE = "plain torch", "torch, chunk by chunk", "torch, on whole tensors"
NATIVE, TRITON = "C++, compiled here", "triton"

PASSES = ("adamw", "sgd", "lion")
"""Optimizers that step in one pass over memory."""

CPU = {
    **dict.fromkeys(PASSES, NATIVE),
    "lamb": CHUNKS,
    "linear_cross_entropy": CHUNKS,
    "layer_norm": "torch's fused operator",
    **dict.fromkeys(("rms_norm", "bias_gelu", "swiglu", "rotary", "dropout_residual"), CHUNKS),
}
"""What runs on the CPU, by kernel."""

ON_CUDA = {
    **dict.fromkeys((*PASSES, "lamb"), WHOLE),
    "linear_cross_entropy": CHUNKS,
    "layer_norm": "torch's fused operator",
}
"""What runs on CUDA without Triton, where it is not the reference."""

WITH_TRITON = frozenset({*PASSES, "rms_norm", "swiglu", "bias_gelu", "dropout_residual"})
"""Kernels that have a Triton version."""


class Choice(NamedTuple):
    """What runs a kernel on a type of device, and why."""

    kernel: str
    device: str
    implementation: str
    why: str


@cache
def has_triton() -> bool:
    """Whether the package `triton` can be imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def compiler() -> str | None:
    """Path of the C++ compiler: that of the environment's CXX, else c++, g++ or clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def choice(kernel: str, device: str) -> Choice:
    """What runs `kernel` on devices of type `device`.

    Raises:
        ValueError: an unknown kernel.
    """
    if kernel not in CPU:
        raise ValueError(f"kernel = {kernel!r}; allowed: {', '.join(CPU)}")
    if device == "cpu" and CPU[kernel] == NATIVE:
        found = compiler()
        return Choice(kernel, device, NATIVE if found else CHUNKS, f"C++ compiler: {found or 'none'}")
    if device == "cpu":
        return Choice(kernel, device, CPU[kernel], "the fastest there is for CPUs here")
    if device == "cuda" and kernel in WITH_TRITON and has_triton():
        return Choice(kernel, device, TRITON, "triton is installed")
    why = "triton is not installed" if kernel in WITH_TRITON else "there is no Triton version"
    return Choice(kernel, device, ON_CUDA.get(kernel, REFERENCE) if device == "cuda" else REFERENCE, why)


def choices() -> list[Choice]:
    """All kernels on the CPU and on CUDA."""
    return [choice(kernel, device) for kernel in CPU for device in ("cpu", "cuda")]


@cache
def chosen(kernel: str, device: str) -> str:
    """As `choice`, its implementation alone; the log says so the first time."""
    found = choice(kernel, device)
    log.info("kernel %s on %s: %s (%s)", kernel, device, found.implementation, found.why)
    return found.implementation


def optimizer_step(kernel: str, device: str) -> "Callable[..., Tensor]":
    """`plain_step_` of kernels/one_pass.py, or what does the same faster on `device`, for the rule named `kernel`."""
    from . import one_pass

    implementation = chosen(kernel, device)
    if implementation == TRITON:
        from .triton_optimizers import triton_step_

        return triton_step_
    if implementation == NATIVE:
        from .native import native_step_

        return native_step_
    if implementation == WHOLE:
        return _whole_step_
    return one_pass.chunked_step_ if implementation == CHUNKS else one_pass.plain_step_


def _whole_step_(rule: "Rule", shards: "Shards", *, multiplier: float = 1.0) -> "Tensor":
    from .one_pass import chunked_step_

    return chunked_step_(rule, shards, multiplier=multiplier, chunk=1 << 62)
