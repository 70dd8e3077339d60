"""How the ranks of a run are divided between the kinds of parallelism: a mesh of named axes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from ..collectives.groups import Mesh
from ..reading import STRICT

ORDER = ("tensor", "context", "data", "pipeline")
"""The axes, innermost first: ranks that talk most are neighbours (Narayanan et al. 2021, section 3.2)."""

ContextPlacement = Literal["zigzag", "contiguous"]
ContextAttention = Literal["ulysses", "ring", "all_gather"]

OF_SAMPLES = ("context", "data")
"""Axes along which ranks compute on different tokens with the same parameters: their gradients are averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSection:
    """`parallel`: ours; ranks by kind of parallelism.

    Attributes:
        tensor: ranks that share each layer, as `mp_size`.
        context: ranks that share each sequence.
        context_attention: how these attend to each other's tokens: by an exchange of heads, by keys and values that
            travel from rank to rank, or by all of them at once.
        context_placement: which tokens a rank has where keys and values come to it: a piece from the front and one
            from the back, so that causal attention is as much work for all, or neighbouring ones.
        pipeline: ranks that have different layers, as `pipeline_size`.
        expert: data-parallel ranks, neighbours, that have different experts of each mixture; 1: all have all.
        order: all four axes, innermost first: ranks that are neighbours on the first are neighbours in the world.
        sequence_parallel: what tensor-parallel layers pass to each other is cut along the sequence, where it would
            else be on all of them (Korthikanti et al. 2022).
        plan: how tensor ranks share the modules whose names match a pattern, for models that have no plan of their own
            (engine/tensor_plan.py): `{"*.fc1": "column", "*.fc2": "row"}`.
    """

    __pydantic_config__ = STRICT
    tensor: int = 1
    context: int = 1
    context_attention: ContextAttention = "ulysses"
    context_placement: ContextPlacement = "zigzag"
    pipeline: int = 1
    expert: int = 1
    order: tuple[str, ...] = ORDER
    sequence_parallel: bool = False
    plan: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(ORDER):
            raise ValueError(f"order = {list(self.order)}; allowed: {', '.join(ORDER)}, each once, innermost first")
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel = true with tensor = 1; allowed: with tensor > 1, whose ranks share it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """Ranks by axis, as config states them; `data` None for all that the others leave. The rest is the section's."""

    data: int | None = None
    tensor: int = 1
    context: int = 1
    context_attention: ContextAttention = "ulysses"
    context_placement: ContextPlacement = "zigzag"
    pipeline: int = 1
    order: tuple[str, ...] = field(default=ORDER)
    sequence_parallel: bool = False
    plan: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls, section: ParallelSection, *, dp_size: int | None, mp_size: int, pipeline_size: int, where: str
    ) -> "Parallelism":
        """What the section and the three keys say together.

        Raises:
            ValueError: a size below 1, or two different sizes for the same axis.
        """
        sizes = {}
        for key, name, given in (("mp_size", "tensor", mp_size), ("pipeline_size", "pipeline", pipeline_size)):
            ours = getattr(section, name)
            if 1 not in (ours, given) and ours != given:
                raise ValueError(f"{where}: {key} = {given} and parallel.{name} = {ours}; allowed: one of them")
            sizes[name] = given if ours == 1 else ours
        if section.expert > 1 and section.context > 1:
            raise ValueError(
                f"{where}: parallel.expert = {section.expert} and parallel.context = {section.context}; allowed: one of"
                " them, because experts are spread over ranks with samples of their own"
            )
        stated = {"dp_size": dp_size, "mp_size": sizes["tensor"], "pipeline_size": sizes["pipeline"]}
        for key, size in (stated | {"parallel.context": section.context}).items():
            if size is not None and size < 1:
                raise ValueError(f"{where}: {key} = {size}; allowed: an integer >= 1")
        return cls(
            data=dp_size,
            context=section.context,
            context_attention=section.context_attention,
            context_placement=section.context_placement,
            order=section.order,
            sequence_parallel=section.sequence_parallel,
            plan=tuple(section.plan.items()),
            **sizes,
        )

    def over(self, world: int, where: str) -> "Parallelism":
        """The same with `data` resolved for a number of ranks.

        Raises:
            ValueError: a product of sizes other than `world`.
        """
        others = self.tensor * self.context * self.pipeline
        sizes = {
            "dp_size": self.data if self.data is not None else max(1, world // others),
            "mp_size": self.tensor,
            "pipeline_size": self.pipeline,
        }
        if self.context > 1:
            sizes["parallel.context"] = self.context
        if (product := prod(sizes.values())) != world:
            raise ValueError(
                f"{where}: {' * '.join(sizes)} = {' * '.join(map(str, sizes.values()))} = {product}, but world ="
                f" {world}; start {product} ranks, or change the sizes"
            )
        return Parallelism(
            data=sizes["dp_size"],
            tensor=self.tensor,
            context=self.context,
            context_attention=self.context_attention,
            context_placement=self.context_placement,
            pipeline=self.pipeline,
            order=self.order,
            sequence_parallel=self.sequence_parallel,
            plan=self.plan,
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks by axis, innermost first; `data` must be resolved."""
        return {name: getattr(self, name) for name in self.order}

    def mesh(self, data: Mesh) -> Mesh:
        """The mesh, without axes of a single rank; the axes of `data` stand where the data axis does."""
        axes: list[tuple[str, int]] = []
        for name in self.order:
            axes += data.axes if name == "data" else [(name, self.sizes[name])]
        return Mesh(tuple((name, size) for name, size in axes if size > 1 or (name, size) in data.axes))
