"""Memory outside of the allocator: by the communicators that a program needs."""

from dataclasses import replace

import pytest
from hand_made import PROCESSOR, gather, steps_of
from windtunnel.collectives.trace import Trace
from windtunnel.sim.framework import GROUP_BYTES, PAIR_BYTES, communicators, framework_bytes
from windtunnel.sim.memory import replay_memory

GPU = replace(PROCESSOR, framework_bytes=1000, memory_bytes=1 << 40)


def job(*axes: str, **world: int) -> Trace:
    """A program with a collective on each of the axes."""
    return replace(steps_of(*(replace(gather(1), axis=axis) for axis in axes)), world=world)


@pytest.mark.parametrize(
    ("trace", "ranks", "further"),
    [
        (job(data=1), {}, 0),
        (job("data", data=8), {"data": 8}, 0),
        (job("data", data=1), {}, 0),
        (job("data", "tensor", data=8, tensor=2), {"data": 8, "tensor": 2}, PAIR_BYTES),
        (job("data", data=8, tensor=4), {"data": 8}, 0),  # ranks that never talk need no communicator
        (job("shard", "shard*replica", shard=8, replica=4), {"shard": 8, "shard*replica": 32}, GROUP_BYTES),
        (
            job("data", "tensor", "tied", data=4, tensor=8, pipeline=2),
            {"data": 4, "tensor": 8, "tied": 2, "pipeline": 2},
            GROUP_BYTES + 2 * PAIR_BYTES,
        ),
    ],
)
def test_each_further_communicator_has_its_buffers(trace: Trace, ranks: dict[str, int], further: int) -> None:
    assert communicators(trace) == ranks
    assert framework_bytes(trace, GPU) == GPU.framework_bytes + further
    assert framework_bytes(trace, replace(GPU, kind="cpu")) == GPU.framework_bytes
    assert replay_memory(trace, GPU).framework_bytes == GPU.framework_bytes + further
