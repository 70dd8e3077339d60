"""What a parameter on this rank is to the ranks that share the model with it: the same values, or a part of its own.

Whoever cuts a model (tensor parallelism, experts, pipeline stages that tie their embeddings) says so here, once; the
flat units, the gradient norm and checkpoints follow.
"""

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True, slots=True)
class Whole:
    """Where a part lies in the whole parameter: it is the concatenation of ranges along one dimension.

    Attributes:
        shape: of the whole parameter.
        dim: along which it is cut.
        ranges: [start, stop) of the whole along `dim`, in the order in which they lie in the part; several for a fused
            projection. What a part has beyond them, at its end, is padding.
    """

    shape: tuple[int, ...]
    dim: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """How a parameter relates to the ranks along the axes of model parallelism.

    Attributes:
        cut: axes along which every rank has a part of its own; along the others all have the same values.
        partial: axes along which each rank's gradient is one term of a sum, which the step takes.
        whole: where this rank's part lies, of a parameter that is cut along one dimension. Roles that differ in this
            alone are equal.
    """

    cut: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    whole: Whole | None = field(default=None, compare=False)


WHOLE = Role()
"""The same values on all ranks, which get the same gradients."""

_ATTRIBUTE = "windtunnel_role"


def give_role(parameter: nn.Parameter, role: Role) -> None:
    setattr(parameter, _ATTRIBUTE, role)


def role_of(parameter: nn.Parameter) -> Role:
    """What `give_role` was told; WHOLE for all others."""
    role: Role = getattr(parameter, _ATTRIBUTE, WHOLE)
    return role
