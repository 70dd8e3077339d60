"""The config's section on pipelines, and the plans that follow from it."""

from dataclasses import dataclass, replace
from typing import Literal

from ..collectives.pipeline import FORWARD, Plan, kept
from ..collectives.pipeline_messages import fuse, prefetch, with_communication
from ..collectives.pipeline_schedules import SCHEDULES, schedule
from ..reading import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSection:
    """`pipeline`: ours; how the stages of `pipeline_size` work. Micro-batches are `gradient_accumulation_steps`.

    Attributes:
        schedule: by name: "sequential", "gpipe", "1f1b", "interleaved", "zb-h1" or "zb-v".
        chunks: of the model on each rank; left out: the fewest that the schedule can have.
        partition: which layers make a chunk: as equal as can be in "parameters", in number ("uniform"), in `costs`
            ("cost"), in bytes of states and activations ("memory"), or as `layers` says ("layers").
        costs: of each layer, as `layer_flops` (engine/layer_flops.py) counts them; for "memory" the bytes of one
            micro-batch's activations.
        layers: of each chunk, in the order of the model, how many.
        ahead: receives are posted so many forwards and backwards before their use.
    """

    __pydantic_config__ = STRICT
    schedule: str = "1f1b"
    chunks: int | None = None
    partition: Literal["uniform", "parameters", "cost", "memory", "layers"] = "parameters"
    costs: tuple[float, ...] = ()
    layers: tuple[int, ...] = ()
    ahead: int = 1

    def __post_init__(self) -> None:
        if not schedule(self.schedule).performed:
            performed = ", ".join(name for name, each in SCHEDULES.items() if each.performed)
            raise ValueError(f"schedule = {self.schedule!r} is priced, not performed; allowed: {performed}")
        if self.chunks is not None and self.chunks < 1:
            raise ValueError(f"chunks = {self.chunks}; allowed: 1 or more")
        if self.ahead < 0:
            raise ValueError(f"ahead = {self.ahead}; allowed: 0 or more")
        if bool(self.layers) != (self.partition == "layers") or any(count < 1 for count in self.layers):
            raise ValueError(
                f"layers = {list(self.layers)} and partition = {self.partition!r}; allowed: numbers >= 1 with 'layers'"
            )
        if bool(self.costs) != (self.partition in ("cost", "memory")):
            raise ValueError(
                f"{len(self.costs)} costs and partition = {self.partition!r}; allowed: costs with 'cost' and 'memory'"
            )

    def plan(self, ranks: int, micro_batches: int) -> Plan:
        """Who computes what in a step, without messages.

        Raises:
            ValueError: sizes that the schedule cannot have.
        """
        return schedule(self.schedule).plan(ranks, micro_batches, self.chunks)

    def posted(self, plan: Plan) -> Plan:
        """The same with messages, which are posted ahead of their use and never waited for by who sends them."""
        return fuse(prefetch(with_communication(plan), self.ahead))


def forwards_of(plan: Plan) -> Plan:
    """The forwards of a plan alone: what an evaluation does."""
    programs = (tuple(action for action in plan.actions(rank) if action.kind == FORWARD) for rank in range(plan.ranks))
    return replace(plan, programs=tuple(programs))


def in_flight_by_stage(plan: Plan) -> list[int]:
    """By virtual stage, the most micro-batches whose activations it keeps at once."""
    peaks = [0] * plan.stages
    now = [0] * plan.stages
    for rank in range(plan.ranks):
        for action in plan.actions(rank):
            stage = plan.stage(rank, action.chunk)
            now[stage] += kept(action)
            peaks[stage] = max(peaks[stage], now[stage])
    return peaks
