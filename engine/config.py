"""What a run is told: DeepSpeed's JSON, read at the edge into frozen values.

A key that Windtunnel does not know or does not honour is an error that names it and the nearest known key: a setting
that is silently ignored is worse than one that is refused.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..collectives.zero import Zero
from ..reading import STRICT, nearest, read_into


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSection:
    """`zero_optimization`: which of optimizer state, gradients and parameters each rank keeps only 1/n of."""

    __pydantic_config__ = STRICT
    stage: int = 0

    def __post_init__(self) -> None:
        if self.stage not in range(4):
            raise ValueError(f"stage = {self.stage}; allowed: 0, 1, 2, 3")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSection:
    """`optimizer`: a type by name and its keyword arguments."""

    __pydantic_config__ = STRICT
    type: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bf16Section:
    """`bf16`: parameters and gradients in bfloat16, fp32 masters in the optimizer's shards."""

    __pydantic_config__ = STRICT
    enabled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp16Section:
    """`fp16`: as `bf16` in half precision, gradients multiplied by a static `loss_scale` before the cast."""

    __pydantic_config__ = STRICT
    enabled: bool = False
    loss_scale: float = 65536.0

    def __post_init__(self) -> None:
        if not 0 < self.loss_scale < math.inf:
            raise ValueError(
                f"loss_scale = {self.loss_scale}; allowed: a static scale > 0, dynamic is not available yet"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Json:
    """The keys of the JSON file, as written; None where a batch size is left to be derived from the others."""

    __pydantic_config__ = STRICT
    train_batch_size: int | None = None
    train_micro_batch_size_per_gpu: int | None = None
    gradient_accumulation_steps: int | None = None
    gradient_clipping: float = 0.0
    zero_optimization: ZeroSection = ZeroSection()
    optimizer: OptimizerSection | None = None
    bf16: Bf16Section = Bf16Section()
    fp16: Fp16Section = Fp16Section()
    seed: int = 1234


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A run as resolved for a number of data-parallel ranks.

    Attributes:
        micro_batch: samples of one rank in one forward.
        accumulation: micro-steps per optimizer step.
        clip: largest global gradient norm, 0 for none.
        precision: dtype of parameters and gradients: "as is" keeps the model's own.
        loss_scale: what the loss is multiplied by before backward, and the gradients divided by after it.
    """

    zero: Zero
    micro_batch: int
    accumulation: int
    clip: float
    precision: Literal["as is", "bf16", "fp16"]
    loss_scale: float
    optimizer: OptimizerSection | None
    seed: int

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any] | None, ranks: int) -> "Config":
        """From a dict or the path of a JSON file; None gives the defaults.

        Raises:
            ValueError: an unknown key, a wrong type, or batch sizes that do not fit `ranks`.
        """
        where, data = _load(source)
        keys = read_into(Json, data, where)
        micro_batch, accumulation = _batch_sizes(keys, ranks, where)
        if not 0 <= keys.gradient_clipping < math.inf:
            raise ValueError(
                f"{where}: gradient_clipping = {keys.gradient_clipping};"
                " allowed: a finite number >= 0 (0 clips nothing)"
            )
        if keys.bf16.enabled and keys.fp16.enabled:
            raise ValueError(f"{where}: bf16.enabled and fp16.enabled are both true; allowed: at most one of them")
        return cls(
            zero=Zero.of_stage(keys.zero_optimization.stage),
            micro_batch=micro_batch,
            accumulation=accumulation,
            clip=keys.gradient_clipping,
            precision="bf16" if keys.bf16.enabled else "fp16" if keys.fp16.enabled else "as is",
            loss_scale=keys.fp16.loss_scale if keys.fp16.enabled else 1.0,
            optimizer=keys.optimizer,
            seed=keys.seed,
        )


def _load(source: str | Path | Mapping[str, Any] | None) -> tuple[str, Mapping[str, Any]]:
    if source is None:
        return "config", {}
    if isinstance(source, Mapping):
        return "config", source
    path = Path(source)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"config: cannot read {str(path)!r}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return str(path), data


def _batch_sizes(keys: Json, ranks: int, where: str) -> tuple[int, int]:
    """(micro batch, accumulation) from any two of batch = micro batch * accumulation * ranks; what is left out is 1."""
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = getattr(keys, name)
        if value is not None and value < 1:
            raise ValueError(f"{where}: {name} = {value}; allowed: an integer >= 1")
    batch, micro, steps = keys.train_batch_size, keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps
    if batch is None:
        return micro or 1, steps or 1
    per_step = ranks * (micro or 1) * (steps or 1)
    if batch % per_step or (micro and steps and batch != per_step):
        raise ValueError(
            f"{where}: train_batch_size = {batch} does not fit {ranks} ranks * train_micro_batch_size_per_gpu"
            f" {micro or 'unset'} * gradient_accumulation_steps {steps or 'unset'}; allowed: a multiple of {per_step}"
            if not (micro and steps)
            else f"{where}: train_batch_size = {batch}; allowed: {ranks} ranks * {micro} * {steps} = {per_step}"
        )
    if micro is None:
        micro = batch // (ranks * (steps or 1))
    return micro, batch // (ranks * micro)


OPTIMIZERS = ("Adam", "AdamW", "SGD")


def optimizer_name(section: OptimizerSection) -> str:
    """The canonical name of a configured optimizer (DeepSpeed's JSON is case-insensitive).

    Raises:
        ValueError: naming the type and those that are known.
    """
    for name in OPTIMIZERS:
        if name.lower() == section.type.lower():
            return name
    raise ValueError(
        f"optimizer.type = {section.type!r}; allowed: {', '.join(OPTIMIZERS)}{nearest(section.type, OPTIMIZERS)}"
    )
