"""Cut models equal one process: gradient norm, clipping, checkpoints between any two layouts, export, DeviceMesh."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cut_models import Layout, engine_of, start, step, train_alone, whole_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from windtunnel.engine.checkpoint_files import CheckpointError, Manifest
from windtunnel.engine.checkpoint_share import Assets, share
from windtunnel.engine.export import consolidate, export
from windtunnel.engine.roles import Role, give_role
from windtunnel.engine.world import World

TOLERANCE = 1e-12
"""Per tensor, in float64: sums of a few terms are taken in another order, some ten times."""


def train(rank: int, world: int, layout: Layout, steps: int) -> tuple[dict[str, Tensor], list[float]]:
    engine = start(rank, layout)
    norms = [step(engine, layout, rank) for _ in range(steps)]
    whole = engine.full_parameters()
    engine.close()
    return whole, norms


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||a - b|| / ||b|| of a tensor; names must be the same."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (1, 2), (2, 2), (3, 1)])
def test_norm_and_clipping_equal_one_process(four_ranks: World, stage: int, accumulation: int) -> None:
    expected, norms = train_alone(3, clip=2.0)
    layout = Layout(data=2, tensor=2, stage=stage, accumulation=accumulation, clip=2.0)
    for found, seen in four_ranks.run(train, layout, 3):
        assert seen == pytest.approx(norms, rel=TOLERANCE)
        assert far(found, expected) < TOLERANCE
    assert max(norms) > 2.0  # else nothing was clipped


@pytest.mark.parametrize("stage", [0, 2])
def test_lamb_takes_norms_of_whole_parameters(four_ranks: World, stage: int) -> None:
    expected, _ = train_alone(3, kind="Lamb")
    for found, _ in four_ranks.run(train, Layout(data=2, tensor=2, stage=stage, optimizer="Lamb"), 3):
        assert far(found, expected) < TOLERANCE


# Checkpoints #


def go_on(rank: int, world: int, layout: Layout, folder: str, until: int) -> tuple[dict[str, Tensor], float]:
    """From the latest checkpoint to a number of steps, and save. (parameters, a random number after that)"""
    engine = start(rank, layout)
    torch.manual_seed(rank)
    engine.load_checkpoint(folder)
    while engine.global_steps < until:
        step(engine, layout, rank)
        torch.rand(1)
    engine.save_checkpoint(folder)
    drawn = torch.rand(1).item()
    whole = engine.full_parameters()
    engine.close()
    return whole, drawn


def fresh(rank: int) -> float:
    """The second random number of a rank that begins."""
    torch.manual_seed(rank)
    return torch.rand(2)[1].item()


def test_tensor_parallel_checkpoints_load_at_any_layout(four_ranks: World, tmp_path: Path) -> None:
    """2 x 2, 4 x 1, one process, 1 x 4, 2 x 2: every one goes on where the last one stopped, moments included."""
    expected, _ = train_alone(5, clip=2.0)
    for number, (data, tensor, stage) in enumerate([(2, 2, 3), (4, 1, 1), (1, 1, 0), (1, 4, 2), (2, 2, 1)], 1):
        layout = Layout(data=data, tensor=tensor, stage=stage, clip=2.0)
        arguments = (layout, str(tmp_path), number)
        results = [go_on(0, 1, *arguments)] if layout.world == 1 else four_ranks.run(go_on, *arguments)
        # At another mesh a rank's random state means nothing: it keeps the one that it has.
        assert [drawn for _, drawn in results] == [fresh(rank) for rank in range(layout.world)]
    assert far(results[0][0], expected) < TOLERANCE
    layouts = [Manifest.read(path) for path in sorted(tmp_path.glob("global_step*"))]
    assert [manifest.world for manifest in layouts] == [4, 4, 1, 4, 4]
    assert all(manifest.parameters == layouts[0].parameters for manifest in layouts)


def test_stages_and_parts_load_at_any_layout(world_of: Callable[[int], World], tmp_path: Path) -> None:
    """Data 2 x tensor 2 x pipeline 2, then 1 x 4 x 2, one process, and back; each saves and loads the whole model."""
    expected, _ = train_alone(4)
    eight = world_of(8)
    for number, (data, tensor, pipeline, stage) in enumerate(
        [(2, 2, 2, 2), (1, 4, 2, 1), (1, 1, 1, 0), (2, 2, 2, 3)], 1
    ):
        layout = Layout(data=data, tensor=tensor, pipeline=pipeline, stage=stage)
        arguments = (layout, str(tmp_path), number)
        everyones = [go_on(0, 1, *arguments)] if layout.world == 1 else eight.run(go_on, *arguments)
        assert all(far(found, everyones[0][0]) == 0.0 for found, _ in everyones)
    assert far(everyones[0][0], expected) < TOLERANCE


@pytest.mark.parametrize(
    "layout",
    [
        Layout(data=2, tensor=2, stage=2),
        Layout(tensor=2, pipeline=2, stage=1),
        Layout(data=2, pipeline=2, stage=3, order=("pipeline", "data", "context", "tensor")),
    ],
)
def test_the_same_layout_continues_with_the_same_bits(four_ranks: World, tmp_path: Path, layout: Layout) -> None:
    """Random states too, of each rank."""
    through = four_ranks.run(go_on, layout, str(tmp_path / "through"), 3)
    four_ranks.run(go_on, layout, str(tmp_path / "cut"), 1)
    resumed = four_ranks.run(go_on, layout, str(tmp_path / "cut"), 3)
    for (expected, drawn), (found, drawn_again) in zip(through, resumed, strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert drawn == drawn_again
    assert far(resumed[0][0], train_alone(3)[0]) < TOLERANCE


# Export #


def train_and_export(rank: int, world: int, layout: Layout, folder: str) -> dict[str, Tensor]:
    engine = start(rank, layout)
    step(engine, layout, rank)
    engine.save_checkpoint(Path(folder, "checkpoint"))
    export(engine, Path(folder, "live"))
    state = engine.full_state_dict()
    engine.close()
    return state


@pytest.mark.parametrize("layout", [Layout(tensor=2, pipeline=2, stage=2), Layout(data=2, pipeline=2, stage=3)])
def test_exports_have_the_whole_model(four_ranks: World, tmp_path: Path, layout: Layout) -> None:
    """Live, offline, and as a state dict, under all names of all stages; so plain torch loads them."""
    states = four_ranks.run(train_and_export, layout, str(tmp_path))
    expected, _ = train_alone(1)
    expected |= {"second.table": expected["table"], "seen": torch.ones((), dtype=torch.float64)}
    consolidate(tmp_path / "checkpoint", tmp_path / "offline", dtype=None)
    weights = [load_file(tmp_path / where / "model.safetensors") for where in ("live", "offline")]
    for found in [*weights, *states]:
        assert far(found, expected) < TOLERANCE
        whole_model().load_state_dict(found)


# Who saves what #


def test_what_stages_share_is_saved_once() -> None:
    """Parameters by the first stage that has them; buffers by the first rank; groups and extra state of all."""

    def having(stage: int, mark: int, *names: str) -> Assets:
        return Assets(stage, {name: (2,) for name in names}, [{"names": [*names], "values": stage}], {"b": mark}, {})

    everyones = [having(0, 5, "tied", "low"), having(1, 6, "tied", "high"), having(0, 5, "tied", "low")]
    tasks = [share(everyones, rank) for rank in range(3)]
    assert [sorted(task.elsewhere) for task in tasks] == [[], ["tied"], []]
    assert [task.buffers for task in tasks] == [("b",), (), ()]
    assert [task.own_buffers for task in tasks] == [(), ("b",), ()]
    assert tasks[1].groups == [{"names": ["tied", "low"], "values": 0}, {"names": ["high"], "values": 1}]
    everyones[2] = replace(everyones[2], shapes={"tied": (3,)})
    with pytest.raises(ValueError, match=r"parameter tied has shape \(2,\) on another rank and \(3,\) on rank 2"):
        share(everyones, 0)


def save_without_saying_how(rank: int, world: int, folder: str) -> str:
    model = nn.Linear(3, 2)
    give_role(model.weight, Role(cut=("tensor",)))
    engine = engine_of(model, Layout(tensor=2))
    with pytest.raises(CheckpointError) as failure:
        engine.save_checkpoint(folder)
    engine.close()
    return str(failure.value)


def test_a_cut_that_nobody_described_is_refused(two_ranks: World, tmp_path: Path) -> None:
    for message in two_ranks.run(save_without_saying_how, str(tmp_path)):
        assert "rank 1: ValueError: parameter weight is cut along tensor, and its role does not say which" in message
    assert list(tmp_path.iterdir()) == []


def test_another_format_is_refused(tmp_path: Path) -> None:
    """Flat parameters, as they were before models were cut."""
    engine = start(0, Layout())
    folder = engine.save_checkpoint(tmp_path, "old")
    fields = json.loads((folder / "manifest.json").read_text())["manifest"]
    del fields["format"]
    digest = hashlib.sha256(json.dumps(fields, indent=1).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, "manifest": fields}))
    with pytest.raises(CheckpointError, match="it has format 1, and this version reads 2"):
        engine.load_checkpoint(tmp_path)
    engine.close()


# DeviceMesh #


def use_device_mesh(rank: int, world: int, layout: Layout) -> None:
    engine = start(rank, layout)
    mesh, place = engine.device_mesh(), layout.place(rank)
    assert mesh is engine.device_mesh()
    names = tuple(reversed(layout.order))
    assert mesh.mesh_dim_names == names
    assert dict(zip(names, mesh.shape, strict=True)) == {"tensor": 2, "context": 1, "data": 2, "pipeline": 1}
    assert dict(zip(names, mesh.get_coordinate(), strict=True)) == place
    for name in names:
        here = torch.tensor(float(10**rank))
        torch.distributed.all_reduce(here, group=mesh.get_group(name))
        ours = torch.full((1,), float(10**rank))
        engine.groups.axis(name).all_reduce(ours, "test").wait()
        assert here == ours
    whole = torch.arange(12.0).view(6, 2)
    rows = distribute_tensor(whole, mesh["tensor"], [Shard(0)])
    assert torch.equal(rows.to_local(), whole.chunk(2)[place["tensor"]])
    engine.close()


@pytest.mark.parametrize(
    "order", [("tensor", "context", "data", "pipeline"), ("data", "pipeline", "tensor", "context")]
)
def test_torch_sees_our_mesh(four_ranks: World, order: tuple[str, ...]) -> None:
    four_ranks.run(use_device_mesh, Layout(data=2, tensor=2, order=order))


def test_a_lone_process_has_a_mesh_too() -> None:
    engine = start(0, Layout())
    mesh = engine.device_mesh()
    try:
        assert mesh["tensor"].size() == mesh.size() == 1
        assert distribute_tensor(torch.ones(3), mesh["data"], [Shard(0)]).full_tensor().sum() == 3
    finally:
        torch.distributed.destroy_process_group()
        engine.close()
