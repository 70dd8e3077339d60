"""Which module of a model is cut how among tensor ranks: a plan, by patterns of module names, and what carries it out.

A plan is a mapping of patterns (fnmatch) to styles; of several that match, the first counts. Styles, joined by commas:

    column            linear, cut along its outputs
    row               linear, cut along its inputs; its output leaves the region that is cut
    vocabulary        an embedding or a head, cut along the vocabulary, padded where that does not divide
    region            its first argument enters a region that is cut; else each column does that for itself
    opens             its output enters a region, in which "vocabulary inside" then is
    divide A B        attributes A and B are numbers, or lists of them, of which each rank has its share
    norm              in between the regions: with sequence parallelism gradients of its parameters are terms of a sum
    split             the first module (in order of registration) whose input is cut along the sequence, with that
    cut D             of a buffer: cut along dimension D

"column of 64" cuts between units of 64 features (heads), evenly; "column fused 128+32+32 of 64" cuts each of several
projections that lie side by side, "column fused 3" three of one width. Without units, sizes may differ by one.

A parameter stays the same object with a part of its values, so optimizers and ties hold. Its role (engine/roles.py)
says where the part lies.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .roles import Role, Whole, give_role, role_of
from .sharding import cut, sections
from .tensor_functions import TensorRanks, enter, split
from .tensor_layers import ColumnLinear, RowLinear, Rows, VocabEmbedding, VocabHead

AXIS = "tensor"

LAYERS = (ColumnLinear, RowLinear, VocabEmbedding, VocabHead)
"""Modules that compute with a part of their weights."""

Plan = Mapping[str, str]


def parallelize(model: nn.Module, plan: Plan, ranks: TensorRanks) -> None:
    """Cut a model in place: this rank keeps its part, and the modules pass activations to the other ranks.

    All ranks must hold the same values before.

    Raises:
        ValueError: a pattern that nothing matches, an unknown style, or sizes that the ranks cannot share.
    """
    styles = _matched(model, plan)
    if ranks.sequence_parallel and not any("split" in each for each in styles.values()):
        raise ValueError(
            "parallel.sequence_parallel = true, but no module of the tensor plan has the style 'split'; name the first"
            " block so, and norms between regions 'norm'"
        )
    _Carpenter(model, ranks, styles).work()


def _matched(model: nn.Module, plan: Plan) -> dict[str, list[str]]:
    """The styles of each module or buffer that the plan names."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_buffers()]
    found: dict[str, list[str]] = {}
    for name in names:
        pattern = next((pattern for pattern in plan if fnmatchcase(name, pattern)), None)
        if pattern is not None:
            found[name] = [style.strip() for style in plan[pattern].split(",")]
    for pattern in plan:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"the tensor plan's {pattern!r} matches no module; allowed: names as in named_modules()")
    return found


