"""Every algorithm of the catalogue played by ranks, over sockets and through shared memory, where whole numbers must
come out exactly as arithmetic says, and as Gloo's own calls leave them."""

import itertools
import threading
import time
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import WorldOf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from windtunnel.collectives.algorithms import KINDS, algorithms
from windtunnel.engine.communication_section import Communication
from windtunnel.engine.communicator import Communicator, Entry, NativeCommunicator
from windtunnel.engine.gloo import GlooCommunicator
from windtunnel.engine.world import World

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int64": torch.int64}
WIDE = {"int32": torch.int32, "fp64": torch.float64, "uint8": torch.uint8}
TRANSPORTS = ("sockets", "shared memory")


class Case(NamedTuple):
    """A collective, and what it is played on."""

    kind: str
    name: str
    elements: int
    dtype: str
    root: int = 0
    largest: bool = False


def make(transport: str, timeout_s: float = 20.0, group: dist.ProcessGroup | None = None) -> GlooCommunicator:
    """A communicator on a rank, over the whole world or some of it."""
    ranks = group or dist.group.WORLD
    assert ranks is not None
    shared = transport == "shared memory"
    return GlooCommunicator("data", ranks, _get_default_store(), timeout_s, shared_memory=shared)


def whole_numbers(rank: int, elements: int, dtype: torch.dtype) -> Tensor:
    """[n] that differ between ranks and places; sums over 8 ranks stay below 256, exact even in bf16 and uint8."""
    return ((torch.arange(elements) * (2 * rank + 3) + rank) % 31).to(dtype)


