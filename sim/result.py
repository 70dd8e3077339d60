"""What one simulated training step costs: the numbers of the command line's contract."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import Any

from ..collectives.trace import Trace
from .hardware import Cluster
from .memory import Excess, Memory, replay_memory
from .replay import Replay, replay

BACKWARD_OVER_FORWARD = 2
"""Model FLOPs count a backward as two forwards (Narayanan et al. 2021, appendix "Floating-point operations")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """A simulated steady step.

    Attributes:
        step_time_s: all micro-steps and the optimizer; the second of two steps.
        tokens_per_s: of the whole job.
        tflops_per_gpu: model FLOPs: matrix products and attention (causal counted in full), backward twice forward,
            no recomputation.
        hardware_tflops_per_gpu: with recomputation.
        mfu: `tflops_per_gpu` over the dense peak at that precision.
        breakdown_s: compute, exposed_communication, bubble, host, offload; sums to the step.
        communication_s: of the same rank, by axis: {exposed_s, hidden_s}, as in Replay.
        peak_memory_bytes: by category at the peak, their `total`, what the allocator has `reserved`, and what the
            `framework` takes besides.
        fits: reserved + framework <= capacity, cached memory given back where more is asked for than is left.
        first_to_exceed: the first request that does not fit; None if all do.
        bytes_sent_per_gpu: per step: total, max over the ranks, by_axis.
        model_state_bytes: parameters, gradients and optimizer values between steps, on the device.
        offloaded_bytes_per_node: what rests off the devices of a node, by tier ("host", "nvme").
        wall_s: how long the simulation took, flight included.
        events: simpy events played.
        layout: every option as resolved.
    """

    step_time_s: float
    tokens_per_s: float
    tflops_per_gpu: float
    hardware_tflops_per_gpu: float
    mfu: float
    breakdown_s: Mapping[str, float]
    communication_s: Mapping[str, Mapping[str, float]]
    peak_memory_bytes: Mapping[str, int]
    fits: bool
    first_to_exceed: Excess | None
    bytes_sent_per_gpu: Mapping[str, Any]
    model_state_bytes: int
    offloaded_bytes_per_node: Mapping[str, int]
    wall_s: float
    events: int
    layout: Mapping[str, Any]


def price(
    trace: Trace,
    cluster: Cluster,
    *,
    precision: str,
    tokens_per_step: int,
    layout: Mapping[str, Any],
    fidelity: str = "closed_form",
    expandable_segments: bool = False,
    fusion: str = "none",
    overlap: bool = True,
    since: float | None = None,
) -> StepResult:
    """Replay a trace on a cluster.

    Args:
        precision: dtype whose peak the utilisation is measured against.
        tokens_per_step: of the whole job.
        fidelity, fusion, overlap: as for `replay`; what is kept in memory does not depend on them.
        expandable_segments: of the CUDA allocator (PYTORCH_CUDA_ALLOC_CONF).
        since: `perf_counter` when the work on this answer began, if that was before now.
    """
    began = perf_counter() if since is None else since
    step = replay(trace, cluster, fidelity=fidelity, fusion=fusion, overlap=overlap)
    memory = replay_memory(trace, cluster.processor, expandable_segments=expandable_segments)
    model_flops = (1 + BACKWARD_OVER_FORWARD) * step.forward_flops
    tflops = model_flops / step.step_time_s / 1e12
    return StepResult(
        step_time_s=step.step_time_s,
        tokens_per_s=tokens_per_step / step.step_time_s,
        tflops_per_gpu=tflops,
        hardware_tflops_per_gpu=step.executed_flops / step.step_time_s / 1e12,
        mfu=tflops * 1e12 / cluster.processor.peak_flops[precision],
        breakdown_s=step.breakdown_s,
        communication_s=step.communication_s,
        peak_memory_bytes=peak_memory(memory),
        fits=memory.excess is None,
        first_to_exceed=memory.excess,
        bytes_sent_per_gpu=_sent(step),
        model_state_bytes=sum(memory.state.values()),
        offloaded_bytes_per_node={
            tier: nbytes * min(cluster.gpus_per_node, prod(trace.world.values()))
            for tier, nbytes in memory.elsewhere.items()
        },
        wall_s=perf_counter() - began,
        events=step.events,
        layout={**layout, "gpus": prod(trace.world.values())},
    )


def peak_memory(memory: Memory) -> dict[str, int]:
    """As `StepResult` has it."""
    return {
        **memory.peak,
        "total": memory.total_bytes,
        "reserved": memory.reserved_bytes,
        "framework": memory.framework_bytes,
    }


def _sent(step: Replay) -> dict[str, Any]:
    """All ranks of a data-parallel job send the same: units are padded to equal chunks."""
    total = sum(step.sent_bytes.values())
    return {"total": total, "max": total, "by_axis": step.sent_bytes}
