"""A user's own module on the simulated device, in the flight's process: built without weights, described, flown."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from ..engine.batch import map_tensors, samples_in, tensors, tokens_in
from ..engine.device import DTYPES
from ..engine.partition import repeated_blocks
from .own_models import OwnModel
from .samples import as_dtype, load_sample, to_sim


def look(target: str, folder: str) -> OwnModel:
    """What `experiments/own_models.py` knows of a model.

    Raises:
        ValueError: as `build`.
    """
    model, batch = build(target, folder)
    parameters = list(model.parameters())
    return OwnModel(
        name=target,
        folder=folder,
        kind=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        layers=len(repeated_blocks(model)),
        samples=samples_in(batch),
        tokens=tokens_in(batch),
    )


def for_flight(target: str, folder: str, micro_batch: int, precision: str) -> tuple[nn.Module, Callable[[], Any]]:
    """What a flight needs (engine/pilot.py): the model, and a function that makes a micro-batch of so many samples.

    Args:
        precision: of the parameters; floating-point inputs in fp32 come in it too, as a training loop would cast them.

    Raises:
        ValueError: as `build` and `of_size`.
    """
    with unset_fake_temporarily(), torch.device("cpu"):
        model, batch = build(target, folder)
        batch = of_size(batch, micro_batch)
        if precision in ("bf16", "fp16"):
            batch = as_dtype(batch, DTYPES[precision])
    return to_sim(model, batch)


def build(target: str, folder: str) -> tuple[nn.Module, Any]:
    """The model, its parameters on `meta`, and its sample micro-batch.

    Of several batches in a list, as `verify` takes them, it is the first.

    Raises:
        ValueError: no such function, one that fails, or one that returns something else.
    """
    file, _, function_name = target.rpartition(":")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if file.endswith(".py"):
        file = str(Path(folder) / file)
    function = load_sample(f"{file}:{function_name}")
    try:
        with _weightless():
            made = function()
    except Exception as error:
        raise ValueError(f"model = {target!r}: the function failed with {type(error).__name__}: {error}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ValueError(f"model = {target!r} must return (model, batch), got {_shape_of(made)}")
    model, batch = made
    if isinstance(batch, list) and batch:
        batch = batch[0]
    if next(tensors(batch), None) is None:
        raise ValueError(
            f"model = {target!r}: the batch is a {type(batch).__name__}; allowed: tensors, in a tuple or dict"
        )
    if next(model.parameters(), None) is None:
        raise ValueError(f"model = {target!r}: a {type(model).__name__} without parameters; allowed: a model to train")
    return model, batch


def _shape_of(made: object) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(item).__name__ for item in made)})"
    return type(made).__name__


@contextmanager
def _weightless() -> Iterator[None]:
    """Inside, a parameter is moved to `meta` as soon as a module has it.

    So weights are neither drawn nor kept, and 70 B of them fit anywhere, while every other tensor has its values, which
    constructors may look at. (Under torch.device("meta") a rate from `torch.linspace(...)[i].item()` is an error.)
    A parameter that several modules are given stays one.
    """
    twins = WeakTensorKeyDictionary()

    # Any, because torch's annotation has no place for the parameter that a hook may return.
    def keep_shape(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or is_lazy(parameter) or parameter.is_meta:
            return None
        if parameter not in twins:
            shape = torch.empty_like(parameter, device="meta")
            twins[parameter] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
        return twins[parameter]

    handle = register_module_parameter_registration_hook(keep_shape)
    try:
        yield
    finally:
        handle.remove()


def of_size(batch: Any, samples: int) -> Any:
    """The batch with so many samples: every tensor's dimension 0 is changed.

    Raises:
        ValueError: tensors of different sizes in dimension 0, of which nobody knows which are samples.
    """
    given = samples_in(batch)
    if samples == given:
        return batch

    def resize(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != given:
            raise ValueError(
                f"micro-batch = {samples}, but of the sample batch's tensors one has {given} samples and one the shape"
                f" {tuple(tensor.shape)}; allowed: {given}, or tensors that all have the samples in dimension 0"
            )
        return torch.empty((samples, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")

    return map_tensors(batch, resize)
