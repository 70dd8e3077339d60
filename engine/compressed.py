"""A communicator that sends gradients, parameters or both in fewer bytes, and looks like any other to the engine.

[Note: what overlaps]
A compressed collective is a few ordinary ones with arithmetic between. It is coded and its first message is under way
when the call returns; the rest happens in `wait`. A gather and a flat reduce-scatter have one message, so all of their
traffic overlaps with what is computed meanwhile; an all-reduce sends its second half, and a scheme with an agreed
scale, low-rank factors or a node grid its later messages, while the caller waits. Ranks must therefore wait for
collectives in the same order, as they must start them.

[Note: what is not finite]
inf or nan on any rank, and what overflows a format, comes out as inf or nan on every rank that gets the block (or
value) that it was in; it never becomes a finite number. `take_overflow` tells whether that happened. What error
feedback would carry on of such a block is dropped, so that the next step is clean.
"""

import random
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.cast import largest_magnitude, scale_for_sum, scaled_cast, unscaled
from ..kernels.low_rank import as_matrix, orthonormal, start_factor
from .codec import decode, encode
from .communication_section import Compression
from .communicator import Call, Communicator, Handle
from .compression import ERROR_FEEDBACK, BlockQuantized, Cast, Coded, LowRank, Scheme, TopK
from .device import DTYPES

Phases = Generator[Handle, None, Tensor]
"""Starts collectives one by one, is resumed when each has ended, and returns what it was for."""

Slot = tuple[str, str]
"""The label of a buffer, and which of the losses on its way is meant."""


@dataclass(frozen=True, slots=True)
class NodeGrid:
    """The same ranks as nodes x ranks of a node: rank = node * inside.world + rank inside.

    Attributes:
        inside: this rank's group of the ranks on its node.
        across: its group of the ranks with the same place on every node.
    """

    inside: Communicator
    across: Communicator


