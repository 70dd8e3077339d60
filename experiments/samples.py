"""What a user's function gives us: a model and global batches, and how a batch becomes a forward pass and a loss."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..engine.batch import call, map_tensors
from ..engine.loss import loss_of

Sample = tuple[nn.Module, list[Any]]

MicroStep = Callable[[Callable[..., Any], Callable[..., None], Any], Tensor]
"""`micro_step(model, backward, batch)`: forward and backward as the user does them; returns the loss to report.

`backward(loss, more=False, retain_graph=False)` is `Engine.backward`, or its like for one process."""


def load_sample(target: str) -> Callable[[], Sample]:
    """The function that "MODULE:FUNCTION" or "FILE.py:FUNCTION" names.

    The current folder counts as a place for modules, and so does the folder of a file.

    Raises:
        ValueError: no such module, file or function.
    """
    module_name, _, function_name = target.rpartition(":")
    if not module_name or not function_name:
        raise ValueError(f"target = {target!r}; allowed: MODULE:FUNCTION or FILE.py:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = load_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
        function: Callable[[], Sample] = getattr(module, function_name)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"target = {target!r}: {error}") from None
    if not callable(function):
        raise ValueError(f"target = {target!r} is a {type(function).__name__}; allowed: a function")
    return function


def load_file(path: str) -> ModuleType:
    """The module in a file: the one that is loaded from it already, else a new one by the file's name."""
    file = Path(path).resolve()
    for module in list(sys.modules.values()):
        if (known := getattr(module, "__file__", None)) and Path(known) == file:
            return module
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    name = file.stem if file.stem not in sys.modules else str(file)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, so that what it defines can be pickled
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def make_sample(target: str, steps: int | None) -> Sample:
    """The model and `steps` global batches (all of them by default).

    Raises:
        ValueError: the function returns something else, or too few batches.
    """
    model, batches, _ = make_training(target, steps)
    return model, batches


def make_training(target: str, steps: int | None) -> tuple[nn.Module, list[Any], MicroStep]:
    """As `make_sample`, and the third thing that the function may return: how a micro-step is done."""
    function = load_sample(target)
    try:
        made = function()
    except Exception as error:
        raise ValueError(f"target = {target!r}: the function failed with {type(error).__name__}: {error}") from error
    if not (isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)):
        raise ValueError(f"{target} must return (model, batches), got {type(made).__name__}")
    model, batches = made[0], list(made[1])
    if not batches or (steps is not None and steps > len(batches)):
        raise ValueError(f"steps = {steps}; allowed: 1 to {len(batches)}, the batches that {target} returns")
    return model, batches[:steps], made[2] if len(made) == 3 else one_backward


@dataclass(frozen=True, slots=True)
class Facts:
    """Of a target: how many batches are used, and whether it brings a micro-step of its own."""

    batches: int
    own_micro_step: bool


def check_sample(target: str, steps: int | None, parts: int) -> Facts:
    """Find out, before any rank is started, whether a target gives batches that divide into `parts`.

    Raises:
        ValueError: as `make_sample` and `share`.
    """
    _, batches, micro_step = make_training(target, steps)
    for batch in batches:
        share(batch, parts, 0)
    return Facts(len(batches), micro_step is not one_backward)


def one_backward(model: Callable[..., Any], backward: Callable[..., None], batch: Any) -> Tensor:
    """The usual micro-step."""
    loss = run_model(model, batch)
    backward(loss)
    return loss


def run_model(model: Callable[..., Any], batch: Any) -> Tensor:
    """The loss of a forward pass (engine/loss.py)."""
    return loss_of(call(model, batch))


def share(batch: Any, parts: int, part: int) -> Any:
    """Part number `part` of `parts` equal ones, cut on dimension 0 of every tensor.

    Raises:
        ValueError: a batch that does not divide.
    """

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] % parts:
            raise ValueError(
                f"a batch tensor of shape {tuple(tensor.shape)} does not divide among world * accumulation = {parts};"
                f" allowed: a multiple of {parts} samples on dimension 0"
            )
        size = tensor.shape[0] // parts
        return tensor[part * size : (part + 1) * size]

    return map_tensors(batch, cut)


def as_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in `dtype`, the others as they are."""
    return map_tensors(batch, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def to_sim(model: nn.Module, batch: Any) -> tuple[nn.Module, Callable[[], Any]]:
    """A model and a batch, made for real or on `meta`, as shapes on the simulated device (inside a flight).

    Parameters and buffers are replaced in their modules, ties kept; values are forgotten.

    Raises:
        ValueError: a parameter without a shape, of a lazy module.
    """
    twins: dict[Tensor, Tensor] = {}
    for name, module in model.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if is_lazy(parameter):
                raise ValueError(
                    f"{name or type(module).__name__}.{own} has no shape yet; run a batch through it first"
                )
            if parameter not in twins:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="sim")
                twins[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, own, twins[parameter])
        for own, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if buffer not in twins:
                twins[buffer] = torch.empty(buffer.shape, dtype=buffer.dtype, device="sim")
            setattr(module, own, twins[buffer])
    shapes = map_tensors(batch, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    def make_batch() -> Any:
        return map_tensors(shapes, lambda shape: torch.empty(shape.shape, dtype=shape.dtype, device="sim"))

    return model, make_batch
