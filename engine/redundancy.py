"""What a run keeps more than once, and why: shards in every group of ranks, a second shard in every node, whole copies.

Redundancy buys fewer bytes over slow links. Each form is a choice of the config:

    zero_optimization.mics_shard_size           states sharded in groups of ranks, replicated across them (MiCS)
    zero_optimization.zero_hpz_partition_size   parameters sharded a second time in each node, for backward (ZeRO++ hpZ)
    local_updates                               whole copies that step by themselves and agree now and then
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..collectives.groups import Mesh
from ..reading import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalUpdates:
    """`local_updates`: ours; every rank steps on its own gradients, and the ranks agree every so many steps.

    Attributes:
        every: optimizer steps from one agreement to the next, H in the papers.
        outer: "average" replaces the parameters by their mean over the ranks (Local SGD, Stich 2019); "nesterov" takes
            the mean of how far the ranks have come since the last agreement for a gradient, and makes a step of SGD
            with Nesterov momentum from there (DiLoCo, Douillard et al. 2023, algorithm 1).
        outer_lr: of that step; DiLoCo's own value by default (section 3).
        outer_momentum: of that step; DiLoCo's own value by default.
        warmup_steps: so many synchronous steps come first (post-local SGD, Lin et al. 2020).
    """

    __pydantic_config__ = STRICT
    every: int
    outer: Literal["average", "nesterov"] = "average"
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every = {self.every}; allowed: an integer >= 1, steps from one agreement to the next")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps = {self.warmup_steps}; allowed: an integer >= 0")
        if not self.outer_lr > 0:
            raise ValueError(f"outer_lr = {self.outer_lr}; allowed: a number > 0")
        if not 0 < self.outer_momentum < 1:
            raise ValueError(f"outer_momentum = {self.outer_momentum}; allowed: between 0 and 1, both excluded")
        if self.outer == "average" and (self.outer_lr, self.outer_momentum) != (0.7, 0.9):
            raise ValueError("outer_lr and outer_momentum belong to outer = 'nesterov', and outer = 'average' has none")

    def due(self, step: int) -> bool:
        """Whether the ranks agree after their `step`-th optimizer step, counted from 1."""
        return step > self.warmup_steps and (step - self.warmup_steps) % self.every == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Redundancy:
    """The choices.

    Attributes:
        shard_ranks: states are sharded over so many consecutive ranks, and replicated across such groups; None: over
            all ranks.
        secondary_ranks: so many consecutive ranks hold all parameters in second shards; 1: there are none.
        local: how ranks agree that step by themselves; None: they step together.
        expert_ranks: so many consecutive ranks have different experts (engine/experts.py); all else is kept as ever.
    """

    shard_ranks: int | None = None
    secondary_ranks: int = 1
    local: LocalUpdates | None = None
    expert_ranks: int = 1

    def mesh(self, ranks: int) -> Mesh:
        """The axes of the data-parallel ranks: "data", or those of the groups, innermost first."""
        if self.shard_ranks is not None and self.shard_ranks < ranks:
            return Mesh.of({"shard": self.shard_ranks, "replica": ranks // self.shard_ranks})
        if self.secondary_ranks > 1:
            return Mesh.of({"inside": self.secondary_ranks, "across": ranks // self.secondary_ranks})
        if self.expert_ranks > 1:
            return Mesh.of({"expert": self.expert_ranks, "expert_data": ranks // self.expert_ranks})
        return Mesh.of({"data": ranks})


OFF = -1
"""DeepSpeed's `mics_shard_size` where there is none."""


def resolve(
    mics_shard_size: int, hpz_size: int, local: LocalUpdates | None, stage: int, ranks: int, *, experts: int = 1
) -> Redundancy:
    """The choices of a config, checked against each other.

    Raises:
        ValueError: a size that does not divide the ranks, or a choice that does not go with the stage or another one.
    """
    redundant = mics_shard_size != OFF or hpz_size != 1 or local is not None
    problem = next(_problems(mics_shard_size, hpz_size, local, stage, ranks), None) or next(
        _problems_of_experts(experts, ranks, redundant=redundant), None
    )
    if problem is not None:
        raise ValueError(problem)
    return Redundancy(
        shard_ranks=None if mics_shard_size == OFF else mics_shard_size,
        secondary_ranks=hpz_size,
        local=local,
        expert_ranks=experts,
    )


def _problems(mics: int, hpz: int, local: LocalUpdates | None, stage: int, ranks: int) -> Iterator[str]:
    if mics != OFF:
        yield from _uneven("zero_optimization.mics_shard_size", mics, ranks, f", or {OFF} for none")
        if stage == 0:
            yield (
                f"zero_optimization.mics_shard_size = {mics} and zero_optimization.stage = 0, which shards nothing;"
                " allowed: stage 1, 2 or 3"
            )
    if hpz != 1:
        yield from _uneven("zero_optimization.zero_hpz_partition_size", hpz, ranks, ", where 1 means none")
        if stage != 3:
            yield (
                f"zero_optimization.zero_hpz_partition_size = {hpz} and zero_optimization.stage = {stage}, which"
                " gathers nothing for backward; allowed: stage 3"
            )
        if mics != OFF:
            yield (
                f"zero_optimization.mics_shard_size = {mics} and zero_hpz_partition_size = {hpz} are both set: in a"
                " shard group of its own size nothing is left to keep twice; allowed: one of them"
            )
    if local is not None and stage != 0:
        yield (
            f"local_updates with zero_optimization.stage = {stage}: a shard is stepped for all ranks by one of them,"
            " but ranks that step on gradients of their own have nothing in common to shard; allowed: stage 0"
        )


def _problems_of_experts(experts: int, ranks: int, *, redundant: bool) -> Iterator[str]:
    if experts != 1:
        yield from _uneven("parallel.expert", experts, ranks, ", where 1 means that all have all experts")
        if redundant:
            yield (
                f"parallel.expert = {experts} with zero_optimization.mics_shard_size, zero_hpz_partition_size or"
                " local_updates, which keep copies that ranks with different experts do not have; allowed: one of them"
            )


def _uneven(name: str, size: int, ranks: int, besides: str) -> Iterator[str]:
    if size < 1 or ranks % size:
        count = max(1, ranks // max(1, size))
        divisors = ", ".join(str(each) for each in range(1, ranks + 1) if ranks % each == 0)
        yield (
            f"{name} = {size} does not divide the ranks: {size} * {count} = {size * count}, but there are {ranks}"
            f" ranks; allowed: {divisors}{besides}"
        )
