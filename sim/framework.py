"""What a process takes of a GPU's memory outside of the allocator: the CUDA context and NCCL's buffers."""

from math import prod

from ..collectives.trace import Collective, Trace
from .hardware import Processor

PAIR_BYTES, GROUP_BYTES = 544 << 20, 688 << 20
"""Of NCCL for one more communicator of two ranks, or of more: its channels' buffers, whatever the number of ranks.
Measured on A100s with NVLink, an all-reduce in every possible group of four (NVIDIA/nccl issue 964). RCCL on MI250X
takes about 650 MiB for each, too (Lumi-supercomputer/LUMI-AI-Guide issue 111), and NCCL's authors say that the bytes
grow with communicators and channels and, beyond two nodes, not with ranks (NVIDIA/nccl issue 986)."""


def communicators(trace: Trace) -> dict[str, int]:
    """Ranks of each communicator that a program uses, by axis of the mesh; groups of one rank need none.

    Messages between pipeline stages are no part of a trace, but have a communicator. An axis that is none of the mesh's
    joins the two ends of a pipeline.
    """
    axes = {op.axis for segment in trace.segments for op in segment if isinstance(op, Collective)}
    ranks = {axis: prod(trace.world.get(part, 2) for part in axis.split("*")) for axis in axes}
    ranks["pipeline"] = trace.world.get("pipeline", 1)
    return {axis: size for axis, size in ranks.items() if size > 1}


def framework_bytes(trace: Trace, processor: Processor) -> int:
    """Bytes outside of the allocator: the profile's, which include a first communicator, and the further ones'."""
    if processor.kind != "gpu":
        return processor.framework_bytes
    further = sorted(communicators(trace).values(), reverse=True)[1:]
    return processor.framework_bytes + sum(PAIR_BYTES if ranks == 2 else GROUP_BYTES for ranks in further)
