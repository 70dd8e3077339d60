"""What a training step is made of, read from the outside: reduced gradients, and what the optimizer keeps.

Nothing here runs unless it is asked for, and nothing communicates: each rank sees the parts that it holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .engine import Engine


@dataclass(frozen=True, slots=True)
class Share:
    """Elements `start` to `stop` of a parameter, flattened, and one value for each.

    Attributes:
        name: of the parameter, the model's own.
        what: of the values: "gradient", or the name that the optimizer's state has for them.
        values: [stop - start], or a single one for what a parameter has once, as a count of steps.
    """

    name: str
    what: str
    start: int
    stop: int
    values: Tensor


def reduced_gradients(engine: Engine) -> Iterator[Share]:
    """Between the last backward of a step and `engine.step()`: means over ranks and micro-steps, before clipping.

    In the optimizer's precision, loss scale taken out; zeros for a parameter that was not used.
    """
    for unit in engine.optimizer.units:
        if unit.rest is not None:
            unit.rest.arrived.block()
        whole = unit.gradient_shard.to(unit.wide) / engine.loss_scaler.scale
        names = {slot.parameter: slot.name for slot in unit.part.slots}
        for piece in unit.pieces():
            shift = unit.bounds[0] - unit.views[piece.parameter][0]
            values = whole[piece.start : piece.stop]
            yield Share(names[piece.parameter], "gradient", piece.start + shift, piece.stop + shift, values)


def optimizer_state(engine: Engine) -> Iterator[Share]:
    """After a step: the master copies, where they are not the parameters themselves, and what is kept for each."""
    dtypes = {slot.name: slot.parameter.dtype for unit in engine.optimizer.units for slot in unit.part.slots}
    for held in engine.optimizer.held():
        if held.name not in dtypes:
            continue  # frozen
        start, stop = held.first, held.first + held.elements
        values = engine.optimizer.values(held)
        if (master := values.pop("parameter")).dtype != dtypes[held.name]:
            yield Share(held.name, "master", start, stop, master)
        for what, kept in values.items():
            if isinstance(kept, Tensor) and kept.numel() in (1, held.elements):
                yield Share(held.name, what, start, stop, kept.flatten())
