"""The backend's own collectives, as the native communicator calls them, against sums and concatenations."""

import torch
import torch.distributed as dist
from windtunnel.engine.communicator import NativeCommunicator
from windtunnel.engine.world import World


def collectives(rank: int, world: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    native = NativeCommunicator("data", group)
    data = torch.arange(world * world * 3, dtype=torch.float32).view(world, -1)  # row r is rank r's buffer
    total = data.sum(0)
    mine = slice(rank * 3, rank * 3 + 3)

    buffer = data[rank].clone()
    native.all_reduce(buffer, "sum").wait()
    assert torch.equal(buffer, total)  # exact: small integers

    buffer = data[rank].clone()
    native.all_reduce(buffer, "maximum", largest=True).wait()
    assert torch.equal(buffer, data.amax(0))

    buffer = data[rank].clone()
    native.reduce_scatter(buffer, "sum").wait()
    assert torch.equal(buffer[mine], total[mine])

    buffer = torch.zeros_like(total)
    buffer[mine] = total[mine]
    native.all_gather(buffer, "parameters").wait()
    assert torch.equal(buffer, total)

    buffer = data[rank].clone()
    native.replicate([buffer])
    assert torch.equal(buffer, data[0])

    buffer = data[rank].clone()
    native.broadcast(buffer, "last rank's", root=world - 1).wait()
    assert torch.equal(buffer, data[world - 1])

    buffer = data[rank].clone()
    native.reduce(buffer, "sum", root=world - 1).wait()
    if rank == world - 1:
        assert torch.equal(buffer, total)

    buffer = data[rank].clone()
    native.all_to_all(buffer, "exchange").wait()
    assert torch.equal(buffer, data[:, mine].flatten())
    assert {entry.algorithm for entry in native.ledger} == {"native"}


def test_native_collectives(two_ranks: World) -> None:
    two_ranks.run(collectives)
