"""A PyTorch profiler (Kineto) trace of a step read as measured kernel times.

`torch.profiler.profile(record_shapes=True)` and `export_chrome_trace` write which operator ran when on which shapes.
Each operator is called again on the meta device, which computes shapes alone, and is described as a flight describes
it (engine/operators.py): so it has the name, the bytes and the FLOPs that a trace holds for it. Its time is that of the
GPU kernels that it started, or its own where there is no GPU.
"""

import gzip
import json
from ast import literal_eval
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..collectives.trace import Kernel

if TYPE_CHECKING:
    from torch import Tensor

MICROSECONDS = 1e6

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of what runs on a GPU."""

NO_DTYPE = ("", "Scalar", "ScalarList", "TensorList", "GenericList")


class Measured(NamedTuple):
    """A kernel as often as it ran."""

    kernel: Kernel
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """What a profiler's trace says.

    Attributes:
        device: "gpu" if any work ran on one, else "cpu".
        measured: every kernel that was understood.
        unknown: by operator that was not, or GPU kernel that belongs to none, why, and its seconds in all.
    """

    device: str
    measured: tuple[Measured, ...]
    unknown: Mapping[str, tuple[str, float]]


@dataclass(slots=True)
class Operator:
    """A call of an operator, with those that it made itself."""

    name: str
    start: float
    end: float
    arguments: Mapping[str, Any]
    inner: list["Operator"] = field(default_factory=list)

    def all(self) -> Iterator["Operator"]:
        yield self
        for one in self.inner:
            yield from one.all()


def read_profile(path: str | Path) -> Profile:
    """Read a Chrome trace of the PyTorch profiler, plain or gzipped.

    Raises:
        ValueError: the file cannot be read, is no such trace, or was recorded without shapes.
    """
    events = _events(Path(path))
    operators = _nested([event for event in events if event.get("cat") == "cpu_op" and event.get("ph") == "X"])
    if not operators:
        raise ValueError(f"from-profile = {path}: it holds no operators; allowed: a trace of torch.profiler")
    if not any("Input Dims" in one.arguments for root in operators for one in root.all()):
        raise ValueError(f"from-profile = {path}: it holds no shapes; record it with record_shapes=True")
    work = _device_work(events)
    device = "gpu" if work else "cpu"
    times: dict[Kernel, list[float]] = defaultdict(list)
    unknown: dict[str, tuple[str, float]] = {}

    def lose(name: str, why: str, seconds: float) -> None:
        unknown[name] = why, seconds + unknown.get(name, ("", 0.0))[1]

    for one in (leaf for root in operators for leaf in _leaves(root)):
        started = [what for call in one.all() for what in work.pop(call.arguments.get("External id"), ())]
        if device == "gpu" and not started:
            continue
        seconds = sum(found for _, found in started) or (one.end - one.start) / MICROSECONDS
        try:
            kernel = described(one)
        except Exception as error:  # whatever torch raises on arguments that the file does not tell in full
            lose(one.name, (str(error).splitlines() or [type(error).__name__])[0], seconds)
            continue
        if kernel is not None:
            times[kernel].append(seconds)
        elif started:
            lose(one.name, "a flight has no kernel for it", seconds)
    for name, seconds in (what for left in work.values() for what in left):
        lose(name, "no operator that was understood started it", seconds)
    measured = tuple(Measured(kernel, tuple(found)) for kernel, found in times.items())
    return Profile(device, measured, unknown)


def _events(path: Path) -> list[dict[str, Any]]:
    try:
        raw = path.read_bytes()
        data = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
        events = data["traceEvents"] if isinstance(data, dict) else data
        return [event for event in events if isinstance(event, dict)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"from-profile = {path}: not a trace of torch.profiler: {error}") from None


def _nested(events: Sequence[Mapping[str, Any]]) -> list[Operator]:
    """The outermost operators of every thread; a call lies within its caller."""
    threads: dict[Any, list[Operator]] = defaultdict(list)
    for event in events:
        one = Operator(event["name"], event["ts"], event["ts"] + event.get("dur", 0), event.get("args", {}))
        threads[event.get("pid"), event.get("tid")].append(one)
    roots: list[Operator] = []
    for calls in threads.values():
        stack: list[Operator] = []
        for one in sorted(calls, key=lambda call: (call.start, -call.end)):
            while stack and one.end > stack[-1].end:
                stack.pop()
            (stack[-1].inner if stack else roots).append(one)
            stack.append(one)
    return roots


def _leaves(one: Operator) -> Iterator[Operator]:
    """The operators that a flight would see: not those that are made of others, nor those that others are made of."""
    if one.name.startswith("aten::") and not _made_of_others(one):
        yield one
        return
    for inner in one.inner:
        yield from _leaves(inner)


def _made_of_others(one: Operator) -> bool:
    """Whether torch takes an operator apart before a flight sees it; if it is not known, whether it calls others."""
    import torch

    try:
        name = _overload(one).name()
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"))
    except (AttributeError, RuntimeError, ValueError):
        return bool(one.inner)


def _device_work(events: Sequence[Mapping[str, Any]]) -> dict[Any, list[tuple[str, float]]]:
    """(name, seconds) of what ran on a GPU, by the "External id" of the operator that started it."""
    work: dict[Any, list[tuple[str, float]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in DEVICE_WORK and event.get("ph") == "X":
            work[event.get("args", {}).get("External id")].append((event["name"], event["dur"] / MICROSECONDS))
    return work


# An operator as a flight describes it #


def described(one: Operator) -> Kernel | None:
    """The kernel that an operator starts, or None if it starts none.

    Raises:
        Exception: the file does not tell its arguments in full.
    """
    import torch
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    from ..engine.operators import describe

    function, arguments = _call(one)
    positional = [value for given, value in arguments if not given.kwarg_only]
    named = {given.name: value for given, value in arguments if given.kwarg_only}
    with torch.no_grad():
        result = function(*positional, **named)
    operands = [leaf for leaf in tree_leaves((positional, named)) if isinstance(leaf, Tensor)]
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    causal = any(given.name == "is_causal" and value for given, value in arguments)
    attention = _attention(function.overloadpacket.__name__, operands, results, causal)
    return attention or describe(function, operands, positional, results)


def _attention(name: str, operands: "Sequence[Tensor]", results: "Sequence[Tensor]", causal: bool) -> Kernel | None:
    """Fused attention as the operators of the simulated device describe it, whichever of torch's it was."""
    from ..engine.operators import ATTENTION, describe
    from ..engine.sim_device import attention, attention_backward

    if name in ATTENTION:
        inputs = operands[:3]
        return describe(attention._opoverload, inputs, (*inputs, None, causal), results[:2])
    if name.removesuffix("_backward") in ATTENTION:
        saved = operands[:6]
        return describe(attention_backward._opoverload, saved, (*saved, causal), results[:3])
    return None


