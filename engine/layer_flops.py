"""What the layers of a model cost, traced: for stages that are equal in work (`pipeline.partition` = "cost")."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .evaluation import evaluating
from .operators import flops_of
from .stages import layers_of, run_layers


def layer_flops(model: nn.Module, inputs: tuple[Any, ...], targets: tuple[Any, ...] = ()) -> tuple[float, ...]:
    """FLOPs of the forward of each layer of a model on a micro-batch; a multiply-add counts two.

    For `"pipeline": {"partition": "cost", "costs": layer_flops(model, (x,), (y,))}`. A backward takes twice as many in
    every layer, so that the forward is enough to compare layers by. Counted are matrix products, convolutions and fused
    attention (engine/operators.py); what only moves or adds values, an embedding or a norm, counts nothing. Layers run
    in evaluation mode without gradients; a model and inputs on the meta device are counted without computing.

    Args:
        inputs: of the first layer, one micro-batch [B, ...].
        targets: what the last layer takes besides; none where a criterion makes the loss.

    Raises:
        ValueError: the model cannot be cut into layers.
    """
    layers, found = layers_of(model), []
    value: Any = inputs
    with torch.no_grad(), evaluating(model):
        for number, layer in enumerate(layers):
            more = targets if number == len(layers) - 1 else ()
            with _Counter() as counter:
                value = run_layers([layer], value if isinstance(value, tuple) else (value,), more)
            found.append(counter.flops)
    return tuple(found)


class _Counter(TorchDispatchMode):
    """Adds up what the operators inside cost."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        results = made if isinstance(made, tuple | list) else (made,)
        self.flops += flops_of(function, args, [each for each in results if isinstance(each, Tensor)])
        return made
