"""The backend of torch.distributed, beside Gloo's, alone, and under DDP, FSDP2 and distributed checkpoints.

It needs worlds of its own: their default group is ours.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as checkpoint
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from small_models import Run, micro_batches, train_alone, whole_optimizer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from windtunnel import register_backend
from windtunnel.engine.communicator import CommunicationError
from windtunnel.engine.world import World

TIMEOUT = timedelta(seconds=20)
RUN = Run("gpt", optimizer="SGD", steps=5)

Joined = Callable[[int], World]

_others: dict[str, dist.ProcessGroup] = {}
"""In a rank: groups to compare with, by backend."""


@pytest.fixture(scope="module")
def joined() -> Iterator[Joined]:
    """A living world of that size, whose default group is ours: see conftest.py."""
    worlds: dict[int, World] = {}

    def living(size: int) -> World:
        if size not in worlds or not worlds[size].alive:
            worlds[size] = World(size, timeout_s=TIMEOUT.total_seconds(), threads=1)
            if size == 2:
                worlds[size].run(join_by_environment, free_port())
            else:
                worlds[size].run(join_by_store)
        return worlds[size]

    yield living
    for world in worlds.values():
        world.close()


@pytest.fixture
def pair(joined: Joined) -> World:
    return joined(2)


@pytest.fixture
def four(joined: Joined) -> World:
    return joined(4)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def join_by_environment(rank: int, world: int, port: int) -> None:
    """As torchrun has a script do it."""
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    register_backend()
    dist.init_process_group("cpu:windtunnel", timeout=TIMEOUT)
    assert dist.get_backend_config() == "cpu:windtunnel"


def join_by_store(rank: int, world: int) -> None:
    store = dist.PrefixStore("ours", _get_default_store())
    dist.destroy_process_group()
    register_backend()
    register_backend()  # changes nothing
    dist.init_process_group("windtunnel", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    assert dist.get_backend() == "windtunnel"


def gloo() -> dist.ProcessGroup:
    if "gloo" not in _others:
        _others["gloo"] = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return _others["gloo"]


def default() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def test_nothing_is_registered_until_asked() -> None:
    program = """
import sys, windtunnel
assert "torch" not in sys.modules
import torch.distributed as dist, windtunnel.engine.backend
assert "windtunnel" not in dist.Backend.backend_list
windtunnel.register_backend()
windtunnel.register_backend()
assert dist.Backend.backend_list.count("windtunnel") == 1
assert dist.Backend.default_device_backend_map["cpu"] == "gloo"
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


# Each collective #


def outcomes(group: dist.ProcessGroup, new: Callable[[int], Tensor]) -> dict[str, list[Tensor]]:
    """What each collective makes of `new(n)`, n tensors of this rank's stacked along dimension 0."""
    rank, world = group.rank(), group.size()
    results: dict[str, list[Tensor]] = {}

    def keep(name: str, *tensors: Tensor) -> None:
        results[name] = [tensor.detach().clone() for tensor in tensors]

    floating = new(1).is_floating_point()
    for op in ("SUM", "MAX", "MIN", *(["AVG"] if floating else [])):
        reduction = getattr(dist.ReduceOp, op)
        tensor = new(1)
        dist.all_reduce(tensor, reduction, group)
        keep(f"all_reduce {op}", tensor)
        source, part = new(world), new(1)
        group.reduce_scatter_single(part, source, scatter_options(reduction)).wait()
        keep(f"reduce_scatter {op}", part, source)
        parts = [new(1) + number for number in range(world)]
        dist.reduce_scatter(part, parts, reduction, group)
        keep(f"reduce_scatter list {op}", part, *parts)
        tensor = new(1)
        dist.reduce(tensor, op=reduction, group=group, group_dst=1)
        keep(f"reduce {op}", *([tensor] if rank == 1 else []))
    tensor = new(1)
    dist.broadcast(tensor, group=group, group_src=1)
    keep("broadcast", tensor)
    whole = new(world)
    group.all_gather_single(whole, new(1)).wait()
    keep("all_gather", whole)
    received = [new(1) for _ in range(world)]
    dist.all_gather(received, new(1), group)
    keep("all_gather list", *received)
    whole, source = new(world), new(world)
    group.all_to_all_single(whole, source, [], [], dist.AllToAllOptions()).wait()
    keep("all_to_all", whole, source)
    gathered = [new(1) for _ in range(world)]
    dist.gather(new(1), gathered if rank == 0 else None, group=group, group_dst=0)
    keep("gather", *gathered)
    scattered = new(1)
    dist.scatter(scattered, [new(1) + n for n in range(world)] if rank == 0 else None, group=group, group_src=0)
    keep("scatter", scattered)
    dist.barrier(group)
    return results