class _Carpenter:
    """Carries a plan out.

    Args:
        styles: by name of a module or buffer.
    """

    def __init__(self, model: nn.Module, ranks: TensorRanks, styles: Mapping[str, list[str]]) -> None:
        self.model, self.ranks, self.styles = model, ranks, styles
        self.rank, self.world = ranks.group.rank, ranks.group.world
        self._is_split = False

    def work(self) -> None:
        for name, styles in self.styles.items():
            for style in styles:
                self._apply(name, *style.split())
        for name, module in self.model.named_modules():
            held = [role_of(parameter) for parameter in module._parameters.values() if parameter is not None]
            cuts = any(AXIS in role.cut and role.whole is not None for role in held)
            if cuts and not isinstance(module, LAYERS):
                raise ValueError(
                    f"{name!r}, a {type(module).__name__}, shares a weight with a module that the tensor plan cuts;"
                    " name it in the plan too"
                )

    def _apply(self, name: str, style: str, *words: str) -> None:
        match style:
            case "column" | "row":
                self._replace(name, self._linear(name, style, words))
            case "vocabulary":
                self._replace(name, self._vocabulary(name, enters=words != ("inside",)))
            case "region":
                self.model.get_submodule(name).register_forward_pre_hook(self._enters, with_kwargs=True)
            case "opens":
                self.model.get_submodule(name).register_forward_hook(self._opens)
            case "divide":
                self._divide(name, words)
            case "norm":
                if self.ranks.sequence_parallel:
                    for parameter in self.model.get_submodule(name).parameters():
                        give_role(parameter, Role(partial=(AXIS,)))
            case "split":
                if self.ranks.sequence_parallel and not self._is_split:
                    self.model.get_submodule(name).register_forward_pre_hook(self._splits, with_kwargs=True)
                    self._is_split = True
            case "cut":
                self._cut_buffer(name, int(words[0]))
            case _:
                raise ValueError(
                    f"the tensor plan's style of {name!r} is {style!r}; allowed: column, row, vocabulary, region,"
                    " opens, divide, norm, split, cut"
                )

    def _replace(self, name: str, layer: nn.Module) -> None:
        old = self.model.get_submodule(name)
        holder, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(holder), last, layer.train(old.training))

    # Hooks #

    def _enters(self, module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return _with_first(arguments, keywords, lambda x: enter(x, self.ranks))

    def _opens(self, module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return enter(output, self.ranks)

    def _splits(self, module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return _with_first(arguments, keywords, lambda x: split(x, self.ranks))

    # Modules #

    def _linear(self, name: str, style: str, words: tuple[str, ...]) -> nn.Module:
        module = self.model.get_submodule(name)
        transposed = type(module).__name__ == "Conv1D"  # of transformers: a linear layer whose weight is [in, out]
        if not transposed and not isinstance(module, nn.Linear):
            raise ValueError(f"the tensor plan cuts {name!r}, a {type(module).__name__}; allowed: linear layers")
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter)
        dim = int(transposed) if style == "column" else 1 - int(transposed)
        ranges = self._ranges(name, weight.shape[dim], words)
        self._cut(name, weight, dim, ranges)
        if style == "row":
            if isinstance(bias, nn.Parameter) and self.ranks.sequence_parallel:
                give_role(bias, Role(partial=(AXIS,)))
            return RowLinear(weight, _parameter(bias), self.ranks, transposed=transposed)
        if isinstance(bias, nn.Parameter):
            self._cut(name, bias, 0, ranges)
        inside = any("region" in styles for outer, styles in self.styles.items() if _is_inside(name, outer))
        return ColumnLinear(weight, _parameter(bias), self.ranks, transposed=transposed, enters=not inside)

    def _ranges(self, name: str, features: int, words: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
        """This rank's features.

        Args:
            words: "fused" and widths, "of" and a unit, or neither.
        """
        told = dict(zip(words[::2], words[1::2], strict=False))
        if len(words) % 2 or not told.keys() <= {"fused", "of"}:
            raise ValueError(
                f"the tensor plan's style of {name!r} ends in {' '.join(words)!r}; allowed: 'fused W of U'"
            )
        widths = [int(width) for width in told.get("fused", str(features)).split("+")]
        if len(widths) == 1 and "fused" in told:
            widths = [features // widths[0]] * widths[0]
        if sum(widths) != features:
            raise ValueError(f"{name}: sections of {'+'.join(map(str, widths))} features, but it has {features}")
        unit = int(told.get("of", 0))
        ranges, start = [], 0
        for width in widths:
            first, last = self._share(name, width, unit)
            ranges.append((start + first, start + last))
            start += width
        return tuple(ranges)

    def _share(self, name: str, width: int, unit: int) -> tuple[int, int]:
        if unit and (width % unit or width // unit % self.world):
            raise ValueError(
                f"{name}: {width} features are {width / unit:g} heads of {unit}, which {self.world} tensor ranks cannot"
                f" share evenly; choose parallel.tensor (mp_size) so that it divides the heads"
            )
        if width < self.world:
            raise ValueError(f"{name}: {width} features for {self.world} tensor ranks; allowed: at least one for each")
        first, last = sections(width // (unit or 1), self.world)[self.rank]
        return first * (unit or 1), last * (unit or 1)

    def _vocabulary(self, name: str, *, enters: bool) -> nn.Module:
        module = self.model.get_submodule(name)
        if not isinstance(module, nn.Embedding | nn.Linear):
            raise ValueError(
                f"the tensor plan cuts {name!r}, a {type(module).__name__}; allowed: nn.Embedding, nn.Linear"
            )
        unusual = ("max_norm", "sparse", "scale_grad_by_freq")
        if any(getattr(module, option, None) for option in unusual):
            raise ValueError(f"{name}: an embedding with {', '.join(unusual)} cannot be cut; leave them out")
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        place = role_of(weight).whole
        vocabulary = weight.shape[0] if place is None else place.shape[0]
        padded = -(-vocabulary // self.world)
        if padded * (self.world - 1) >= vocabulary:
            raise ValueError(f"{name}: {vocabulary} rows for {self.world} tensor ranks leave one without any")
        first, last = padded * self.rank, min(padded * (self.rank + 1), vocabulary)
        rows = Rows(first, last - first, vocabulary)
        self._cut(name, weight, 0, ((first, last),), padded)
        if isinstance(module, nn.Embedding):
            return VocabEmbedding(weight, rows, self.ranks, module.padding_idx)
        bias = _parameter(module.bias)
        if bias is not None:
            self._cut(name, bias, 0, ((first, last),), padded)
        return VocabHead(weight, bias, rows, self.ranks, enters=enters)

    def _cut(
        self,
        name: str,
        parameter: nn.Parameter,
        dim: int,
        ranges: tuple[tuple[int, int], ...],
        padded: int | None = None,
    ) -> None:
        known = role_of(parameter).whole
        whole = Whole(tuple(parameter.shape) if known is None else known.shape, dim, ranges)
        if known is not None:
            if known != whole:
                raise ValueError(f"{name}: its weight is tied to one that is cut in another way; give both one style")
            return
        parameter.data, parameter.grad = cut(parameter.data, whole, padded), None
        give_role(parameter, Role(cut=(AXIS,), whole=whole))

    def _divide(self, name: str, attributes: tuple[str, ...]) -> None:
        module = self.model.get_submodule(name)
        for attribute in attributes:
            value = getattr(module, attribute)
            numbers = value if isinstance(value, list) else [value]
            if any(number % self.world for number in numbers):
                raise ValueError(f"{name}: {attribute} = {value}, which {self.world} tensor ranks do not divide")
            shares = [number // self.world for number in numbers]
            setattr(module, attribute, shares if isinstance(value, list) else shares[0])

    def _cut_buffer(self, name: str, dim: int) -> None:
        buffer = self.model.get_buffer(name)
        start, stop = sections(buffer.shape[dim], self.world)[self.rank]
        holder, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(holder), last, buffer.narrow(dim, start, stop - start).clone())


def _with_first(arguments: tuple, keywords: dict[str, Any], change: Any) -> tuple[tuple, dict[str, Any]]:
    """A module's arguments, the first tensor of which is changed."""
    if arguments:
        return (change(arguments[0]), *arguments[1:]), keywords
    name = next(name for name, value in keywords.items() if isinstance(value, Tensor))
    return arguments, {**keywords, name: change(keywords[name])}


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _parameter(value: Any) -> nn.Parameter | None:
    return value if isinstance(value, nn.Parameter) else None


def check_optimizer(optimizer: torch.optim.Optimizer | None) -> None:
    """An optimizer that was made on the whole parameters follows them, unless it has stepped.

    Raises:
        ValueError: it has state, whose shapes are those of the whole parameters.
    """
    if optimizer is not None and optimizer.state:
        raise ValueError(
            f"optimizer {type(optimizer).__name__} has stepped on the whole parameters, which tensor ranks now cut;"
            " pass one that has not, or a function of the parameters"
        )
