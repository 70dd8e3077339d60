"""What the engine tells of its steps, and to whom; it exists only where the config asks for it."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .batch import samples_in, tokens_in
from .communicator import Communicator
from .device import synchronize
from .metrics import Monitoring, Writer, require


class Monitor:
    """Gathers what is known of a step and tells the writers of rank 0.

    Losses stay on the device until somebody is told: then the ranks take their mean in one scalar all-reduce.

    Attributes:
        writers: on rank 0, those that the config enabled; add your own (`log(step, values)`, `close()`).
    """

    def __init__(
        self, wishes: Monitoring, communicator: Communicator, device: torch.device, same_samples: int = 1
    ) -> None:
        for section in wishes.sections:
            if section.package is not None:  # on every rank, so that none waits for one that has failed
                require(section.package)
        self.wishes, self.communicator, self.device = wishes, communicator, device
        self.same_samples = same_samples  # ranks that are given the same ones
        self.writers: list[Writer] = [section.writer() for section in wishes.sections] if communicator.rank == 0 else []
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._losses = self._samples = self._tokens = 0
        self._since_s: float | None = None
        self._phases = {"forward": 0.0, "backward": 0.0, "step": 0.0}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Around forward, backward and step of training. Evaluation is not timed."""
        if self._since_s is None:
            self._since_s = time.perf_counter()
        if not (self.wishes.breakdown and torch.is_grad_enabled()):
            yield
            return
        synchronize(self.device)
        began_s = time.perf_counter()
        yield
        synchronize(self.device)
        self._phases[phase] += time.perf_counter() - began_s

    def saw(self, batch: Any) -> None:
        """A micro-batch goes into forward."""
        if torch.is_grad_enabled():
            self._samples += samples_in(batch)
            self._tokens += tokens_in(batch)

    def took(self, loss: Tensor) -> None:
        """The loss of a micro-step, before it is scaled."""
        self._loss += loss.detach()
        self._losses += 1

    def stepped(self, step: int, known: Mapping[str, float | None]) -> None:
        """An optimizer step is over; all ranks call it.

        Args:
            step: its number, from 1.
            known: what the engine knows of it, by name; None is left out.
        """
        if self.wishes.due(step):
            self.log(step, {f"train/{name}": value for name, value in self._values(known).items()})
            self._since_s = time.perf_counter()
            self._samples = self._tokens = 0
            self._phases = dict.fromkeys(self._phases, 0.0)
        self._loss.zero_()
        self._losses = 0

    def _values(self, known: Mapping[str, float | None]) -> dict[str, float]:
        """The loss of this step, mean over micro-steps and ranks; rates and times since somebody was last told."""
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        totals[0] = self._loss
        totals[1:] = torch.tensor([self._losses, self._samples, self._tokens])
        self.communicator.all_reduce(totals, "metrics", scalar=True).wait()
        loss, losses, samples, tokens = (totals / self.same_samples).tolist()
        assert self._since_s is not None
        passed_s = time.perf_counter() - self._since_s
        values = {
            "loss": loss / losses if losses else None,  # a user's own loss.backward() does not pass here
            **known,
            "samples_per_s": samples / passed_s,
            "tokens_per_s": tokens / passed_s if tokens else None,
        }
        if self.wishes.breakdown:
            values |= {f"{phase}_s": seconds for phase, seconds in self._phases.items()}
        return {name: value for name, value in values.items() if value is not None}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Tell the writers; print a line if it is time for one."""
        if self.communicator.rank != 0:
            return
        for writer in self.writers:
            writer.log(step, values)
        if self.wishes.print_every and step % self.wishes.print_every == 0:
            shown = ", ".join(f"{name.removeprefix('train/')} {value:.5g}" for name, value in values.items())
            print(f"step {step}: {shown}", file=sys.stderr, flush=True)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def monitor_for(
    wishes: Monitoring, communicator: Communicator, device: torch.device, same_samples: int = 1
) -> Monitor | None:
    """A monitor, if the config asks for one; a flight has no values to tell.

    Raises:
        ValueError: a writer's package is not installed.
    """
    return Monitor(wishes, communicator, device, same_samples) if wishes.active and device.type != "sim" else None