def scatter_options(op: Any) -> dist.ReduceScatterOptions:
    options = dist.ReduceScatterOptions()
    options.reduceOp = op
    return options


def integers(shape: tuple[int, ...], dtype: torch.dtype, rank: int, seed: int) -> Callable[[int], Tensor]:
    """Whole numbers: sums of a few are exact in every dtype."""

    def new(times: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        return torch.randint(-8, 8, (times * shape[0], *shape[1:]), generator=generator).to(dtype)

    return new


def strided(new: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """The same values in every second column of a wider tensor."""

    def odd(times: int) -> Tensor:
        values = new(times)
        return torch.zeros(*values.shape, 2, dtype=values.dtype)[..., 1].copy_(values)

    return odd


def beside_gloo(rank: int, world: int, shape: tuple[int, ...], dtype: torch.dtype, odd: str, seed: int) -> None:
    new = integers(shape, dtype, rank, seed)
    mine = strided(new) if odd == "everywhere" or (odd == "on rank 0" and rank == 0) else new
    theirs = outcomes(gloo(), new)
    for name, tensors in outcomes(default(), mine).items():
        for got, wanted in zip(tensors, theirs[name], strict=True):
            assert torch.equal(got, wanted), f"{name} of {shape} {dtype}, strided {odd}"


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
NO_SHRINKING = (Phase.explicit, Phase.generate)  # each example that fails ends a world
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32])


@settings(max_examples=15, phases=NO_SHRINKING)
@given(SHAPES, DTYPES, st.sampled_from(["nowhere", "everywhere", "on rank 0"]), st.integers(0, 99))
def test_collectives_equal_those_of_gloo(
    joined: Joined, shape: tuple[int, ...], dtype: torch.dtype, odd: str, seed: int
) -> None:
    joined(2).run(beside_gloo, shape, dtype, odd, seed)


@settings(max_examples=8, phases=NO_SHRINKING)
@given(SHAPES, DTYPES, st.sampled_from(["nowhere", "everywhere", "on rank 0"]), st.integers(0, 99))
def test_collectives_of_four_equal_those_of_gloo(
    joined: Joined, shape: tuple[int, ...], dtype: torch.dtype, odd: str, seed: int
) -> None:
    joined(4).run(beside_gloo, shape, dtype, odd, seed)


def unusual_tensors(rank: int, world: int) -> None:
    group = default()
    scalar = torch.tensor(float(rank + 1))
    dist.all_reduce(scalar)
    assert scalar == sum(range(1, world + 1))
    empty = torch.empty(0)
    for start in (dist.all_reduce, lambda tensor: dist.broadcast(tensor, 0)):
        start(empty)
    group.all_gather_single(torch.empty(0), empty).wait()
    flags = torch.tensor([rank == 0, rank == 1, False])
    dist.all_reduce(flags, dist.ReduceOp.MAX)  # a dtype that only Gloo reduces
    assert flags.tolist() == [True, True, False]
    complex_number = torch.tensor([complex(rank, 1)])
    dist.all_reduce(complex_number)
    assert complex_number == complex(sum(range(world)), world)
    sparse = torch.sparse_coo_tensor(torch.tensor([[rank]]), torch.ones(1), (world,))
    dist.all_reduce(sparse)
    assert torch.equal(sparse.to_dense(), torch.ones(world))
    with torch.inference_mode():
        inferred = torch.full((3,), float(rank))
        dist.all_reduce(inferred)
        whole = torch.empty(3 * world)
        group.all_gather_single(whole, inferred).wait()
    assert (inferred == sum(range(world))).all()
    assert (whole == sum(range(world))).all()
    uneven = [torch.full((number + rank,), float(rank)) for number in range(world)]
    received = [torch.empty(rank + number) for number in range(world)]
    dist.all_to_all(received, uneven)
    assert all((tensor == number).all() for number, tensor in enumerate(received))
    sizes = [tensor.numel() for tensor in uneven]
    flat = torch.empty(sum(sizes))
    group.all_to_all_single(flat, torch.cat(uneven), sizes, sizes, dist.AllToAllOptions()).wait()
    assert torch.equal(flat, torch.cat(received))
    objects: list[Any] = [None] * world
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": number} for number in range(world)]


