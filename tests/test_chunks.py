"""Parts of parameters in coordinates of the whole: any cut is written, and read back by any other."""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from windtunnel.engine.checkpoint_plan import Region, RegionSavePlanner, Source, Stock
from windtunnel.engine.chunks import boxes, chunks, reassemble, whole_of
from windtunnel.engine.roles import Role, Whole, give_role

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@dataclass(frozen=True)
class Part:
    """What one rank along the axis has: a part of the whole with padding, and where ZeRO cuts it."""

    whole: Whole
    padding: int
    points: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        size = sum(stop - start for start, stop in self.whole.ranges) + self.padding
        return (*self.whole.shape[: self.whole.dim], size, *self.whole.shape[self.whole.dim + 1 :])

    def of(self, truth: Tensor) -> Tensor:
        """The part, written out by torch alone; padding is -1."""
        ranges = [truth.narrow(self.whole.dim, start, stop - start) for start, stop in self.whole.ranges]
        padding = [*self.shape]
        padding[self.whole.dim] = self.padding
        return torch.cat([*ranges, truth.new_full(padding, -1.0)], self.whole.dim)

    def pieces(self) -> list[tuple[int, int]]:
        return list(pairwise(sorted({0, prod(self.shape), *(point % (prod(self.shape) + 1) for point in self.points)})))


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Part]:
    """A dimension dealt out in pieces to some ranks, in any order, as fused and padded parameters are."""
    dim = draw(st.integers(0, len(shape) - 1))
    points = draw(st.lists(st.integers(0, shape[dim]), max_size=4))
    ranges = draw(st.permutations(list(pairwise(sorted({0, shape[dim], *points})))))
    ranks = draw(st.integers(1, 3))
    return [
        Part(Whole(shape, dim, tuple(ranges[rank::ranks])), draw(st.integers(0, 2)), tuple(draw(POINTS)))
        for rank in range(ranks)
    ]


POINTS = st.lists(st.integers(0, 2000), max_size=3)


@st.composite
def two_cuts(draw: st.DrawFn) -> tuple[list[Part], list[Part]]:
    shape = draw(SHAPES)
    return draw(cuts(shape)), draw(cuts(shape))


@given(SHAPES, st.integers(0, 2000), st.integers(0, 2000))
def test_a_range_is_few_boxes_in_order(shape: tuple[int, ...], one: int, other: int) -> None:
    start, stop = sorted((one % (prod(shape) + 1), other % (prod(shape) + 1)))
    numbers = torch.arange(prod(shape)).view(shape)
    found = list(boxes(shape, start, stop))
    values = [numbers[tuple(slice(a, b) for a, b in box)].flatten() for box in found]
    assert torch.cat([numbers.new_empty(0), *values]).tolist() == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


@given(SHAPES.flatmap(cuts))
def test_chunks_of_all_ranks_tile_the_whole(parts: list[Part]) -> None:
    shape = parts[0].whole.shape
    truth = torch.arange(float(prod(shape))).view(shape)
    written = torch.zeros(shape)
    for part in parts:
        flat = part.of(truth).flatten()
        for start, stop in part.pieces():
            found = chunks(part.whole, part.shape, start, stop)
            assert len(found) <= (2 * len(shape) - 1) * len(part.whole.ranges)
            for chunk in found:
                box = tuple(slice(a, a + n) for a, n in zip(chunk.offset, chunk.shape, strict=True))
                assert torch.equal(chunk.of(flat[start:stop]), truth[box])
                written[box] += 1
    assert written.eq(1).all()
    assert torch.equal(reassemble([part.of(truth) for part in parts], [part.whole for part in parts]), truth)


def save(folder: Path, parts: list[Part], truth: Tensor, copies: int) -> None:
    """What all ranks do, without the ranks; each piece is some ranks' (`copies`)."""
    planners, writers, plans = [], [], []
    pieces = [(part, *piece) for part in parts for piece in part.pieces()] * copies
    for rank, (part, start, stop) in enumerate(pieces):
        flat = part.of(truth).flatten()[start:stop]
        sources = {
            Region("x", chunk.offset, chunk.shape, part.whole.shape): Source(truth.dtype, chunk.of(flat).detach)
            for chunk in chunks(part.whole, part.shape, start, stop)
        }
        planner, writer = RegionSavePlanner(sources, {f"rank {rank}": bytes([rank])}), FileSystemWriter(folder)
        planner.set_up_planner({}, is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0, rank=rank)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
        planners.append(planner)
        writers.append(writer)
    everyones, metadata = planners[0].create_global_plan(plans)
    everyones = writers[0].prepare_global_plan(everyones)
    results = []
    for planner, writer, plan in zip(planners, writers, everyones, strict=True):
        results.append(writer.write_data(planner.finish_plan(plan), planner).value())
    writers[0].finish(metadata, results)


@settings(max_examples=25)
@given(two_cuts(), st.integers(1, 2))
def test_any_cut_reads_any_other(
    tmp_path_factory: pytest.TempPathFactory, both: tuple[list[Part], list[Part]], copies: int
) -> None:
    saved, read = both
    shape = saved[0].whole.shape
    truth = torch.arange(float(prod(shape))).view(shape)
    folder = tmp_path_factory.mktemp("cut") / "it"
    save(folder, saved, truth, copies)
    stock = Stock(folder)
    for part in read:
        for start, stop in part.pieces():
            found = torch.full((stop - start,), -1.0)
            regions = {
                Region("x", chunk.offset, chunk.shape, shape): chunk.of(found)
                for chunk in chunks(part.whole, part.shape, start, stop)
            }
            objects = stock.read(regions, ["rank 0"])
            assert torch.equal(found, part.of(truth).flatten()[start:stop])
            assert objects == {"rank 0": b"\0"}
    assert torch.equal(stock.whole("x"), truth)
    longer = (*shape[:-1], shape[-1] + 1)
    with pytest.raises(ValueError, match=r"x: the run has shape .*, the checkpoint shape"):
        stock.read({Region.all_of("x", longer): torch.empty(longer)})


def test_real_sizes_are_few_chunks() -> None:
    """A fused qkv of GPT-3's width, cut by columns over 8 ranks and by ZeRO over 64: not a chunk for each row."""
    hidden, ranks = 12288, 8
    own = hidden // ranks
    whole = Whole((hidden, 3 * hidden), 1, tuple((hidden * part, hidden * part + own) for part in range(3)))
    elements = hidden * 3 * own // 64
    assert len(chunks(whole, (hidden, 3 * own), 17 * elements + 5, 18 * elements + 5)) <= 9


def test_what_is_not_a_whole_is_refused() -> None:
    part = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="do not make a whole of shape"):
        reassemble([part], [Whole((4, 3), 0, ((0, 2),))])
    with pytest.raises(ValueError, match="do not make a whole of shape"):
        reassemble([part, part], [Whole((4, 3), 0, ((0, 2),)), Whole((2, 6), 1, ((3, 6),))])
    parameter = nn.Parameter(part)
    give_role(parameter, Role(cut=("tensor",)))
    with pytest.raises(ValueError, match="parameter up is cut along tensor, and its role does not say which part"):
        whole_of("up", parameter)
