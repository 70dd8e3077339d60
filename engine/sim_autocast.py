"""torch.autocast on the `sim` device, by the rules that torch has for CUDA (aten/src/ATen/autocast_mode.h).

torch lets a device of its own say what its operators do under autocast. Here as there, products of matrices are taken
down to the lower precision, what needs range or sums over many elements is taken up to fp32, and all else runs in the
dtypes that it is given. Casts of parameters are not kept for a second use: a weight that one forward uses twice is
cast twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

KEY = "AutocastPrivateUse1"

LOWER = (
    "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "einsum", "linear", "matmul",
    "mm", "mv", "prelu", "scaled_dot_product_attention",
)  # fmt: skip
"""Computed in the lower precision."""

FP32 = (
    "acos", "asin", "binary_cross_entropy_with_logits", "cdist", "cosh", "cosine_embedding_loss", "cosine_similarity",
    "dist", "erfinv", "exp", "expm1", "group_norm", "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss",
    "layer_norm", "log", "log10", "log1p", "log2", "margin_ranking_loss", "mse_loss", "multi_margin_loss",
    "native_layer_norm", "nll_loss", "nll_loss2d", "norm.Scalar", "poisson_nll_loss", "pow.Scalar", "pow.Tensor_Scalar",
    "pow.Tensor_Tensor", "reciprocal", "renorm", "rsqrt", "sinh", "smooth_l1_loss", "soft_margin_loss", "softplus",
    "tan", "triplet_margin_loss",
)  # fmt: skip
"""Computed in fp32 from operands that are cast to it."""

FP32_RESULT = ("cumprod", "cumsum", "log_softmax.int", "prod", "prod.dim_int", "softmax.int", "sum", "sum.dim_IntList")
"""Computed in fp32 by an operator that casts as it reads."""

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""What an operator is called with: its positional arguments, and the others by name."""

_key = torch._C._parse_dispatch_key(KEY)
assert _key is not None
_RULES_OFF = torch._C.DispatchKeySet(_key)

_everything = torch.library.Library("_", "IMPL", KEY)
_aten = torch.library.Library("aten", "IMPL", KEY)


def register(device: str) -> None:
    """Give the device its rules; once in a process."""
    _everything.fallback(torch.library.fallthrough_kernel)
    for name in LOWER:
        _rule(name, lambda _, given: _cast(given, torch.get_autocast_dtype(device)))
    for name in FP32:
        _rule(name, lambda _, given: _cast(given, torch.float32))
    for name in FP32_RESULT:
        _rule(name, _with_fp32_result)


def _rule(name: str, prepare: Callable[[Any, Given], Given]) -> None:
    """Under autocast, `prepare` changes what the operator is given."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def kernel(*arguments: Any, **keywords: Any) -> Any:
        arguments, keywords = prepare(operator, (arguments, keywords))
        with torch._C._ExcludeDispatchKeyGuard(_RULES_OFF):
            return operator(*arguments, **keywords)

    _aten.impl(name, kernel)


def _cast(given: Given, dtype: torch.dtype) -> Given:
    """With all floating tensors in `dtype`, but those in float64."""

    def one(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    cast: Given = tree_map_only(Tensor, one, given)
    return cast


def _with_fp32_result(operator: Any, given: Given) -> Given:
    arguments, keywords = given
    names = [argument.name for argument in operator._schema.arguments]
    asked = dict(zip(names, arguments, strict=False)) | keywords
    if asked.get("dtype") is None and arguments[0].dtype in (torch.float16, torch.bfloat16):
        return arguments[: names.index("dtype")], keywords | {"dtype": torch.float32}
    return given
