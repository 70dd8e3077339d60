"""The one door from the engine to the network: typed methods, async handles, a ledger, and no wait without an end.

`GlooCommunicator` (engine/gloo.py) plays our own programs over sockets, `NativeCommunicator` here calls NCCL, and
`SimCommunicator` (engine/flight.py) only writes down what would be sent. All of them work in place on a flat buffer.
Where ranks hold parts of it, it is cut in as many equal parts as there are ranks, and part r belongs to rank r.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives.groups import PIPELINE, Mesh
from .communication_section import Communication
from .observer import SILENT, Observer

DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


class CommunicationError(RuntimeError):
    """A collective that failed or timed out. The message names it, the ranks that wait and those that are silent."""


class Entry(NamedTuple):
    """One kind of call in the ledger. `algorithm` names the program of ours that was played, or is "native"."""

    kind: str
    axis: str
    elements: int
    dtype: str
    algorithm: str
    scalar: bool

    def __str__(self) -> str:
        return f"{self.kind} of {self.elements} {self.dtype} on axis {self.axis!r} ({self.algorithm})"


class Call(NamedTuple):
    """One collective as it was asked for.

    Attributes:
        buffer: [n], worked on in place.
        label: what an error calls it.
        largest: an all-reduce takes the maximum instead of the sum.
        root: the rank whose values are broadcast, or that gets the sum of a reduce, or at the other end of a message.
    """

    entry: Entry
    buffer: Tensor
    label: str
    largest: bool = False
    root: int = 0


class Letter(NamedTuple):
    """A message between two ranks: `kind` is "send" or "recv", `peer` the rank at the other end."""

    kind: str
    buffer: Tensor
    peer: int
    label: str


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Block until the buffer may be used. On CUDA it is the current stream that waits, not the host."""


class Done:
    """The handle of a collective with nothing to do."""

    def wait(self) -> None:
        pass


DONE = Done()