def parts(elements: int, world: int) -> list[slice]:
    """Rank r's part of a buffer, for every r; the first ones are longer where the ranks do not divide it."""
    ends = [elements // world * r + min(r, elements % world) for r in range(world + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def kept(communicator: Communicator, case: Case) -> bool:
    """Whether a collective leaves what it promises."""
    rank, world = communicator.rank, communicator.world
    dtype = {**DTYPES, **WIDE}[case.dtype]
    everyone = [whole_numbers(r, case.elements, dtype) for r in range(world)]
    stacked = torch.stack(everyone)
    cut = parts(case.elements, world)
    buffer, mine = everyone[rank].clone(), cut[rank]
    total = stacked.amax(0) if case.largest and case.elements else stacked.sum(0, dtype=dtype)
    match case.kind:
        case "all_reduce":
            communicator.all_reduce(buffer, "test", largest=case.largest).wait()
            return torch.equal(buffer, total)
        case "reduce_scatter":
            communicator.reduce_scatter(buffer, "test").wait()
            return torch.equal(buffer[mine], total[mine])
        case "all_gather":
            communicator.all_gather(buffer, "test").wait()
            return torch.equal(buffer, torch.cat([values[part] for values, part in zip(everyone, cut, strict=True)]))
        case "all_to_all":
            communicator.all_to_all(buffer, "test").wait()
            return torch.equal(buffer, torch.cat([values[mine] for values in everyone]))
        case "broadcast":
            communicator.broadcast(buffer, "test", root=case.root).wait()
            return torch.equal(buffer, everyone[case.root])
        case _:
            communicator.reduce(buffer, "test", root=case.root).wait()
            return rank != case.root or torch.equal(buffer, total)


def play(rank: int, world: int, transport: str, cases: list[Case]) -> list[Case]:
    """The cases that were not kept."""
    communicator = make(transport)
    broken = []
    for case in cases:
        communicator.force(case.name)
        if not kept(communicator, case):
            broken.append(case)
        assert {entry.algorithm for entry in communicator.ledger if entry.kind == case.kind} >= {case.name}
    communicator.close()
    return broken


def cases_of(world: int, lengths: list[int], dtypes: list[str]) -> list[Case]:
    """Every algorithm and kind, on several lengths; all-to-all takes whole parts."""
    found = []
    for kind in KINDS:
        for number, algorithm in enumerate(algorithms(kind, world)):
            for place, length in enumerate(lengths):
                elements = length * world if kind == "all_to_all" else length
                dtype = dtypes[(number + place) % len(dtypes)]
                found.append(Case(kind, algorithm.name, elements, dtype, root=(number + place) % world))
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_algorithm(world_of: WorldOf, size: int, transport: str) -> None:
    """Empty, one element, fewer than ranks, odd, and some kilobytes."""
    cases = cases_of(size, [0, 1, size - 1, 257, 4099], list(DTYPES))
    assert world_of(size).run(play, transport, cases) == [[]] * size


def test_every_algorithm_on_eight_ranks() -> None:
    with World(8, timeout_s=30.0, threads=1) as ranks:
        for transport in TRANSPORTS:
            assert ranks.run(play, transport, cases_of(8, [3, 1001], list(DTYPES))) == [[]] * 8


@pytest.mark.parametrize("size", [2, 4])
def test_long_messages_through_the_slots(world_of: WorldOf, size: int) -> None:
    """Longer than all slots of a channel together: senders must wait for receivers, and none for ever."""
    cases = cases_of(size, [700_000], ["fp32"])
    assert world_of(size).run(play, "shared memory", cases) == [[]] * size


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_case(world_of: WorldOf, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([2, 3, 4]))
    kind = data.draw(st.sampled_from(KINDS))
    name = data.draw(st.sampled_from([algorithm.name for algorithm in algorithms(kind, size)]))
    elements = data.draw(st.integers(0, 3000) | st.integers(100_000, 300_000))
    case = Case(
        kind,
        name,
        elements * size if kind == "all_to_all" else elements,
        data.draw(st.sampled_from([*DTYPES, *WIDE])),
        data.draw(st.integers(0, size - 1)),
        kind == "all_reduce" and data.draw(st.booleans()),
    )
    transport = data.draw(st.sampled_from(TRANSPORTS))
    assert world_of(size).run(play, transport, [case]) == [[]] * size


def beside_native(rank: int, world: int, transport: str) -> list[str]:
    """The kinds and dtypes in which our result is not Gloo's own."""
    group = dist.group.WORLD
    assert group is not None
    ours, native = make(transport), NativeCommunicator("data", group)
    different = []
    for kind in KINDS:
        for dtype in ("fp32", "fp16", "int64") if kind in ("all_reduce", "reduce_scatter", "reduce") else DTYPES:
            values = whole_numbers(rank, 12 * world, DTYPES[dtype])
            results = []
            for communicator in (ours, native):
                buffer = values.clone()
                getattr(communicator, kind)(buffer, "test").wait()
                results.append(buffer)
            looked_at = {
                "reduce_scatter": parts(12 * world, world)[rank],
                "reduce": slice(None if rank == 0 else 0),
            }.get(kind, slice(None))
            if not torch.equal(results[0][looked_at], results[1][looked_at]):
                different.append(f"{kind} {dtype}")
    ours.close()
    return different


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_equal_to_native(four_ranks: World, transport: str) -> None:
    assert four_ranks.run(beside_native, transport) == [[]] * 4


def odd_tensors(rank: int, world: int, transport: str) -> None:
    """Parameters that need gradients, transposed, without dimensions, of booleans."""
    communicator = make(transport)
    weight = torch.nn.Parameter(torch.full((3, 4), float(rank)))
    communicator.broadcast(weight, "parameter", root=1).wait()
    assert weight.eq(1).all()
    turned = torch.full((3, 4), float(rank + 1)).T
    communicator.all_reduce(turned, "transposed").wait()
    assert turned.eq(sum(range(1, world + 1))).all()
    scalar, mask = torch.tensor(rank), torch.tensor([rank == 0, True, False])
    communicator.replicate([scalar, mask])
    assert scalar.item() == 0
    assert mask.tolist() == [True, True, False]
    communicator.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_odd_tensors(two_ranks: World, transport: str) -> None:
    two_ranks.run(odd_tensors, transport)


def ledger(rank: int, world: int) -> Counter:
    """Four gathers and the largest of some numbers; what the ledger says of them."""
    communicator = make("sockets")
    communicator.force("ring")
    for handle in [communicator.all_gather(torch.zeros(32), "test") for _ in range(4)]:
        handle.wait()
    largest = torch.tensor([rank, -rank])
    communicator.all_reduce(largest, "test", largest=True, scalar=True).wait()
    assert largest.tolist() == [world - 1, 0]
    communicator.close()
    return communicator.ledger


def test_the_ledger_counts(four_ranks: World) -> None:
    counted = {
        Entry("all_gather", "data", 32, "fp32", "ring", False): 4,
        Entry("all_reduce", "data", 2, "int64", "ring", True): 1,
    }
    assert four_ranks.run(ledger) == [counted] * 4


def in_the_background(rank: int, world: int, transport: str) -> bool:
    """Whether handles that nobody waits for end while the main thread computes."""
    communicator = make(transport)
    buffers = [torch.full((50_000,), float(rank)) for _ in range(4)]
    handles = [communicator.all_reduce(buffer, "test") for buffer in buffers]
    x = torch.randn(64, 64)
    deadline = time.monotonic() + 20.0
    while not all(handle.play.over for handle in handles) and time.monotonic() < deadline:
        x = torch.tanh(x @ x)
    over = [handle.play.over for handle in handles]
    sums = [buffer.eq(sum(range(world))).all().item() for buffer in buffers]
    communicator.close()
    return all(over) and all(sums)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_handles_progress_during_computation(two_ranks: World, transport: str) -> None:
    assert two_ranks.run(in_the_background, transport) == [True, True]


def several_in_flight(rank: int, world: int, transport: str) -> tuple[bool, list[int]]:
    """Collectives of all kinds started together and waited for backwards; and the order in which they ended."""
    communicator = make(transport)
    ended: list[int] = []
    cases = [
        ("all_reduce", whole_numbers(rank, 4000, torch.float32)),
        ("all_gather", whole_numbers(rank, 4000, torch.float32)),
        ("broadcast", whole_numbers(rank, 400_000, torch.float32)),
        ("reduce_scatter", whole_numbers(rank, 4000, torch.float32)),
        ("all_reduce", whole_numbers(rank, 3, torch.int64)),
    ]
    handles = [getattr(communicator, kind)(buffer, "test") for kind, buffer in cases]
    for number, handle in enumerate(handles):
        handle.play.end = lambda failure, number=number, end=handle.play.end: (ended.append(number), end(failure))
    for handle in reversed(handles):
        handle.wait()
    everyone = [whole_numbers(r, 4000, torch.float32) for r in range(world)]
    cut = parts(4000, world)
    good = torch.equal(cases[0][1], sum(everyone))
    good &= torch.equal(cases[1][1], torch.cat([v[p] for v, p in zip(everyone, cut, strict=True)]))
    good &= torch.equal(cases[2][1], whole_numbers(0, 400_000, torch.float32))
    good &= torch.equal(cases[3][1][cut[rank]], sum(everyone)[cut[rank]])
    good &= torch.equal(cases[4][1], sum(whole_numbers(r, 3, torch.int64) for r in range(world)))
    communicator.close()
    return bool(good), ended


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_several_in_flight_keep_their_order(four_ranks: World, transport: str) -> None:
    for good, ended in four_ranks.run(several_in_flight, transport):
        assert good
        assert ended == sorted(ended)


def sub_groups(rank: int, world: int, transport: str) -> tuple[tuple[int, ...], list[Case]]:
    """Two groups at once, beside the group of all; both have ranks 0 and 1 of their own."""
    everybody = make(transport)
    pairs = [[0, 2], [1, 3]]
    groups = [dist.new_group(pair) for pair in pairs]
    communicator = make(transport, group=groups[rank % 2])
    handle = everybody.all_reduce(together := torch.ones(1000), "all")
    cases = [Case(kind, "default", 1000, "fp32", root=1) for kind in KINDS]
    broken = [case for case in cases if not kept(communicator, case)]
    handle.wait()
    assert together.eq(world).all()
    own = torch.tensor([rank])
    communicator.all_reduce(own, "numbers").wait()
    assert own.item() == sum(pairs[rank % 2])
    names = communicator.names
    communicator.close()
    everybody.close()
    return names, broken


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sub_groups(four_ranks: World, transport: str) -> None:
    assert four_ranks.run(sub_groups, transport) == [((0, 2), []), ((1, 3), [])] * 2


def defaults(rank: int, world: int) -> tuple[str, set[Entry]]:
    group = dist.group.WORLD
    assert group is not None
    communicator = GlooCommunicator("data", group, _get_default_store(), 20.0)
    communicator.all_gather(torch.zeros(8), "test").wait()
    communicator.force("direct", over_sockets=True)
    communicator.all_gather(torch.zeros(8), "test").wait()
    communicator.close()
    return communicator.transport.name, {entry.algorithm for entry in communicator.ledger}


def test_ranks_of_one_host_share_memory(two_ranks: World) -> None:
    assert two_ranks.run(make_default) == ["shared memory"] * 2
    for transport, used in two_ranks.run(defaults):
        assert transport == "sockets"
        assert "direct" in used


def chosen_by_price(rank: int, world: int) -> tuple[float, set[str]]:
    """A slow and a fast network, as the config describes them: few messages on the one, few bytes on the other."""
    used = set()
    for latency_s in (1.0, 0.0):
        tier = {"name": "wire", "ranks": world, "latency_s": latency_s, "bytes_per_s": 1e6}
        communicator = make("sockets")
        communicator.follow(Communication(transport="sockets", tiers=(tier,)))
        buffer = torch.ones(1000)
        communicator.all_reduce(buffer, "test").wait()
        used |= {entry.algorithm for entry in communicator.ledger}
        communicator.close()
    return float(buffer.sum()), used


def test_the_config_can_describe_the_network(four_ranks: World) -> None:
    assert four_ranks.run(chosen_by_price) == [(4000.0, {"recursive_doubling", "ring"})] * 4


def outside(rank: int, world: int) -> str:
    group = dist.new_group([0])
    if rank == 0:
        return ""
    with pytest.raises(ValueError, match=rf"this process \(rank {rank}\) is not one of its ranks") as caught:
        GlooCommunicator("data", group, _get_default_store(), 20.0)
    return str(caught.value)


def test_a_rank_outside_of_the_group_is_told(two_ranks: World) -> None:
    assert all(two_ranks.run(outside)[1:])


def make_default(rank: int, world: int) -> str:
    group = dist.group.WORLD
    assert group is not None
    communicator = GlooCommunicator("data", group, _get_default_store(), 20.0)
    communicator.close()
    return communicator.transport.name


def threads_end(rank: int, world: int) -> int:
    before = threading.active_count()
    make("shared memory").close()
    return threading.active_count() - before


def test_close_ends_the_thread(two_ranks: World) -> None:
    assert two_ranks.run(threads_end) == [0, 0]
