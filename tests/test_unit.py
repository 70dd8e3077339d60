"""A flat unit on one rank of an imagined group: shards, padding, identity of parameters, freed and restored memory."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from windtunnel.collectives.zero import Zero, padded
from windtunnel.engine.communicator import DONE, Call, Communicator, Handle, SoloCommunicator
from windtunnel.engine.groups import Groups
from windtunnel.engine.observer import SILENT
from windtunnel.engine.partition import partition
from windtunnel.engine.unit import FlatUnit, Residency


class Imagined(Communicator):
    """Rank `rank` of `world` ranks without the others: what they would send is taken from `theirs` (whole buffers)."""

    def __init__(self, rank: int, world: int, theirs: Tensor | None = None) -> None:
        super().__init__("data", rank, world)
        self.theirs = theirs
        self.labels: list[str] = []

    def perform(self, call: Call) -> Handle:
        self.labels.append(call.label)
        if call.entry.kind == "all_gather" and self.theirs is not None:
            chunks, sent = call.buffer.view(self.world, -1), self.theirs.view(self.world, -1)
            for rank in range(self.world):
                if rank != self.rank:
                    chunks[rank] = sent[rank]
        return DONE


class Shapes(nn.Module):
    """Parameters of given shapes, each value its position in the whole."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        offset = 0
        for number, shape in enumerate(shapes):
            count = math.prod(shape)
            values = torch.arange(offset, offset + count, dtype=dtype).view(shape)
            self.register_parameter(f"p{number}", nn.Parameter(values))
            offset += count


def make_unit(model: nn.Module, stage: int, communicator: Communicator, dtype: torch.dtype | None = None) -> FlatUnit:
    _, parts = partition(model, [{"params": list(model.parameters())}])
    unit = FlatUnit(parts[0], Zero.of_stage(stage), Groups.only(communicator), dtype or parts[0].dtype, SILENT)
    unit.take_shard()
    return unit


shapes = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=6)
worlds = st.integers(1, 9)
stages = st.integers(0, 3)


@given(shapes=shapes, world=worlds, stage=st.integers(1, 3))
def test_pieces_of_all_ranks_tile_every_parameter(shapes: list[tuple[int, ...]], world: int, stage: int) -> None:
    whole = Shapes(shapes)
    elements = sum(parameter.numel() for parameter in whole.parameters())
    owned: list[list[float]] = [[] for _ in shapes]
    for rank in range(world):
        model = copy.deepcopy(whole)
        number = {parameter: n for n, parameter in enumerate(model.parameters())}
        unit = make_unit(model, stage, Imagined(rank, world))
        assert unit.elements == padded(elements, world)
        assert unit.shard.numel() == unit.elements // world
        for piece in unit.pieces():
            # Not `piece.start` in the assertion: pytest would print the piece, and torch reads freed memory to print.
            start, stop = piece.start, piece.stop
            assert 0 <= start < stop <= unit.shard.numel()
            owned[number[piece.parameter]] += unit.shard[start:stop].tolist()
    # Values are positions, ranks are visited in order: tiled exactly once is the same as equal to the original.
    assert owned == [parameter.flatten().tolist() for parameter in whole.parameters()]


@given(shapes=shapes, world=worlds)
def test_at_stage_0_each_rank_owns_everything(shapes: list[tuple[int, ...]], world: int) -> None:
    unit = make_unit(Shapes(shapes), 0, Imagined(world - 1, world))
    assert unit.bounds == (0, unit.elements)
    assert [(p.parameter, p.stop - p.start) for p in unit.pieces()] == [(p, p.numel()) for p in unit.parameters]


@given(shapes=shapes, world=worlds, stage=stages, data=st.data())
def test_padding_is_zero_and_parameters_keep_identity_and_values(
    shapes: list[tuple[int, ...]], world: int, stage: int, data: st.DataObject
) -> None:
    model = Shapes(shapes)
    objects, values = list(model.parameters()), [parameter.detach().clone() for parameter in model.parameters()]
    used = sum(value.numel() for value in values)
    whole = torch.cat([*(value.flatten() for value in values), torch.zeros(padded(used, world) - used)])
    unit = make_unit(model, stage, Imagined(data.draw(st.integers(0, world - 1)), world, theirs=whole))
    unit.gather()
    unit.arrive()
    assert unit.residency is Residency.GATHERED
    assert torch.equal(unit.full, whole)
    assert all(one is other for one, other in zip(model.parameters(), objects, strict=True))
    storage = unit.full.untyped_storage()._cdata
    for parameter, value in zip(objects, values, strict=True):
        assert parameter.untyped_storage()._cdata == storage
        assert parameter.shape == value.shape
        assert torch.equal(parameter, value)


