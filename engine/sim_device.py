"""`torch.device("sim")`: a device with shapes and no arithmetic, on which any module runs under fake tensors.

Registration is global to the process (PrivateUse1 is one slot, and `torch.accelerator` then answers `sim`), so flights
run in a child process; importing windtunnel registers nothing.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from . import sim_autocast, sim_recurrent

NAME = "sim"


class _SimModule(_DummyBackendModule):
    """What torch asks of `torch.sim`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def is_initialized(self) -> bool:
        return True

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


def register() -> None:
    """Make `torch.device("sim")` known to this process; a second call does nothing.

    Raises:
        RuntimeError: another backend has taken PrivateUse1.
    """
    taken = torch._C._get_privateuse1_backend_name()
    if taken == NAME:
        return
    if taken != "privateuseone":
        raise RuntimeError(
            f"this process has the backend {taken!r} on PrivateUse1, where {NAME!r} would go: fly in another"
        )
    _setup_privateuseone_for_python_backend(NAME, backend_module=_SimModule())
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    # Above autograd, so that it holds in recomputation too, where modes of the forward are not active.
    _library.impl("scaled_dot_product_attention", _fused_attention, "AutogradPrivateUse1")
    sim_autocast.register(NAME)
    sim_recurrent.register(_library)
    for name in ("silu_backward", "mish_backward"):  # one kernel on CPU and CUDA; taken apart where there is none
        _library.impl(name, _one_operator, "PrivateUse1")
    _library.impl("_fused_sgd_", _in_place, "Meta")  # torch has shapes for the fused Adams, not for SGD
    # Errors that unwind through a device thread of autograd abort the process; in the calling thread they are raised.
    torch.autograd.set_multithreading_enabled(False)


def _in_place(*_: Any, **__: Any) -> None:
    """The shapes of an operator that writes to its operands and returns nothing."""


def _one_operator(*_: Any, **__: Any) -> Tensor:
    """Stands where other devices have a kernel. Fake tensors have shapes before this is reached."""
    raise NotImplementedError("the sim device computes nothing")


_library = torch.library.Library("aten", "IMPL")


def _empty_strided(size: Iterable[int], stride: Iterable[int], *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch._C._acc.create_empty_tensor(tuple(size), dtype or torch.get_default_dtype())


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """`torch.tensor([1.0], device="sim")` copies its values from the host, outside of fake tensors; none are kept."""
    return target


@torch.library.custom_op("windtunnel::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Fused attention as one operator: (output [B, H, S, E], log-sum-exp [B, H, S] in fp32). Shapes only."""
    raise NotImplementedError("windtunnel::attention exists on the sim device only")


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    same = value.shape[-1] == query.shape[-1]  # fused kernels keep the query's layout
    output = torch.empty_like(query) if same else query.new_empty((*query.shape[:-1], value.shape[-1]))
    return output, query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("windtunnel::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. Shapes only."""
    raise NotImplementedError("windtunnel::attention_backward exists on the sim device only")


@attention_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@torch.library.custom_op("windtunnel::attention_bias_backward", mutates_args=())
def attention_bias_backward(query: Tensor, key: Tensor) -> Tensor:
    """What backward writes besides where the mask is a learned bias: a gradient for each score [B, H, S, T]."""
    raise NotImplementedError("windtunnel::attention_bias_backward exists on the sim device only")


@attention_bias_backward.register_fake
def _(query: Tensor, key: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:-1], key.shape[-2]))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mask_shape = None if mask is None else mask.shape
    ctx.set_materialize_grads(False)  # else the unused gradient of the log-sum-exp is made of zeros


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: reading them again would compute them again, where they are recomputed
    bias = attention_bias_backward(*saved[:2]).sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[3] else None
    return *attention_backward(gradient, *saved, ctx.causal), bias, None


attention.register_autograd(_backward, setup_context=_save)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` as the one operator that fused kernels are, on this device only."""
    output, _ = attention(query, key, value, attn_mask, is_causal)
    return output
