"""Where the loss is in what a model returned."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def loss_of(output: Any) -> Tensor:
    """The output itself, its item "loss", its attribute `loss`, or the first item of a tuple or list.

    Raises:
        ValueError: there is no tensor in any of those places.
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif hasattr(output, "loss"):
        loss = output.loss
    elif isinstance(output, tuple | list) and output:
        loss = output[0]
    if isinstance(loss, Tensor):
        return loss
    found = "is None (were labels given?)" if loss is None else f"is a {type(loss).__name__}"
    raise ValueError(
        f"the loss in a {type(output).__name__} {found}; allowed: a tensor, a mapping or an object with a tensor"
        " 'loss', or a tuple that begins with one"
    )


def flown_loss(output: Any) -> Tensor:
    """`loss_of`, or where a model makes no loss the mean of the first thing that it returns: all of it has a gradient.

    Raises:
        ValueError: as `loss_of`; also where there is a place for a loss and none in it.
    """
    if isinstance(output, Mapping) and "loss" not in output and not hasattr(output, "loss"):
        output = next(iter(output.values()), None)
    loss = loss_of(output)
    return loss if loss.dim() == 0 else loss.mean()
