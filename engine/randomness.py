"""Random numbers of ranks that share a model: equal where they hold the same values, their own where they do not.

While an engine's forward runs in training, torch's generators follow the config's seed, the rank's samples and the
number of the forward, whatever the script has drawn; afterwards they go on where the script left them. Ranks of a
tensor group so draw the same dropout masks. Inside of a region that they have cut, each draws its own: it is seeded
with a number that all have drawn outside, and its rank. So no state is kept but the count of forwards, and a block
that is computed again from the states at its beginning (engine/recompute.py) draws the same masks.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .device import random_states, set_random_states


def draws(model: nn.Module) -> bool:
    """Whether a model has dropout: a dropout module, or a rate in an attribute whose name says so."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        if any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items()):
            return True
    return False


def mixed(*numbers: int) -> int:
    """A seed that depends on all of the numbers and on their order."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest())


class Randomness:
    """Where torch's generators are while a model runs.

    Args:
        device: that the model is on.
        seed: of the config.
        samples: what tells the ranks apart that have other samples, or other layers.
        rank: among the ranks that share each layer.
        drawn: whether the model draws at all.
        shared: whether several ranks share each layer; else torch's generators are left alone.

    Attributes:
        forwards: how many have begun, of a model that draws.
    """

    def __init__(
        self, device: torch.device, seed: int, samples: tuple[int, ...], rank: int, *, drawn: bool, shared: bool
    ) -> None:
        self.device, self.seed, self.samples, self.rank = device, seed, samples, rank
        self.drawn = drawn
        self.active = drawn and shared and device.type not in ("sim", "meta")
        self.forwards = 0
        self._outside: dict[str, Tensor] = {}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward of the model in training."""
        number, self.forwards = self.forwards, self.forwards + self.drawn
        if not self.active:
            yield
            return
        before = random_states(self.device)
        torch.manual_seed(mixed(self.seed, *self.samples, number))
        try:
            yield
        finally:
            set_random_states(before, self.device)
            self._outside = {}

    def enter(self) -> None:
        """From here on each rank draws its own numbers, until `leave`."""
        if self.active:
            seed = int(torch.randint(1 << 62, ()))
            self._outside = random_states(self.device)
            torch.manual_seed(mixed(seed, self.rank))

    def leave(self) -> None:
        """From here on the ranks draw as they did before `enter`."""
        if self._outside:
            set_random_states(self._outside, self.device)
            self._outside = {}

    def separate(self) -> None:
        """From here on each rank draws its own numbers, until the forward ends."""
        self.enter()
        self._outside = {}

    def state_dict(self) -> dict[str, int]:
        return {"forwards": self.forwards}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.forwards = state["forwards"]