def test_unusual_tensors(pair: World, four: World) -> None:
    pair.run(unusual_tensors)
    four.run(unusual_tensors)


def autograd_is_none_the_wiser(rank: int, world: int) -> None:
    """Gloo writes behind autograd's back; scripts rely on it."""
    x = torch.ones(3, requires_grad=True)
    y = x.exp()  # backward needs y
    dist.all_reduce(y.detach())
    matrix = torch.outer(x, x).exp()
    dist.all_reduce(matrix.detach()[:, :2])  # with gaps
    (y.sum() + matrix.sum()).backward()
    parameter = nn.Parameter(torch.full((2,), float(rank)))
    dist.broadcast(parameter, 1)
    assert parameter.tolist() == [1.0, 1.0]
    assert parameter.requires_grad
    z = x.sin()
    saved = z * z
    dist.all_reduce(z)
    saved.sum().backward()


def test_autograd_does_not_see_collectives(pair: World) -> None:
    pair.run(autograd_is_none_the_wiser)


def coalesced(rank: int, world: int, dtype: torch.dtype) -> None:
    group = default()
    shapes = [(3,), (2, 5), (1,)]
    tensors = [integers(shape, dtype, rank, number)(1) for number, shape in enumerate(shapes)]
    everyones = [[integers(shape, dtype, r, n)(1) for n, shape in enumerate(shapes)] for r in range(world)]
    summed, before = [t.clone() for t in tensors], group._communicator.ledger.total()
    with dist._coalescing_manager(group, async_ops=True) as manager:
        for tensor in summed:
            dist.all_reduce(tensor)
    manager.wait()
    gathered = [torch.empty(world * shape[0], *shape[1:], dtype=dtype) for shape in shapes]
    with dist._coalescing_manager(group):
        for output, tensor in zip(gathered, tensors, strict=True):
            dist.all_gather_single(output, tensor)
    scattered = [torch.empty_like(tensor) for tensor in tensors]
    with dist._coalescing_manager(group):
        for output, tensor in zip(scattered, gathered, strict=True):
            dist.reduce_scatter_single(output, tensor)
    assert group._communicator.ledger.total() - before == 3, "each batch of tensors is one collective"
    for number in range(len(shapes)):
        column = [tensors[number] for tensors in everyones]
        assert torch.equal(summed[number], torch.stack(column).sum(0))
        assert torch.equal(gathered[number], torch.cat(column))
        assert torch.equal(scattered[number], tensors[number] * world)
    mixed = [torch.ones(3), torch.ones(2, dtype=torch.int64)]
    outputs = [torch.empty(3 * world), torch.empty(2 * world, dtype=torch.int64)]
    group.all_gather_single_coalesced(outputs, mixed).wait()  # not of one dtype: Gloo's own
    assert all((output == 1).all() for output in outputs)


def test_coalesced_collectives_travel_as_one(four: World) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        four.run(coalesced, dtype)


# Time and order #


def many_in_flight(rank: int, world: int) -> None:
    group = default()
    sums = [torch.full((1000 * number + 1,), float(rank + number)) for number in range(8)]
    works = []
    for tensor in sums:  # ours and Gloo's, large and small, all under way at once
        works.append(dist.all_reduce(tensor, async_op=True))
        works.append(dist.all_gather([torch.empty(1) for _ in range(world)], torch.ones(1), async_op=True))
        works.append(dist.all_reduce(torch.zeros(3), dist.ReduceOp.MIN, async_op=True))
    works[-1].wait()  # they end in order, so the last is the end of all
    assert all(work.is_completed() and work.is_success() and work.exception() is None for work in works)
    for number, tensor in enumerate(sums):
        assert (tensor == sum(range(world)) + world * number).all()
    tensor = torch.ones(2)
    work = group.allreduce([tensor])
    [value] = work.get_future().wait()
    assert value is tensor
    assert work.result()[0] is tensor
    assert tensor.tolist() == [world, world]

    def again(future: "torch.futures.Future[list[Tensor]]") -> Tensor:
        [mine] = future.value()
        return dist.all_reduce(mine, async_op=True).get_future().wait()[0]

    chained = dist.all_reduce(torch.ones(2), async_op=True).get_future().then(again).then(lambda f: f.value() + 1)
    assert chained.wait().tolist() == [world * world + 1] * 2


def test_many_collectives_in_flight(pair: World, four: World) -> None:
    pair.run(many_in_flight, limit_s=30)
    four.run(many_in_flight, limit_s=30)


