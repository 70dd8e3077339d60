"""Checkpoints: what is saved at one layout continues at any other, and nothing ever leaves less than a whole one."""

import random
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import WorldOf
from small_models import Mlp, Run, regression_batch, start_engine, train_alone, train_step
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from windtunnel.engine import checkpoint_files, gloo
from windtunnel.engine.checkpoint_files import CheckpointError, complete_tags, latest_tag
from windtunnel.engine.engine import Engine, initialize
from windtunnel.engine.world import World, WorldError

STEPS = 3

TOLERANCE = 1e-10
"""As in test_zero.py: other ranks and stages add in another order, in float64."""


# What ranks do #


def train(rank: int, world: int, run: Run, folder: str, until: int, **overrides: Any) -> tuple[list[float], Any]:
    """Go on from the folder's latest checkpoint to a number of steps, and save. (losses, parameters)"""
    engine = start_engine(run, run.build(), **overrides)
    engine.load_checkpoint(folder)
    losses = [train_step(engine, run, step, rank, world) for step in range(engine.global_steps, until)]
    engine.save_checkpoint(folder)
    parameters = engine.full_parameters()
    engine.close()
    return losses, parameters


def train_overridden(rank: int, world: int, run: Run, folder: str, until: int, overrides: dict) -> Any:
    return train(rank, world, run, folder, until, **overrides)


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def check_continuation(world: World, run: Run, folders: tuple[Path, Path], **overrides: Any) -> None:
    """At one layout, a run that was interrupted and one that was not have the same bits."""
    through, cut = map(str, folders)
    whole = world.run(train_overridden, run, through, STEPS, overrides)
    world.run(train_overridden, run, cut, 1, overrides)
    for (losses, expected), (resumed, found) in zip(
        whole, world.run(train_overridden, run, cut, STEPS, overrides), strict=True
    ):
        assert resumed == losses[1:]
        assert equal(found, expected)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "through", tmp_path / "cut"


# The same layout #


@pytest.mark.parametrize("stage", range(4))
def test_the_same_layout_continues_with_the_same_bits(two_ranks: World, folders: tuple[Path, Path], stage: int) -> None:
    check_continuation(two_ranks, Run("gpt", stage=stage, schedule=True, clip=0.3, accumulation=3), folders)


@pytest.mark.parametrize("model", ["never used", "sometimes used", "frozen"])
def test_models_with_special_parameters(two_ranks: World, folders: tuple[Path, Path], model: str) -> None:
    check_continuation(two_ranks, Run(model, stage=3, optimizer="grouped"), folders)


