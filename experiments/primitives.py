"""The operators that a calibration times: real CPU tensors, real calls, named and counted as a flight records them.

Each primitive is run once under a dispatch mode that describes its operator (engine/operators.py), so its name and its
bytes are those that a trace holds; then it is only timed. Operands are warm and results are new, as in training.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..collectives.trace import Kernel
from ..engine.operators import describe
from ..engine.sim_device import attention, attention_backward
from ..engine.sim_optimizer import optimizer_step
from ..kernels import activations, norms
from ..kernels.adamw import AdamW
from ..kernels.one_pass import Shards, chunked_step_

aten = torch.ops.aten

Run = Callable[[], object]

WIDTH = 256
"""Columns of a row-wise operand (norms, softmax, embeddings)."""

TINY, LARGE = 1, 1 << 22
ELEMENTS = (1 << 10, 1 << 14, 1 << 18, 1 << 20, LARGE)
"""Sizes of an operand: 4 KiB to 16 MiB in fp32. Operators that also run on scalars are timed on one element too."""

TOKENS = (512, 2048)
FEATURES = (64, 256, 1024)
"""Products have all sizes of FEATURES in all places, and TOKENS rows with the larger two in the others."""

BATCHED = ((64, 128, 128, 32), (64, 128, 32, 128), (16, 256, 256, 64), (16, 256, 64, 256))
"""(batch, m, n, k) of unfused attention."""

PIECES = (0.25, 0.0833, 0.3333, 0.3334)
"""Matrices of a transformer block as shares of its parameters: what a fused optimizer gets, with short vectors."""

SHORT_VECTORS = 8

HEADS, HEAD_SIZE, SEQ = 8, 32, 128
"""Of the attention that is timed, at several batch sizes."""


class Primitive(NamedTuple):
    """An operator on its operands, and the kernel that a trace holds for it."""

    kernel: Kernel
    run: Run


class Kernels(TorchDispatchMode):
    """Collects the kernels of what runs inside it, like the recorder of a flight."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Kernel] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        operands = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if function.namespace != "prim" and (kernel := describe(function, operands, args, results)) is not None:
            self.seen.append(kernel)
        return result


def recorded(run: Run) -> list[Kernel]:
    """The kernels of a call."""
    with Kernels() as kernels:
        run()
    return kernels.seen


def primitive(run: Run) -> Primitive:
    """A call that starts one kernel.

    Raises:
        RuntimeError: it starts none, or several: its time would belong to no kernel.
    """
    kernels = recorded(run)
    if len(kernels) != 1:
        raise RuntimeError(f"a primitive must start one kernel, not {[kernel.name for kernel in kernels]}")
    return Primitive(kernels[0], run)


