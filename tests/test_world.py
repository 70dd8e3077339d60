"""Ranks that fail: the world ends in time, with an error that names the rank, and the collective if it was in one."""

import os
import signal
import threading
from unittest import mock

import pytest
import torch
from conftest import WorldOf
from windtunnel.engine import gloo, world
from windtunnel.engine.communicator import CommunicationError
from windtunnel.engine.device import communicator_for
from windtunnel.engine.engine import initialize
from windtunnel.engine.world import World, WorldError

TIMEOUT_S = 1.0
"""How long a collective waits here for other ranks."""

ANSWER_S = 1.0
"""How long a rank that failed waits for the others to say what they did; longer outside of tests."""

LIMIT_S = 30.0
"""A world that needs this long has not noticed by itself; its message then differs from those expected here."""


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "ANSWER_S", ANSWER_S)


def run(ranks: World, body, *arguments) -> str:
    """The error with which `body` ends a world."""
    with pytest.raises(WorldError) as ended:
        ranks.run(body, *arguments, limit_s=LIMIT_S)
    assert not ranks.alive
    return str(ended.value)


# Bodies #


def squares(rank: int, size: int, offset: int) -> tuple[int, int, int]:
    return rank, size, rank * rank + offset


def fail_on(rank: int, size: int, failing: list[int]) -> None:
    if rank in failing:
        raise ValueError(f"boom {rank}")


def collective(rank: int, size: int, kinds: list[str | None], elements: list[int]) -> None:
    """Each rank performs its own collective; None stands for a rank that is stuck elsewhere."""
    with mock.patch.object(gloo, "ANSWER_S", ANSWER_S):
        communicator = communicator_for(torch.device("cpu"), TIMEOUT_S)
        if (kind := kinds[rank]) is None:
            threading.Event().wait(10 * LIMIT_S)
        else:
            getattr(communicator, kind)(torch.zeros(elements[rank]), "test").wait()


def die_in_a_collective(rank: int, size: int) -> None:
    with mock.patch.object(gloo, "ANSWER_S", ANSWER_S):
        communicator = communicator_for(torch.device("cpu"), TIMEOUT_S)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        communicator.reduce_scatter(torch.zeros(8), "gradients of block 3").wait()


def stall_in_training(rank: int, size: int) -> None:
    """The timeout given to `initialize` is the one that ends a step whose peer never comes."""
    with mock.patch.object(gloo, "ANSWER_S", ANSWER_S):
        config = {"zero_optimization": {"stage": 3}, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
        engine, *_ = initialize(torch.nn.Linear(3, 3), config, timeout_s=TIMEOUT_S)
        if rank == 1:
            threading.Event().wait(10 * LIMIT_S)
        engine(torch.zeros(1, 3))


def fail_twice(rank: int, size: int) -> list[str]:
    """After a failed collective the communicator refuses the next ones at once, with the same explanation."""
    said = []
    with mock.patch.object(gloo, "ANSWER_S", ANSWER_S):
        communicator = communicator_for(torch.device("cpu"), TIMEOUT_S)
        kind = ["all_gather", "reduce_scatter"][rank]
        for _ in range(2):
            try:
                getattr(communicator, kind)(torch.zeros(8), "test").wait()
            except CommunicationError as error:
                said.append(str(error))
    return said


def stay_busy(rank: int, size: int) -> None:
    if rank == 1:
        threading.Event().wait(10 * LIMIT_S)


# Tests #


def test_results_are_ordered_by_rank(four_ranks: World) -> None:
    assert four_ranks.run(squares, 10) == [(rank, 4, rank * rank + 10) for rank in range(4)]


def test_a_world_of_one() -> None:
    with World(1, threads=1) as alone:
        assert alone.run(squares, 1) == [(0, 1, 1)]
    assert not alone.alive


def test_a_world_of_none() -> None:
    with pytest.raises(ValueError, match="world = 0; allowed: at least 1 rank"):
        World(0)


@pytest.mark.parametrize("failing", [[0], [1], [0, 1]])
def test_a_body_that_raises(two_ranks: World, failing: list[int]) -> None:
    message = run(two_ranks, fail_on, failing)
    parts = message.split("; ")
    assert len(parts) == len(failing)
    for rank, part in zip(failing, parts, strict=True):
        assert part.startswith(f"rank {rank} failed: ValueError: boom {rank} (test_world.py:")


def test_an_ended_world_says_so(two_ranks: World) -> None:
    run(two_ranks, fail_on, [0])
    with pytest.raises(WorldError, match="this world has ended: make a new one"):
        two_ranks.run(squares, 0)


def test_a_killed_world_is_started_again(world_of: WorldOf) -> None:
    before = world_of(2)
    run(before, fail_on, [0])
    assert world_of(2) is not before
    assert world_of(2) is world_of(2)
    assert world_of(2).run(squares, 0) == [(0, 2, 0), (1, 2, 1)]


def test_a_rank_that_is_killed(two_ranks: World) -> None:
    message = run(two_ranks, die_in_a_collective)
    assert "rank 1 died: killed by SIGKILL" in message
    assert (
        "rank 0 failed: number 1, reduce_scatter of 8 fp32 on axis 'data' (direct), gradients of block 3: " in message
    )
    assert "rank 1 did not answer" in message


def test_a_rank_that_stalls(four_ranks: World) -> None:
    message = run(four_ranks, collective, ["all_gather", None, "all_gather", "all_gather"], [8] * 4)
    assert "rank 1 was still busy" in message
    for rank in (0, 2, 3):
        assert f"rank {rank} failed: number 1, all_gather of 8 fp32" in message
    assert message.count("rank 1 did not answer") == 3


def test_a_stall_in_training(two_ranks: World) -> None:
    message = run(two_ranks, stall_in_training)
    assert "all_gather of 12 fp32 on axis 'data' (direct), parameters of root: " in message
    assert "rank 1 was still busy" in message


@pytest.mark.parametrize(
    ("kinds", "elements"),
    [
        (["all_gather", "reduce_scatter"], [8, 8]),
        (["all_gather", "all_gather"], [8, 16]),
        (["all_reduce", "reduce_scatter"], [8192, 8192]),
    ],
)
def test_ranks_that_call_different_collectives(two_ranks: World, kinds: list[str], elements: list[int]) -> None:
    message = run(two_ranks, collective, kinds, elements)
    for rank in range(2):
        call = f"number 1, {kinds[rank]} of {elements[rank]} fp32 on axis 'data'"
        assert f"rank {rank} failed: {call}" in message
        assert f"rank {rank} was in {call}" in message


def test_one_rank_of_four_differs(four_ranks: World) -> None:
    message = run(four_ranks, collective, ["all_gather", "all_gather", "reduce_scatter", "all_gather"], [8] * 4)
    assert message.count("rank 2 was in number 1, reduce_scatter of 8 fp32") == 3
    assert "rank 2 failed: number 1, reduce_scatter of 8 fp32" in message


def test_a_failed_communicator_stays_failed() -> None:
    with World(2, threads=1) as ranks:  # of its own: what the ranks told each other stays in its store
        for rank, (first, second) in enumerate(ranks.run(fail_twice, limit_s=LIMIT_S)):
            assert first == second
            assert first.startswith(f"number 1, {['all_gather', 'reduce_scatter'][rank]} of 8 fp32")


def test_a_body_past_its_limit(two_ranks: World) -> None:
    with pytest.raises(WorldError, match=r"^rank 1 was still busy after 1 s$"):
        two_ranks.run(stay_busy, limit_s=1.0)
