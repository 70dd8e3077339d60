"""Ranks of a job by kind, and the few classes of groups that they make, each simulated once.

Ranks that compute a micro-batch together (tensor and context axes) meet at every collective, so the slowest member of
such a group sets its pace between any two of them: a group is as its set of kinds, however many ranks there are. The
cluster as a class sees it has the paces of all its kinds (`Cluster.paced_by`) and the narrowest of their links.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from operator import or_
from typing import NamedTuple

import numpy as np

from ..collectives.groups import PIPELINE, Mesh
from .flows import Integers
from .hardware import Cluster
from .result import StepResult
from .unlike import Pace, Stragglers

DATA = "data"

MOST_KINDS = 62
"""Sets of kinds are bits of an integer."""


class Kind(NamedTuple):
    """What a rank is like: its pace, and the share of the cluster's bandwidth between nodes that its node has."""

    pace: Pace
    inter_node_share: float = 1.0


@dataclass(frozen=True, slots=True)
class RankKinds:
    """The kinds of a job's ranks.

    Attributes:
        kinds: each once.
        of_rank: [ranks] number of the kind.
    """

    kinds: tuple[Kind, ...]
    of_rank: Integers

    def even_on(self, cluster: Cluster) -> bool:
        """Whether all ranks are as the cluster says that ranks are."""
        return self.kinds == (Kind(Pace(cluster.processor)),)

    def among(self, kinds: int) -> tuple[Kind, ...]:
        """The kinds of a set: bit k stands for kind k."""
        return tuple(kind for number, kind in enumerate(self.kinds) if kinds >> number & 1)


@lru_cache(maxsize=16)
def rank_kinds(cluster: Cluster, world: int, stragglers: Stragglers) -> RankKinds:
    """The kind of each rank of a job, node by node.

    Raises:
        ValueError: more slow ranks than there are ranks, or too many kinds.
    """
    usual = Kind(Pace(cluster.processor))
    by_node = {
        node: Kind(Pace(table.processor or cluster.processor), table.inter_node_share)
        for table in cluster.nodes_like
        for node in table.nodes
        if node * cluster.gpus_per_node < world
    }
    numbers: dict[Kind, int] = {} if len(by_node) * cluster.gpus_per_node >= world else {usual: 0}
    of_rank = np.zeros(world, np.int64)
    for node, kind in sorted(by_node.items()):
        first = node * cluster.gpus_per_node
        of_rank[first : first + cluster.gpus_per_node] = _numbered(numbers, kind)
    kinds = list(numbers)
    for rank in stragglers.drawn(world):
        kind = kinds[of_rank[rank]]
        of_rank[rank] = _numbered(numbers, kind._replace(pace=kind.pace._replace(factor=stragglers.factor)))
    return _used(tuple(numbers), of_rank)


def _numbered(numbers: dict[Kind, int], kind: Kind) -> int:
    return numbers.setdefault(kind, len(numbers))


def _used(kinds: tuple[Kind, ...], of_rank: Integers) -> RankKinds:
    """Without kinds that no rank is of."""
    used, compact = np.unique(of_rank, return_inverse=True)
    if used.size > MOST_KINDS:
        raise ValueError(f"nodes_like makes {used.size} kinds of ranks; allowed: at most {MOST_KINDS}")
    return RankKinds(tuple(kinds[number] for number in used), compact.reshape(-1))


def seen_by(cluster: Cluster, kinds: Sequence[Kind]) -> Cluster:
    """The cluster as a group with members of these kinds sees it."""
    paces = tuple(dict.fromkeys(kind.pace for kind in kinds))
    narrowed = cluster.narrowed(min(kind.inter_node_share for kind in kinds))
    return replace(narrowed, processor=paces[0].processor, paced_by=paces, nodes_like=())


@dataclass(frozen=True, slots=True)
class PipelineClasses:
    """The pipelines of a job that differ.

    Attributes:
        kinds: [pipelines, stages] by pipeline and stage the set of kinds of the ranks that compute it together.
        closing: by stage, the set of kinds of all its ranks, who reduce gradients together.
    """

    kinds: Integers
    closing: tuple[int, ...]


def pipeline_classes(ranks: RankKinds, mesh: Mesh) -> PipelineClasses:
    """Which pipelines differ, in a mesh whose outer axes are data and pipeline."""
    sizes = mesh.sizes
    stages, pipelines = sizes.get(PIPELINE, 1), sizes.get(DATA, 1)
    bits = np.int64(1) << ranks.of_rank
    sets = np.bitwise_or.reduce(bits.reshape(stages, pipelines, -1), axis=2)
    closing = tuple(reduce(or_, map(int, np.unique(row)), 0) for row in sets)
    return PipelineClasses(np.unique(sets.T, axis=0), closing)


def as_job(result: StepResult, ranks: RankKinds, precision: str) -> StepResult:
    """The result of a job of such ranks, from that of its slowest ones.

    It fits if it fits on every kind of GPU, and its utilisation is against the mean of their peaks.
    """
    counts = np.bincount(ranks.of_rank, minlength=len(ranks.kinds))
    processors = [kind.pace.processor for kind in ranks.kinds]
    peaks = np.array([processor.peak_flops[precision] for processor in processors])
    reserved_bytes = result.peak_memory_bytes["reserved"]
    return replace(
        result,
        mfu=result.tflops_per_gpu * 1e12 / float((counts * peaks).sum() / counts.sum()),
        fits=all(reserved_bytes + each.framework_bytes <= each.memory_bytes for each in processors),
    )