@given(shapes=shapes, world=worlds, data=st.data())
def test_freed_memory_comes_back_under_the_same_views(
    shapes: list[tuple[int, ...]], world: int, data: st.DataObject
) -> None:
    model = Shapes(shapes)
    whole = make_unit(copy.deepcopy(model), 0, Imagined(0, world)).full.clone()
    unit = make_unit(model, 3, Imagined(data.draw(st.integers(0, world - 1)), world, theirs=whole))
    views: list[torch.Tensor] = []  # what autograd would have saved of the first gather
    for _ in range(2):
        assert unit.residency is Residency.SHARDED
        assert all(bool(parameter.isnan().all()) for parameter in model.parameters())
        assert unit.full.untyped_storage().nbytes() == 0
        assert unit.shard.untyped_storage().nbytes() == unit.elements // world * 4
        unit.gather()
        unit.gather()  # asked for twice, sent once
        unit.arrive()
        views = views or [parameter.detach() for parameter in model.parameters()]
        for view, parameter in zip(views, model.parameters(), strict=True):
            assert view.data_ptr() == parameter.data_ptr()
            assert torch.equal(view.flatten(), whole[int(view.flatten()[0]) :][: view.numel()])
        unit.free()
    assert unit.groups.shard.ledger.total() == (2 if world > 1 else 0)


@given(shapes=shapes, world=worlds, stage=stages)
def test_publish_only_where_whole_parameters_lack_a_step(shapes: list[tuple[int, ...]], world: int, stage: int) -> None:
    unit = make_unit(Shapes(shapes), stage, Imagined(0, world))
    unit.publish()
    unit.arrive()
    kinds = [entry.kind for entry in unit.groups.shard.ledger]
    assert kinds == (["all_gather"] if stage in (1, 2) and world > 1 else [])


@given(shapes=shapes, world=worlds, stage=stages, missed=st.sets(st.integers(0, 5)))
def test_gradients_accumulate_scaled_and_missing_ones_are_zero(
    shapes: list[tuple[int, ...]], world: int, stage: int, missed: set[int]
) -> None:
    """Two backwards; with sharded gradients each one is reduced, elsewhere they add up in the buffer."""
    model = Shapes(shapes)
    unit = make_unit(model, stage, Imagined(0, world))
    unit.gather()
    scale = 0.5
    for _ in range(2):
        for number, parameter in enumerate(model.parameters()):
            if number not in missed:
                parameter.grad = parameter.detach() + 1.0
                unit.accept(parameter, scale)
                assert parameter.grad is None
        if stage >= 2:
            unit.reduce().wait()
            unit.absorb()
            assert unit.gradient.untyped_storage().nbytes() == 0
    if stage < 2:
        unit.reduce().wait()
    wanted = [
        torch.zeros(p.numel()) if number in missed else 2 * scale * (p.detach().flatten() + 1.0)
        for number, p in enumerate(model.parameters())
    ]
    start, stop = unit.bounds
    flat = torch.cat([*wanted, torch.zeros(unit.elements)])[start:stop]
    assert torch.equal(unit.gradient_shard, flat)
    kind = "all_reduce" if stage == 0 else "reduce_scatter"
    assert [entry.kind for entry in unit.groups.shard.ledger if entry.kind != "all_gather"] == [kind] * (world > 1)


@pytest.mark.parametrize(
    ("dtype", "master"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("stage", range(4))
def test_masters_are_wide(dtype: torch.dtype, master: torch.dtype, stage: int) -> None:
    unit = make_unit(Shapes([(3, 3)]), stage, SoloCommunicator(), dtype)
    assert unit.master.dtype == master
    assert (unit.master is unit.shard) == (dtype == master)
    assert unit.size.element_bytes == dtype.itemsize
    assert torch.equal(unit.master, torch.arange(9, dtype=master))


def test_a_frozen_unit_has_neither_gradient_nor_master() -> None:
    model = Shapes([(3,)]).requires_grad_(False)
    _, parts = partition(model, [])
    unit = FlatUnit(parts[0], Zero.of_stage(3), Groups.only(Imagined(0, 2)), torch.float32, SILENT)
    unit.take_shard()
    assert not unit.size.trainable
    assert not hasattr(unit, "gradient")
    assert not hasattr(unit, "master")
    assert unit.shard.tolist() == [0.0, 1.0]
