"""The config's sections on collectives: how they are done, and what travels in fewer bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..collectives.algorithms import KINDS, algorithm
from ..collectives.tiers import Tier
from ..reading import STRICT
from .compression import ERROR_FEEDBACK, SCHEMES, BlockQuantized, Cast, Scheme, scheme_named
from .sections import ZeroSection

DATA_TYPES: dict[str, Literal["fp16", "bf16", "fp32"]] = {
    "fp16": "fp16", "bf16": "bf16", "bfp16": "bf16", "fp32": "fp32",
}  # fmt: skip
"""Our name of a `communication_data_type`; DeepSpeed writes bf16 as "bfp16" there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionSection:
    """`communication_compression`: ours; what travels in fewer bytes.

    Attributes:
        gradients: the scheme of gradients by name (engine/compression.py).
        gradient_options: its fields.
        parameters: the scheme of gathered parameters, at stage 3.
        parameter_options: its fields.
        min_elements: smaller buffers travel as they are.
    """

    __pydantic_config__ = STRICT
    gradients: str | None = None
    gradient_options: dict[str, Any] = field(default_factory=dict)
    parameters: str | None = None
    parameter_options: dict[str, Any] = field(default_factory=dict)
    min_elements: int = 1024

    def __post_init__(self) -> None:
        if self.min_elements < 0:
            raise ValueError(f"min_elements = {self.min_elements}; allowed: at least 0")
        for name, options in (("gradient", self.gradient_options), ("parameter", self.parameter_options)):
            if options and getattr(self, f"{name}s") is None:
                raise ValueError(f"{name}_options = {options} without {name}s; name the scheme that they are for")


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """`communication`: ours; how collectives are done.

    Attributes:
        transport: between CPU ranks; "auto" is shared memory where all ranks are on one host, else sockets.
        algorithms: for a kind of collective ("all_reduce") the algorithm that does it at every size ("ring",
            "hierarchical/8x4", "native"); the others are chosen by size.
        tiers: the network under the ranks, innermost first, as tables with the fields of Tier (collectives/tiers.py);
            algorithms are then chosen by their price on it, else by what was measured on one host.
    """

    __pydantic_config__ = STRICT
    transport: Literal["auto", "sockets", "shared_memory"] = "auto"
    algorithms: dict[str, str] = field(default_factory=dict)
    tiers: tuple[dict[str, Any], ...] = ()

    def network(self) -> tuple[Tier, ...]:
        """The tiers.

        Raises:
            ValueError: a field that a Tier does not have, or that is missing or wrong.
        """
        try:
            return tuple(Tier(**table) for table in self.tiers)
        except TypeError as error:
            raise ValueError(f"tiers: {error}; allowed: the fields of Tier in collectives/tiers.py") from None

    def __post_init__(self) -> None:
        self.network()
        for kind, name in self.algorithms.items():
            if name != "native" or kind not in KINDS:
                algorithm(kind, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What engine/compressed.py does to gradients and to parameters on their way; None leaves them alone."""

    gradients: Scheme | None = None
    parameters: Cast | BlockQuantized | None = None
    min_elements: int = 1024


def compression_of(section: CompressionSection, zero: ZeroSection, data_type: str | None, where: str) -> Compression:
    """What our section and DeepSpeed's keys say together.

    Args:
        data_type: `communication_data_type`.

    Raises:
        ValueError: two keys for the same traffic, or a scheme that does not go with the ZeRO stage.
    """
    gradients = {
        "communication_data_type": None if data_type is None else Cast(dtype=DATA_TYPES[data_type]),
        "zero_optimization.zero_quantized_gradients": BlockQuantized(bits=4) if zero.zero_quantized_gradients else None,
        "communication_compression.gradients": _scheme(section.gradients, section.gradient_options, "gradients", where),
    }
    parameters = {
        "zero_optimization.zero_quantized_weights": BlockQuantized(bits=8) if zero.zero_quantized_weights else None,
        "communication_compression.parameters": _scheme(
            section.parameters, section.parameter_options, "parameters", where
        ),
    }
    for_gradients, for_parameters = _only_one(gradients, where), _only_one(parameters, where)
    if isinstance(for_gradients, ERROR_FEEDBACK) and zero.stage >= 2:
        raise ValueError(
            f"{where}: communication_compression.gradients = {section.gradients!r} keeps a whole gradient of what it"
            f" lost on every rank, which zero_optimization.stage = {zero.stage} is there to avoid; allowed: stage 0 or"
            " 1, or a scheme without error feedback"
        )
    if isinstance(for_parameters, ERROR_FEEDBACK):
        raise ValueError(
            f"{where}: communication_compression.parameters = {section.parameters!r}; allowed:"
            f" {', '.join(name for name, (kind, _) in SCHEMES.items() if kind not in ERROR_FEEDBACK)}"
        )
    if for_parameters is not None and zero.stage != 3:
        key = next(key for key, scheme in parameters.items() if scheme is not None)
        raise ValueError(
            f"{where}: {key} is set and zero_optimization.stage = {zero.stage}; allowed: stage 3, which keeps exact"
            " parameters apart from the gathered ones"
        )
    return Compression(gradients=for_gradients, parameters=for_parameters, min_elements=section.min_elements)


def _scheme(name: str | None, options: dict[str, Any], what: str, where: str) -> Scheme | None:
    return None if name is None else scheme_named(name, options, f"{where}: communication_compression.{what}")


def _only_one(schemes: Mapping[str, Scheme | None], where: str) -> Any:
    """The scheme that one of the keys gives, or None."""
    given = {key: scheme for key, scheme in schemes.items() if scheme is not None}
    if len(given) > 1:
        raise ValueError(f"{where}: {' and '.join(given)} are both set; allowed: at most one of them")
    return next(iter(given.values()), None)
