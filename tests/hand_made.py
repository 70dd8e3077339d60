"""Hardware and traces whose times are whole numbers: a kernel takes a second per byte, a collective what it is told."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from windtunnel.collectives.trace import Call, Collective, Kernel, Op, Phase, Ref, Segment, Trace, Wait
from windtunnel.sim.hardware import FIGURES, Cluster, Fabric, Processor

PROCESSOR = Processor(
    name="one byte per second",
    kind="gpu",
    memory_bytes=1_000_000,
    memory_bytes_per_s=1.0,
    memory_efficiency=1.0,
    peak_flops={"fp32": 100.0, "bf16": 200.0},
    matmul_efficiency=1.0,
    attention_efficiency=1.0,
    multiprocessors=1,
    tile=(1, 1),
    launch_s=0.0,
    kernel_floor_s=0.0,
    framework_bytes=0,
    allocation_bytes=1,
    asynchronous=True,
    compute_rate_under_communication=1.0,
    communication_rate_under_compute=1.0,
    sources=dict.fromkeys(FIGURES, "made up for the tests"),
)

CLUSTER = Cluster(
    name="hand-made",
    processor=PROCESSOR,
    gpus_per_node=2,
    nodes=1,
    intra_node=Fabric(bytes_per_s=1.0, latency_s=0.0),
    inter_node=None,
    sources={},
)


def cluster_with(**figures: float) -> Cluster:
    """The hand-made cluster with other figures of its processor."""
    return replace(CLUSTER, processor=replace(PROCESSOR, **figures))


def kernel(seconds: int, name: str = "kernel") -> Kernel:
    """Takes `seconds` on the hand-made processor."""
    return Kernel(name, "memory", 0.0, 0, seconds, "uint8", (seconds,))


def gather(seconds: int, label: str = "parameters") -> Collective:
    """Takes `seconds` on the two hand-made ranks: a ring of two sends half of the buffer, a byte per second."""
    return Collective("all_gather", "data", 2 * seconds, "uint8", None, label)


def wait(op: int, key: str = "forward", age: int = 0) -> Wait:
    """Waits for the collective at position `op` of the segment `key` outside of the blocks."""
    return Wait(Ref(key, 0, True, age, op))


def two_steps(phases: Sequence[tuple[str, Segment, int]], *, world: Mapping[str, int] | None = None) -> Trace:
    """Two equal training steps of phases (key of the one segment, its ops, repetitions)."""
    segments = tuple(segment for _, segment, _ in phases)
    made = tuple(
        Phase(f"phase {number}", step, (Call(number, key, -1),), repeat)
        for step in (1, 2)
        for number, (key, _, repeat) in enumerate(phases)
    )
    return Trace(dict(world or {"data": 2}), 0, segments, made)


def steps_of(*ops: Op) -> Trace:
    """Two equal training steps of one segment."""
    return two_steps([("forward", ops, 1)])