@pytest.mark.parametrize("precision", [{"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "loss_scale": 8.0}}])
def test_masters_continue(two_ranks: World, folders: tuple[Path, Path], precision: dict[str, Any]) -> None:
    check_continuation(two_ranks, Run("gpt", stage=2, dtype=torch.float32), folders, **precision)


@pytest.mark.parametrize("scheme", ["top_k", "power_sgd"])
def test_errors_that_compression_carries_on_continue(two_ranks: World, folders: tuple[Path, Path], scheme: str) -> None:
    compression = {"gradients": scheme, "min_elements": 1}
    check_continuation(
        two_ranks,
        Run("gpt", stage=1, dtype=torch.float32),
        folders,
        communication_compression=compression,
    )


class Noisy(Mlp):
    """Random states of both kinds, and statistics that differ between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(7)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(self.norm(x)) * random.random(), y)


def train_noisily(rank: int, world: int, folder: str, until: int) -> tuple[list[float], list[Tensor]]:
    torch.manual_seed(rank)
    random.seed(rank)
    config = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_optimization": {"stage": 2}}
    engine, *_ = initialize(Noisy().double(), config, timeout_s=20.0)
    engine.load_checkpoint(folder)
    losses = []
    for step in range(engine.global_steps, until):
        x, y = regression_batch(step)
        loss = engine(x.chunk(world)[rank], y.chunk(world)[rank])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.save_checkpoint(folder)
    statistics = [buffer.clone() for buffer in engine.module.buffers()]
    engine.close()
    return losses, statistics


def test_random_states_and_statistics_of_each_rank_continue(two_ranks: World, folders: tuple[Path, Path]) -> None:
    whole = two_ranks.run(train_noisily, str(folders[0]), STEPS)
    two_ranks.run(train_noisily, str(folders[1]), 1)
    resumed = two_ranks.run(train_noisily, str(folders[1]), STEPS)
    for (losses, statistics), (more, found) in zip(whole, resumed, strict=True):
        assert more == losses[1:]
        assert all(map(torch.equal, found, statistics))
    assert not torch.equal(whole[0][1][0], whole[1][1][0])  # the ranks do differ


# Other layouts #

TIERS: dict[str, dict[str, Any]] = {
    "host": {"offload_optimizer": {"device": "cpu"}},
    "files": {"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme"}},
}


def in_tiers(tiers: str, stage: int, folder: Path) -> dict[str, Any]:
    """The section zero_optimization with state in those tiers, files in a folder."""
    sections = {name: dict(section) for name, section in TIERS.get(tiers, {}).items()}
    for section in sections.values():
        if section["device"] == "nvme":
            section["nvme_path"] = str(folder)
    return {"zero_optimization": {"stage": stage, **sections}}


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("model", ["gpt", "frozen"])
def test_what_rests_off_the_device_continues_with_the_same_bits(
    two_ranks: World, folders: tuple[Path, Path], tmp_path: Path, model: str, tiers: str
) -> None:
    (files := tmp_path / "nvme").mkdir()
    check_continuation(two_ranks, Run(model, stage=3, clip=0.3), folders, **in_tiers(tiers, 3, files))


def test_any_tier_loads_any_other(two_ranks: World, tmp_path: Path) -> None:
    (files := tmp_path / "nvme").mkdir()
    run = Run("tied", steps=4)
    for step, tiers in enumerate(("files", "device", "host", "files"), 1):
        overrides = in_tiers(tiers, 3, files)
        outcomes = two_ranks.run(train_overridden, run, str(tmp_path / "ck"), step, overrides)
    expected = train_alone(run)
    for _, parameters in outcomes:
        for name, wanted in expected.parameters.items():
            assert float((parameters[name] - wanted).norm()) <= TOLERANCE * max(1.0, float(wanted.norm())), name


CHAINS = [
    ("tied", "grouped", [(3, 2), (1, 4), (0, 3)]),
    ("one element", "AdamW", [(3, 4), (2, 3), (3, 2)]),
    ("sometimes used", "AdamW", [(0, 2), (3, 3), (2, 4)]),
    ("never used", "AdamW", [(1, 3), (3, 2), (1, 4)]),
    ("frozen", "AdamW", [(2, 2), (3, 4), (1, 2)]),
]


@pytest.mark.parametrize(("model", "optimizer", "layouts"), CHAINS)
def test_any_stage_and_world_loads_any_other(
    world_of: WorldOf, tmp_path: Path, model: str, optimizer: str, layouts: list[tuple[int, int]]
) -> None:
    """A step at each layout, against one process that takes them all."""
    run = Run(model, optimizer=optimizer, schedule=True, steps=len(layouts))
    losses = []
    for step, (stage, size) in enumerate(layouts, 1):
        outcomes = world_of(size).run(train, replace(run, stage=stage), str(tmp_path), step)
        losses.append(sum(found[0] for found, _ in outcomes) / size)
    expected = train_alone(run)
    assert losses == pytest.approx(expected.losses, rel=TOLERANCE)
    for _, parameters in outcomes:
        for name, wanted in expected.parameters.items():
            assert float((parameters[name] - wanted).norm()) <= TOLERANCE * max(1.0, float(wanted.norm())), name


def load_only(rank: int, world: int, run: Run, folder: str, overrides: dict) -> dict[str, Tensor]:
    engine = start_engine(run, run.build(), **overrides)
    engine.load_checkpoint(folder, load_optimizer_states=False)
    parameters = {held.name: engine.optimizer.values(held)["parameter"].clone() for held in engine.optimizer.held()}
    engine.close()
    return parameters


def test_a_bf16_run_gives_an_fp32_run_its_masters(two_ranks: World, tmp_path: Path) -> None:
    run = Run("mlp", stage=0, dtype=torch.float32)
    overrides = {"bf16": {"enabled": True}}
    two_ranks.run(train_bf16, run, str(tmp_path))
    (masters, _), (wide, _) = (two_ranks.run(load_only, run, str(tmp_path), each) for each in (overrides, {}))
    assert equal(masters, wide)
    assert all(value.dtype == torch.float32 for value in wide.values())
    assert not all(torch.equal(value, value.bfloat16().float()) for value in wide.values())


def train_bf16(rank: int, world: int, run: Run, folder: str) -> None:
    engine = start_engine(run, run.build(), bf16={"enabled": True})
    x, y = (tensor.bfloat16() for tensor in regression_batch(0))
    engine.backward(engine(x, y))
    engine.step()
    engine.save_checkpoint(folder)
    engine.close()


def lone_engine(optimizer: Any = None, units: list[nn.Module] | None = None, model: nn.Module | None = None) -> Engine:
    torch.manual_seed(0)
    engine, *_ = initialize(
        model or Mlp().double(),
        optimizer=optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)),
        units=units,
    )
    return engine


def step_alone(engine: Engine, step: int = 0) -> float:
    loss = engine(*regression_batch(step))
    engine.backward(loss)
    engine.step()
    return loss.item()


def test_other_units_and_another_order_of_groups(tmp_path: Path) -> None:
    def grouped(model: nn.Module, order: int) -> torch.optim.Optimizer:
        biases = [p for p in model.parameters() if p.dim() == 1]
        others = [p for p in model.parameters() if p.dim() > 1]
        groups: list[dict[str, Any]] = [{"params": biases, "lr": 3e-3}, {"params": others, "weight_decay": 0.3}]
        return torch.optim.AdamW(groups[::order], lr=1e-2)

    torch.manual_seed(0)
    saved, resumed = Mlp().double(), Mlp().double()
    first = lone_engine(grouped(saved, 1), model=saved)
    step_alone(first)
    first.optimizer.param_groups[0]["lr"] = 1e-4
    first.save_checkpoint(tmp_path)
    second = lone_engine(grouped(resumed, -1), units=[], model=resumed)
    second.load_checkpoint(tmp_path)
    assert [group["lr"] for group in second.optimizer.param_groups] == [1e-2, 1e-4]
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [0.3, 1e-2]
    assert step_alone(first, 1) == step_alone(second, 1)
    assert equal(first.full_parameters(), second.full_parameters())


def test_groups_that_cross_those_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    model = Mlp().double()
    parameters = list(model.parameters())
    engine = lone_engine(
        torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 1.0}]), model=model
    )
    engine.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="parameter group 0 joins parameters that had different"):
        lone_engine(lambda parameters: torch.optim.SGD(parameters)).load_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["NAdam", "RAdam", "Adamax", "ASGD", "Rprop", "Adadelta", "RMSprop"])
def test_scalars_and_other_state_of_optimizers(tmp_path: Path, kind: str) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(parameters)
        return optimizer

    engine = lone_engine(make)
    for step in range(2):
        step_alone(engine, step)
    engine.save_checkpoint(tmp_path)
    resumed = lone_engine(make)
    resumed.load_checkpoint(tmp_path)
    for step in range(2, 4):
        assert step_alone(engine, step) == step_alone(resumed, step)


# What else belongs to a run #


class Counter:
    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def test_stateful_objects_and_the_clients_state(tmp_path: Path) -> None:
    engine = lone_engine()
    engine.stateful["loader"] = loader = Counter()
    loader.position = 7
    step_alone(engine)
    folder = engine.save_checkpoint(tmp_path, client_state={"best": 0.5})
    assert folder == tmp_path / "global_step1"
    resumed = lone_engine()
    resumed.stateful["loader"] = again = Counter()
    assert resumed.load_checkpoint(tmp_path) == (str(folder), {"best": 0.5})
    assert (again.position, resumed.global_steps) == (7, 1)
    found = r"engine.stateful has \['loss_scaler'\], the checkpoint \['loader', 'loss_scaler'\]"
    with pytest.raises(CheckpointError, match=found):
        lone_engine().load_checkpoint(tmp_path)


def test_the_model_alone(tmp_path: Path) -> None:
    engine = lone_engine()
    step_alone(engine)
    engine.save_checkpoint(tmp_path)
    tuned = lone_engine(lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    tuned.load_checkpoint(tmp_path, load_module_only=True)
    assert equal(tuned.full_parameters(), engine.full_parameters())
    assert tuned.global_steps == 0
    assert tuned.optimizer.param_groups[0]["lr"] == 0.5
    assert not tuned.optimizer.state


def test_nothing_saved_yet_is_a_fresh_start(tmp_path: Path) -> None:
    assert lone_engine().load_checkpoint(tmp_path) == (None, {})


def test_the_format_is_that_of_torch(tmp_path: Path) -> None:
    """torch.distributed.checkpoint alone reads what we save."""
    engine = lone_engine()
    folder = engine.save_checkpoint(tmp_path)
    values = torch.empty(11, 7, dtype=torch.float64)
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load({"parameters/layers.0.weight": values}, checkpoint_id=folder, no_dist=True)
    assert torch.equal(values, engine.full_parameters()["layers.0.weight"])


def save_fresh(rank: int, world: int, run: Run, folder: str) -> None:
    engine = start_engine(run, run.build())
    engine.save_checkpoint(folder, "fresh")
    engine.close()


def test_replicas_are_written_once_and_by_all(four_ranks: World, tmp_path: Path) -> None:
    run = Run("gpt", stage=0)
    four_ranks.run(save_fresh, run, str(tmp_path))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "fresh").glob("*.distcp"))]
    values = sum(parameter.numel() * 8 for parameter in run.build().parameters())
    assert len(sizes) == 4
    # Besides values, a file has about 1 KB of frame around each of its tensors, and a rank's random state.
    assert values < sum(sizes) < 2 * values + 4 * 32_000
    assert max(sizes) < 0.6 * sum(sizes)


# Refusals #


def test_the_middle_of_a_batch_is_no_moment(tmp_path: Path) -> None:
    engine, *_ = initialize(
        Mlp().double(), {"gradient_accumulation_steps": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    )
    step_alone(engine)
    with pytest.raises(ValueError, match="save_checkpoint after micro-step 1 of 2"):
        engine.save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="load_checkpoint after micro-step 1 of 2"):
        engine.load_checkpoint(tmp_path)


@pytest.mark.parametrize("tag", ["", "a/b", "..", ".hidden", "latest"])
def test_tags(tmp_path: Path, tag: str) -> None:
    with pytest.raises(ValueError, match="allowed: a plain folder name"):
        lone_engine().save_checkpoint(tmp_path, tag)


class Wider(Mlp):
    def __init__(self, width: int = 11) -> None:
        super().__init__()
        self.layers[0] = nn.Linear(7, width, bias=False)
        self.layers[2] = nn.Linear(width, 5)
        self.more = nn.Linear(2, 2)


def test_another_model_or_optimizer(tmp_path: Path) -> None:
    engine = lone_engine()
    step_alone(engine)
    engine.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks more\.bias, more\.weight and has layers\.0\.bias that"):
        lone_engine(model=Wider().double()).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight has shape \(12, 7\), in the checkpoint \(11, 7\)"):
        lone_engine(model=Wider(12).double()).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="the optimizer is SGD, in the checkpoint AdamW"):
        lone_engine(lambda parameters: torch.optim.SGD(parameters)).load_checkpoint(tmp_path)
    partly = lone_engine(model=Wider().double())
    partly.load_checkpoint(tmp_path, load_module_strict=False)
    assert torch.equal(partly.full_parameters()["layers.2.weight"], engine.full_parameters()["layers.2.weight"])


def save_apart(rank: int, world: int, folder: str) -> None:
    run = Run("mlp")
    engine = start_engine(run, run.build())
    engine.save_checkpoint(folder, f"tag{rank}")


def test_ranks_that_save_different_things(two_ranks: World, tmp_path: Path) -> None:
    with pytest.raises(WorldError, match=r"rank 0 saves .*'tag0'.* rank 1 .*'tag1'"):
        two_ranks.run(save_apart, str(tmp_path))


def save_on_one_rank(rank: int, world: int, folder: str) -> None:
    run = Run("mlp", stage=3)
    with mock.patch.object(gloo, "ANSWER_S", 1.0):
        engine = start_engine(run, run.build(), timeout_s=1.0)
        if rank == 0:
            engine.save_checkpoint(folder)
        else:
            train_step(engine, run, 0, rank, world)


def test_a_rank_that_does_not_save_is_named(two_ranks: World, tmp_path: Path) -> None:
    with pytest.raises(WorldError, match=r"all_reduce of 1 int32.*save_checkpoint.*rank 1 was in number"):
        two_ranks.run(save_on_one_rank, str(tmp_path))


# Damage #


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "bytes and was written with"),
    "missing": (Path.unlink, "it is missing"),
    "altered": (flip, "SHA-256 differs|checksum differs"),
}


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_an_older_one_is_loaded_if_asked(tmp_path: Path, damage: str, file: str) -> None:
    engine = lone_engine()
    engine.save_checkpoint(tmp_path, "old")
    expected = engine.full_parameters()
    step_alone(engine)
    engine.save_checkpoint(tmp_path, "new")
    act, reason = DAMAGE[damage]
    act(tmp_path / "new" / file)
    if file == "manifest.json" and damage == "truncated":
        reason = "delimiter"  # it is no JSON any more
    with pytest.raises(CheckpointError, match=rf"'new'.*{file}: .*({reason}).*complete tags there: old"):
        lone_engine().load_checkpoint(tmp_path)
    resumed = lone_engine()
    path, _ = resumed.load_checkpoint(tmp_path, fall_back=True)
    assert path == str(tmp_path / "old")
    assert equal(resumed.full_parameters(), expected)


def test_a_tag_that_is_not_there(tmp_path: Path) -> None:
    engine = lone_engine()
    engine.save_checkpoint(tmp_path, "a")
    with pytest.raises(CheckpointError, match=r"'b' is not in .*; complete tags there: a"):
        engine.load_checkpoint(tmp_path, "b")


def save_with_a_full_disk(rank: int, world: int, folder: str) -> list[str]:
    """Rank 1's files may not grow beyond 10 kB the second time."""
    run = Run("gpt", stage=1)
    engine = start_engine(run, run.build())
    engine.save_checkpoint(folder, "good")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = []
    for asynchronous in (False, True):
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            engine.save_checkpoint(folder, "bad", asynchronous=asynchronous)
            engine.checkpoints.wait()
        except CheckpointError as error:
            messages.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    engine.save_checkpoint(folder, "afterwards", save_latest=False)
    engine.close()
    return messages


def test_a_full_disk_leaves_the_last_one_and_names_the_rank(two_ranks: World, tmp_path: Path) -> None:
    for messages in two_ranks.run(save_with_a_full_disk, str(tmp_path)):
        assert len(messages) == 2
        for message in messages:
            assert "'bad' was not saved" in message
            assert "rank 1: OSError: cannot write into" in message
            assert "File too large" in message
            assert "rank 0:" not in message
            assert "latest is still 'good'" in message
    assert complete_tags(tmp_path) == ["good", "afterwards"]
    assert [path.name for path in tmp_path.glob(".*")] == []


# In the background #


@contextmanager
def held_back(outcome: Exception | None = None) -> Iterator[threading.Event]:
    """Files are written when the event is set, or fail then."""
    go = threading.Event()
    write = FileSystemWriter.write_data

    def wait_and_write(writer: Any, plan: Any, planner: Any) -> Any:
        assert go.wait(20.0)
        if outcome is not None:
            raise outcome
        return write(writer, plan, planner)

    with mock.patch.object(FileSystemWriter, "write_data", wait_and_write):
        yield go


def save_while_training(rank: int, world: int, folder: str) -> tuple[bool, bool, bool]:
    """(not complete while training goes on, complete after waiting, with the values of the call)"""
    run = Run("gpt", stage=3)
    engine = start_engine(run, run.build())
    train_step(engine, run, 0, rank, world)
    before = engine.full_parameters()
    with held_back() as go:
        engine.save_checkpoint(folder, asynchronous=True)
        for step in (1, 2):
            train_step(engine, run, step, rank, world)
        absent = not (Path(folder) / "latest").exists()
        go.set()
        engine.checkpoints.wait()
    present = latest_tag(Path(folder)) == "global_step1"
    engine.load_checkpoint(folder)
    same = equal(engine.full_parameters(), before)
    engine.close()
    return absent, present, same


def test_training_goes_on_while_a_checkpoint_is_written(two_ranks: World, tmp_path: Path) -> None:
    assert two_ranks.run(save_while_training, str(tmp_path)) == [(True, True, True)] * 2


def test_a_second_save_waits_for_the_first_and_says_if_it_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = lone_engine()
    with held_back(OSError("the disk is gone")) as go:
        engine.save_checkpoint(tmp_path, "first", asynchronous=True)
        go.set()
        with pytest.raises(CheckpointError, match=r"'first' was not saved.*the disk is gone.*there is no earlier one"):
            engine.save_checkpoint(tmp_path, "second")
    assert "the disk is gone" in caplog.text
    engine.save_checkpoint(tmp_path, "third", asynchronous=True)
    engine.save_checkpoint(tmp_path, "fourth")
    assert complete_tags(tmp_path) == ["third", "fourth"]


def test_close_says_if_it_failed(tmp_path: Path) -> None:
    engine = lone_engine()
    with held_back(OSError("the disk is gone")) as go:
        engine.save_checkpoint(tmp_path, asynchronous=True)
        go.set()
        with pytest.raises(CheckpointError, match="'global_step0' was not saved"):
            engine.close()


# The folder #


def test_pruning(tmp_path: Path) -> None:
    engine = lone_engine()
    for step in range(5):
        step_alone(engine, step)
        engine.save_checkpoint(tmp_path, keep_last=2)
    assert complete_tags(tmp_path) == ["global_step4", "global_step5"]
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "global_step4", "global_step5"}
    with pytest.raises(ValueError, match="keep_last = 0; allowed: at least 1"):
        engine.save_checkpoint(tmp_path, keep_last=0)


def test_leftovers_are_cleaned_and_what_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    engine = lone_engine()
    engine.save_checkpoint(tmp_path, "a")
    (tmp_path / "a").rename(tmp_path / ".a.replaced")
    (tmp_path / ".b.partial-1234").mkdir()
    (tmp_path / ".latest-x").write_text("a")
    assert lone_engine().load_checkpoint(tmp_path)[0] == str(tmp_path / ".a.replaced")
    engine.save_checkpoint(tmp_path, "c", save_latest=False)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "a", "c"}
    assert checkpoint_files.latest_tag(tmp_path) == "a"