def messages(rank: int, world: int) -> None:
    """Sends that others receive only after a collective: no rank may wait for its turn."""
    right, left = (rank + 1) % world, (rank - 1) % world
    token = torch.ones(1)
    if rank % 2 == 0:
        sent = dist.isend(torch.full((3,), float(rank)), right, tag=7)
        dist.all_reduce(token)
        received = torch.empty(3)
        dist.recv(received, left, tag=7)
        sent.wait()
    else:
        received = torch.empty(3)
        posted = dist.irecv(received, left, tag=7)
        dist.all_reduce(token)
        posted.wait()
        dist.send(torch.full((3,), float(rank)), right, tag=7)
    assert (received == left).all()
    if rank == 0:
        anyone = torch.empty(1)
        assert sorted(int(dist.recv(anyone, tag=1)) for _ in range(world - 1)) == list(range(1, world))
    else:
        dist.send(torch.ones(1), 0, tag=1)
    exchange = [dist.P2POp(dist.isend, token, right), dist.P2POp(dist.irecv, received[:1], left)]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    assert received[0] == world


def test_messages_do_not_wait_for_collectives(pair: World, four: World) -> None:
    pair.run(messages)
    four.run(messages)


def subgroups(rank: int, world: int) -> int:
    before = threading.active_count()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    rows, columns = mesh.get_group("shard"), mesh.get_group("replicate")
    assert dist.get_backend(rows) == "windtunnel"
    along, across = torch.tensor([10.0**rank]), torch.tensor([10.0**rank])
    first, second = [(along, rows), (across, columns)][:: 1 if rank in (0, 3) else -1]
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor, group in (first, second)]
    for work in works:  # neighbours begin with different groups, so these must not wait for each other
        work.wait()
    row, column = divmod(rank, 2)
    assert along == 10.0 ** (2 * row) + 10.0 ** (2 * row + 1)
    assert across == 10.0**column + 10.0 ** (column + 2)
    odd = dist.new_group([1, 3])
    if rank in (1, 3):
        tensor = torch.tensor([float(rank)])
        dist.broadcast(tensor, 3, odd)
        assert tensor == 3
        dist.destroy_process_group(odd)
        with pytest.raises(CommunicationError, match="destroyed"):
            odd.allreduce([tensor])
    solo = dist.new_group([rank], use_local_synchronization=True)
    output = torch.empty(2)
    solo.reduce_scatter_single(output, torch.tensor([2.0, 4.0]), scatter_options(dist.ReduceOp.AVG)).wait()
    assert output.tolist() == [2.0, 4.0]
    for group in (rows, columns, solo):
        dist.destroy_process_group(group)
    return threading.active_count() - before


def test_subgroups_have_lanes_of_their_own(four: World) -> None:
    assert four.run(subgroups) == [0, 0, 0, 0], "destroyed groups leave no thread behind"


def functional_collectives(rank: int, world: int) -> None:
    group = default()
    mine = torch.arange(4.0) + rank
    wanted = torch.stack([torch.arange(4.0) + number for number in range(world)])
    assert torch.equal(functional.all_reduce(mine, "sum", group).wait(), wanted.sum(0))
    assert torch.equal(functional.all_reduce(mine, "avg", group).wait(), wanted.mean(0))
    assert torch.equal(functional.all_gather_single(mine, 0, group).wait(), wanted.flatten())
    scattered = functional.reduce_scatter_single(wanted.flatten(), "sum", 0, group)
    assert torch.equal(scattered.wait(), wanted[rank] * world)
    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(4.0 * world).view(2 * world, 2)
    shards = DTensor.from_local(whole.chunk(world)[rank], mesh, [Shard(0)])
    assert torch.equal(shards.full_tensor(), whole)
    assert torch.equal(shards.redistribute(mesh, [Shard(1)]).full_tensor(), whole)
    assert torch.equal((shards.sum() * 1.0).redistribute(mesh, [Replicate()]).to_local(), whole.sum())


def test_functional_collectives_and_dtensor(pair: World) -> None:
    pair.run(functional_collectives)


# Training #


