"""A model's modules switched to the fused kernels of kernels/, in place: parameters, names and hooks stay as they are.

A module of torch or of transformers is given a subclass of its own class. A model of one's own says by the name of an
attribute which function may be replaced by one that gives the same:

    gated(gate, up)                      silu(gate) * up
    rotate(x, table)                     rotary positions, table [2, S, E] of cosines and sines
    readout(hidden, weight, targets)     the loss of the logits hidden @ weight.T, or without targets the logits
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.activations import rotary, swiglu
from ..kernels.dropout import draw_seed, dropout
from ..kernels.linear_cross_entropy import IGNORED, linear_cross_entropy
from ..kernels.norms import rms_norm
from .communicator import Communicator
from .device import linear_cross_entropy_for
from .kernel_section import KernelSection
from .tensor_functions import TensorRanks, enter
from .tensor_layers import Rows
from .tensor_models import Readout

log = logging.getLogger(__name__)


class FusedRmsNorm:
    """nn.RMSNorm, or the one of Llama's kin in transformers, as one operator."""

    def forward(self: Any, x: Tensor) -> Tensor:
        eps = getattr(self, "variance_epsilon", None) or getattr(self, "eps", None) or torch.finfo(x.dtype).eps
        dtype = torch.promote_types(x.dtype, self.weight.dtype)  # they differ under autocast
        return rms_norm(x.to(dtype), self.weight.to(dtype), eps)[0]


class FusedDropout:
    """nn.Dropout without a mask in memory."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return dropout(x, self.p, draw_seed()) if self.training and self.p > 0 else x


class FusedReadout:
    """The mean loss of hidden states without their logits, or, without targets, what was there before.

    Args:
        before: the model's own function, or the Readout of ranks that share the vocabulary.
    """

    def __init__(self, before: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        self.before = before

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor | None) -> Tensor:
        """A scalar in fp32 or wider with targets [B, S], else logits [B, S, V].

        Args:
            hidden: [B, S, D], or this rank's [B, S / t, D] of it.
            weight: [V, D], or this rank's rows of it.
        """
        if targets is None:
            return self.before(hidden, weight, None)
        vocabulary = None
        if isinstance(self.before, Readout):
            vocabulary = SharedVocabulary(self.before.rows, self.before.ranks)
            hidden = enter(hidden, self.before.ranks)
            self.before.ranks.randomness.leave()
        flat = targets.flatten()
        losses = linear_cross_entropy(
            hidden.flatten(0, -2),
            weight,
            flat,
            vocabulary=vocabulary,
            compute=linear_cross_entropy_for(hidden.device, alone=vocabulary is None),
        )
        return losses / (flat != IGNORED).sum()


class SharedVocabulary:
    """Rows of a vocabulary that ranks share, for kernels/linear_cross_entropy.py."""

    def __init__(self, rows: Rows, ranks: TensorRanks) -> None:
        self.first, self.count = rows.first, rows.count
        self.group: Communicator = ranks.group

    def largest_(self, values: Tensor) -> None:
        self.group.all_reduce(values, "largest logits", largest=True).wait()

    def sum_(self, values: Tensor) -> None:
        self.group.all_reduce(values, "sums of exponentials").wait()


FUNCTIONS: dict[str, tuple[str, Callable[[Any], Callable[..., Tensor]]]] = {
    "activation": ("gated", lambda before: swiglu),
    "rotary": ("rotate", lambda before: rotary),
    "cross_entropy": ("readout", FusedReadout),
}
"""By what is fused: the attribute, and what makes its new value from the one before."""

MODULES: dict[str, tuple[type, frozenset[str]]] = {
    "norm": (FusedRmsNorm, frozenset({"RMSNorm", "LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})),
    "dropout": (FusedDropout, frozenset({"Dropout"})),
}
"""By what is fused: the forward, and the names of the classes whose forward it stands for.

nn.LayerNorm is not among them: torch's own is one operator forward and one backward on every device.
"""


def fuse(model: nn.Module, section: KernelSection) -> dict[str, int]:
    """Switch what `section` names; how many modules of each kind there were.

    Raises:
        ValueError: it names something that the model has nothing of.
    """
    found = {name: _fuse_one(model, name) for name in sorted(section.names - {"optimizer"})}
    for name, count in found.items():
        if not count and isinstance(section.fused, list):
            raise ValueError(
                f"kernels.fused {name!r}: a {type(model).__name__} has nothing that it fuses; allowed: leave it out, or"
                " true for whatever there is"
            )
        log.info("kernels.fused %r: %d modules", name, count)
    return found


def _fuse_one(model: nn.Module, name: str) -> int:
    count = 0
    for module in model.modules():
        if name in MODULES:
            forward, classes = MODULES[name]
            kind = type(module)
            if kind.__name__ in classes and getattr(module, "weight", module) is not None:
                module.__class__ = type(f"Fused{kind.__name__}", (forward, kind), {})
                count += 1
        else:
            attribute, make = FUNCTIONS[name]
            before = module.__dict__.get(attribute)
            if callable(before):
                setattr(module, attribute, make(before))
                count += 1
    return count
