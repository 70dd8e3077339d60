"""`kernels` of the config: which arithmetic the fused kernels of kernels/ do in place of torch's operators."""

from dataclasses import dataclass

from ..reading import STRICT, nearest

FUSED = ("optimizer", "cross_entropy", "norm", "activation", "rotary", "dropout")
"""What can be fused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSection:
    """What is fused; all else stays as the model and torch have it.

    Attributes:
        fused: `true` for all that a model has, or a list of some of "optimizer", "cross_entropy", "norm", "activation",
            "rotary", "dropout".
    """

    __pydantic_config__ = STRICT
    fused: bool | list[str] = False

    def __post_init__(self) -> None:
        for name in self.fused if isinstance(self.fused, list) else ():
            if name not in FUSED:
                raise ValueError(
                    f"fused = {name!r}; allowed: true, or some of {', '.join(FUSED)}{nearest(name, FUSED)}"
                )

    @property
    def names(self) -> frozenset[str]:
        """What is to be fused."""
        return frozenset(self.fused) if isinstance(self.fused, list) else frozenset(FUSED if self.fused else ())
