"""Every rank of a job by itself: the witness of rank classes. No classes, no streams as processes, no events.

All ranks run the same trace, so they do the same op at the same place of the program, and who waits for whom points
back in it: one walk over the program with an array of clocks finds all times. Hosts are never late, and what runs
side by side does not slow the other down.
"""

from collections import Counter, defaultdict

import numpy as np
from windtunnel.collectives.groups import Mesh
from windtunnel.collectives.trace import Collective, Kernel, Trace, Wait
from windtunnel.sim.hardware import Cluster
from windtunnel.sim.kernel import kernel_seconds
from windtunnel.sim.network import collective_seconds
from windtunnel.sim.rank_classes import RankKinds
from windtunnel.sim.topology import topology


def expanded_step_s(trace: Trace, cluster: Cluster, ranks: RankKinds, fidelity: str = "closed_form") -> float:
    """Seconds of the steady step, from the last rank's end of a step to the last rank's end of the next."""
    first_s, second_s = expanded_ends_s(trace, cluster, ranks, fidelity)
    return second_s - first_s


def expanded_ends_s(
    trace: Trace, cluster: Cluster, ranks: RankKinds, fidelity: str = "closed_form"
) -> tuple[float, float]:
    """When the last rank ends the first step, and the second."""
    mesh = Mesh.of(trace.world)
    computed = np.zeros(mesh.world)
    free: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(mesh.world))
    done: dict[tuple[str, int, int, int], np.ndarray] = {}
    runs: Counter[tuple[str, int]] = Counter()
    ends: list[float] = []
    for step in (1, 2):
        for phase in (phase for phase in trace.phases if phase.step == step):
            for call in (call for _ in range(phase.repeat) for call in phase.calls):
                here = call.key, call.block
                runs[here] += 1
                for position, op in enumerate(trace.segments[call.segment]):
                    if isinstance(op, Kernel):
                        computed = computed + _own_seconds(op, ranks)
                    elif isinstance(op, Collective):
                        done[*here, runs[here], position] = end = _together(
                            op, mesh, cluster, ranks, fidelity, np.maximum(computed, free[op.axis])
                        )
                        free[op.axis] = end
                    elif isinstance(op, Wait):
                        block = op.ref.block_from(call.block)
                        run = runs[op.ref.key, block] - op.ref.age
                        computed = np.maximum(computed, done[op.ref.key, block, run, op.ref.op])
        ends.append(float(computed.max()))
    return ends[0], ends[1]


def _own_seconds(op: Kernel, ranks: RankKinds) -> np.ndarray:
    seconds = [kind.pace.factor * kernel_seconds(op, kind.pace.processor) for kind in ranks.kinds]
    return np.array(seconds)[ranks.of_rank]


def _together(
    op: Collective, mesh: Mesh, cluster: Cluster, ranks: RankKinds, fidelity: str, ready: np.ndarray
) -> np.ndarray:
    """[ranks] when a collective ends that each group begins when all its members are ready."""
    ends = np.empty(mesh.world)
    for group in mesh.groups(op.axis):
        members = list(group)
        share = min(ranks.kinds[ranks.of_rank[rank]].inter_node_share for rank in members)
        network = topology(cluster.narrowed(share), mesh.world)
        ends[members] = ready[members].max() + collective_seconds(op, mesh.placement(op.axis), network, fidelity)
    return ends
