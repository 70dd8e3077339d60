"""What experiments/bench/kernels.py compares: torch's ways and ours, and the fewest bytes that each operation moves."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...kernels import activations, dropout, norms
from ...kernels.adamw import AdamW
from ...kernels.dispatch import optimizer_step
from ...kernels.linear_cross_entropy import linear_cross_entropy, plain_linear_cross_entropy
from ...kernels.lion import Lion
from ...kernels.one_pass import Rule, Shards, plain_step_
from ...kernels.sgd import Sgd

CHECKED = 10_000
"""Elements on which an optimizer's pass is held against its reference in float64."""


class Sizes(NamedTuple):
    """Parameters that an optimizer steps; tokens, vocabulary and width of a model."""

    parameters: int
    tokens: int
    vocab: int
    width: int


class Contender(NamedTuple):
    """One way: what runs, and its largest difference to the reference as a share of the largest value there.

    `builds`: its first call compiles for up to minutes; it runs only if it is asked for.
    """

    name: str
    run: Callable[[], object]
    error: Callable[[], float] | None = None
    builds: bool = False


class Made(NamedTuple):
    contenders: Sequence[Contender]
    least_bytes: float
    elements: int


class Case(NamedTuple):
    """`weighs`: peak memory is measured too."""

    name: str
    make: Callable[[Sizes, torch.device], Made]
    weighs: bool = False


# Optimizers #


def _shards(rule: Rule, elements: int, device: torch.device) -> Shards:
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> list[Tensor]:
        return [torch.randn(elements, device=device, generator=generator)]

    moments = tuple([tensor.abs_() for tensor in draw()] for _ in rule.moments)
    steps = [torch.tensor(10.0, device=device)] if isinstance(rule, AdamW) else []
    return Shards(draw(), draw(), moments, steps, [torch.empty(elements, dtype=torch.bfloat16, device=device)])