class Communicator(ABC):
    """What the engine may ask of a group of ranks.

    Attributes:
        axis: the mesh axis that the group spans.
        rank, world: this rank's number in the group, and the group's size.
        ledger: how often each kind of collective was started.
        forced: the algorithm of a kind of collective, if not the one that `algorithm` would take.
    """

    observer: Observer = SILENT

    def __init__(self, axis: str, rank: int, world: int) -> None:
        self.axis, self.rank, self.world = axis, rank, world
        self.ledger: Counter[Entry] = Counter()
        self.forced: Mapping[str, str] = {}

    def follow(self, wishes: Communication) -> None:
        """Do as the config says from the next collective on; on all ranks, with nothing under way.

        Raises:
            ValueError: what cannot be done here.
        """
        self.forced = wishes.algorithms

    def all_reduce(self, buffer: Tensor, label: str, *, largest: bool = False, scalar: bool = False) -> Handle:
        """Sum (or, with `largest`, maximum) of every rank's `buffer` [n], on every rank."""
        return self._start("all_reduce", buffer, label, largest=largest, scalar=scalar)

    def reduce_scatter(self, buffer: Tensor, label: str) -> Handle:
        """Sum of every rank's `buffer` [n], n a multiple of the world: rank r gets part r, the rest is overwritten."""
        return self._start("reduce_scatter", buffer, label)

    def all_gather(self, buffer: Tensor, label: str) -> Handle:
        """Part r of `buffer` [n] goes from rank r to every rank."""
        return self._start("all_gather", buffer, label)

    def all_to_all(self, buffer: Tensor, label: str) -> Handle:
        """Part r of `buffer` [n] goes to rank r, and what rank r has for this rank takes its place."""
        return self._start("all_to_all", buffer, label)

    def broadcast(self, buffer: Tensor, label: str, root: int = 0) -> Handle:
        """The root's `buffer` [n], on every rank."""
        return self._start("broadcast", buffer, label, root=root)

    def reduce(self, buffer: Tensor, label: str, root: int = 0) -> Handle:
        """Sum of every rank's `buffer` [n] on the root; the other ranks' buffers are overwritten."""
        return self._start("reduce", buffer, label, root=root)

    def send(self, buffer: Tensor, peer: int, label: str) -> Handle:
        """Values of `buffer` [n], contiguous, go to rank `peer` of the group, which must `recv` as many.

        The k-th message to a peer meets the k-th `recv` from this rank there. The buffer may change after the wait.
        """
        return self.exchange([Letter("send", buffer, peer, label)])[0]

    def recv(self, buffer: Tensor, peer: int, label: str) -> Handle:
        """Fill `buffer` [n], contiguous, with what rank `peer` of the group sends."""
        return self.exchange([Letter("recv", buffer, peer, label)])[0]

    def exchange(self, letters: Sequence["Letter"]) -> list[Handle]:
        """Start messages together, none of which waits for another one of them.

        Raises:
            ValueError: a peer that is this rank or not in the group.
        """
        for kind, buffer, peer, label in letters:
            if peer == self.rank or not 0 <= peer < self.world:
                raise ValueError(
                    f"{kind} ({label}) between rank {self.rank} and rank {peer} of {self.world} on axis {self.axis!r};"
                    " allowed: another rank of the group"
                )
            assert buffer.is_contiguous()
        calls = [Call(self._letter_entry(letter), letter.buffer, letter.label, root=letter.peer) for letter in letters]
        self.ledger.update(call.entry for call in calls)
        return self.post(calls)

    def shift(self, outgoing: Tensor, incoming: Tensor, label: str) -> list[Handle]:
        """`outgoing` [n] goes to the next rank of the group, the one before fills `incoming` [n]; all ranks at once.

        Both are contiguous, and are left alone until the waits.
        """
        following, before = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        return self.exchange([Letter("send", outgoing, following, label), Letter("recv", incoming, before, label)])

    def _letter_entry(self, letter: "Letter") -> Entry:
        buffer = letter.buffer
        dtype = DTYPE_NAMES.get(buffer.dtype, str(buffer.dtype))
        return Entry(letter.kind, self.axis, buffer.numel(), dtype, "p2p", False)

    def replicate(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's values to every rank, once, before training: the ledger, which is of training, does not list it."""
        for tensor in tensors:
            if self.world > 1:
                self.perform(Call(self._entry("broadcast", tensor, scalar=True), tensor, "initial values")).wait()

    def _start(
        self, kind: str, buffer: Tensor, label: str, *, largest: bool = False, root: int = 0, scalar: bool = False
    ) -> Handle:
        if self.world == 1:
            return DONE
        entry = self._entry(kind, buffer, largest=largest, scalar=scalar)
        self.ledger[entry] += 1
        return self.perform(Call(entry, buffer, label, largest, root))

    def _entry(self, kind: str, buffer: Tensor, *, largest: bool = False, scalar: bool = False) -> Entry:
        dtype = DTYPE_NAMES.get(buffer.dtype, str(buffer.dtype))
        algorithm = self.forced.get(kind) or self.algorithm(kind, buffer.numel() * buffer.element_size(), largest)
        return Entry(kind, self.axis, buffer.numel(), dtype, algorithm, scalar)

    def algorithm(self, kind: str, nbytes: int, largest: bool) -> str:
        """Name of the algorithm that `perform` is to use."""
        return "native"

    def along(self, mesh: Mesh, axis: str) -> "Communicator":
        """A communicator of this rank's group on an axis of a mesh over these ranks; all of them must ask for it."""
        return self.among(mesh.groups(axis), axis)

    def among(self, members: Sequence[tuple[int, ...]], axis: str) -> "Communicator":
        """A communicator of this rank's group, of those that `members` lists; all ranks must ask for it.

        A rank that is in none of them gets a group of one.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be cut in groups")

    def post(self, calls: Sequence[Call]) -> list[Handle]:
        """Start messages between two ranks each, together."""
        raise NotImplementedError(f"{type(self).__name__} has no messages between two ranks")

    @abstractmethod
    def perform(self, call: Call) -> Handle:
        """Start a collective."""

    def overflow(self) -> Tensor | None:
        """Whether a collective made inf or nan of what it sent since this was last asked: a flag on the device [],
        of this rank; None where nothing is sent in another format. Nothing waits for it here."""
        return None

    def give_up(self, cause: str) -> None:  # noqa: B027  (NCCL's watchdog ends what hangs)
        """This rank does not go on. Ranks that wait for it are told why at once, where there is a way to."""

    def close(self) -> None:  # noqa: B027  (most have nothing to give back)
        """Give back threads; nothing may be under way."""

    def release_buffers(self) -> None:  # noqa: B027
        """Drop scratch memory; it comes back when it is next needed."""


class SoloCommunicator(Communicator):
    """A group of one: nothing to do."""

    def __init__(self, axis: str = "data") -> None:
        super().__init__(axis, rank=0, world=1)

    def among(self, members: Sequence[tuple[int, ...]], axis: str) -> Communicator:
        return SoloCommunicator(axis)

    def perform(self, call: Call) -> Handle:
        return DONE


# [Note: one way]
# Messages of one NCCL communicator run in the order in which they were posted. A receive that is posted ahead of its
# use would hold up every send behind it, also one that its sender waits for, and a pipeline would stand still. The
# proof of a pipeline counts on a queue for each direction between two ranks, so along that axis each direction between
# neighbours (the ends of the row are neighbours, for interleaved chunks) has a process group of two, with a
# communicator and a stream of its own. Elsewhere what is exchanged is one batch that all ranks post together, as a
# shift.


class NativeCommunicator(Communicator):
    """The backend's own collectives, with the group's own time limit: NCCL on CUDA.

    Args:
        owner: the process groups were made for this communicator and end with it.
        one_way: by (sender, receiver), the group of two that their messages go through: see [Note: one way].
    """

    def __init__(
        self,
        axis: str,
        group: dist.ProcessGroup,
        timeout_s: float = 600.0,
        *,
        owner: bool = False,
        one_way: Mapping[tuple[int, int], dist.ProcessGroup] | None = None,
    ) -> None:
        super().__init__(axis, group.rank(), group.size())
        self.group, self.timeout_s, self.owner = group, timeout_s, owner
        self.one_way = dict(one_way or {})

    def among(self, members: Sequence[tuple[int, ...]], axis: str) -> Communicator:
        ranks = dist.get_process_group_ranks(self.group)
        group = new_process_group(members, ranks, self.timeout_s)
        one_way = one_way_groups(members, ranks, self.timeout_s) if axis == PIPELINE else {}
        if group is None:
            return SoloCommunicator(axis)
        return NativeCommunicator(axis, group, self.timeout_s, owner=True, one_way=one_way)

    def close(self) -> None:
        if self.owner:
            for group in (*self.one_way.values(), self.group):
                dist.destroy_process_group(group)
            self.owner = False

    def follow(self, wishes: Communication) -> None:
        if wishes != Communication():
            raise ValueError(
                f"communication = {wishes}: this backend does its own collectives over its own transport; leave it out"
            )

    def perform(self, call: Call) -> Handle:
        return NativeHandle(native_collective(self.group, call), call.entry)

    def post(self, calls: Sequence[Call]) -> list[Handle]:
        moves = {"send": dist.isend, "recv": dist.irecv}
        ranks = dist.get_process_group_ranks(self.group)
        if self.one_way:
            started = [moves[c.entry.kind](c.buffer, ranks[c.root], self._way(c)) for c in calls]
            return [NativeHandle(_started(work), call.entry) for work, call in zip(started, calls, strict=True)]
        # As a batch also where it is one message: NCCL keeps all batches of a group in the order of the calls.
        operations = [dist.P2POp(moves[c.entry.kind], c.buffer, ranks[c.root], self.group) for c in calls]
        works = dist.batch_isend_irecv(operations)  # a single one for all, where the backend joins them
        if len(works) < len(calls):
            works = works[-1:] * len(calls)
        return [NativeHandle(work, call.entry) for work, call in zip(works, calls, strict=True)]

    def _way(self, call: Call) -> dist.ProcessGroup:
        ends = (self.rank, call.root) if call.entry.kind == "send" else (call.root, self.rank)
        if ends not in self.one_way:
            raise ValueError(f"{call.entry} from rank {ends[0]} to {ends[1]}; allowed: between neighbours of the axis")
        return self.one_way[ends]


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None  # torch gives None to ranks outside of the group
    return work


class NativeHandle:
    def __init__(self, work: dist.Work, entry: Entry) -> None:
        self.work, self.entry = work, entry

    def wait(self) -> None:
        try:
            # Without a time: NCCL would block the host to measure it. The group has its own limit, and a watchdog.
            self.work.wait()
        except RuntimeError as error:
            raise CommunicationError(f"{self.entry} failed: {error}") from None


def new_process_group(
    members: Sequence[tuple[int, ...]], ranks: Sequence[int], timeout_s: float
) -> dist.ProcessGroup | None:
    """This rank's group of those listed, None if it is in none; every rank of the whole world must call it.

    Args:
        members: the ranks of each group, as the caller numbers them.
        ranks: what the whole world calls those.
        timeout_s: how long a rank waits for the others in one collective.
    """
    mine = None
    for numbers in members:  # torch wants each rank to take part in the making of every group
        group = dist.new_group([ranks[member] for member in numbers], timeout=timedelta(seconds=timeout_s))
        if isinstance(group, dist.ProcessGroup):
            mine = group
    return mine


def one_way_groups(
    members: Sequence[tuple[int, ...]], ranks: Sequence[int], timeout_s: float
) -> dict[tuple[int, int], dist.ProcessGroup]:
    """By (sender, receiver), places in this rank's group, a process group of their own for each two neighbours in it.

    Arguments as of `new_process_group`; every rank of the whole world must call it.
    """
    mine = {}
    for numbers in members:
        size = len(numbers)
        onward = [(place, (place + 1) % size) for place in range(size)] if size > 1 else []
        for ends in dict.fromkeys([*onward, *((b, a) for a, b in onward)]):
            pair = tuple(numbers[place] for place in ends)
            group = new_process_group([pair], ranks, timeout_s)
            if group is not None:
                mine[ends] = group
    return mine


def native_collective(group: dist.ProcessGroup, call: Call) -> dist.Work:
    """Start the backend's own version of a collective, in place on its buffer.

    The only calls of c10d collectives: torch 2.13 renames `all_gather_into_tensor` and `reduce_scatter_tensor`.
    """
    kind, buffer = call.entry.kind, call.buffer
    if kind == "broadcast":
        from_root = dist.BroadcastOptions()
        from_root.rootRank = call.root
        return group.broadcast([buffer], from_root)
    if kind == "reduce":
        to_root = dist.ReduceOptions()
        to_root.rootRank = call.root
        return group.reduce([buffer], to_root)
    if kind == "all_reduce":
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX if call.largest else dist.ReduceOp.SUM)
        return group.allreduce([buffer], options)
    if kind == "all_to_all":
        return group.alltoall_base(buffer, buffer.clone(), [], [], dist.AllToAllOptions())
    mine = buffer.view(group.size(), -1)[group.rank()]
    if kind == "reduce_scatter":
        return group._reduce_scatter_base(mine, buffer, dist.ReduceScatterOptions())
    return group._allgather_base(buffer, mine)
