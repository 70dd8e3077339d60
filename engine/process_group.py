# mypy: disable-error-code="override"
# torch declares several overloads of the methods below; c10d, DDP and FSDP2 call those that are defined here.
"""A process group of torch.distributed whose collectives are our programs, and Gloo's calls where we have none.

[Note: who waits for whom]
Each group does its collectives one after the other, in the order of the calls (engine/lane.py). torch asks that all
ranks of a group make the same collective calls in the same order, so their lanes meet at each call, and none waits for
a call that stands behind its own. Whether a call is ours or Gloo's depends only on what ranks must agree on (kind,
reduction, dtype, even sizes), never on what is one rank's own affair (strides, split sizes), and both sorts stand in
the same lane. Each group has a lane and Gloo contexts of its own, so that groups do not wait for each other.
Point-to-point messages have no place in the order of the collectives (rank 0 may send and then reduce while rank 1
reduces and then receives): they bypass the lane, on a second Gloo context.

[Note: the base class is never called]
Python can override a ProcessGroup but no Backend. C++ reaches the methods that PyProcessGroup.hpp names; where Python
does not define one of them, it runs the base class while it holds the GIL, and that deadlocks now and then: a thread of
Gloo's needs the GIL to drop a tensor. So all of them are defined here, and what is Gloo's goes to a plain ProcessGroup,
whose bindings release the GIL. Calls from C++ that Python cannot override end up in the Gloo backend that is registered
for the CPU.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, Backend, PrefixStore, ProcessGroupGloo, Store

from .arena import Arena, contiguous, leaves, lengths, overwrite, pack, unpack
from .communicator import DTYPE_NAMES, CommunicationError, Communicator, Handle, SoloCommunicator
from .gloo import GlooCommunicator
from .lane import Lane

NAME = "windtunnel"

CARRIED = frozenset(DTYPE_NAMES) - {torch.bool}
"""Dtypes that our programs carry. Gloo knows all of them, for the kinds of collective that have no program."""

OLD_NAMES = {
    "all_gather_single": "_allgather_base",
    "all_gather_single_coalesced": "allgather_into_tensor_coalesced",
    "reduce_scatter_single": "_reduce_scatter_base",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
    "all_to_all_single": "alltoall_base",
}
"""What torch called its methods before 2.13, which knows both."""

CLOSE_S = 5.0
"""How long a group that is destroyed waits for the collectives under way."""


class WindtunnelGroup(dist.ProcessGroup):
    """CPU ranks whose collectives are our programs; see [Note: who waits for whom].

    Gloo's own call, in the same lane, does what we have no program for: other dtypes, reductions but sum, mean and (of
    all-reduce) maximum, uneven parts, gather and scatter. Tensors may have any shape and strides.

    Args:
        axis: what errors call the group.
        store: where its ranks meet; nobody else writes to it.
        timeout: how long a collective waits for other ranks.
    """

    def __init__(self, axis: str, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        # torch's other constructor, the one in its stub, makes an object that C++ cannot call back.
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.timeout = timeout
        self._wire = _gloo_group(PrefixStore("wire", store), rank, size, timeout)
        self._direct = _gloo_group(PrefixStore("direct", store), rank, size, timeout)
        _add_backend(self, self._direct._get_backend(torch.device("cpu")))
        self._communicator: Communicator = SoloCommunicator(axis)
        if size > 1:
            failures = PrefixStore("failures", store)
            self._communicator = GlooCommunicator(axis, self._wire, failures, timeout.total_seconds())
        self._lane = Lane(f"windtunnel {axis} lane", timeout.total_seconds())
        self._arena = Arena()  # of the lane, which does one job at a time

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        return NAME

    def shutdown(self) -> None:
        """Give back threads and transport once the collectives under way have ended; torch calls it."""
        if self._lane.close(CLOSE_S):
            self._communicator.close()

    # The collectives that we have programs for. A method says who does the call, its job does it, later.

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self._reduce_everywhere("allreduce", tensors, opts or dist.AllreduceOptions())

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """All tensors travel as one buffer."""
        return self._reduce_everywhere("allreduce_coalesced", tensors, opts or dist.AllreduceCoalescedOptions())

    def _reduce_everywhere(self, name: str, tensors: list[Tensor], opts: Any) -> dist.Work:
        largest = opts.reduceOp == dist.ReduceOp.MAX
        if not _carried(tensors) or not (largest or _is_sum(opts.reduceOp, tensors)):
            return self._native(name, tensors, tensors, opts)
        mean = opts.reduceOp == dist.ReduceOp.AVG

        def job() -> None:
            with self._arena.flat(tensors) as buffer:
                _play(self._communicator.all_reduce, buffer, name, largest=largest)
                if mean:
                    buffer.div_(self.size())

        return self._lane.start(name, tensors, job)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        opts = opts or dist.BroadcastOptions()
        if not _carried(tensors):
            return self._native("broadcast", tensors, tensors, opts)
        root = opts.rootRank

        def job() -> None:
            with self._arena.flat(tensors) as buffer:
                _play(self._communicator.broadcast, buffer, "broadcast", root=root)

        return self._lane.start("broadcast", tensors, job)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """Only the root's tensors change."""
        opts = opts or dist.ReduceOptions()
        if not _carried(tensors) or not _is_sum(opts.reduceOp, tensors):
            return self._native("reduce", tensors, tensors, opts)
        root, mean = opts.rootRank, opts.reduceOp == dist.ReduceOp.AVG

        def job() -> None:
            buffer = self._arena.buffer(sum(lengths(tensors)), tensors[0].dtype)
            pack(tensors, buffer)
            _play(self._communicator.reduce, buffer, "reduce", root=root)
            if self.rank() == root:
                unpack(buffer.div_(self.size()) if mean else buffer, tensors)

        return self._lane.start("reduce", tensors, job)

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Any = None) -> dist.Work:
        if not _carried([output, source]) or output.numel() != self.size() * source.numel():
            return self._native("all_gather_single", [output], output, source, opts or AllgatherOptions())

        def job() -> None:
            with self._arena.flat([output], read=False) as buffer:
                part = buffer[self.rank() * source.numel() :][: source.numel()]
                if part.data_ptr() != source.data_ptr() or not source.is_contiguous():  # FSDP2 gathers in place
                    pack([source], part)
                _play(self._communicator.all_gather, buffer, "all_gather_single")

        return self._lane.start("all_gather_single", [output], job)

    def all_gather_single_coalesced(self, outputs: list[Tensor], sources: list[Tensor], opts: Any = None) -> dist.Work:
        """All sources travel as one buffer."""
        name, widths = "all_gather_single_coalesced", lengths(sources)
        if not _carried([*outputs, *sources]) or lengths(outputs) != [self.size() * width for width in widths]:
            return self._native(name, outputs, outputs, sources, opts or AllgatherOptions())

        def job() -> None:
            parts = self._gather_parts(name, sources)
            for output, columns in zip(outputs, parts.split(widths, dim=1), strict=True):
                overwrite(output, columns)

        return self._lane.start(name, outputs, job)

    def allgather(self, outputs: list[list[Tensor]], sources: list[Tensor], opts: Any = None) -> dist.Work:
        places = list(chain(*outputs))
        even = len(sources) == 1 and lengths(places) == lengths(sources) * self.size()
        if not even or not _carried([*places, *sources]):
            return self._native("allgather", outputs, outputs, sources, opts or AllgatherOptions())

        def job() -> None:
            unpack(self._gather_parts("allgather", sources).view(-1), places)

        return self._lane.start("allgather", outputs, job)

    def _gather_parts(self, name: str, sources: list[Tensor]) -> Tensor:
        """Row r: rank r's sources, packed. In the arena."""
        parts = self._parts(sum(lengths(sources)), sources[0].dtype)
        pack(sources, parts[self.rank()])
        _play(self._communicator.all_gather, parts.view(-1), name)
        return parts

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Any = None) -> dist.Work:
        opts = opts or dist.ReduceScatterOptions()
        if not self._can_scatter([output], [source], opts):
            return self._native("reduce_scatter_single", [output], output, source, opts)
        return self._reduce_parts("reduce_scatter_single", [output], [source], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], sources: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """All sources travel as one buffer."""
        opts, name = opts or dist.ReduceScatterOptions(), "reduce_scatter_single_coalesced"
        if not self._can_scatter(outputs, sources, opts):
            return self._native(name, outputs, outputs, sources, opts)
        return self._reduce_parts(name, outputs, sources, opts)

    def _can_scatter(self, outputs: list[Tensor], sources: list[Tensor], opts: Any) -> bool:
        even = lengths(sources) == [self.size() * length for length in lengths(outputs)]
        return even and _carried([*outputs, *sources]) and _is_sum(opts.reduceOp, sources)

    def reduce_scatter(self, outputs: list[Tensor], sources: list[list[Tensor]], opts: Any = None) -> dist.Work:
        opts, parts = opts or dist.ReduceScatterOptions(), list(chain(*sources))
        even = len(outputs) == 1 and lengths(parts) == lengths(outputs) * self.size()
        if not even or not _carried([*outputs, *parts]) or not _is_sum(opts.reduceOp, parts):
            return self._native("reduce_scatter", outputs, outputs, sources, opts)
        return self._reduce_parts("reduce_scatter", outputs, sources, opts)

    def _reduce_parts(
        self, name: str, outputs: list[Tensor], sources: Sequence[Tensor | list[Tensor]], opts: Any
    ) -> dist.Work:
        """Each source is a tensor, or a list with a tensor per rank. They may not change: a copy is reduced."""
        mean, widths = opts.reduceOp == dist.ReduceOp.AVG, lengths(outputs)

        def job() -> None:
            parts = self._parts(sum(widths), outputs[0].dtype)
            for columns, source in zip(parts.split(widths, dim=1), sources, strict=True):
                if isinstance(source, Tensor):
                    columns.copy_(source.reshape(columns.shape))
                else:
                    for row, part in zip(columns, source, strict=True):
                        pack([part], row)
            _play(self._communicator.reduce_scatter, parts.view(-1), name)
            mine = parts[self.rank()]
            unpack(mine.div_(self.size()) if mean else mine, outputs)

        return self._lane.start(name, outputs, job)

    def all_to_all_single(
        self, output: Tensor, source: Tensor, output_splits: list[int], source_splits: list[int], opts: Any = None
    ) -> dist.Work:
        """Ours if no splits are given: whether they are even is known to this rank only."""
        even = output.numel() == source.numel() and output.numel() % self.size() == 0
        if output_splits or source_splits or not even or not _carried([output, source]):
            options = opts or dist.AllToAllOptions()
            return self._native("all_to_all_single", [output], output, source, output_splits, source_splits, options)

        def job() -> None:
            with self._arena.flat([output], read=False) as buffer:
                pack([source], buffer)
                _play(self._communicator.all_to_all, buffer, "all_to_all_single")

        return self._lane.start("all_to_all_single", [output], job)

    def barrier(self, opts: Any = None) -> dist.Work:
        """Over when every rank's earlier collectives are."""

        def job() -> None:
            token = torch.zeros(1, dtype=torch.int32, device="cpu")
            _play(self._communicator.all_reduce, token, "barrier", scalar=True)

        return self._lane.start("barrier", [], job)

    # Gloo's own calls.

    def alltoall(self, outputs: list[Tensor], sources: list[Tensor], opts: Any = None) -> dist.Work:
        """Of any sizes, packed for Gloo, whose own call wants them equal."""
        opts, splits = opts or dist.AllToAllOptions(), (lengths(outputs), lengths(sources))

        def job() -> None:
            sent = torch.cat([source.reshape(-1) for source in sources])
            received = self._arena.buffer(sum(splits[0]), sent.dtype)
            self._call("alltoall_base", received, sent, *splits, opts)
            unpack(received, outputs)

        return self._lane.start("alltoall", outputs, job)

    def gather(self, outputs: list[list[Tensor]], sources: list[Tensor], opts: Any = None) -> dist.Work:
        return self._native("gather", outputs, outputs, sources, opts or dist.GatherOptions())

    def scatter(self, outputs: list[Tensor], sources: list[list[Tensor]], opts: Any = None) -> dist.Work:
        return self._native("scatter", outputs, outputs, sources, opts or dist.ScatterOptions())

    def allgather_coalesced(self, outputs: list[list[Tensor]], sources: list[Tensor], opts: Any = None) -> dist.Work:
        return self._native("allgather_coalesced", outputs, outputs, sources, opts or AllgatherOptions())

    def _native(self, name: str, outputs: Sequence[Any], *arguments: Any) -> dist.Work:
        def job() -> None:
            copies: list[tuple[Tensor, Tensor]] = []
            self._call(OLD_NAMES.get(name, name), *contiguous(arguments, copies))
            written = {id(tensor) for tensor in leaves(outputs)}
            for tensor, copy in copies:
                if id(tensor) in written:
                    overwrite(tensor, copy)

        return self._lane.start(name, outputs, job)

    def _call(self, name: str, *arguments: Any) -> None:
        """Gloo's own call, to its end. The communicator has nothing to do meanwhile, so it may use its context."""
        try:
            getattr(self._wire, name)(*arguments).wait(self.timeout)
        except RuntimeError as error:
            raise CommunicationError(f"{name} on axis {self._communicator.axis!r} (native): {error}") from None

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> dist.Work:
        return self._direct.send(tensors, destination, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> dist.Work:
        return self._direct.recv(tensors, source, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> dist.Work:
        return self._direct.recv_anysource(tensors, tag)

    def _parts(self, width: int, dtype: torch.dtype) -> Tensor:
        """[ranks, width] in the arena."""
        return self._arena.buffer(self.size() * width, dtype).view(self.size(), width)


for _name, _old_name in OLD_NAMES.items():
    setattr(WindtunnelGroup, _old_name, getattr(WindtunnelGroup, _name))


def _gloo_group(store: Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    group = dist.ProcessGroup(store, rank, size)
    _add_backend(group, ProcessGroupGloo(store, rank, size, timeout))
    return group


def _add_backend(group: dist.ProcessGroup, backend: Backend) -> None:
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)


def _carried(tensors: Sequence[Tensor]) -> bool:
    """Whether our programs carry them: dense, on the CPU, and of one dtype that is in CARRIED."""
    dense = all(tensor.is_cpu and tensor.layout == torch.strided for tensor in tensors)
    dtypes = {tensor.dtype for tensor in tensors}
    return dense and len(dtypes) == 1 and dtypes <= CARRIED


def _is_sum(op: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether a sum, divided at the end if need be, is what `op` asks for."""
    return op == dist.ReduceOp.SUM or (op == dist.ReduceOp.AVG and tensors[0].is_floating_point())


def _play(start: Callable[..., Handle], buffer: Tensor, label: str, **arguments: Any) -> None:
    """A collective, to its end; nothing travels for a buffer without elements."""
    if buffer.numel():
        start(buffer, label, **arguments).wait()
