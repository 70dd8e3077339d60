"""AdamW, SGD with momentum and Lion in one pass over memory, in Triton; formulas and arguments as in their plain forms.

One program steps `BLOCK` elements: each value is read once and written once, whatever is done to it. Needs the package
`triton`; kernels/dispatch.py imports it only where that is installed.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw import AdamW
from .lion import Lion
from .one_pass import Rule, Shards, check
from .sgd import Sgd

BLOCK = 1024


@triton.jit
def _adamw(
    master, gradient, copy, partials, mean, square, step, elements, multiplier, lr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr, EPS: tl.constexpr,
    DECAY: tl.constexpr, DECOUPLED: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < elements
    x = tl.load(master + places, mask=inside, other=0.0)
    g = tl.load(gradient + places, mask=inside, other=0.0).to(x.dtype) * multiplier
    m = tl.load(mean + places, mask=inside, other=0.0)
    v = tl.load(square + places, mask=inside, other=0.0)
    tl.store(partials + tl.program_id(0), tl.sum(g * g))
    # 1 - b^t in fp64: at t = 1 fp32 would keep four digits of it.
    t = tl.load(step).to(tl.float64)
    rate = (lr / (1.0 - tl.exp(t * LOG1))).to(x.dtype)
    spread = tl.sqrt(1.0 - tl.exp(t * LOG2)).to(x.dtype)
    if DECOUPLED:
        x -= lr * DECAY * x
    else:
        g += DECAY * x
    m += (1.0 - BETA1) * (g - m)
    v = BETA2 * v + (1.0 - BETA2) * g * g
    x -= rate * m / (tl.sqrt(v) / spread + EPS)
    tl.store(master + places, x, mask=inside)
    tl.store(mean + places, m, mask=inside)
    tl.store(square + places, v, mask=inside)
    if COPIES:
        tl.store(copy + places, x.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _sgd(
    master, gradient, copy, partials, momentum, elements, multiplier, lr,
    MU: tl.constexpr, DAMPENING: tl.constexpr, DECAY: tl.constexpr, NESTEROV: tl.constexpr, FIRST: tl.constexpr,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < elements
    x = tl.load(master + places, mask=inside, other=0.0)
    g = tl.load(gradient + places, mask=inside, other=0.0).to(x.dtype) * multiplier
    tl.store(partials + tl.program_id(0), tl.sum(g * g))
    g += DECAY * x
    if MU != 0.0:
        m = g if FIRST else MU * tl.load(momentum + places, mask=inside, other=0.0) + (1.0 - DAMPENING) * g
        tl.store(momentum + places, m, mask=inside)
        g = g + MU * m if NESTEROV else m
    x -= lr * g
    tl.store(master + places, x, mask=inside)
    if COPIES:
        tl.store(copy + places, x.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _lion(
    master, gradient, copy, partials, momentum, elements, multiplier, lr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, DECAY: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < elements
    x = tl.load(master + places, mask=inside, other=0.0)
    g = tl.load(gradient + places, mask=inside, other=0.0).to(x.dtype) * multiplier
    m = tl.load(momentum + places, mask=inside, other=0.0)
    tl.store(partials + tl.program_id(0), tl.sum(g * g))
    c = BETA1 * m + (1.0 - BETA1) * g
    sign = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))  # 0 and nan are their own signs
    x -= lr * (sign + DECAY * x)
    m = BETA2 * m + (1.0 - BETA2) * g
    tl.store(master + places, x, mask=inside)
    tl.store(momentum + places, m, mask=inside)
    if COPIES:
        tl.store(copy + places, x.to(copy.dtype.element_ty), mask=inside)


def _values(rule: Rule) -> tuple[Any, dict[str, Any]]:
    """The kernel of a rule, and its constants by name."""
    match rule:
        case AdamW():
            logs = {"LOG1": math.log(rule.betas[0] or 1e-300), "LOG2": math.log(rule.betas[1] or 1e-300)}
            betas = {"BETA1": rule.betas[0], "BETA2": rule.betas[1]}
            return _adamw, {
                **betas, **logs, "EPS": rule.eps, "DECAY": rule.weight_decay, "DECOUPLED": rule.decoupled
            }  # fmt: skip
        case Sgd():
            return _sgd, {
                "MU": rule.momentum, "DAMPENING": rule.dampening, "DECAY": rule.weight_decay,
                "NESTEROV": rule.nesterov, "FIRST": rule.first,
            }  # fmt: skip
        case Lion():
            return _lion, {"BETA1": rule.betas[0], "BETA2": rule.betas[1], "DECAY": rule.weight_decay}
    raise ValueError(f"{type(rule).__name__} has no Triton version; allowed: AdamW, Sgd, Lion")


def triton_step_(rule: Rule, shards: Shards, *, multiplier: float = 1.0) -> Tensor:
    """`plain_step_` of kernels/one_pass.py; sums of squares are of fp32 within a block, of float64 over blocks."""
    check(rule, shards)
    kernel, constants = _values(rule)
    lr: float = rule.lr  # type: ignore[attr-defined]
    device = shards.masters[0].device if shards.masters else torch.device("cpu")
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for number, master in enumerate(shards.masters):
        elements = master.numel()
        if not elements:
            continue
        blocks = triton.cdiv(elements, BLOCK)
        partials = torch.empty(blocks, dtype=master.dtype, device=device)
        moments = [moment[number] for moment in shards.moments] or [master]  # SGD without momentum reads none
        steps = [shards.steps[number]] if isinstance(rule, AdamW) else []
        kernel[(blocks,)](
            master, shards.gradients[number], shards.copies[number] if shards.copies else master, partials, *moments,
            *steps, elements, multiplier, lr, **constants, COPIES=bool(shards.copies), BLOCK=BLOCK,
        )  # fmt: skip
        squares += partials.double().sum()
    return squares
