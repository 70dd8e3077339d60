"""Rings: proved, counted, and performed on Gloo ranks, where whole numbers must come out exactly."""

from collections import Counter
from unittest import mock

import pytest
import torch
from conftest import WorldOf
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.collectives.program import Send, chunk_bounds, sent_elements
from windtunnel.collectives.proof import prove
from windtunnel.collectives.ring import RING
from windtunnel.collectives.tiers import RING_STEPS
from windtunnel.engine import gloo
from windtunnel.engine.communicator import Communicator, Entry
from windtunnel.engine.device import communicator_for
from windtunnel.engine.world import World

KINDS = tuple(RING)
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "int64": torch.int64}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [*range(1, 18), 64])
def test_proof(kind: str, world: int) -> None:
    prove(RING[kind], world)


@given(kind=st.sampled_from(KINDS), world=st.integers(1, 24), elements=st.integers(0, 2000))
def test_steps_and_traffic_equal_the_closed_form(kind: str, world: int, elements: int) -> None:
    """r (n - 1) steps of one send each, and r (n - 1) / n of the buffer sent per rank (the mean where n does not
    divide it), r = 2 for an all-reduce and 1 otherwise: Patarasuk and Yuan 2009."""
    rounds = 2 if kind == "all_reduce" else 1
    assert RING_STEPS[kind] == rounds
    programs = [RING[kind].program(rank, world) for rank in range(world)]
    assert all(len(program) == rounds * (world - 1) for program in programs)
    assert all(sum(isinstance(op, Send) for op in step) == 1 for program in programs for step in program)
    sent = [sent_elements(program, chunk_bounds(elements, world)) for program in programs]
    assert sum(sent) == rounds * (world - 1) * elements
    if elements % world == 0:
        assert sent == [rounds * (world - 1) * elements // world] * world


def whole_numbers(rank: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    """[n] values that differ between ranks and places; sums over 4 ranks stay below 256, exact even in bf16."""
    return ((torch.arange(elements) * (2 * rank + 3) + rank) % 61).to(dtype)


def perform(rank: int, world: int, kind: str, dtype: str, elements: int, force_ring: bool) -> tuple[bool, Counter]:
    """Whether a collective left what it promises, and the ledger."""
    communicator = communicator_for(torch.device("cpu"), timeout_s=10.0)
    limits: dict[str, float] = dict.fromkeys(KINDS, 0) if force_ring else gloo.NATIVE_BELOW_BYTES
    with mock.patch.dict(gloo.NATIVE_BELOW_BYTES, limits):
        good = promise_kept(communicator, kind, DTYPES[dtype], elements)
    communicator.close()
    return good, communicator.ledger


def promise_kept(communicator: Communicator, kind: str, dtype: torch.dtype, elements: int) -> bool:
    rank, world = communicator.rank, communicator.world
    everyone = [whole_numbers(r, elements, dtype) for r in range(world)]
    total = torch.stack(everyone).sum(0, dtype=dtype)
    buffer, mine = everyone[rank].clone(), slice(rank * elements // world, (rank + 1) * elements // world)
    match kind:
        case "all_reduce":
            communicator.all_reduce(buffer, "test").wait()
            return torch.equal(buffer, total)
        case "reduce_scatter":
            communicator.reduce_scatter(buffer, "test").wait()
            return torch.equal(buffer[mine], total[mine])
        case _:
            communicator.all_gather(buffer, "test").wait()
            parts = [values.chunk(world)[r] for r, values in enumerate(everyone)]
            return torch.equal(buffer, torch.cat(parts))


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([2, 4]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(list(DTYPES)),
    chunk=st.integers(1, 3000),
)
def test_performed_on_ranks(world_of: WorldOf, size: int, kind: str, dtype: str, chunk: int) -> None:
    entry = Entry(kind, "data", chunk * size, dtype, "ring", False)
    for good, ledger in world_of(size).run(perform, kind, dtype, chunk * size, True):
        assert good
        assert ledger == {entry: 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [4, 16 * 1024])
def test_native_or_ring(two_ranks: World, kind: str, dtype: str, elements: int) -> None:
    """All-reduces go to Gloo's own, and are as exact."""
    entry = Entry(kind, "data", elements, dtype, "native" if kind == "all_reduce" else "ring", False)
    assert two_ranks.run(perform, kind, dtype, elements, False) == [(True, {entry: 1})] * 2


def overlap_and_maximum(rank: int, world: int) -> tuple[list[bool], Counter]:
    communicator = communicator_for(torch.device("cpu"), timeout_s=10.0)
    buffers = [whole_numbers(rank + shift, 32, torch.float64) for shift in range(5)]
    handles = [communicator.all_gather(buffer, "test") for buffer in buffers]
    largest = torch.tensor([rank, -rank])
    communicator.all_reduce(largest, "test", largest=True, scalar=True).wait()
    for handle in reversed(handles):
        handle.wait()
    communicator.close()
    expected = [
        torch.cat([whole_numbers(r + shift, 32, torch.float64).chunk(world)[r] for r in range(world)])
        for shift in range(5)
    ]
    good = [torch.equal(buffer, wanted) for buffer, wanted in zip(buffers, expected, strict=True)]
    return [*good, largest.tolist() == [world - 1, 0]], communicator.ledger


def test_many_under_way_and_the_ledger_counts_them(four_ranks: World) -> None:
    ledger = {
        Entry("all_gather", "data", 32, "fp64", "ring", False): 5,
        Entry("all_reduce", "data", 2, "int64", "native", True): 1,
    }
    assert four_ranks.run(overlap_and_maximum) == [([True] * 6, ledger)] * 4
