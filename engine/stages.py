"""A model as a row of layers, and the chunks of them that the stages of a pipeline hold."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives.partition_stages import balanced
from .context import POSITIONS, takes_positions

STATE_BYTES = 16
"""Of a parameter: weight and gradient in 2 bytes each, three fp32 values of Adam (Rajbhandari et al. 2020, 3.1)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One step of a model. What it returns, a tensor or a tuple of them, the next one takes as its arguments.

    The last one takes the targets too, and returns the loss, unless a criterion makes the loss of what it returns.
    Where ranks share each sequence, one with an argument `position_ids` gets the positions of this rank's tokens.

    Attributes:
        forward: what the layer does; parameters of the model that it reads are those of `parts`.
        parts: dotted names in the model of the submodules and parameters that it uses. One that layers of several
            stages name is tied: each of these stages holds it.
    """

    forward: Callable[..., Any]
    parts: tuple[str, ...] = ()


class LayerList(nn.Module):
    """Modules and functions in a row, as a model; its parameters are named by their number in the row."""

    _row: tuple[Callable[..., Any], ...]

    def __init__(self, layers: Iterable[Callable[..., Any]]) -> None:
        super().__init__()
        self._row = tuple(layers)
        for number, layer in enumerate(self._row):
            if isinstance(layer, nn.Module):
                self.add_module(str(number), layer)
            elif not callable(layer):
                raise ValueError(f"layer {number} is a {type(layer).__name__}; allowed: modules and functions")

    def pipeline_layers(self) -> list[Layer]:
        return [
            Layer(layer, (str(number),) if str(number) in self._modules else ())
            for number, layer in enumerate(self._row)
        ]

    def forward(self, *inputs: Any) -> Any:
        return run_layers(self.pipeline_layers(), inputs)


def run_layers(
    layers: Iterable[Layer], inputs: tuple[Any, ...], targets: tuple[Any, ...] = (), positions: Tensor | None = None
) -> Any:
    """What the layers make of inputs; the last one gets `targets` besides, and who takes `positions` those."""
    row = list(layers)
    value: Any = inputs
    for layer in row:
        more = targets if layer is row[-1] else ()
        named = {} if positions is None or not takes_positions(layer.forward) else {POSITIONS: positions}
        value = layer.forward(*(value if isinstance(value, tuple) else (value,)), *more, **named)
    return value


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a model that can say them: by a method `pipeline_layers`, or as a Sequential or ModuleList.

    Raises:
        ValueError: any other model.
    """
    says: Callable[[], Sequence[Layer]] | None = getattr(model, "pipeline_layers", None)
    if says is not None:
        return list(says())
    if isinstance(model, nn.Sequential | nn.ModuleList):
        return [Layer(child, (name,)) for name, child in model._modules.items() if child is not None]
    raise ValueError(
        f"a {type(model).__name__} cannot be cut into pipeline stages; allowed: an nn.Sequential, a list of layers, or"
        " a model with a method pipeline_layers() that returns windtunnel.engine.stages.Layer values; or leave out"
        " pipeline_size"
    )