def train(model: nn.Module, rank: int, world: int) -> None:
    optimizer = whole_optimizer(RUN, model)
    for step in range(RUN.steps):
        [(x, y)] = micro_batches(RUN, step, rank, world)
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def ddp(rank: int, world: int) -> dict[str, Tensor]:
    ours = DistributedDataParallel(RUN.build(), bucket_cap_mb=0.001)
    train(ours, rank, world)
    if world == 2:  # with two addends the order cannot matter
        theirs = DistributedDataParallel(RUN.build(), bucket_cap_mb=0.001, process_group=gloo())
        train(theirs, rank, world)
        for name, parameter in parameters_of(theirs).items():
            assert torch.equal(parameter, parameters_of(ours)[name]), name
    return parameters_of(ours)


def fsdp(rank: int, world: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    model = sharded(shape)
    train(model, rank, world)
    return parameters_of(model)


def sharded(shape: tuple[int, ...]) -> nn.Module:
    model: Any = RUN.build()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def assert_equal_to_one_process(by_rank: list[dict[str, Tensor]]) -> None:
    """In float64 what is left is the order of additions: some 1e-16 per step, which five steps magnify a little."""
    alone = train_alone(RUN).parameters
    for parameters in by_rank:
        assert parameters.keys() == alone.keys()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, alone[name], rtol=1e-11, atol=1e-13, msg=name)


def test_ddp(pair: World, four: World) -> None:
    assert_equal_to_one_process(pair.run(ddp))
    assert_equal_to_one_process(four.run(ddp))


def test_fsdp2(pair: World, four: World) -> None:
    assert_equal_to_one_process(pair.run(fsdp, (2,)))
    assert_equal_to_one_process(four.run(fsdp, (4,)))


def test_fsdp2_with_replicas(four: World) -> None:
    assert_equal_to_one_process(four.run(fsdp, (2, 2)))


def save_and_load(rank: int, world: int, folder: Path) -> None:
    trained = sharded((world,))
    train(trained, rank, world)
    checkpoint.save({"model": trained.state_dict()}, checkpoint_id=folder)
    fresh = sharded((world,))
    state = {"model": fresh.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    fresh.load_state_dict(state["model"])
    for name, parameter in parameters_of(trained).items():
        assert torch.equal(parameter, parameters_of(fresh)[name]), name


def test_distributed_checkpoint(pair: World, tmp_path: Path) -> None:
    pair.run(save_and_load, tmp_path)


# Failure. Each breaks a group that was made for it #

SHORT = timedelta(seconds=1)


def mismatched_sizes(rank: int, world: int) -> str:
    group = dist.new_group(timeout=SHORT)
    with pytest.raises(CommunicationError) as failure:
        dist.all_reduce(torch.ones(10 + rank), group=group)
    with pytest.raises(CommunicationError):
        dist.all_reduce(torch.ones(3), group=group)  # a broken group stays so
    return str(failure.value)


def test_mismatched_sizes_fail_on_all_ranks(four: World) -> None:
    for rank, message in enumerate(four.run(mismatched_sizes, limit_s=30)):
        assert f"all_reduce of {10 + rank} fp32" in message
        assert all(f"rank {other} " in message for other in range(4) if other != rank)


def absent_rank(rank: int, world: int) -> list[str]:
    """Rank 1 makes no call: what the ways to wait tell rank 0."""
    group, other = dist.new_group(timeout=SHORT), dist.new_group(timeout=SHORT)
    wrapped = DistributedDataParallel(nn.Linear(2, 2), process_group=group)
    if rank == 1:
        return []
    messages = []
    work = dist.all_reduce(torch.ones(2), group=group, async_op=True)
    with pytest.raises(CommunicationError, match=r"has not ended within 0\.01 s"):
        work.wait(timedelta(milliseconds=10))
    with pytest.raises(RuntimeError) as failure:
        work.get_future().wait()
    messages.append(str(failure.value))
    assert work.is_completed()
    assert not work.is_success()
    assert isinstance(work.exception(), CommunicationError)
    # What follows on a group that has failed fails at once, with the same words.
    with pytest.raises(CommunicationError) as failure:
        dist.barrier(group)
    messages.append(str(failure.value))
    with pytest.raises(RuntimeError) as failure:  # C++ waits for this one
        wrapped(torch.ones(1, 2)).sum().backward()
    messages.append(str(failure.value))
    with pytest.raises(CommunicationError, match=r"gather on axis 'group .*native"):
        dist.gather(torch.ones(1), [torch.ones(1), torch.ones(1)], group=other)
    return messages


def test_absent_rank(pair: World) -> None:
    for message in pair.run(absent_rank, limit_s=60)[0]:
        assert "all_reduce of 2 fp32" in message
        assert "rank 1 did not answer" in message
