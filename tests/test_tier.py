"""Where state is placed: what the config says, which units go, what an optimizer keeps, whose turn a buffer is."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.trace import Copy, HostWork
from windtunnel.engine.config import Config
from windtunnel.engine.optim import ELEMENT_WISE
from windtunnel.engine.parameter_rest import ParameterRest
from windtunnel.engine.placement import Placement, offloaded
from windtunnel.engine.tier import Slot, Slots, Tiers, state_layout
from windtunnel.engine.transfer import FINISHED, OffloadError, Transfers


def placed(stage: int, **sections: dict[str, Any]) -> Placement:
    return Config.read({"zero_optimization": {"stage": stage, **sections}}, 1).placement


def test_nothing_rests_elsewhere_unless_told() -> None:
    assert placed(3) == Placement()
    assert not placed(3, offload_optimizer={"device": "none"}, offload_param={"device": "none"}).moves


def test_what_the_sections_come_to() -> None:
    placement = placed(
        3, offload_optimizer={"device": "nvme", "nvme_path": "/a", "buffer_count": 3, "pin_memory": False},
        offload_param={"device": "cpu"},
    )  # fmt: skip
    assert (placement.optimizer, placement.optimizer_path, placement.optimizer_buffers) == ("nvme", "/a", 3)
    assert (placement.parameters, placement.pin_memory, placement.delay_after) == ("host", False, None)
    assert placed(1, offload_optimizer={"device": "cpu", "delayed_update": True}).delay_after == 40


@pytest.mark.parametrize(
    ("stage", "sections", "message"),
    [
        (2, {"offload_param": {"device": "cpu"}}, "offload_param.device = 'cpu' and stage = 2; allowed: stage 3"),
        (1, {"offload_optimizer": {"device": "nvme"}}, "device = 'nvme' without nvme_path"),
        (1, {"offload_optimizer": {"device": "cpu", "ratio": 1.5}}, "ratio = 1.5; allowed: 0 to 1"),
        (1, {"offload_optimizer": {"device": "cpu", "buffer_count": 1}}, "buffer_count = 1; allowed: at least 2"),
        (1, {"offload_optimizer": {"device": "cpu", "fast_init": True}}, "fast_init = True; allowed: false, because"),
        (1, {"offload_optimizer": {"delayed_update": True}}, "delayed_update = true and device = 'none'"),
        (1, {"offload_optimizer": {"device": "cpu", "ratio": 0.5, "delayed_update": True}}, "allowed: ratio = 1"),
        (1, {"offload_optimizer": {"device": "cpu", "delayed_update_after": -1}}, "delayed_update_after = -1; allowed"),
        (3, {"offload_param": {"device": "nvme", "nvme_path": "x", "buffer_count": 0}}, "buffer_count = 0; allowed"),
        (1, {"offload_optimizer": {"device": "disk"}}, "offload_optimizer.device"),
    ],
)
def test_what_cannot_be_is_refused_by_name(stage: int, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        placed(stage, **sections)
    assert "\n" not in str(error.value)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.floats(0, 1))
def test_units_go_until_the_share_is_met(elements: list[int], ratio: float) -> None:
    flags = offloaded(elements, ratio)
    taken = [count for count, flag in zip(elements, flags, strict=True) if flag]
    assert flags == sorted(flags, reverse=True)  # the first ones
    assert sum(taken) >= ratio * sum(elements) * (1 - 1e-12)
    assert sum(taken[:-1]) < ratio * sum(elements) or not taken
    assert all(flags) == (sum(taken) == sum(elements))


KEPT = {"Adam": 2, "AdamW": 2, "SGD": 1, "Adagrad": 1, "Adadelta": 2, "Rprop": 2, "ASGD": 1}


@pytest.mark.parametrize("kind", ELEMENT_WISE)
def test_what_an_optimizer_keeps_is_found_by_asking_it(kind: type[torch.optim.Optimizer]) -> None:
    arguments = {"lr": 0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    layout = state_layout(kind, arguments, torch.float64)
    tensor = torch.ones(7, dtype=torch.float64)
    tensor.grad = torch.ones_like(tensor)
    optimizer = kind([tensor], **arguments)
    optimizer.step()
    kept = {name for name, value in optimizer.state[tensor].items() if getattr(value, "shape", ()) == (7,)}
    assert set(layout) == kept
    assert set(layout.values()) <= {torch.float64}
    assert len(layout) == KEPT.get(kind.__name__, len(kept))


def test_options_of_an_optimizer_count() -> None:
    assert state_layout(torch.optim.SGD, {"lr": 0.1}, torch.float32) == {}
    assert len(state_layout(torch.optim.AdamW, {"amsgrad": True}, torch.float32)) == 3


# Parameters #


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_parameters_that_were_asked_for_too_early_are_not_old(device: str, tmp_path: Path) -> None:
    section = {"device": device, "nvme_path": str(tmp_path), "buffer_count": 2}
    tiers = Tiers(placed(3, offload_param=section), Transfers(5.0), 0)
    rests = [ParameterRest(tiers, f"unit {number}", torch.full((5,), float(number))) for number in range(4)]
    tiers.make_buffers(adds=False)
    for rest in rests:  # more than there are buffers
        rest.fetch()
    rests[0].store(torch.full((5,), 7.0), FINISHED)
    rests[1].store_down(torch.full((5,), 8.0))
    seen = torch.empty(5)
    for rest, value in zip(reversed(rests), (3.0, 2.0, 8.0, 7.0), strict=True):
        rest.copy_into(seen)
        assert seen.tolist() == [value] * 5
    tiers.close()


# Queues #


def test_tasks_wait_for_what_they_need() -> None:
    transfers, order = Transfers(5.0), []
    first = transfers.work(HostWork("first", 1, 2), lambda: order.append("first"))
    source, target = torch.arange(4.0), torch.zeros(4)
    transfers.copy(Copy("to_host", 16, "x"), source, target, [first]).wait()
    order.append("copied")
    assert order == ["first", "copied"]
    assert torch.equal(source, target)
    moved = transfers.report()
    assert (moved["first"].nbytes, moved["to_host"].nbytes, moved["to_host"].calls) == (3, 16, 1)
    assert moved["to_host"].bytes_per_s == pytest.approx(16 / moved["to_host"].seconds)
    transfers.close()


def test_a_failure_reaches_whoever_waits_for_it() -> None:
    transfers = Transfers(5.0)

    def fail() -> None:
        raise OSError("no such drive")

    failed = transfers.work(HostWork("write", 1, 0), fail)
    after = transfers.work(HostWork("step", 1, 0), lambda: None, [failed])
    for wait in (failed.wait, after.block, transfers.drain):
        with pytest.raises(OffloadError, match="no such drive"):
            wait()
    transfers.close()


def test_no_wait_is_without_an_end() -> None:
    import threading

    transfers, never = Transfers(0.05), threading.Event()
    stuck = transfers.work(HostWork("step", 10, 0), lambda: never.wait(5.0))
    with pytest.raises(OffloadError, match=r"step \(10 bytes\) did not end within 0\.05 s"):
        stuck.wait()
    never.set()
    transfers.close()


class Holds:
    def __init__(self, slot: Slot) -> None:
        self.slot, self.gave_way = slot, False

    def give_way(self) -> None:
        self.slot.holder, self.gave_way = None, True


@given(st.integers(2, 5), st.integers(1, 20))
def test_buffers_are_taken_in_turn_and_never_from_who_needs_them(count: int, takes: int) -> None:
    transfers = Transfers(5.0)
    slots = Slots(transfers, count)
    slots.fit(100)
    slots.make()
    seen = []
    for _ in range(takes):
        slot = slots.take()
        assert slot is not None
        seen.append(id(slot))
    assert len(set(seen)) == min(count, takes)
    assert all(seen[number] == seen[number - count] for number in range(count, takes))
    slot = slots._slots[slots._turn % count]
    slot.holder = holder = Holds(slot)
    assert slots.take() is None
    slots.free_next()
    assert holder.gave_way
    assert slots.take() is slot
    transfers.drain()
    transfers.close()