class CompressedCommunicator(Communicator):
    """Compresses the reductions and gathers of large buffers; all else goes through as it is.

    Scalars, maxima, buffers that are not floating-point and those below `min_elements` are left alone. After an
    all-reduce or a gather all ranks have the same bits: a gather replaces a rank's own part by what the others get too.

    Attributes:
        inner: does the sending; the ledger is its own, and so shows what is really sent.
        gradients: scheme of all_reduce and reduce_scatter; None leaves them alone.
        parameters: scheme of all_gather, without error feedback.
        grid: exchanges of coded gradients go inside nodes first and then, summed and coded again, between them (qgZ,
            Wang et al. 2023, section 3.3); gathers between nodes first. What crosses nodes is then 1 / inside.world.
        seed: of stochastic rounding, which also depends on the rank and on the number of the call.
    """

    def __init__(
        self,
        inner: Communicator,
        *,
        gradients: Scheme | None = None,
        parameters: Cast | BlockQuantized | None = None,
        min_elements: int = 1024,
        grid: NodeGrid | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(inner.axis, inner.rank, inner.world)
        if isinstance(parameters, ERROR_FEEDBACK):
            raise ValueError(f"parameters = {parameters}; allowed: a cast or blocks, which need no error feedback")
        if grid is not None and grid.across.rank * grid.inside.world + grid.inside.rank != inner.rank:
            raise ValueError(
                f"grid: node {grid.across.rank} of {grid.inside.world} ranks, number {grid.inside.rank} in it, is not"
                f" rank {inner.rank}; allowed: ranks numbered node by node"
            )
        self.inner, self.gradients, self.parameters, self.grid = inner, gradients, parameters, grid
        self.min_elements, self.seed = min_elements, seed
        self.ledger, self.observer = inner.ledger, inner.observer
        self._kept: dict[Slot, Tensor] = {}
        self._overflow: Tensor | None = None
        self._draws = 0
        self._bypassed = False

    # The interface of a communicator #

    def all_reduce(self, buffer: Tensor, label: str, *, largest: bool = False, scalar: bool = False) -> Handle:
        if largest or scalar or not self._compresses(self.gradients, buffer):
            return self.inner.all_reduce(buffer, label, largest=largest, scalar=scalar)
        return _Chain(self._all_reduce(buffer, label))

    def reduce_scatter(self, buffer: Tensor, label: str) -> Handle:
        if not self._compresses(self.gradients, buffer):
            return self.inner.reduce_scatter(buffer, label)
        return _Chain(self._reduce_scatter(buffer, label))

    def all_gather(self, buffer: Tensor, label: str) -> Handle:
        if not self._compresses(self.parameters, buffer):
            return self.inner.all_gather(buffer, label)
        return _Chain(self._all_gather(buffer, label))

    def replicate(self, tensors: Iterable[Tensor]) -> None:
        self.inner.replicate(tensors)

    def algorithm(self, kind: str, nbytes: int, largest: bool) -> str:
        return self.inner.algorithm(kind, nbytes, largest)

    def perform(self, call: Call) -> Handle:
        return self.inner.perform(call)

    def close(self) -> None:
        for communicator in (self.inner, *((self.grid.inside, self.grid.across) if self.grid else ())):
            communicator.close()

    def release_buffers(self) -> None:
        self.inner.release_buffers()

    # What it adds #

    def take_overflow(self) -> bool:
        """Whether a compressed collective ended with inf or nan on this rank since this was last asked.

        The same on all ranks after all-reduces and gathers; of a reduce-scatter each rank knows its own part. Reads
        from the device.
        """
        overflow = self.overflow()
        return overflow is not None and bool(overflow)

    def overflow(self) -> Tensor | None:
        overflow, self._overflow = self._overflow, None
        return overflow

    def error(self, label: str) -> dict[str, Tensor]:
        """What error feedback has yet to send for a buffer, by where it was lost: "sent" (its addend here), "node" (the
        node's sum), "sum" (the part that this rank summed). Sums over the ranks complete the sum of results."""
        return {where: kept for (name, where), kept in self._kept.items() if name == label and where != "factor"}

    def state_dict(self) -> dict[str, Any]:
        """What the next collectives depend on: this rank's errors and factors, and the number of random draws."""
        return {"kept": self._kept, "draws": self._draws}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from there; only with the same units, stage and ranks."""
        self._kept = {slot: kept.to(device) for slot, kept in state["kept"].items()}
        self._draws = state["draws"]

    @contextmanager
    def uncompressed(self) -> Iterator[None]:
        """Inside, collectives are sent as they are: for values that are to be kept."""
        self._bypassed = True
        try:
            yield
        finally:
            self._bypassed = False

    def _compresses(self, scheme: Scheme | None, buffer: Tensor) -> bool:
        if scheme is None or self._bypassed or self.world == 1 or not buffer.is_floating_point():
            return False
        already = isinstance(scheme, Cast) and scheme.scale == 1.0 and DTYPES[scheme.dtype] == buffer.dtype
        return buffer.numel() >= self.min_elements and not already

    # The collectives in phases #

    def _all_reduce(self, buffer: Tensor, label: str) -> Phases:
        scheme, elements = self.gradients, buffer.numel()
        if isinstance(scheme, Cast):
            total = yield from self._cast("all_reduce", scheme, buffer, label)
        elif isinstance(scheme, LowRank):
            total = yield from self._low_rank(scheme, buffer, label)
        elif isinstance(scheme, TopK):
            total = yield from self._sum_of_sparse(scheme, buffer, label)
        else:
            assert scheme is not None
            rows = functional.pad(buffer.float(), (0, -elements % self.world)).view(self.world, -1)
            part = yield from self._sum_to_parts(scheme, rows, label)
            payload = self._encode(scheme, part[None], (label, "sum"))
            everywhere = yield from self._spread(payload, label)
            total = decode(scheme, everywhere, part.numel()).reshape(-1)[:elements]
        return self._deliver(total, buffer)

    def _reduce_scatter(self, buffer: Tensor, label: str) -> Phases:
        scheme, rows = self.gradients, buffer.view(self.world, -1)
        if isinstance(scheme, Cast):
            total = yield from self._cast("reduce_scatter", scheme, buffer, label)
            part = total.view(self.world, -1)[self.rank]
        elif isinstance(scheme, LowRank):  # the factors of the sum are needed everywhere: so is an all-reduce's traffic
            total = yield from self._low_rank(scheme, buffer, label)
            part = total.view(self.world, -1)[self.rank]
        else:
            assert scheme is not None
            part = yield from self._sum_to_parts(scheme, rows.float(), label)
        return self._deliver(part, rows[self.rank])

    def _all_gather(self, buffer: Tensor, label: str) -> Phases:
        scheme, rows = self.parameters, buffer.view(self.world, -1)
        if isinstance(scheme, Cast):
            total = yield from self._cast("all_gather", scheme, buffer, label)
        else:
            assert scheme is not None
            payload = self._encode(scheme, rows[self.rank][None].float(), (label, "gathered"))
            everywhere = yield from self._spread(payload, label)
            total = decode(scheme, everywhere, rows.shape[1]).reshape(-1)
        return self._deliver(total, buffer)

    def _cast(self, kind: str, scheme: Cast, buffer: Tensor, label: str) -> Phases:
        """The collective itself on a copy in another format."""
        gathers = kind == "all_gather"
        mine = buffer.view(self.world, -1)[self.rank] if gathers else buffer
        scale: Tensor | float = 1.0
        if scheme.scale == "dynamic":
            scale = largest_magnitude(mine)
            yield self.inner.all_reduce(scale, f"scale for {label}", largest=True, scalar=True)
            scale = scale_for_sum(scale, 1 if gathers else self.world)
        else:
            scale = scheme.scale
        sent = scaled_cast(mine, DTYPES[scheme.dtype], scale)
        if gathers:
            whole = torch.empty_like(buffer, dtype=sent.dtype)
            whole.view(self.world, -1)[self.rank].copy_(sent)
            sent = whole
        yield getattr(self.inner, kind)(sent, label)
        return unscaled(sent, scale)

    def _sum_to_parts(self, scheme: Coded, rows: Tensor, label: str) -> Phases:
        """The sum over ranks of row r of `rows` [world, m], on rank r."""
        if self.grid is None:
            return (yield from self._exchange(self.inner, scheme, rows, (label, "sent")))
        nodes, ranks = self.grid.across.world, self.grid.inside.world
        by_place = rows.view(nodes, ranks, -1).transpose(0, 1).reshape(ranks, -1)
        node_sum = yield from self._exchange(self.grid.inside, scheme, by_place, (label, "sent"))
        return (yield from self._exchange(self.grid.across, scheme, node_sum.view(nodes, -1), (label, "node")))

    def _exchange(self, group: Communicator, scheme: Coded, rows: Tensor, slot: Slot) -> Phases:
        """The same over the ranks of `group`: one row to each, and the sum of what they sent here."""
        payload = self._encode(scheme, rows, slot)
        yield group.all_to_all(payload.view(-1), slot[0])
        return decode(scheme, payload, rows.shape[1]).sum(0)

    def _spread(self, payload: Tensor, label: str) -> Phases:
        """Every rank's `payload` [1, bytes], as [world, bytes]."""
        for group in (self.grid.across, self.grid.inside) if self.grid else (self.inner,):
            gathered = payload.new_empty((group.world, payload.numel()))
            gathered[group.rank].copy_(payload.view(-1))
            yield group.all_gather(gathered.view(-1), label)
            payload = gathered
        if self.grid:  # [ranks, nodes * bytes], and ranks are numbered node by node
            payload = payload.view(self.grid.inside.world, self.grid.across.world, -1).transpose(0, 1)
        return payload.reshape(self.world, -1)

    def _sum_of_sparse(self, scheme: TopK, buffer: Tensor, label: str) -> Phases:
        """All ranks' kept values to all, who add them in the same order."""
        rows = buffer.float().view(1, -1)
        payload = self._encode(scheme, rows, (label, "sent"))
        everywhere = yield from self._spread(payload, label)
        total = torch.zeros_like(rows)
        for row in everywhere.split(1):
            total += decode(scheme, row, buffer.numel())
        return total.view(-1)

    def _low_rank(self, scheme: LowRank, buffer: Tensor, label: str) -> Phases:
        """Vogels et al. 2019, algorithms 1 and 2, for a sum instead of a mean."""
        _, columns, rank = scheme.shape(buffer.numel())
        matrix = as_matrix(buffer, columns)
        matrix = matrix + self._recall((label, "sent"), matrix)
        first = start_factor(columns, rank, buffer.device)
        left = matrix @ self._recall((label, "factor"), first, first)
        yield self.inner.all_reduce(left.view(-1), label)
        left = orthonormal(left)
        right = matrix.T @ left
        self._keep((label, "sent"), matrix - left @ right.T)
        right = right.contiguous()
        yield self.inner.all_reduce(right.view(-1), label)
        usable = torch.isfinite(right).all() & (right != 0).any()
        self._keep((label, "factor"), torch.where(usable, right, first))
        return (left @ right.T).view(-1)[: buffer.numel()]

    def _deliver(self, result: Tensor, buffer: Tensor) -> Tensor:
        overflow = torch.isfinite(result).all().logical_not()
        if self._overflow is None:
            with self.observer.category("counters"):
                self._overflow = torch.zeros_like(overflow)
        self._overflow.logical_or_(overflow)
        return buffer.copy_(result)

    # Coding and what it loses #

    def _encode(self, scheme: Coded, rows: Tensor, slot: Slot) -> Tensor:
        if isinstance(scheme, BlockQuantized):
            return encode(scheme, rows, self._noise(rows) if scheme.rounding == "stochastic" else None)
        rows = rows + self._recall(slot, rows)
        payload = encode(scheme, rows)
        self._keep(slot, rows - decode(scheme, payload, rows.shape[1]))
        return payload

    def _recall(self, slot: Slot, like: Tensor, first: Tensor | None = None) -> Tensor:
        """What is kept in a slot; `first` (zeros) to begin with."""
        if slot not in self._kept:
            with self.observer.category("buffers"):
                self._kept[slot] = torch.zeros_like(like) if first is None else first.clone()
        kept = self._kept[slot]
        if kept.shape != like.shape:
            raise ValueError(
                f"label = {slot[0]!r} was that of a buffer cut as {tuple(kept.shape)}, now as {tuple(like.shape)};"
                " allowed: one label for each buffer that needs error feedback"
            )
        return kept

    def _keep(self, slot: Slot, values: Tensor) -> None:
        torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0, out=self._kept[slot])

    def _noise(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1): the same whenever the run is repeated, different on every rank and in every call."""
        self._draws += 1
        if like.device.type == "sim":
            return torch.empty_like(like).uniform_()
        generator = torch.Generator(like.device)
        generator.manual_seed(random.Random(f"{self.seed} {self.rank} {self._draws}").getrandbits(63))
        return torch.empty_like(like).uniform_(generator=generator)


class _Chain:
    """The handle of a collective in phases: see [Note: what overlaps]."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._under_way: Handle | None = None
        self._advance()

    def wait(self) -> None:
        while self._under_way is not None:
            self._under_way.wait()
            self._advance()

    def _advance(self) -> None:
        with torch.no_grad():
            self._under_way = next(self._phases, None)


def compressed(
    communicator: Communicator, compression: Compression, seed: int = 0, grid: NodeGrid | None = None
) -> Communicator:
    """`communicator` with what a config says of compression; itself if that is nothing, or it has one rank."""
    if communicator.world == 1 or (compression.gradients is None and compression.parameters is None):
        return communicator
    return CompressedCommunicator(
        communicator,
        gradients=compression.gradients,
        parameters=compression.parameters,
        min_elements=compression.min_elements,
        grid=grid,
        seed=seed,
    )


def uncompressed(communicator: Communicator) -> AbstractContextManager[None]:
    """Inside, a communicator of any kind sends everything as it is."""
    return communicator.uncompressed() if isinstance(communicator, CompressedCommunicator) else nullcontext()
