"""The groups that a model's collectives run on, made once from the config: communicators along the axes of its mesh."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..collectives.groups import Mesh, tiers_along
from .communicator import Communicator, SoloCommunicator
from .compressed import NodeGrid, compressed, uncompressed
from .config import Communication, Config


@dataclass(frozen=True, slots=True)
class Groups:
    """What each collective of a data-parallel engine spans. Where nothing is kept twice, `shard` is `everyone`.

    Attributes:
        everyone: all ranks that train on samples of their own: initial values.
        together: ranks whose gradients make one step: the mean, flags. All of them, or each by itself.
        shard: ranks that together hold one copy of what is sharded: gathers, reduce-scatters, sums over shards.
        replica: ranks that hold the same shard: reduced gradients are summed over them.
        secondary: ranks that together hold the second copy of the parameters; a group of one where there is none.
        others: that compressed collectives of these are made of.
    """

    everyone: Communicator
    together: Communicator
    shard: Communicator
    replica: Communicator
    secondary: Communicator
    others: tuple[Communicator, ...] = ()

    @classmethod
    def whole(cls, everyone: Communicator) -> "Groups":
        """Nothing is kept twice."""
        return cls(everyone, everyone, everyone, _alone(everyone), _alone(everyone))

    @classmethod
    def apart(cls, everyone: Communicator) -> "Groups":
        """Every rank steps by itself."""
        alone = _alone(everyone)
        return cls(everyone, alone, alone, alone, alone)

    def each(self) -> tuple[Communicator, ...]:
        """The communicators, each once."""
        return tuple(
            dict.fromkeys((self.everyone, self.together, self.shard, self.replica, self.secondary, *self.others))
        )

    def overflow(self) -> Tensor | None:
        """Whether a collective of gradients made inf or nan of what it sent: a flag on the device [], of this rank."""
        flags = [group.overflow() for group in dict.fromkeys((self.together, self.shard, self.replica))]
        known = [flag for flag in flags if flag is not None]
        return torch.stack(known).any() if known else None

    @contextmanager
    def uncompressed(self) -> Iterator[None]:
        """Inside, everything is sent as it is."""
        with ExitStack() as stack:
            for communicator in self.each():
                stack.enter_context(uncompressed(communicator))
            yield

    def close(self) -> None:
        """End the communicators' threads; nothing may be under way."""
        for communicator in self.each():
            communicator.close()


def groups_for(communicator: Communicator, settings: Config) -> Groups:
    """The groups of a run, on every rank of `communicator` at the same time.

    Args:
        communicator: spans all data-parallel ranks; where there are several axes it is renamed to what they make.

    Raises:
        ValueError: what the config says of communication cannot be done here.
    """
    communicator.follow(settings.communication)
    mesh = settings.redundancy.mesh(communicator.world)
    if len(mesh.axes) == 1:
        return Groups.whole(compressed(communicator, settings.compression, settings.seed))
    (inner, _), (outer, _) = mesh.axes
    near, far = (_along(communicator, mesh, axis, settings.communication) for axis in (inner, outer))
    communicator.axis = f"{inner}*{outer}"
    if settings.redundancy.secondary_ranks > 1:
        # What was gathered for forward has been rounded already; what backward gathers of it goes as it is.
        whole = compressed(communicator, settings.compression, settings.seed, NodeGrid(near, far))
        return Groups(whole, whole, whole, _alone(communicator), near, (far,))
    shard, replica = (compressed(group, settings.compression, settings.seed) for group in (near, far))
    return Groups(communicator, communicator, shard, replica, _alone(communicator))


def _along(communicator: Communicator, mesh: Mesh, axis: str, wishes: Communication) -> Communicator:
    """A group of an axis, which does as the config says on the network that it sees."""
    seen = tiers_along(mesh.placement(axis), wishes.network())
    group = communicator.along(mesh, axis)
    group.follow(replace(wishes, tiers=tuple(asdict(tier) for tier in seen)))
    return group


def _alone(communicator: Communicator) -> Communicator:
    solo = SoloCommunicator(communicator.axis)
    solo.observer = communicator.observer
    return solo
