"""Traces are flown once, and kept where and as long as that is honest."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hand_made import gather, kernel, steps_of, wait
from windtunnel.collectives.trace import Trace
from windtunnel.engine.pilot import Plan
from windtunnel.engine.pilot import fly as really_fly
from windtunnel.experiments import flights, pipeline
from windtunnel.experiments.flights import flown, forget
from windtunnel.experiments.layout import Options, resolve
from windtunnel.experiments.models import load_model
from windtunnel.sim.hardware import load_cluster

OURS = "windtunnel.experiments.transformer:for_flight"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Plan]]:
    """The plans that were really flown; flights are hand-made, of a trace that depends on the plan."""
    plans: list[Plan] = []

    def fly(plan: Plan) -> Trace:
        plans.append(plan)
        return steps_of(kernel(plan.world), gather(2), wait(1), kernel(plan.micro_steps))

    monkeypatch.setattr(flights, "fly", fly)
    monkeypatch.setenv("WINDTUNNEL_FLIGHTS", str(tmp_path / "flights"))
    forget()
    yield plans
    forget()


def files() -> list[Path]:
    folder = flights.flights_folder()
    assert folder is not None
    return sorted(folder.glob("*"))


def test_a_plan_is_flown_once_and_read_by_the_next_process(asked: list[Plan]) -> None:
    plan = Plan(factory=OURS, arguments={"batch": 2}, config={"a": {"b": 1.5}}, world=4)
    first = flown(plan)
    assert flown(plan) is first
    forget()
    assert flown(plan) == first
    assert asked == [plan]
    assert len(files()) == 1


@pytest.mark.parametrize(
    "other",
    [
        Plan(factory=OURS, arguments={"batch": 3}, world=4),
        Plan(factory=OURS, arguments={"batch": 2}, world=5),
        Plan(factory=OURS, arguments={"batch": 2}, world=4, micro_steps=2),
        Plan(factory=OURS, arguments={"batch": 2}, config={"bf16": {"enabled": True}}, world=4),
    ],
)
def test_other_plans_are_other_flights(asked: list[Plan], other: Plan) -> None:
    plan = Plan(factory=OURS, arguments={"batch": 2}, world=4)
    flown(plan)
    flown(other)
    assert asked == [plan, other]
    assert len(files()) == 2


def test_micro_steps_come_in_three_classes(asked: list[Plan]) -> None:
    for number in (3, 4, 512):
        flown(Plan(factory=OURS, world=4, micro_steps=number))
    assert [plan.micro_steps for plan in asked] == [3]


def test_what_cannot_be_read_is_flown_again(asked: list[Plan]) -> None:
    plan = Plan(factory=OURS, world=4)
    first = flown(plan)
    (path,) = files()
    path.write_text(path.read_text()[:-40])
    forget()
    assert flown(plan) == first
    assert len(asked) == 2
    forget()
    assert flown(plan) == first
    assert len(asked) == 2


def test_another_program_is_another_flight(asked: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(factory=OURS, world=4)
    flown(plan)
    forget()
    monkeypatch.setattr(flights, "_program", lambda: "other source")
    flown(plan)
    assert len(asked) == 2


def test_users_programs_leave_no_files(asked: list[Plan]) -> None:
    plan = Plan(factory="verify_targets:linear", world=4)
    flown(plan)
    flown(plan)
    assert len(asked) == 1
    assert files() == []


def test_off(asked: list[Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WINDTUNNEL_FLIGHTS", "off")
    flown(Plan(factory=OURS, world=4))
    assert flights.flights_folder() is None
    assert len(asked) == 1
    assert not (tmp_path / "flights").exists()


def test_a_folder_that_cannot_be_written_costs_a_note(
    asked: list[Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WINDTUNNEL_FLIGHTS", str(tmp_path / "file" / "flights"))
    flown(Plan(factory=OURS, world=4))
    assert len(asked) == 1
    assert "flights are not kept" in capsys.readouterr().err


def test_the_folder_stays_small(asked: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    flown(Plan(factory=OURS, world=4))
    size = files()[0].stat().st_size
    monkeypatch.setattr(flights, "MOST_BYTES", 3 * size + size // 2)
    for world in range(10, 20):
        flown(Plan(factory=OURS, world=world))
    assert len(files()) == 3
    forget()
    flown(Plan(factory=OURS, world=19))
    assert asked[-1].world == 19
    assert len(asked) == 11


def test_memory_is_bounded(asked: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDTUNNEL_FLIGHTS", "off")
    monkeypatch.setattr(flights, "MOST_IN_MEMORY", 2)
    for micro_steps in (1, 2, 3, 2, 1):
        flown(Plan(factory=OURS, world=4, micro_steps=micro_steps))
    assert [plan.micro_steps for plan in asked] == [1, 2, 3, 1]


# Numbers of data-parallel ranks #


def data_parallel(ranks: int, **config: Any) -> Plan:
    """A flight of a model whose units are multiples of 64 elements."""
    spec = replace(load_model("gpt-demo"), layers=2, hidden=64, heads=4, kv_heads=4, ffn=256, vocab=512, seq=64)
    return Plan(
        factory=OURS,
        arguments={"spec": spec, "batch": 1, "seq": 64},
        config={"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, **config},
        world=ranks,
    )


@pytest.fixture
def really(asked: list[Plan], monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """As `asked`, of flights that take place."""

    def fly(plan: Plan) -> Trace:
        asked.append(plan)
        return really_fly(plan)

    monkeypatch.setattr(flights, "fly", fly)
    return asked


def test_where_nothing_is_sharded_two_sizes_tell_the_others(really: list[Plan]) -> None:
    told = [flown(data_parallel(ranks)) for ranks in (2, 8, 4, 64)]
    assert [plan.world for plan in really] == [2, 8]
    assert told[2:] == [really_fly(data_parallel(ranks)) for ranks in (4, 64)]
    odd = flown(data_parallel(100))  # units would be padded
    assert really[-1].world == 100
    assert odd == really_fly(data_parallel(100))


def test_shards_depend_on_how_many_there_are(really: list[Plan]) -> None:
    for ranks in (2, 8, 4):
        flown(data_parallel(ranks, zero_optimization={"stage": 1}))
    assert [plan.world for plan in really] == [2, 8, 4]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_stage_flies_alike_beside_thin_stages_and_beside_whole_ones(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(load_model("gpt-demo"), layers=6, hidden=64, heads=4, kv_heads=4, ffn=256, tied=False)
    layout = resolve(Options(pp=3, global_batch=3, gpus=3), spec, load_cluster("dgx-a100"))
    parts = pipeline.parts_of(spec.layers, pipeline.schedule_plan(layout))
    thin = pipeline.stage_flight(spec, layout, rank, parts)
    monkeypatch.setattr(pipeline, "_at_most", lambda blocks, own: own)
    assert pipeline.stage_flight(spec, layout, rank, parts) == thin
