"""What ranks tell each other as Python objects, and how they fail together instead of one waiting for another."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .communicator import CommunicationError, Communicator

T = TypeVar("T")


class DisagreementError(RuntimeError):
    """Some rank could not do its part; the message has each such rank's reason."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    value: Any
    error: str = ""


HOST = torch.device("cpu")


def everyones(communicator: Communicator, mine: T, label: str, device: torch.device = HOST) -> list[T]:
    """Every rank's object, by rank, on every rank.

    Args:
        device: whose tensors the communicator sends.

    Raises:
        CommunicationError: a rank is silent or does something else; the message names it.
    """
    if communicator.world == 1:
        return [mine]
    payload = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
    sizes = torch.zeros(communicator.world, dtype=torch.int64, device=device)
    sizes[communicator.rank] = payload.numel()
    communicator.all_gather(sizes, f"{label}: sizes").wait()
    rows = torch.zeros(communicator.world, int(sizes.max()), dtype=torch.uint8, device=device)
    rows[communicator.rank, : payload.numel()] = payload.to(device)
    communicator.all_gather(rows.view(-1), label).wait()
    return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows.cpu(), sizes.tolist(), strict=True)]


def all_or_none(communicator: Communicator, action: Callable[[], T], label: str) -> list[T]:
    """Every rank's result of its own `action`; if any rank's fails, an error on all of them.

    Raises:
        DisagreementError: naming each rank that failed, and why.
        CommunicationError: a rank is silent.
    """
    cause = None
    try:
        outcome = _Outcome(action())
    except CommunicationError:
        raise
    except Exception as error:
        cause, outcome = error, _Outcome(None, f"{type(error).__name__}: {error}")
    outcomes = everyones(communicator, outcome, label)
    failed = [f"rank {rank}: {each.error}" for rank, each in enumerate(outcomes) if each.error]
    if failed:
        raise DisagreementError("; ".join(failed)) from cause
    return [each.value for each in outcomes]
