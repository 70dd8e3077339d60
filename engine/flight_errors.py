"""What cannot be flown, said with the operator and the module at fault.

A flight has shapes and no values. A model that looks at values (a branch on a tensor, an operator whose result is as
long as its operand's values say) cannot fly, and torch's own error names neither the module nor a way out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import TracebackType

from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""Raised for an operator whose result, or whose result's shape, depends on values."""

OF_A_MODEL = (RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""What a model's forward raises where it and its batch do not go together."""


@contextmanager
def naming(model: nn.Module) -> Iterator[None]:
    """Turn errors of `model`'s forward and backward into one line that names the operator and the module.

    Raises:
        ValueError: an operator that needs values or that the simulated device does not have, or an error inside a
            module of the model. Errors from elsewhere pass as they are.
    """
    try:
        yield
    except (*NEEDS_VALUES, UnsupportedOperatorException) as error:
        if isinstance(error, UnsupportedOperatorException):
            why = "has no rule for the shape of its result"
        else:
            why = "needs values, where a simulated device has shapes alone"
        raise ValueError(
            f"{_place(model, error)}: operator {error.func} {why}; allowed: operators whose result's shape follows from"
            " the shapes of their operands"
        ) from error
    except OF_A_MODEL as error:
        if _innermost(model, error.__traceback__) is None or _is_ours(error):
            raise
        raise ValueError(f"{_place(model, error)}: {type(error).__name__}: {_first_line(error)}") from error


def _place(model: nn.Module, error: BaseException) -> str:
    found = _innermost(model, error.__traceback__)
    if found is None:
        return f"the backward of a {type(model).__name__}"
    name, module = found
    return f"module {name!r} (a {type(module).__name__})" if name else f"the model (a {type(module).__name__})"


def _innermost(model: nn.Module, traceback: TracebackType | None) -> tuple[str, nn.Module] | None:
    """(name, module) of the deepest call of a method of one of the model's modules."""
    names = {module: name for name, module in model.named_modules()}
    found = None
    for frame, _ in walk_tb(traceback):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names:
            found = names[owner], owner
    return found


def _is_ours(error: BaseException) -> bool:
    """Whether the engine itself raised it, in a hook of a module."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).parent == Path(__file__).parent


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or repr(error)).splitlines()[0]
    if "two devices" in line or "two different devices" in line:
        line += (
            ": a tensor is made without device=, or held by a module as neither parameter nor buffer; make it where the"
            " input is, or register it as a buffer"
        )
    return line
