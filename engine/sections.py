"""The config's sections on ZeRO and on the optimizer."""

import math
from dataclasses import dataclass, field
from typing import Any

from ..reading import STRICT
from .placement import OffloadOptimizerSection, OffloadParamSection, Placement
from .redundancy import OFF

LEAST_ELEMENTS = {
    "reduce_bucket_size": 1,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
"""Smallest values of the sizes in `zero_optimization`; a JSON file may write them as 5e8."""


def _unbounded(elements: float | None) -> float:
    return math.inf if elements is None else int(elements)


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """Bounds, in elements, of what a rank holds besides its shards.

    Attributes:
        bucket_elements: of one flat unit, unless a single parameter is larger.
        live_elements: of all gathered units, beyond which none is gathered before it is needed.
        ahead_elements: of the units gathered before they are needed.
        persistent_below: smaller parameters are never sharded.
    """

    bucket_elements: float = 500_000_000
    live_elements: float = math.inf
    ahead_elements: float = math.inf
    persistent_below: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSection:
    """`zero_optimization`: which of optimizer state, gradients and parameters each rank keeps only 1/n of.

    Attributes:
        stage: 1 shards the optimizer's state, 2 gradients too, 3 parameters too; 0 shards nothing.
        zero_quantized_weights: parameters are gathered as int8 blocks (ZeRO++'s qwZ).
        zero_quantized_gradients: gradients are exchanged as int4 blocks (ZeRO++'s qgZ).
        reduce_bucket_size: elements of the largest flat unit, and so of its gradient buffer and of one collective;
            blocks with more are cut between parameters.
        stage3_max_live_parameters: gathered elements beyond which nothing is gathered ahead.
        stage3_prefetch_bucket_size: elements that may be on their way ahead of their use; 0 gathers nothing ahead.
        stage3_param_persistence_threshold: parameters with fewer elements stay whole on every rank.
        mics_shard_size: states are sharded over so many consecutive ranks and replicated across (MiCS); -1: over all.
        zero_hpz_partition_size: so many consecutive ranks keep the parameters a second time, for backward (ZeRO++'s
            hpZ); 1: none do.
    """

    __pydantic_config__ = STRICT
    stage: int = 0
    reduce_bucket_size: float = 500_000_000
    stage3_max_live_parameters: float | None = None
    stage3_prefetch_bucket_size: float | None = None
    stage3_param_persistence_threshold: float = 0
    zero_quantized_weights: bool = False
    zero_quantized_gradients: bool = False
    mics_shard_size: int = OFF
    zero_hpz_partition_size: int = 1
    offload_optimizer: OffloadOptimizerSection = field(default_factory=OffloadOptimizerSection)
    offload_param: OffloadParamSection = field(default_factory=OffloadParamSection)

    def __post_init__(self) -> None:
        if self.stage not in range(4):
            raise ValueError(f"stage = {self.stage}; allowed: 0, 1, 2, 3")
        for name, least in LEAST_ELEMENTS.items():
            value = getattr(self, name)
            if value is not None and (value < least or value != int(value)):
                raise ValueError(f"{name} = {value:g}; allowed: an integer >= {least}, in elements")
        self.placement()

    def buffers(self) -> "Buffers":
        return Buffers(
            bucket_elements=int(self.reduce_bucket_size),
            live_elements=_unbounded(self.stage3_max_live_parameters),
            ahead_elements=_unbounded(self.stage3_prefetch_bucket_size),
            persistent_below=int(self.stage3_param_persistence_threshold),
        )

    def placement(self) -> Placement:
        """Where shards rest."""
        return Placement.resolve(self.stage, self.offload_optimizer, self.offload_param)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSection:
    """`optimizer`: a type by name and its keyword arguments.

    Attributes:
        type: a name of `windtunnel.optim` in any case: torch's element-wise ones (Adam, AdamW, SGD, ...), Lion, LAMB.
        params: its keyword arguments; Adam and AdamW also take `adam_w_mode`.
    """

    __pydantic_config__ = STRICT
    type: str
    params: dict[str, Any] = field(default_factory=dict)
