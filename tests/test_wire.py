"""Bytes that the kernel says were written, against the programs and the formulas. Every equality here is exact."""

from typing import NamedTuple
from unittest import mock

import pytest
import torch
from conftest import WorldOf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from windtunnel.collectives.algorithms import KINDS, algorithm, algorithms
from windtunnel.collectives.program import chunk_bounds, sent_elements
from windtunnel.collectives.ring import RING
from windtunnel.collectives.zero import Zero, sent_bytes_per_step
from windtunnel.engine.communicator import DTYPE_NAMES, Entry
from windtunnel.engine.device import communicator_for
from windtunnel.engine.engine import initialize
from windtunnel.engine.gloo import GlooCommunicator
from windtunnel.engine.sockets import framing_bytes
from windtunnel.engine.unit import FlatUnit
from windtunnel.engine.wire import GLOO_RECEIVE_BYTES, GLOO_SEND_BYTES, written_bytes

GLOO_FRAMING_BYTES = GLOO_SEND_BYTES + GLOO_RECEIVE_BYTES
"""Headers per message of a ring, in which every rank sends as many messages as it receives."""

ITEM_BYTES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


def messages(kind: str, world: int) -> int:
    """What a rank sends, and receives, in one ring."""
    return (2 if kind == "all_reduce" else 1) * (world - 1)


def played(entry: Entry, rank: int, world: int) -> int:
    """Payload bytes of the sends in the ring that `entry` names."""
    bounds = chunk_bounds(entry.elements, world)
    return sent_elements(RING[entry.kind].program(rank, world), bounds) * ITEM_BYTES[entry.dtype]


def play(rank: int, world: int, kind: str, elements: int, times: int) -> tuple[int, int]:
    """(growth of the kernel's counter, what the communicator metered) over `times` rings."""
    communicator = communicator_for(torch.device("cpu"), timeout_s=10.0)
    assert isinstance(communicator, GlooCommunicator)
    communicator.metered = True
    communicator.force("ring", over_sockets=True)
    buffer = torch.zeros(elements, dtype=torch.float32)
    before = written_bytes()
    for _ in range(times):
        getattr(communicator, kind)(buffer, "test").wait()
    grown = written_bytes() - before
    communicator.close()
    return grown, sum(communicator.wire_bytes.values())


def play_any(rank: int, world: int, kind: str, name: str, elements: int) -> tuple[int, int]:
    """(what the communicator metered, payload and framing of the messages that it lists)."""
    communicator = communicator_for(torch.device("cpu"), timeout_s=10.0)
    assert isinstance(communicator, GlooCommunicator)
    communicator.metered = True
    communicator.force(name, over_sockets=True)
    getattr(communicator, kind)(torch.zeros(elements), "test").wait()
    communicator.close()
    (entry,) = communicator.ledger
    program = algorithm(kind, name).program(rank, world)
    payload = sent_elements(program, algorithm(kind, name).bounds(elements, world)) * 4
    return communicator.wire_bytes[entry], payload + framing_bytes(communicator.steps(entry))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), size=st.sampled_from([2, 3, 4]), kind=st.sampled_from(KINDS), part=st.integers(0, 2000))
def test_any_algorithm_writes_payload_and_framing(
    world_of: WorldOf, data: st.DataObject, size: int, kind: str, part: int
) -> None:
    """Also where a rank sends more messages than it receives, and where some are empty."""
    name = data.draw(st.sampled_from([algorithm.name for algorithm in algorithms(kind, size)]))
    for metered, listed in world_of(size).run(play_any, kind, name, part * size):
        assert metered == listed


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from([2, 4]),
    kind=st.sampled_from(list(RING)),
    chunk=st.sampled_from([1, 7, 1000, 40_000, 300_000]) | st.integers(1, 2000),
    times=st.integers(1, 3),
)
def test_rings_write_payload_and_framing(world_of: WorldOf, size: int, kind: str, chunk: int, times: int) -> None:
    entry = Entry(kind, "data", chunk * size, "fp32", "ring", False)
    for rank, (grown, metered) in enumerate(world_of(size).run(play, kind, chunk * size, times)):
        expected = times * (played(entry, rank, size) + GLOO_FRAMING_BYTES * messages(kind, size))
        assert (grown, metered) == (expected, expected)


class Wide(nn.Module):
    """Units of some kilobytes, and one of odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(48, 48) for _ in range(3)])
        self.still = nn.Linear(48, 48).requires_grad_(False)
        self.head = nn.Linear(48, 47)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return functional.mse_loss(self.head(self.still(x)), torch.zeros(1, 1, dtype=x.dtype).expand(len(x), 47))


class Payload(NamedTuple):
    """Bytes that a rank sends for its units in one optimizer step, by three witnesses."""

    formula: int
    programs: int
    kernel: int


def whole_step(rank: int, world: int, stage: int, micro_steps: int, clip: float) -> tuple[Payload, int]:
    """The payload of one step, and how many few-element reductions there were."""
    torch.manual_seed(0)
    config = {
        "zero_optimization": {"stage": stage},
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": clip,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    engine, *_ = initialize(Wide().double(), config, timeout_s=10.0)
    communicator = engine.communicator
    communicator.force("ring", over_sockets=True)
    communicator.metered = True
    for _ in range(micro_steps):
        engine.backward(engine(torch.randn(2, 48, dtype=torch.float64)))
        engine.step()
    engine.close()
    entries = {entry: count for entry, count in communicator.ledger.items() if not entry.scalar}
    assert {entry.algorithm for entry in entries} == {"ring"}
    framing = sum(count * messages(entry.kind, world) for entry, count in entries.items()) * GLOO_FRAMING_BYTES
    payload = Payload(
        formula=sent_bytes_per_step(
            [unit.size for unit in engine.runtime.units], Zero.of_stage(stage), world, micro_steps
        ),
        programs=sum(count * played(entry, rank, world) for entry, count in entries.items()),
        kernel=sum(communicator.wire_bytes[entry] for entry in entries) - framing,
    )
    return payload, communicator.ledger.total() - sum(entries.values())


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("size", [2, 4])
def test_a_whole_step(world_of: WorldOf, size: int, stage: int, micro_steps: int) -> None:
    for payload, _ in world_of(size).run(whole_step, stage, micro_steps, 0.0):
        assert payload.formula > 0
        assert payload == (payload.formula,) * 3


@pytest.mark.parametrize(("stage", "clip", "scalars"), [(0, 0.0, 1), (0, 1.0, 1), (3, 0.0, 1), (3, 1.0, 1)])
def test_few_element_reductions_are_listed_apart(world_of: WorldOf, stage: int, clip: float, scalars: int) -> None:
    """One per step carries all: the norm of gradients, and whether a rank missed some."""
    for payload, listed in world_of(2).run(whole_step, stage, 1, clip):
        assert payload == (payload.formula,) * 3
        assert listed == scalars


def forget_a_gather(rank: int, world: int) -> Payload:
    """ZeRO 1 that never publishes what it stepped."""
    with mock.patch.object(FlatUnit, "publish"):
        return whole_step(rank, world, 1, 1, 0.0)[0]


def test_a_missing_collective_parts_the_witnesses(world_of: WorldOf) -> None:
    for payload in world_of(2).run(forget_a_gather):
        assert payload.programs == payload.kernel
        assert payload.kernel == payload.formula // 2