class Chunk(nn.Module):
    """Neighbouring layers of a model, whose parameters keep the names that they have in it.

    Attributes:
        number, count: which chunk it is, of how many.
        borrowed: parameters that an earlier chunk of this rank trains; they are not listed here.
    """

    _row: tuple[Layer, ...]
    borrowed: frozenset[nn.Parameter] = frozenset()
    _position_ids: Tensor | None = None

    def __init__(self, model: nn.Module, layers: Sequence[Layer], number: int, count: int) -> None:
        super().__init__()
        self.number, self.count = number, count
        self._row = tuple(layers)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        for path in dict.fromkeys(part for layer in layers for part in layer.parts):
            _adopt(self, model, path)

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.count - 1

    def forward(self, inputs: tuple[Any, ...], targets: tuple[Any, ...] = ()) -> Any:
        return run_layers(self._row, inputs, targets, self._position_ids)

    def place_tokens(self, position_ids: Tensor) -> None:
        """Where a rank's tokens stand in their sequences from now on, int64 [1, tokens]: ranks share these."""
        self._position_ids = position_ids

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """By the model's first name of each, where a parameter with several would have another one here."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if parameter not in self.borrowed:
                yield (self._names[parameter] if remove_duplicate else name), parameter


def _adopt(chunk: nn.Module, model: nn.Module, path: str) -> None:
    """Register a submodule or a parameter of the model in the chunk under the same dotted name."""
    *above, leaf = path.split(".")
    theirs, ours = model, chunk
    for name in above:
        theirs = theirs.get_submodule(name)
        ours = ours._modules.setdefault(name, nn.Module())  # type: ignore[assignment]
    if leaf in theirs._parameters:
        ours._parameters[leaf] = theirs._parameters[leaf]
    elif leaf in theirs._modules:
        ours._modules[leaf] = theirs._modules[leaf]
    else:
        raise ValueError(f"pipeline_layers: {path!r} is neither a submodule nor a parameter of {type(model).__name__}")


def parameters_of(model: nn.Module, layer: Layer) -> list[nn.Parameter]:
    """Those that a layer uses, each once."""
    return [parameter for _, parameter in Chunk(model, [layer], 0, 1).named_parameters()]


def bounds_of(
    model: nn.Module,
    layers: Sequence[Layer],
    chunks: int,
    method: str,
    costs: Sequence[float] = (),
    in_flight: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Where the chunks begin and end in the row of layers.

    Args:
        method: "uniform" counts layers, "parameters" parameters, "cost" takes `costs`, "memory" bytes of states and
            activations.
        costs: by layer; for "memory" the bytes of one micro-batch's activations.
        in_flight: by chunk, micro-batches whose activations it keeps at once; for "memory".

    Raises:
        ValueError: fewer layers than chunks, or costs of another number than the layers.
    """
    if len(layers) < chunks:
        raise ValueError(
            f"the model has {len(layers)} layers, and the pipeline {chunks} chunks (stages * pipeline.chunks); allowed:"
            " at most one chunk per layer"
        )
    if method == "uniform":
        return balanced([1.0] * len(layers), chunks)
    if method == "parameters":
        return balanced([float(sum(p.numel() for p in parameters_of(model, layer))) for layer in layers], chunks)
    if len(costs) != len(layers):
        raise ValueError(
            f"pipeline.partition = {method!r} and {len(costs)} pipeline.costs; allowed: one for each of the"
            f" {len(layers)} layers"
        )
    if method == "cost":
        return balanced(costs, chunks)
    states = [float(STATE_BYTES * sum(p.numel() for p in parameters_of(model, layer))) for layer in layers]
    return balanced(states, chunks, costs, in_flight)


def bounds_as_given(counts: Sequence[int], chunks: int, layers: int) -> tuple[int, ...]:
    """Where the chunks begin and end in a row of so many layers, by how many layers each has.

    Raises:
        ValueError: not a number for each chunk, or numbers that do not make all layers.
    """
    if len(counts) != chunks or sum(counts) != layers:
        raise ValueError(
            f"pipeline.layers = {list(counts)}, {sum(counts)} layers in {len(counts)} chunks; allowed: the"
            f" {layers} layers of the model in {chunks} chunks (stages * pipeline.chunks)"
        )
    return (0, *accumulate(counts))


def chunks_of(model: nn.Module, layers: Sequence[Layer], bounds: Sequence[int]) -> list[Chunk]:
    """All chunks of a model."""
    count = len(bounds) - 1
    return [Chunk(model, layers[bounds[number] : bounds[number + 1]], number, count) for number in range(count)]


def tied_ranks(chunks: Sequence[Chunk], rank_of: Sequence[int]) -> dict[nn.Parameter, tuple[int, ...]]:
    """The parameters that several ranks of a pipeline hold, and these ranks.

    Args:
        rank_of: the rank of each chunk.
    """
    holders: dict[nn.Parameter, set[int]] = {}
    for chunk, rank in zip(chunks, rank_of, strict=True):
        for parameter in chunk.parameters():
            holders.setdefault(parameter, set()).add(rank)
    return {parameter: tuple(sorted(ranks)) for parameter, ranks in holders.items() if len(ranks) > 1}


def drop_others(model: nn.Module, kept: Iterable[nn.Module]) -> None:
    """Free the parameters of a model that none of the kept chunks has: they show NaN from now on."""
    mine = {parameter for chunk in kept for parameter in chunk.parameters()}
    nowhere: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    for parameter in model.parameters():
        if parameter not in mine:
            place = (parameter.dtype, parameter.device)
            if place not in nowhere:
                nowhere[place] = torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device)
            parameter.data = nowhere[place].expand(parameter.shape)
