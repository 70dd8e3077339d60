"""ZeRO described: what each data-parallel rank keeps 1/n of, and what that costs in traffic and memory.

Rajbhandari, Rasley, Ruwase and He, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (SC 2020),
sections 5 and 7. The formulas here are *expectations*: they know parameter counts and nothing of any schedule.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .trace import TIERS


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
        optimizer_tier: where master and moments rest, of TIERS in collectives/trace.py.
        parameter_tier: where this rank's parameters rest; off the device only if parameters are sharded.
    """

    elements: int
    element_bytes: int
    padding: int = 0
    trainable: bool = True
    calls: int = 1
    persistent: bool = False
    gradient_bytes: int | None = None
    optimizer_tier: str = "device"
    parameter_tier: str = "device"

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


def shard_group_bytes_per_step(
    units: Iterable[UnitSize], zero: Zero, shard_ranks: int, replicas: int, micro_steps: int
) -> dict[str, int]:
    """The same by axis where states are sharded over `shard_ranks` ranks and replicated `replicas` times.

    Zhang et al., "MiCS: Near-linear Scaling for Training Gigantic Model on Public Cloud" (VLDB 2022), scale-aware model
    partitioning and 2-hop gradient synchronization: inside a group all is as ZeRO has it over s ranks. Between the r
    replicas of a shard of P / s elements its gradient is summed once per step (the second hop), whatever the number of
    micro-steps: 2 P / s (r-1)/r. Units are padded to a multiple of s * r.
    """
    units = list(units)
    between = sum(
        2 * (unit.elements // shard_ranks // replicas) * (replicas - 1) * unit.element_bytes
        for unit in units
        if unit.trainable
    )
    return {"shard": sent_bytes_per_step(units, zero, shard_ranks, micro_steps), "replica": between}


def secondary_bytes_per_step(
    units: Iterable[UnitSize], ranks: int, secondary_ranks: int, micro_steps: int
) -> dict[str, int]:
    """The same by axis at stage 3 where each group of `secondary_ranks` ranks holds the parameters a second time.

    Wang et al., "ZeRO++: Extremely Efficient Collective Communication for Giant Model Training" (2023), section 3.2
    (hpZ): of the three rounds of k P (n-1)/n the gather for backward stays in the group, k P (m-1)/m with m ranks in
    it. The others span all ranks.
    """
    units = list(units)
    sharded = [unit for unit in units if not unit.persistent]
    backward = sum(micro_steps * (unit.elements // ranks) * (ranks - 1) * unit.element_bytes for unit in sharded)
    inside = sum(
        micro_steps * (unit.elements // secondary_ranks) * (secondary_ranks - 1) * unit.element_bytes
        for unit in sharded
    )
    everywhere = sent_bytes_per_step(units, Zero.of_stage(3), ranks, micro_steps) - backward
    return {"inside": inside, "inside*across": everywhere}


def agreement_bytes(units: Iterable[UnitSize], ranks: int, value_bytes: int) -> int:
    """Payload that each rank sends when ranks that step by themselves agree, once in H steps: 2 P (n-1)/n values.

    Parameters of `value_bytes` bytes in Local SGD (Stich 2019, algorithm 1), how far they have come in DiLoCo
    (Douillard et al. 2023, algorithm 1): a mean over the ranks either way, and no gradients besides.
    """
    return sum(2 * (unit.elements // ranks) * (ranks - 1) * value_bytes for unit in units if unit.trainable)


def model_state_bytes(
    units: Iterable[UnitSize],
    zero: Zero,
    ranks: int,
    *,
    moments: int,
    master_bytes: int,
    secondary_ranks: int = 1,
    outer_values: int = 0,
) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state on rank 0's device between steps: see `tier_bytes`."""
    return tier_bytes(
        units,
        zero,
        ranks,
        moments=moments,
        master_bytes=master_bytes,
        secondary_ranks=secondary_ranks,
        outer_values=outer_values,
    )["device"]


def tier_bytes(
    units: Iterable[UnitSize],
    zero: Zero,
    ranks: int,
    *,
    moments: int,
    master_bytes: int,
    secondary_ranks: int = 1,
    outer_values: int = 0,
) -> dict[str, dict[str, int]]:
    """Bytes of parameters, gradients and optimizer state that rank 0 holds between steps, by tier (SC 2020, section 5).

    Other ranks hold the same or, where padding falls into their shard, a little less. Where optimizer state rests off
    the device, so does a master copy, even of fp32 parameters, and the reduced gradient is in host memory; gradients
    that are not sharded stay on the device too (Ren et al. 2021, ZeRO-Offload, section 3).

    Args:
        ranks: over how many states are sharded: those of a shard group, where all ranks are not one.
        secondary_ranks: over how many the second shards of the parameters are cut; 1 where there are none (ZeRO++,
            section 3.2: with m ranks in a node P / m more parameters per rank).
        outer_values: that an outer optimizer keeps per trainable parameter, in `master_bytes` each: 2 for DiLoCo's
            last agreed values and momentum, 0 for a mean of the parameters.
        moments: values that the optimizer keeps per parameter: 2 for Adam, 1 for momentum, 0 for plain SGD.
        master_bytes: size of an optimizer value; where it differs from a unit's own `element_bytes` a master copy
            of the parameters is kept too, as in mixed precision: 2 + 2 + 12 bytes per parameter with Adam.
    """
    totals = {tier: {"parameters": 0, "gradients": 0, "optimizer": 0} for tier in TIERS}
    for unit in units:
        shard = unit.elements // ranks
        kept = shard if zero.optimizer else unit.elements
        stays = unit.optimizer_tier == "device"
        sharded = zero.of_unit(unit.persistent).parameters
        totals[unit.parameter_tier]["parameters"] += (shard if sharded else unit.elements) * unit.element_bytes
        if sharded and secondary_ranks > 1:
            totals["device"]["parameters"] += unit.elements // secondary_ranks * unit.element_bytes
        if not unit.trainable:
            continue
        if stays or not zero.gradients:
            totals["device"]["gradients"] += (shard if zero.gradients else unit.elements) * unit.bytes_of_gradient
        if not stays:
            totals["host"]["gradients"] += kept * unit.bytes_of_gradient
        shared = stays and unit.parameter_tier == "device" and master_bytes == unit.element_bytes
        values = (0 if shared else kept) + moments * min(kept, unit.elements - unit.padding)
        totals[unit.optimizer_tier]["optimizer"] += (values + outer_values * unit.elements) * master_bytes
    return totals
