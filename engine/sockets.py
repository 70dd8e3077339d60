"""Moves a program's messages through Gloo's point-to-point calls: TCP between any hosts."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .program import Arrival, Posted
from .wire import GLOO_RECEIVE_BYTES, GLOO_SEND_BYTES

ALIGNMENT_BYTES = 64


class Sockets:
    """Messages of one group through Gloo, with a place to wait for those that cannot land where they belong."""

    name = "sockets"

    def __init__(self, group: dist.ProcessGroup, names: Sequence[int], timeout_s: float) -> None:
        self.group, self.names, self.timeout = group, names, timedelta(seconds=timeout_s)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def play(self, steps: tuple[Posted, ...], buffer: Tensor, tag: int, largest: bool) -> None:
        for step in steps:
            self._step(step, buffer, tag, largest)

    def _step(self, step: Posted, buffer: Tensor, tag: int, largest: bool) -> None:
        group = self.group
        landings = self._landings(step, buffer)
        receiving = [
            group.recv([landing], arrival.peer, tag + arrival.number)
            for arrival, landing in zip(step.arrivals, landings, strict=True)
        ]
        sending = {
            place: group.send([buffer[message.start : message.stop]], message.peer, tag + message.number)
            for place, message in enumerate(step.sends)
        }
        for arrival, landing, work in zip(step.arrivals, landings, receiving, strict=True):
            self._wait(work, "from", arrival.peer)
            if not _lands_in_place(arrival):
                for place in arrival.sends:
                    self._wait_for_send(sending, step, place)
                arrival.apply(buffer[arrival.start : arrival.stop], landing, largest)
        for place in list(sending):
            self._wait_for_send(sending, step, place)

    def _wait_for_send(self, sending: dict[int, dist.Work], step: Posted, place: int) -> None:
        """Gloo's sends must not be waited for twice: the second time never ends."""
        if (work := sending.pop(place, None)) is not None:
            self._wait(work, "to", step.sends[place].peer)

    def _landings(self, step: Posted, buffer: Tensor) -> list[Tensor]:
        """Where each arrival of a step is received: in place if nobody else needs the place, else in scratch."""
        item = buffer.element_size()
        sizes = [0 if _lands_in_place(a) else _aligned((a.stop - a.start) * item) for a in step.arrivals]
        if self._scratch.numel() < sum(sizes):
            self._scratch = torch.empty(sum(sizes), dtype=torch.uint8)
        landings, offset = [], 0
        for arrival, size in zip(step.arrivals, sizes, strict=True):
            if size:
                nbytes = (arrival.stop - arrival.start) * item
                landings.append(self._scratch[offset : offset + nbytes].view(buffer.dtype))
                offset += size
            else:
                landings.append(buffer[arrival.start : arrival.stop])
        return landings

    def _wait(self, work: dist.Work, direction: str, peer: int) -> None:
        try:
            work.wait(self.timeout)
        except RuntimeError as error:
            raise RuntimeError(f"a message {direction} rank {self.names[peer]} failed: {error}") from None

    def release_buffers(self) -> None:
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def close(self, failed: bool = False) -> None:
        self.release_buffers()


def _lands_in_place(arrival: Arrival) -> bool:
    return not (arrival.reduces or arrival.sends or arrival.earlier)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def framing_bytes(steps: tuple[Posted, ...]) -> int:
    """What one rank writes to its sockets besides payload when it plays these steps."""
    sent = sum(len(step.sends) for step in steps)
    received = sum(len(step.arrivals) for step in steps)
    return sent * GLOO_SEND_BYTES + received * GLOO_RECEIVE_BYTES
