"""What the engine tells whoever watches it. Nobody does, unless the engine flies on the `sim` device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..collectives.trace import Copy, HostWork


class Observer:
    """Ignores everything; the recorder overrides it.

    The dispatcher shows a recorder each operator, but neither where in the step the engine is, nor that a storage was
    resized, nor what a storage is for.
    """

    def enter(self, key: str, block: int) -> None:
        """From here on the program is in segment `key` of block `block` (see collectives/trace.py)."""

    def phase(self, name: str, step: int, every: int = 1) -> None:
        """From here on the program is in phase `name` of training step `step`, which one step in `every` has."""

    def synchronized(self) -> None:
        """The program reads a value from the device, and so waits for it."""

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """Storages made inside belong to category `name` of collectives/trace.py."""
        yield

    def released(self, tensor: Tensor) -> None:
        """The storage of `tensor` was resized to nothing."""

    def restored(self, tensor: Tensor, category: str) -> None:
        """The storage of `tensor` was resized to its full size and belongs to `category` until it is released."""

    def moves(self, op: Copy | HostWork) -> Any:
        """A copy between tiers or work on the host starts; the answer is what `awaits` wants."""

    def awaits(self, started: Any, stream: str) -> None:
        """A stream (see Wait in collectives/trace.py) goes on when what was started has ended."""

    def rests(self, tier: str, nbytes: int, category: str) -> Any:
        """Memory of a tier that is not the device's is taken; the answer is what `leaves` wants."""

    def leaves(self, taken: Any) -> None:
        """Memory that `rests` told of is given back."""


SILENT = Observer()
