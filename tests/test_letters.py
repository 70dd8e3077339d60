"""Messages between two ranks: what arrives, what the ledger says of it, and who is named when nobody sends."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from windtunnel.engine.communicator import CommunicationError, Entry, Letter, SoloCommunicator
from windtunnel.engine.gloo import GlooCommunicator
from windtunnel.engine.sockets import framing_bytes
from windtunnel.engine.wire import written_bytes
from windtunnel.engine.world import World


def make() -> GlooCommunicator:
    group = dist.group.WORLD
    assert group is not None
    return GlooCommunicator("pipeline", group, _get_default_store(), 20.0)


def in_both_directions(rank: int, world: int) -> list[Tensor]:
    """Both send before they receive, of several dtypes and sizes, around a collective; some have a gradient."""
    communicator = make()
    sent = [torch.full((size,), float(10 * rank + size), dtype=dtype) for size, dtype in SIZES]
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


SIZES = ((5, torch.float64), (1, torch.float32), (70_001, torch.bfloat16), (5, torch.float64))


def test_messages_meet_in_order(two_ranks: World) -> None:
    for rank, (*got, sums) in enumerate(two_ranks.run(in_both_directions)):
        for values, (size, dtype) in zip(got, SIZES, strict=True):
            assert torch.equal(values, torch.full((size,), float(10 * (1 - rank) + size), dtype=dtype))
        assert torch.equal(sums, torch.full((3,), 2.0))


class Counted(NamedTuple):
    ledger: dict[Entry, int]
    payload: int
    written: int


def count(rank: int, world: int, size: int) -> Counted:
    communicator = make()
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
