"""What a parameter on this rank is to the ranks that share the model with it: the same values, or a part of its own.

Whoever cuts a model (tensor parallelism, experts, pipeline stages that tie their embeddings) says so here, once; the
flat units, the gradient norm and checkpoints follow.
"""

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True, slots=True)
class Whole:
    """Which part of the whole parameter a rank's own is.

    It is the concatenation along `dim` of these ranges of the whole: several for a fused one; padding lies outside of
    all ranges, at the end of the part.

    Attributes:
        shape: of the whole parameter.
        dim: dimension that is cut.
        ranges: [start, stop) along it.
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
        whole: which part of the whole parameter this rank's is, where it is cut; needed to save and to export it.
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