def _call(one: Operator) -> tuple[Any, list[tuple[Any, Any]]]:
    """(the overload, its arguments with their places in the schema) of a recorded call."""
    function, lists = _overload(one), _inner_type(one)
    kinds, texts = _inputs(one)
    empty: list[Any] = [[]] * len(kinds)
    dims, strides = one.arguments["Input Dims"], one.arguments.get("Input Strides", empty)
    given = zip(function._schema.arguments, kinds, dims, strides, texts, strict=True)
    return function, [(place, _value(place, *what, of_lists=lists)) for place, *what in given]


def _inputs(one: Operator) -> tuple[Sequence[str], Sequence[str]]:
    """(types, numbers as text) of the arguments."""
    kinds = one.arguments["Input type"]
    return kinds, one.arguments.get("Concrete Inputs", [""] * len(kinds))


def _overload(one: Operator) -> Any:
    """The overload that was called: the first one that takes such arguments; the file gives no more than its name.

    Raises:
        ValueError: there is none.
        AttributeError: this torch has no such operator.
    """
    import torch

    packet = getattr(torch.ops.aten, one.name.removeprefix("aten::"))
    if "Input type" not in one.arguments:
        raise ValueError("its arguments were not recorded")
    kinds, texts = _inputs(one)
    for name in packet.overloads():
        function = getattr(packet, name)
        places = function._schema.arguments
        if len(places) == len(kinds) and all(map(_fits, places, kinds, texts)):
            return function
    raise ValueError(f"no overload takes {list(kinds)}")


def _inner_type(one: Operator) -> str:
    """The type of tensors that an operator or one that it calls was given by itself, else "float"."""
    kinds = (kind for call in one.all() for kind in call.arguments.get("Input type", ()))
    return next((kind for kind in kinds if kind not in NO_DTYPE), "float")


def _fits(place: Any, kind: str, text: str) -> bool:
    """Whether what was recorded can be an argument of the schema."""
    wanted = str(place.type)
    if kind in ("TensorList", "GenericList") or "List[Tensor]" in wanted or "List[Optional[Tensor]]" in wanted:
        return kind in ("TensorList", "GenericList") and "List" in wanted
    if kind == "" and text in ("", "None"):
        return "Tensor" not in wanted or "Optional" in wanted
    if kind in NO_DTYPE:
        return "Tensor" not in wanted
    return "Tensor" in wanted


def _value(place: Any, kind: str, dims: Any, strides: Any, text: str, *, of_lists: str) -> Any:
    """An argument: tensors on the meta device, numbers as they were written.

    Args:
        of_lists: type of tensors in lists, which the file leaves out.
    """
    import torch

    if kind == "TensorList":
        if not dims:  # as the profiler does with long ones
            raise ValueError("the file leaves out the shapes of its tensors")
        return [_tensor(*one, dtype=_dtype(of_lists)) for one in zip(dims, strides or [[]] * len(dims), strict=True)]
    if kind not in NO_DTYPE:
        return _tensor(dims, strides, dtype=_dtype(kind))
    wanted = str(place.real_type)
    if wanted.removeprefix("Optional[").startswith("Device"):
        return torch.device("meta")
    if text in ("", "None", "[]") and (text != "[]" or "List" not in wanted):
        return place.default_value if place.has_default_value() else None
    if "ScalarType" in wanted:
        return _scalar_type(int(text))
    return literal_eval(text)


def _scalar_type(number: int) -> Any:
    """A data type by its number (c10/core/ScalarType.h)."""
    import torch

    names = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64"}
    return getattr(torch, (names | {11: "bool", 15: "bfloat16"})[number])


def _tensor(dims: Sequence[int], strides: Sequence[int], *, dtype: Any) -> "Tensor":
    import torch

    if len(strides) == len(dims) and dims:
        return torch.empty_strided(dims, strides, dtype=dtype, device="meta")
    return torch.empty(dims, dtype=dtype, device="meta")


def _dtype(kind: str) -> Any:
    """What Kineto calls a C++ type as torch's."""
    import torch

    names = {
        "float": torch.float32,
        "double": torch.float64,
        "c10::Half": torch.float16,
        "c10::BFloat16": torch.bfloat16,
        "long int": torch.int64,
        "long": torch.int64,
        "int": torch.int32,
        "bool": torch.bool,
        "unsigned char": torch.uint8,
        "signed char": torch.int8,
    }
    if kind not in names:
        raise ValueError(f"tensors of type {kind!r}")
    return names[kind]
