"""Offload against the same run without it, bit for bit; memory against closed forms; what a drive can do wrong."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import (
    Outcome,
    Run,
    micro_batches,
    start_engine,
    train_rank,
    train_step,
    whole_optimizer,
)
from windtunnel.collectives.zero import Zero, tier_bytes
from windtunnel.engine.engine import Engine
from windtunnel.engine.host_step import HostSteps
from windtunnel.engine.nvme import PAGE, whole_pages
from windtunnel.engine.optimizer_rest import OptimizerRest
from windtunnel.engine.transfer import OffloadError
from windtunnel.engine.world import World

Sections = dict[str, dict[str, Any]]


def optimizer_on(device: str, path: Path, **keys: Any) -> Sections:
    section: dict[str, Any] = {"device": device, "nvme_path": str(path), "buffer_count": 2, **keys}
    return {"offload_optimizer": section}


def parameters_on(device: str, path: Path) -> Sections:
    return {"offload_param": {"device": device, "nvme_path": str(path), "buffer_count": 2}}


def started(run: Run, sections: Sections, **overrides: Any) -> Engine:
    zero = {"stage": run.stage, **sections}
    return start_engine(run, run.build(), zero_optimization=zero, **overrides)


# Equal to the run without #


def train_with(rank: int, world: int, run: Run, sections: Sections, bf16: bool) -> tuple[list[float], dict, dict]:
    """(losses, parameters, bytes moved by direction)."""
    engine = started(run, sections, bf16={"enabled": bf16})
    losses = [train_step(engine, run, step, rank, world) for step in range(run.steps)]
    parameters = engine.full_parameters()
    if engine.tiers is not None:
        engine.tiers.transfers.drain()
    moved = {name: moved.nbytes for name, moved in engine.offload_report().items()}
    engine.close()
    return losses, parameters, moved


def all_ways(
    rank: int, world: int, runs: list[Run], ways: list[Sections], bf16: bool, common: Any = ()
) -> list[tuple[Run, int]]:
    """The (run, number of the way) that were not bit for bit the run without offload; `common` keys hold for both."""
    different = []
    for run in runs:
        losses, parameters, moved = train_with(rank, world, run, dict(common), bf16)
        assert moved == {}
        for number, sections in enumerate(ways):
            other_losses, other_parameters, moved = train_with(rank, world, run, {**dict(common), **sections}, bf16)
            assert moved
            equal = all(torch.equal(parameters[name], other) for name, other in other_parameters.items())
            if not (equal and losses == other_losses):
                different.append((run, number))
    return different


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_optimizer_offload_changes_nothing(two_ranks: World, stage: int, bf16: bool, tmp_path: Path) -> None:
    runs = [
        Run("gpt", stage=stage, accumulation=accumulation, clip=clip, dtype=torch.float32, steps=3)
        for accumulation, clip in [(1, 0.0), (3, 0.0), (1, 0.3), (3, 0.3)]
    ]
    ways = [optimizer_on("cpu", tmp_path), optimizer_on("nvme", tmp_path)]
    assert two_ranks.run(all_ways, runs, ways, bf16) == [[], []]
    assert list(tmp_path.iterdir()) == []  # files are gone with the engine


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_parameter_offload_changes_nothing(two_ranks: World, bf16: bool, tmp_path: Path) -> None:
    runs = [Run("tied", stage=3, accumulation=3, clip=0.3, dtype=torch.float32, steps=3)]
    ways = [
        {**parameters_on(parameters, tmp_path), **(optimizer_on(optimizer, tmp_path) if optimizer else {})}
        for parameters, optimizer in [("cpu", ""), ("nvme", ""), ("cpu", "cpu"), ("nvme", "nvme"), ("nvme", "cpu")]
    ]
    assert two_ranks.run(all_ways, runs, ways, bf16) == [[], []]


@pytest.mark.parametrize("model", ["never used", "sometimes used", "frozen", "one element", "used twice", "recomputed"])
def test_models_that_are_unlike_others(two_ranks: World, model: str, tmp_path: Path) -> None:
    runs = [Run(model, stage=stage, optimizer="grouped", dtype=torch.float32, steps=3) for stage in (1, 3)]
    nvme = optimizer_on("nvme", tmp_path)
    assert two_ranks.run(all_ways, runs[:1], [nvme], False) == [[], []]
    assert two_ranks.run(all_ways, runs[1:], [{**nvme, **parameters_on("nvme", tmp_path)}], False) == [[], []]


def test_every_choice_of_the_section(two_ranks: World, tmp_path: Path) -> None:
    run = Run("gpt", stage=2, dtype=torch.float32, schedule=True, steps=3, optimizer="momentum")
    choices: list[dict[str, Any]] = [
        {"pipeline_read": False, "pipeline_write": False},
        {"step_in_backward": False},
        {"ratio": 0.4},
        {"ratio": 0.0, "buffer_count": 3, "pin_memory": False},
    ]
    ways = [optimizer_on("nvme", tmp_path, **choice) for choice in choices[:3]]
    assert two_ranks.run(all_ways, [run], ways, False) == [[], []]
    _, without, _ = two_ranks.run(train_with, run, {}, False)[0]
    _, kept, moved = two_ranks.run(train_with, run, optimizer_on("cpu", tmp_path, **choices[3]), False)[0]
    assert moved == {}
    assert all(torch.equal(without[name], values) for name, values in kept.items())


def test_blocks_of_several_units(two_ranks: World, tmp_path: Path) -> None:
    """More units than buffers, some of them whole on every rank."""
    run = Run("tied", stage=3, accumulation=3, dtype=torch.float32, steps=3)
    cut = {"reduce_bucket_size": 150, "stage3_param_persistence_threshold": 20}
    ways = [{**parameters_on(device, tmp_path), **optimizer_on(device, tmp_path)} for device in ("cpu", "nvme")]
    assert two_ranks.run(all_ways, [run], ways, False, cut) == [[], []]


# What moves and where it rests #


def test_bytes_that_are_moved(two_ranks: World, tmp_path: Path) -> None:
    """2 bytes of gradient down and 2 of parameter up per parameter and step (ZeRO-Offload, section 4)."""
    steps = 3
    run = Run("gpt", stage=2, dtype=torch.float32, steps=steps)
    shard = sum(part.numel() for part in run.build().parameters()) / 2
    _, _, moved = two_ranks.run(train_with, run, optimizer_on("cpu", tmp_path), True)[0]
    padding = 4  # at most one element for each of four units
    for direction in ("to_host", "to_device"):
        assert 0 <= moved[direction] - 2 * steps * shard <= 2 * steps * padding
    # Gradient, master and two moments in; master, moments and a copy of 16 bits out.
    assert 0 <= moved["step"] - (2 + 12 + 12 + 2) * steps * shard <= 28 * steps * padding


def live_storages() -> dict[int, torch.UntypedStorage]:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and any(thing.stride())]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}


def hold(rank: int, world: int, run: Run, sections: Sections, bf16: bool) -> tuple[int, int, int, dict, list]:
    """(bytes alive on the device and on the host after two steps, shared buffers, formula by tier, unit sizes)."""
    before = live_storages()
    engine = started(run, sections, bf16={"enabled": bf16}, communication={"transport": "sockets"})
    for step in range(2):
        for x, y in micro_batches(run, step, rank, world):
            engine.backward(engine(x, y))
            engine.step()
    del x, y
    engine.communicator.release_buffers()
    assert engine.tiers is not None
    engine.tiers.transfers.drain()
    alive = {number: storage for number, storage in live_storages().items() if number not in before}
    on_host = engine.tiers.transfers.host_storages()
    assert on_host <= set(alive)  # nothing is counted that is gone
    sizes = [unit.size for unit in engine.runtime.units]
    slots = (engine.tiers.optimizer_slots, engine.tiers.parameter_slots, engine.tiers.staging)
    buffers = sum(each.count * whole_pages(each.nbytes) for each in slots if each.made)
    formula = tier_bytes(sizes, Zero.of_stage(run.stage), world, moments=2, master_bytes=4)
    result = (
        sum(storage.nbytes() for number, storage in alive.items() if number not in on_host),
        sum(storage.nbytes() for number, storage in alive.items() if number in on_host),
        buffers,
        formula,
        sizes,
    )
    engine.close()
    return result


@pytest.mark.parametrize(
    ("stage", "optimizer", "parameters", "bf16"),
    [
        (0, "cpu", "", False),
        (1, "cpu", "", True),
        (2, "nvme", "", True),
        (3, "cpu", "", False),
        (3, "", "cpu", False),
        (3, "", "nvme", True),
        (3, "nvme", "nvme", True),
    ],
)
def test_memory_by_tier(
    two_ranks: World, stage: int, optimizer: str, parameters: str, bf16: bool, tmp_path: Path
) -> None:
    """Exact on rank 0, in which no padding falls. The device's is what is left when the host's is taken away."""
    run = Run("gpt", stage=stage, dtype=torch.float32)
    sections = optimizer_on(optimizer, tmp_path) if optimizer else {}
    sections = {**sections, **(parameters_on(parameters, tmp_path) if parameters else {})}
    device, host, buffers, formula, sizes = two_ranks.run(hold, run, sections, bf16)[0]
    assert device == sum(formula["device"].values())
    assert host == sum(formula["host"].values()) + buffers
    if "nvme" in (optimizer, parameters):
        assert formula["nvme"]["optimizer"] == (12 * sum(size.elements // 2 for size in sizes) if optimizer else 0)
    without = tier_bytes(
        [replace(size, optimizer_tier="device", parameter_tier="device") for size in sizes],
        Zero.of_stage(stage), 2, moments=2, master_bytes=4,
    )  # fmt: skip
    # fp32 parameters are their own masters: while those are stepped on the device, nothing is gained.
    gained = sum(without["device"].values()) - device
    assert gained > 0 or (gained == 0 and not optimizer and not bf16)


def test_partial_offload_takes_the_units_that_backward_finishes_first(tmp_path: Path) -> None:
    run = Run("gpt", stage=1, dtype=torch.float32)
    engine = started(run, optimizer_on("cpu", tmp_path, ratio=0.4))
    away = [unit.label for unit in engine.runtime.units if unit.rest is not None]
    assert away == ["block 1", "block 2"]
    total = sum(unit.elements for unit in engine.runtime.units)
    share = sum(unit.elements for unit in engine.runtime.units if unit.rest is not None) / total
    assert 0.4 <= share < 0.4 + engine.runtime.units[-1].elements / total
    engine.close()


# A step late #


def train_late(run: Run, after: int) -> Outcome:
    """Plain torch in one process whose gradients are taken a step before the parameters that they change."""
    shown, stepped = run.build(), run.build()
    optimizer = whole_optimizer(run, stepped)
    losses = []
    for number in range(run.steps):
        loss = shown(*run.batch(number))
        gradients = torch.autograd.grad(loss, list(shown.parameters()))
        losses.append(loss.item())
        late = number + 1 > after
        if late:
            shown.load_state_dict(stepped.state_dict())
        for parameter, gradient in zip(stepped.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if not late:
            shown.load_state_dict(stepped.state_dict())
    return Outcome(losses, {name: parameter.detach() for name, parameter in shown.named_parameters()}, [])


def late_rank(rank: int, world: int, run: Run, sections: Sections) -> tuple[Outcome, dict]:
    """(what is seen, the parameters when the last update has been applied)."""
    engine = started(run, sections)
    losses = [train_step(engine, run, step, rank, world) for step in range(run.steps)]
    seen = Outcome(losses, engine.full_parameters(), [])
    engine.apply_delayed_update()
    last = engine.full_parameters()
    engine.close()
    return seen, last


@pytest.mark.parametrize(("device", "stage"), [("cpu", 1), ("cpu", 3), ("nvme", 2)])
def test_a_delayed_update_is_one_step_late(two_ranks: World, device: str, stage: int, tmp_path: Path) -> None:
    run = Run("gpt", stage=stage, accumulation=3, steps=7)
    after = 3
    expected, on_time = train_late(run, after), train_late(run, after=run.steps)
    next_ones = train_late(replace(run, steps=8), after)
    sections = optimizer_on(device, tmp_path, delayed_update=True, delayed_update_after=after)
    outcomes = two_ranks.run(late_rank, run, sections)
    losses = [sum(pair) / 2 for pair in zip(*(outcome.losses for outcome, _ in outcomes), strict=True)]
    # float64: the order of sums differs, no more.
    assert losses == pytest.approx(expected.losses, rel=1e-10)
    assert losses != pytest.approx(on_time.losses, rel=1e-4)
    for seen, last in outcomes:
        for name, values in expected.parameters.items():
            torch.testing.assert_close(seen.parameters[name], values, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(last[name], next_ones.parameters[name], rtol=1e-9, atol=1e-11)


# What may go wrong #


def test_a_group_that_changes_after_its_units_were_stepped(tmp_path: Path) -> None:
    run = Run("gpt", stage=2, dtype=torch.float32)
    for step_in_backward in (True, False):
        engine = started(run, optimizer_on("cpu", tmp_path, step_in_backward=step_in_backward))
        engine.backward(engine(*run.batch(0)))
        engine.optimizer.param_groups[0]["lr"] = 0.5
        if step_in_backward:
            with pytest.raises(RuntimeError, match=r"changed between backward and step.*step_in_backward = false"):
                engine.step()
        else:
            engine.step()
        engine.close()


def test_units_are_stepped_in_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    real = HostSteps._start

    def note(self: HostSteps, unit: Any, *arguments: Any) -> None:
        begun.append(unit.label)
        real(self, unit, *arguments)

    monkeypatch.setattr(HostSteps, "_start", note)
    for clip, expected in ((0.0, ["block 2", "block 1", "block 0", "root"]), (1.0, [])):
        begun.clear()
        run = Run("gpt", stage=2, dtype=torch.float32, clip=clip)
        engine = started(run, optimizer_on("cpu", tmp_path))
        engine.backward(engine(*run.batch(0)))
        assert begun == expected
        engine.step()
        assert len(begun) == 4
        engine.close()


@pytest.mark.parametrize("harm", ["cut off", "lost", "foreign"])
def test_a_harmed_file_ends_training_with_its_name(tmp_path: Path, harm: str) -> None:
    run = Run("gpt", stage=2, dtype=torch.float32)
    engine = started(run, optimizer_on("nvme", tmp_path))
    engine.backward(engine(*run.batch(0)))
    engine.step()
    assert engine.tiers is not None
    engine.tiers.transfers.drain()
    first = next(tmp_path.glob("*/1.state"))
    if harm == "cut off":
        first.write_bytes(first.read_bytes()[:PAGE])
    elif harm == "lost":
        first.unlink()
    else:
        first.write_bytes(b"x" * first.stat().st_size)
    with pytest.raises(OffloadError, match=r"1\.state: .*root.*start again from a checkpoint"):
        train_step(engine, run, 1, 0, 1)
    with pytest.raises(OffloadError):
        engine.close()
    assert list(tmp_path.iterdir()) == []


def test_state_can_be_looked_at_where_it_rests(tmp_path: Path) -> None:
    run = Run("gpt", stage=1, dtype=torch.float32)
    engine = started(run, optimizer_on("nvme", tmp_path))
    twin = started(run, {})
    for each in (engine, twin):
        each.backward(each(*run.batch(0)))
        each.step()
    for unit, other in zip(engine.runtime.units, twin.runtime.units, strict=True):
        assert isinstance(unit.rest, OptimizerRest)
        assert unit.master.numel() == 0
        with unit.rest.present():
            assert torch.equal(unit.master, other.master)
            unit.master.zero_()
        with unit.rest.present():
            assert not unit.master.any()
    engine.close()


def test_offload_with_no_more_than_one_process(tmp_path: Path) -> None:
    outcome = train_rank(0, 1, run := Run("mlp", steps=3))
    engine = started(run, optimizer_on("nvme", tmp_path))
    assert [train_step(engine, run, step, 0, 1) for step in range(3)] == outcome.losses
    engine.close()
