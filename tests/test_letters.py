"""Messages between two ranks: what arrives, what the ledger says of it, and who is named when nobody sends."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from windtunnel.engine.channel import SLOTS
from windtunnel.engine.communicator import (
    CommunicationError,
    Entry,
    Letter,
    NativeCommunicator,
    SoloCommunicator,
)
from windtunnel.engine.gloo import GlooCommunicator
from windtunnel.engine.letterbox import LARGEST_BYTES, SMALLEST_SLOT_BYTES, slot_bytes_for
from windtunnel.engine.sockets import framing_bytes
from windtunnel.engine.wire import written_bytes
from windtunnel.engine.world import World


def make(shared: bool = True, timeout_s: float = 20.0) -> GlooCommunicator:
    group = dist.group.WORLD
    assert group is not None
    return GlooCommunicator("pipeline", group, _get_default_store(), timeout_s, shared_memory=shared)


def in_both_directions(rank: int, world: int, shared: bool) -> list[Tensor]:
    """Both send before they receive, of several dtypes and sizes, around a collective; some have a gradient."""
    communicator = make(shared)
    sent = [torch.full((size,), float(10 * rank + size % 7), dtype=dtype) for size, dtype in SIZES]
    sent[0].requires_grad_()
    got = [torch.empty(size, dtype=dtype) for size, dtype in SIZES]
    sending = [communicator.send(each, 1 - rank, f"message {number}") for number, each in enumerate(sent)]
    sums = torch.ones(3)
    communicator.all_reduce(sums, "between").wait()
    coming = communicator.exchange([Letter("recv", each, 1 - rank, "answer") for each in got])
    for handle in (*reversed(coming), *sending):
        handle.wait()
        handle.wait()  # once more does no harm
    communicator.close()
    return [*got, sums]


SIZES = (
    (5, torch.float64),
    (1, torch.float32),
    (70_001, torch.bfloat16),  # in larger slots than those before it
    (5, torch.float64),
    (LARGEST_BYTES + 1, torch.uint8),
    (3, torch.int64),
    (7, torch.float32),
)
"""More than the slots of a channel, so that some are sent while this rank waits for a collective."""


@pytest.mark.parametrize("shared", [True, False])
def test_messages_meet_in_order(two_ranks: World, shared: bool) -> None:
    for rank, (*got, sums) in enumerate(two_ranks.run(in_both_directions, shared)):
        for values, (size, dtype) in zip(got, SIZES, strict=True):
            assert torch.equal(values, torch.full((size,), float(10 * (1 - rank) + size % 7), dtype=dtype))
        assert torch.equal(sums, torch.full((3,), 2.0))


class Counted(NamedTuple):
    ledger: dict[Entry, int]
    payload: int
    written: int


def count(rank: int, world: int, size: int) -> Counted:
    communicator = make(shared=False)
    buffer = torch.zeros(size)
    communicator.all_reduce(torch.zeros(1), "together").wait()
    before = written_bytes()
    for _ in range(3):
        move = communicator.send if rank == 0 else communicator.recv
        move(buffer, 1 - rank, "a letter").wait()
    written = written_bytes() - before
    steps = [communicator.steps(entry) for entry, times in communicator.ledger.items() for _ in range(times)]
    letters = steps[1:]
    payload = 4 * sum(message.stop - message.start for step in letters for posted in step for message in posted.sends)
    ledger = {entry: times for entry, times in communicator.ledger.items() if entry.kind != "all_reduce"}
    communicator.close()
    return Counted(ledger, payload, written - sum(framing_bytes(step) for step in letters))


@pytest.mark.parametrize("size", [1, 1000])
def test_the_ledger_says_what_the_kernel_counts(two_ranks: World, size: int) -> None:
    first, second = two_ranks.run(count, size)
    assert first.ledger == {Entry("send", "pipeline", size, "fp32", "p2p", False): 3}
    assert second.ledger == {Entry("recv", "pipeline", size, "fp32", "p2p", False): 3}
    assert (first.payload, second.payload) == (12 * size, 0)
    assert (first.written, second.written) == (12 * size, 0)


def count_cursors(rank: int, world: int, size: int) -> tuple[int, int, int]:
    """(payload by the ledger, bytes that the cursors say were sent, and received)"""
    communicator = make()
    for count in (size, 3 * size):
        move = communicator.send if rank == 0 else communicator.recv
        move(torch.zeros(count), 1 - rank, "a letter").wait()
    payload = sum(4 * entry.elements * times for entry, times in communicator.ledger.items())
    boxes = communicator.letterboxes
    found = (payload, boxes.sent_bytes, boxes.received_bytes)
    communicator.close()
    return found


@pytest.mark.parametrize("size", [1, 20_000])
def test_the_ledger_says_what_the_cursors_count(two_ranks: World, size: int) -> None:
    nbytes = 16 * size
    assert two_ranks.run(count_cursors, size) == [(nbytes, nbytes, 0), (nbytes, 0, nbytes)]


def sends_first(rank: int, world: int) -> list[list[float]]:
    """Each waits for its sends, which are more than a channel takes, before it receives any; then changes them."""
    communicator = make()
    values = [torch.full((2,), float(number)) for number in range(4 * SLOTS)]
    sending = [communicator.send(each, 1 - rank, "early") for each in values]
    for handle, each in zip(sending, values, strict=True):
        handle.wait()
        each.fill_(-1.0)
    got = [torch.empty(2) for _ in values]
    for each in got:
        communicator.recv(each, 1 - rank, "late").wait()
    communicator.close()
    return [each.tolist() for each in got]


def test_sends_do_not_wait_for_receives(two_ranks: World) -> None:
    wanted = [[float(number)] * 2 for number in range(4 * SLOTS)]
    assert two_ranks.run(sends_first) == [wanted, wanted]


@given(nbytes=st.integers(0, LARGEST_BYTES), now=st.sampled_from([0, SMALLEST_SLOT_BYTES, LARGEST_BYTES]))
def test_slots_hold_the_message_and_never_shrink(nbytes: int, now: int) -> None:
    size = slot_bytes_for(nbytes, now)
    assert max(nbytes, now, SMALLEST_SLOT_BYTES) <= size <= LARGEST_BYTES
    assert size & (size - 1) == 0


def another_size(rank: int, world: int) -> str:
    communicator = make()
    if rank == 0:
        communicator.send(torch.zeros(3), 1, "short").wait()
    else:
        with pytest.raises(CommunicationError) as error:
            communicator.recv(torch.zeros(4), 0, "long").wait()
    dist.barrier()  # both have seen it; a wait on the communicator would hear of who gives up first
    communicator.give_up("the test is over")  # nobody reads the message
    communicator.close()
    return str(error.value) if rank else ""


def test_a_message_of_another_size_is_named(two_ranks: World) -> None:
    _, said = two_ranks.run(another_size)
    assert "long, from rank 0 to rank 1" in said
    assert "12 bytes, but number 0 of 16" in said


def unread(rank: int, world: int) -> str:
    communicator = make(timeout_s=0.2)
    if rank == 0:
        communicator.send(torch.zeros(3), 1, "for nobody").wait()
        with pytest.raises(CommunicationError) as error:
            communicator.close()
        return str(error.value)
    communicator.close()
    return ""


def test_a_message_that_nobody_receives_is_told_at_the_end(two_ranks: World) -> None:
    said, _ = two_ranks.run(unread)
    assert said == "messages from rank 0 were never received by rank 1: waited 0.2 s when closing"


def hear(rank: int, world: int) -> str:
    communicator = make()
    said = ""
    if rank == 0:
        communicator.give_up("ValueError: out of data")
        with pytest.raises(CommunicationError, match="this rank gave up: ValueError: out of data"):
            communicator.recv(torch.zeros(1), 1, "nothing")
    else:
        with pytest.raises(CommunicationError) as error:
            communicator.recv(torch.zeros(1), 0, "nothing").wait()
        said = str(error.value)
    communicator.close()
    return said


def test_who_gives_up_is_heard_at_once(two_ranks: World) -> None:
    """Not after the 20 seconds that a wait may take: it would say how long it waited."""
    _, said = two_ranks.run(hear)
    assert said.endswith("nothing, from rank 0 to rank 1: rank 0 gave up: ValueError: out of data")


def one_way(rank: int, world: int) -> tuple[int, list[float]]:
    """A ring of messages in each direction, receives first, on the groups that NCCL would have."""
    group = dist.group.WORLD
    assert group is not None
    communicator = NativeCommunicator("joined", group, 20.0).among([tuple(range(world))], "pipeline")
    assert isinstance(communicator, NativeCommunicator)
    peers = sorted({(rank + 1) % world, (rank - 1) % world})
    got = [torch.zeros(1) for _ in peers]
    letters = [Letter("recv", each, peer, "ring") for each, peer in zip(got, peers, strict=True)]
    letters += [Letter("send", torch.full((1,), float(rank)), peer, "ring") for peer in peers]
    for handle in communicator.exchange(letters):
        handle.wait()
    ways = [communicator.one_way[ends] for peer in peers for ends in ((rank, peer), (peer, rank))]
    assert all(dist.get_world_size(way) == 2 for way in ways)
    communicator.close()
    return len({id(way) for way in (*ways, group)}), [each.item() for each in got]


def test_each_direction_has_a_group_of_its_own(two_ranks: World, four_ranks: World) -> None:
    assert two_ranks.run(one_way) == [(3, [1.0]), (3, [0.0])]
    found = four_ranks.run(one_way)
    assert found == [(5, sorted([(rank - 1) % 4 + 0.0, (rank + 1) % 4 + 0.0])) for rank in range(4)]


def wait_in_vain(rank: int, world: int) -> str:
    group = dist.new_group()  # Gloo ends the connections of a group in which a wait was in vain
    assert group is not None
    communicator = GlooCommunicator("pipeline", group, _get_default_store(), 0.2, owner=True)
    said = ""
    if rank == 1:
        with pytest.raises(CommunicationError) as error:
            communicator.recv(torch.zeros(7), 0, "activation of chunk 0, micro-batch 3").wait()
        said = str(error.value)
    communicator.close()
    return said


def test_a_message_that_is_not_sent_is_named(two_ranks: World) -> None:
    _, said = two_ranks.run(wait_in_vain)
    for words in ("recv of 7 fp32 on axis 'pipeline'", "micro-batch 3", "from rank 0 to rank 1"):
        assert words in said


def in_groups(rank: int, world: int) -> tuple[int, int, list[float]]:
    communicator = make()
    pairs = communicator.among([(0, 3), (1,)], "tied")
    total = torch.full((2,), float(rank))
    pairs.all_reduce(total, "sum").wait()
    found = (pairs.rank, pairs.world, total.tolist())
    pairs.close()
    communicator.close()
    return found


def test_groups_of_some_ranks(four_ranks: World) -> None:
    alone = [(0, 1, [float(rank)] * 2) for rank in range(4)]
    assert four_ranks.run(in_groups) == [(0, 2, [3.0, 3.0]), alone[1], alone[2], (1, 2, [3.0, 3.0])]


def test_a_peer_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"send \(x\) between rank 0 and rank 0 of 1 on axis 'data'"):
        SoloCommunicator().send(torch.zeros(1), 0, "x")