def _pass_error(rule: Rule, device: torch.device) -> float:
    step = optimizer_step(type(rule).__name__.lower(), device.type)
    found = _shards(rule, CHECKED, device)
    wanted = Shards(
        [found.masters[0].double()],
        [found.gradients[0].double()],
        tuple([moment[0].double()] for moment in found.moments),
        found.steps,
    )
    step(rule, found, multiplier=0.5)
    plain_step_(rule, wanted, multiplier=0.5)
    return _difference(found.masters[0], wanted.masters[0])


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def optimizer_case(rule: Rule, torchs: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[..., Made]:
    """Gradients in fp32, their norm, a step, and the new parameters in bf16.

    torch's way takes the norm, has its fused optimizer step (told to scale gradients through a multiplication, as a
    clipped step does), and copies. Ours does all in one pass; then once more with the norm first, as clipping by a
    global norm needs it.
    """

    def make(sizes: Sizes, device: torch.device) -> Made:
        shards = _shards(rule, sizes.parameters, device)
        ((master,), (gradient,), (copy,)) = shards.masters, shards.gradients, shards.copies
        parameter = nn.Parameter(master)
        parameter.grad = gradient
        optimizer = torchs([parameter])
        step = optimizer_step(type(rule).__name__.lower(), device.type)

        def theirs() -> None:
            torch.linalg.vector_norm(gradient)
            optimizer.step()
            copy.copy_(parameter.detach())

        def norm_first() -> None:
            torch.linalg.vector_norm(gradient)
            step(rule, shards, multiplier=0.999)

        contenders = [
            Contender("torch fused, norm, copy", theirs),
            Contender("one pass", lambda: step(rule, shards), lambda: _pass_error(rule, device)),
            Contender("norm, then one clipped pass", norm_first),
        ]
        if isinstance(rule, AdamW) and device.type == "cpu":
            contenders.append(_deepspeed(rule, gradient, copy, sizes.parameters))
        # master and moments come and go, the gradient comes, the copy goes
        return Made(contenders, sizes.parameters * (8.0 * (1 + len(rule.moments)) + 4 + 2), sizes.parameters)

    return make


def _deepspeed(rule: AdamW, gradient: Tensor, copy: Tensor, elements: int) -> Contender:
    """DeepSpeed's Adam for CPUs, built at its first use; its own optimizer does not take the norm or round."""
    made: list[Callable[[], None]] = []

    def build() -> Callable[[], None]:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        parameter = nn.Parameter(torch.zeros(elements))
        parameter.grad = gradient
        optimizer = DeepSpeedCPUAdam([parameter], lr=rule.lr, betas=rule.betas, weight_decay=rule.weight_decay)

        def run() -> None:
            torch.linalg.vector_norm(gradient)
            optimizer.step()
            copy.copy_(parameter.detach())

        return run

    def run() -> None:
        if not made:
            made.append(build())
        made[0]()

    return Contender("DeepSpeed's, norm, copy", run, builds=True)


def _with_foreach(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The one that torch lacks a fused version of."""
    from ...engine.optim import Lion as LionOptimizer

    return LionOptimizer(parameters, lr=1e-4, weight_decay=0.1)


# Forward and backward #


def forward_and_backward(
    plain: Callable[..., Tensor],
    fused: Callable[..., Tensor],
    inputs: Callable[[Sizes, torch.device], list[Tensor]],
    passes: float,
    reference: Callable[..., Tensor] | None = None,
) -> Callable[..., Made]:
    """`plain` as torch runs it and compiled, and `fused`, on the same inputs.

    Args:
        inputs: of both; gradients are taken of those that are floating.
        passes: tensors as large as the first input that must be read or written at least.
        reference: what `fused` is held against in float64, if not `plain`.
    """

    def make(sizes: Sizes, device: torch.device) -> Made:
        given = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs(sizes, device)]
        leaves = [tensor for tensor in given if tensor.requires_grad]
        shape = plain(*given)
        gradient = torch.ones_like(shape)

        def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            output = function(*given)
            return output.detach(), *torch.autograd.grad(output, leaves, gradient)

        def error() -> float:
            wide = [t.detach().double().requires_grad_() if t.requires_grad else t for t in given]
            output = (reference or plain)(*wide)
            wanted = torch.autograd.grad(output, [t for t in wide if t.requires_grad], gradient.double())
            return max(_difference(*pair) for pair in zip(run(fused), (output.detach(), *wanted), strict=True))

        compiled = torch.compile(plain)
        contenders = [
            Contender("torch", lambda: run(plain)),
            Contender("fused", lambda: run(fused), error),
            Contender("torch.compile", lambda: run(compiled), builds=True),
        ]
        first = given[0]
        return Made(contenders, passes * first.numel() * first.element_size(), first.numel())

    return make


def _activations(count: int, *, weight: bool = False) -> Callable[[Sizes, torch.device], list[Tensor]]:
    def make(sizes: Sizes, device: torch.device) -> list[Tensor]:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        rows = [torch.randn(sizes.tokens, sizes.width, device=device, dtype=dtype) for _ in range(count)]
        return [*rows, torch.randn(sizes.width, device=device, dtype=dtype)] if weight else rows

    return make


def _cross_entropy(sizes: Sizes, device: torch.device) -> list[Tensor]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(sizes.tokens, sizes.width, device=device, dtype=dtype)
    weight = 0.02 * torch.randn(sizes.vocab, sizes.width, device=device, dtype=dtype)
    return [hidden, weight, torch.randint(sizes.vocab, (sizes.tokens,), device=device)]


SEED = torch.tensor(1)

CASES: list[Case] = [
    Case(
        "adamw",
        optimizer_case(AdamW(lr=1e-4), lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True)),
    ),
    Case(
        "sgd",
        optimizer_case(Sgd(lr=1e-4, momentum=0.9), lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, fused=True)),
    ),
    Case("lion", optimizer_case(Lion(weight_decay=0.1), _with_foreach)),
    Case(
        "linear_cross_entropy",
        forward_and_backward(plain_linear_cross_entropy, linear_cross_entropy, _cross_entropy, 4),
        weighs=True,
    ),
    Case(
        "rms_norm",
        forward_and_backward(
            lambda x, w: functional.rms_norm(x, (x.shape[-1],), w, 1e-5),
            lambda x, w: norms.rms_norm(x, w, 1e-5)[0],
            _activations(1, weight=True),
            5,
        ),
        weighs=True,
    ),
    Case(
        "add_rms_norm",
        forward_and_backward(
            lambda x, r, w: functional.rms_norm(x + r, (x.shape[-1],), w, 1e-5),
            lambda x, r, w: norms.rms_norm(x, w, 1e-5, r)[0],
            _activations(2, weight=True),
            7,
        ),
        weighs=True,
    ),
    Case(
        "swiglu",
        forward_and_backward(lambda g, u: functional.silu(g) * u, activations.swiglu, _activations(2), 8),
        weighs=True,
    ),
    Case(
        "bias_gelu",
        forward_and_backward(
            lambda x, b: functional.gelu(x + b, approximate="tanh"),
            activations.bias_gelu,
            _activations(1, weight=True),
            5,
        ),
        weighs=True,
    ),
    Case(
        "dropout_residual",
        forward_and_backward(
            lambda x, r: r + functional.dropout(x, 0.1),
            lambda x, r: dropout.dropout(x, 0.1, SEED, r),
            _activations(2),
            5,
            lambda x, r: dropout.plain_dropout(x, 0.1, int(SEED), r),
        ),
        weighs=True,
    ),
]
