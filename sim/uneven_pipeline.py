"""A step of a job whose pipelines differ: each kind of pipeline by itself, and together where gradients are reduced.

Pipelines (the data-parallel copies of the model) know nothing of each other until the update. A stage's update begins
when the slowest of its copies has done its last action, and goes as its slowest members do. All pipelines are found in
one pass over the plan, their times side by side in arrays. Of a plan that does not flush the slowest pipeline sets the
pace of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..collectives.groups import Mesh
from ..collectives.pipeline import Plan
from .flows import Floats
from .hardware import Cluster
from .pipeline import PipelineStep, as_composed, order_of
from .rank_classes import PipelineClasses, RankKinds, pipeline_classes, seen_by
from .stages import Stage, link_seconds, stage_price
from .timetable import RankTimes, evaluate

StageOn = Callable[[int, Cluster], Stage]
"""(pipeline rank, the cluster as a group of such ranks sees it) -> what its work costs."""

Stages = dict[tuple[int, int], Stage]
"""By pipeline rank and set of kinds."""


@dataclass(frozen=True, slots=True)
class UnevenStep:
    """A composed step.

    Attributes:
        step: as the pipeline that ends last lives it.
        stages: of that pipeline, with the updates that all pipelines make together.
    """

    step: PipelineStep
    stages: tuple[Stage, ...]


def compose_uneven(
    plan: Plan, stage_on: StageOn, cluster: Cluster, mesh: Mesh, ranks: RankKinds, message_bytes: int
) -> UnevenStep:
    """The step of a job whose ranks are not alike.

    Args:
        plan: with its messages.
        mesh: of the whole job, its outer axes data and pipeline.
        message_bytes: what a rank sends of a micro-batch to the next stage, and back.
    """
    classes = pipeline_classes(ranks, mesh)
    pairs = {(rank, int(kinds)) for row in classes.kinds for rank, kinds in enumerate(row)}
    stages: Stages = {
        (rank, kinds): stage_on(rank, seen_by(cluster, ranks.among(kinds)))
        for rank, kinds in sorted(pairs | set(enumerate(classes.closing)))
    }
    closing = [stages[pair] for pair in enumerate(classes.closing)]
    after_s = np.array([sum(stage.update_s.values()) for stage in closing])
    links = _links(cluster, mesh, ranks, classes, message_bytes)
    within_s = np.zeros_like(after_s) if plan.flushes else after_s
    lived = evaluate(order_of(plan), _prices(plan, classes, stages), links, list(within_s))
    slowest = _meet(lived.ranks, after_s) if plan.flushes else _slowest(lived.ranks)
    own = [stages[rank, int(kinds)] for rank, kinds in enumerate(classes.kinds[slowest])]
    joined = tuple(stage.with_update_of(last) for stage, last in zip(own, closing, strict=True))
    prices = [stage_price(plan, rank, stage) for rank, stage in enumerate(joined)]
    alone = [_alone(rank, slowest) for rank in lived.ranks]
    return UnevenStep(as_composed(plan, prices, alone, len(order_of(plan).doings)), joined)


def _prices(plan: Plan, classes: PipelineClasses, stages: Stages) -> list[Floats]:
    """By number of the price, its seconds in each pipeline."""
    number = plan.micro_batches_per_step
    prices = {pair: stage_price(plan, pair[0], stage) for pair, stage in stages.items()}
    return [
        np.array([prices[rank, int(kinds)].seconds(action, number) for kinds in classes.kinds[:, rank]])
        for rank, action in order_of(plan).prices
    ]


def _links(
    cluster: Cluster, mesh: Mesh, ranks: RankKinds, classes: PipelineClasses, message_bytes: int
) -> Callable[[str, int, int], Floats]:
    """Messages between two stages of each pipeline: the narrower one of the two ends counts."""
    sets = np.unique(classes.kinds)
    share_of = {int(kinds): min(kind.inter_node_share for kind in ranks.among(int(kinds))) for kinds in sets}
    links = {
        share: link_seconds(cluster.narrowed(share), mesh, message_bytes) for share in sorted(set(share_of.values()))
    }

    def seconds(what: str, sender: int, receiver: int) -> Floats:
        ends = ((share_of[int(row[sender])], share_of[int(row[receiver])]) for row in classes.kinds)
        return np.array([links[min(pair)](what, sender, receiver) for pair in ends])

    return seconds


def _meet(ranks: Sequence[RankTimes], after_s: Floats) -> int:
    """Let every stage's update begin when all its copies are ready, and end; the pipeline that came last."""
    ready_s = np.array([rank.marks[-1][0] for rank in ranks])  # [stages, pipelines]
    for rank, begins_s, seconds in zip(ranks, ready_s.max(axis=1), after_s, strict=True):
        _, compute_s, exposed_s = rank.marks[-1]
        rank.marks[-1] = (np.full(ready_s.shape[1], begins_s + seconds), compute_s, exposed_s)
    return int((ready_s + after_s[:, None]).max(axis=0).argmax())


def _slowest(ranks: Sequence[RankTimes]) -> int:
    """The pipeline whose steady step takes longest."""
    return int(np.array([rank.marks[2][0] - rank.marks[1][0] for rank in ranks]).max(axis=0).argmax())


def _alone(rank: RankTimes, pipeline: int) -> RankTimes:
    """The times of a rank in one of the pipelines."""

    def pick(value: Any) -> float:
        return float(value[pipeline]) if isinstance(value, np.ndarray) else float(value)

    return RankTimes(
        starts_s=[pick(value) for value in rank.starts_s],
        ends_s=[pick(value) for value in rank.ends_s],
        marks=[(pick(now), pick(compute), pick(exposed)) for now, compute, exposed in rank.marks],
    )