class Pool:
    """Operands of all sizes in a few buffers, so that hundreds of primitives take the memory of the largest."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.buffers = [torch.randn(LARGE, generator=generator) for _ in range(4)]
        self.out = torch.randn(LARGE, generator=generator)

    def flat(self, elements: int, which: int = 0) -> Tensor:
        return self.buffers[which][:elements]

    def matrix(self, rows: int, columns: int, which: int = 0) -> Tensor:
        return self.flat(rows * columns, which).view(rows, columns)

    def target(self, elements: int) -> Tensor:
        """What an operator may write to."""
        return self.out[:elements]


def operators() -> Iterator[Primitive]:
    """The operators that move bytes, and attention, at several sizes."""
    pool = Pool()
    for elements in (TINY, *ELEMENTS):
        yield from map(primitive, element_wise(pool, elements))
    for elements in ELEMENTS:
        yield from map(primitive, row_wise(pool, elements))
        yield from map(primitive, losses_and_embeddings(pool, elements))
        yield from map(primitive, optimizers(elements))
        yield from map(primitive, fused(pool, elements))
        yield one_pass(elements)
    for batch in (1, 2, 4, 8, 16):
        yield from fused_attention(batch)
    for pieces in (4, 16):
        scalars = [torch.zeros(()) for _ in range(pieces)]
        yield primitive(partial(torch._foreach_add_, scalars, 1.0))


def element_wise(pool: Pool, elements: int) -> Iterable[Run]:
    """Operators on [elements], those in place with values that stay as they are."""
    x, y, out = pool.flat(elements), pool.flat(elements, 1), pool.target(elements)
    positive = pool.flat(elements, 2).abs_()
    one, half = torch.ones(()), x.bfloat16()
    return (
        lambda: x + y,
        lambda: torch.mul(x, 0.5, out=out),  # how the engine takes a gradient
        lambda: x * y,
        lambda: out.mul_(one),  # how it clips
        lambda: out.div_(1.0),  # how a norm counts shared gradients
        lambda: torch.stack((x, y)),
        lambda: out.add_(y, alpha=1e-9),
        lambda: out.copy_(x),
        lambda: x.clone(),
        lambda: x.to(torch.bfloat16),
        lambda: half.to(torch.float32),
        lambda: pool.target(elements).zero_(),
        lambda: out.fill_(1.0),
        lambda: torch.zeros(elements),
        lambda: torch.full((elements,), 1.0),
        lambda: torch.zeros_like(x),
        lambda: torch.ones_like(x),
        lambda: positive.sqrt(),
        lambda: positive.rsqrt(),
        lambda: x.sigmoid(),
        lambda: x / positive,
        lambda: out.sub_(y, alpha=1e-9),
        lambda: x.square(),
        lambda: x.neg(),
        lambda: positive.reciprocal(),
        lambda: x.clamp(max=1.0),
        lambda: torch.linalg.vector_norm(x),
        lambda: functional.gelu(x, approximate="tanh"),
        lambda: aten.gelu_backward(y, x, approximate="tanh"),
        lambda: functional.silu(x),
        lambda: aten.silu_backward(y, x),
    )


def row_wise(pool: Pool, elements: int) -> Iterable[Run]:
    """Operators on [rows, WIDTH]."""
    rows = elements // WIDTH
    x, gradient = pool.matrix(rows, WIDTH), pool.matrix(rows, WIDTH, 1)
    weight, bias = torch.ones(WIDTH), torch.zeros(WIDTH)
    shape, parts = [WIDTH], [pool.matrix(rows, WIDTH // 4, number) for number in range(4)]
    _, mean, scale = torch.native_layer_norm(x, shape, weight, bias, 1e-5)
    logs = functional.log_softmax(x, dim=-1)
    return (
        lambda: x.sum(0, keepdim=True),  # the gradient of a bias
        lambda: torch.cat(parts, dim=-1),
        lambda: aten.slice_backward(gradient, [rows, WIDTH], 0, 0, rows, 1),
        lambda: torch.native_layer_norm(x, shape, weight, bias, 1e-5),
        lambda: aten.native_layer_norm_backward(gradient, x, shape, mean, scale, weight, bias, [True, True, True]),
        lambda: x.mean(-1, keepdim=True),  # RMSNorm is made of single operators on a CPU
        lambda: functional.log_softmax(x, dim=-1),
        lambda: aten._log_softmax_backward_data(gradient, logs, -1, torch.float32),
    )


def losses_and_embeddings(pool: Pool, elements: int) -> Iterable[Run]:
    """Operators that pick rows of WIDTH by number."""
    rows = elements // WIDTH
    table, x = pool.matrix(WIDTH, WIDTH), pool.matrix(rows, WIDTH, 1)
    numbers = torch.arange(rows) * 7 % WIDTH
    loss, total = torch.ones(()), torch.tensor(float(rows))
    return (
        lambda: functional.embedding(numbers, table),
        lambda: aten.embedding_dense_backward(x, numbers, WIDTH, -1, False),
        lambda: aten.nll_loss_forward(x, numbers, None, 1, -100),
        lambda: aten.nll_loss_backward(loss, x, numbers, None, 1, -100, total),
    )


def optimizers(elements: int) -> Iterable[Run]:
    """Fused optimizers on the parameters of a block, `elements` in all."""

    def pieces() -> list[Tensor]:
        sizes = [max(1, int(share * elements)) for share in PIECES] + [max(1, elements // 1000)] * SHORT_VECTORS
        return [torch.full((size,), 0.1) for size in sizes]

    elements = elements // 2  # four operands of each: 32 MiB of them at the largest size
    parameters, gradients, first, second = (pieces() for _ in range(4))
    steps = [torch.ones(()) for _ in parameters]
    adam: Any = dict(lr=0.0, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False)
    sgd: Any = dict(weight_decay=0.0, momentum=0.9, lr=0.0, dampening=0.0, nesterov=False, maximize=False)
    return (
        lambda: torch._fused_adamw_(parameters, gradients, first, second, [], steps, **adam),
        lambda: torch._fused_adam_(parameters, gradients, first, second, [], steps, **adam),
        lambda: torch._fused_sgd_(parameters, gradients, first, is_first_step=False, **sgd),
    )


def fused(pool: Pool, elements: int) -> Iterable[Run]:
    """Operators of kernels/ on [elements] values, in rows of WIDTH."""
    x, y, z = (pool.matrix(max(1, elements // WIDTH), WIDTH, which) for which in range(3))
    weight, ops = torch.ones(WIDTH), torch.ops.windtunnel
    _, scales = ops.rms_norm(x, weight, 1e-5)
    return (
        lambda: norms.rms_norm(x, weight, 1e-5),
        lambda: ops.rms_norm_backward(y, x, weight, scales),
        lambda: activations.swiglu(x, y),
        lambda: ops.swiglu_backward(x, y, z),
    )


def one_pass(elements: int) -> Primitive:
    """AdamW in one pass with a copy in bf16, filed under the operator that stands for it in a flight."""
    elements = elements // 2  # as above
    master, gradient, mean, square = (torch.full((elements,), 0.1) for _ in range(4))
    copy, step = torch.empty(elements, dtype=torch.bfloat16), torch.ones(())
    arguments = [master], [gradient], [mean, square], [copy]
    kernel = describe(optimizer_step._opoverload, [master, gradient, mean, square, copy], arguments, [])
    assert kernel is not None
    shards = Shards([master], [gradient], ([mean], [square]), [step], [copy])
    return Primitive(kernel, lambda: chunked_step_(AdamW(lr=0.0, weight_decay=0.0), shards))


def fused_attention(batch: int) -> Iterator[Primitive]:
    """Causal attention as the transformer calls it, filed under the operators that stand for it in a flight."""
    shape = (batch, SEQ, HEADS, HEAD_SIZE)
    query, key, value = (torch.randn(shape).transpose(1, 2).requires_grad_() for _ in range(3))

    def forward() -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    with torch.enable_grad():
        output = forward()
    gradient, sums = torch.randn_like(output), torch.empty(batch, HEADS, SEQ)
    inputs, saved = (query, key, value), (gradient, query, key, value, output, sums)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs, gradient, retain_graph=True)

    for operator, operands, rest, results, run in (
        (attention, inputs, (None, True), (output, sums), forward),
        (attention_backward, saved, (True,), backward(), backward),
    ):
        kernel = describe(operator._opoverload, operands, (*operands, *rest), results)
        assert kernel is not None
        yield Primitive(kernel, run)


def products() -> Iterator[Primitive]:
    """Matrix products in fp32, by shape in the three layouts of a linear layer; one large one in other data types."""
    larger = FEATURES[1:]
    for m, n, k in (*product(FEATURES, repeat=3), *product(TOKENS, larger, larger)):
        yield from map(primitive, linear_layer(m, n, k))
    for batch, m, n, k in BATCHED:
        left, right = torch.randn(batch, m, k), torch.randn(batch, n, k).transpose(1, 2)
        yield primitive(partial(torch.bmm, left, right))
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(1024, 1024, dtype=dtype)
        yield primitive(partial(torch.mm, x, x))


def linear_layer(m: int, n: int, k: int) -> Iterable[Run]:
    """(m, k) by (k, n) as a forward with bias, as the gradient of an input, and as the gradient of a weight."""
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    weight_kn, x_km = weight.t().contiguous(), x.t().contiguous()
    return (
        lambda: torch.addmm(bias, x, weight.t()),
        lambda: torch.mm(x, weight_kn),
        lambda: torch.mm(x_km.t(), weight_kn),
    )


def small_module(layers: int = 8, width: int = 64) -> Run:
    """Forward and backward of a module whose products are among those of `products`: it shows torch's overhead."""
    stack = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU("tanh"))))
    x = torch.randn(width, width)

    def run() -> None:
        stack(x).sum().backward()
        stack.zero_grad(set_to_none=True)

    return run
