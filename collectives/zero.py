"""ZeRO described: what each data-parallel rank keeps 1/n of, and what that costs in traffic and memory.

Rajbhandari, Rasley, Ruwase and He, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (SC 2020),
sections 5 and 7. The formulas here are *expectations*: they know parameter counts and nothing of any schedule.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Zero:
    """What each rank keeps only 1/n of. The engine has one code path; these three booleans steer it."""

    optimizer: bool = False
    gradients: bool = False
    parameters: bool = False

    @classmethod
    def of_stage(cls, stage: int) -> "Zero":
        if stage not in range(4):
            raise ValueError(f"zero stage = {stage}; allowed: 0, 1, 2, 3")
        return cls(optimizer=stage >= 1, gradients=stage >= 2, parameters=stage >= 3)

    def of_unit(self, persistent: bool) -> "Zero":
        """What holds for a unit: persistent ones keep whole parameters."""
        return replace(self, parameters=False) if persistent else self

    @property
    def stage(self) -> int:
        return self.optimizer + self.gradients + self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSize:
    """A flat unit as the formulas see it.

    Attributes:
        elements: parameters in it, padding included (a multiple of the ranks).
        padding: how many of them are no parameters; they lie at the end and have no moments.
        element_bytes: of the parameters, 4 or 2 (8 in float64).
        gradient_bytes: of a gradient as it is kept and reduced; None where that is as the parameters.
        trainable: frozen units have no gradients and no optimizer state.
        calls: how often the forward of its module runs in a micro-step; sharded parameters are gathered for each.
        persistent: its parameters stay whole, even where the others are sharded.
    """

    elements: int
    element_bytes: int
    padding: int = 0
    trainable: bool = True
    calls: int = 1
    persistent: bool = False
    gradient_bytes: int | None = None

    @property
    def bytes_of_gradient(self) -> int:
        return self.element_bytes if self.gradient_bytes is None else self.gradient_bytes


def padded(elements: int, ranks: int) -> int:
    """The next multiple of `ranks`."""
    return -(-elements // ranks) * ranks


def sent_bytes_per_step(units: Iterable[UnitSize], zero: Zero, ranks: int, micro_steps: int) -> int:
    """Payload that each rank sends for its units in one optimizer step (SC 2020, section 7).

    With P elements padded, n ranks and k micro-steps: stages 0 and 1 send 2 P (n-1)/n, stage 2 (k+1) P (n-1)/n, stage 3
    3 k P (n-1)/n; persistent units as in stage 2. Gradients count with their own size per element. Few-element
    reductions (gradient norm, bitmap of used parameters) are not in it.
    """
    total = 0
    for unit in units:
        at_the_step = zero.optimizer and unit.trainable
        sharded = zero.of_unit(unit.persistent).parameters
        gathers = (unit.calls + 1) * micro_steps if sharded else int(at_the_step)  # forward, backward
        # An all-reduce sends what a reduce-scatter and a gather do.
        reductions = unit.trainable * (micro_steps if zero.gradients else 1 if zero.optimizer else 2)
        element = gathers * unit.element_bytes + reductions * unit.bytes_of_gradient
        total += (unit.elements // ranks) * (ranks - 1) * element
    return total


def model_state_bytes(
    units: Iterable[UnitSize], zero: Zero, ranks: int, *, moments: int, master_bytes: int
) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state that rank 0 holds between steps (SC 2020, section 5).

    Other ranks hold the same or, where padding falls into their shard, a little less.

    Args:
        moments: values that the optimizer keeps per parameter: 2 for Adam, 1 for momentum, 0 for plain SGD.
        master_bytes: size of an optimizer value; where it differs from a unit's own `element_bytes` a master copy
            of the parameters is kept too, as in mixed precision: 2 + 2 + 12 bytes per parameter with Adam.
    """
    totals = {"parameters": 0, "gradients": 0, "optimizer": 0}
    for unit in units:
        shard = unit.elements // ranks
        totals["parameters"] += (
            shard if zero.of_unit(unit.persistent).parameters else unit.elements
        ) * unit.element_bytes
        if not unit.trainable:
            continue
        totals["gradients"] += (shard if zero.gradients else unit.elements) * unit.bytes_of_gradient
        kept = shard if zero.optimizer else unit.elements
        masters = kept if master_bytes != unit.element_bytes else 0
        totals["optimizer"] += (masters + moments * min(kept, unit.elements - unit.padding)) * master_bytes
    return totals
