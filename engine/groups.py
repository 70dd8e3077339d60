"""The groups that a model's collectives run on, made once from the config: communicators along the axes of its mesh."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from ..collectives.groups import JOINED, PIPELINE, TIED, Mesh, tiers_along
from .communication_section import Communication
from .communicator import Communicator, SoloCommunicator
from .compressed import NodeGrid, compressed, uncompressed
from .config import Config
from .mesh import OF_SAMPLES
from .roles import Role


@dataclass(frozen=True, slots=True)
class Groups:
    """What each collective of an engine spans. Where nothing is kept twice, `shard` is `everyone`.

    Attributes:
        everyone: all ranks that train the same parameters on tokens of their own: initial values.
        together: ranks whose gradients make one step: the mean, flags. All of them, or each by itself.
        shard: ranks that together hold one copy of what is sharded: gathers, reduce-scatters, sums over shards.
        replica: ranks that hold the same shard: reduced gradients are summed over them.
        secondary: ranks that together hold the second copy of the parameters; a group of one where there is none.
        others: that compressed collectives of these are made of.
        beside: the axes along which ranks share one model, and "data", by name; without those of a single rank.
        whole: all ranks of the run; None where they are `everyone`.
        copies: how many ranks along the axes beside have the same reduced gradients of the units that use these groups.
        sums_beside: whether `replica` is such an axis, along which gradients are summed too.
        expert: data-parallel ranks that have different experts; `expert_data` those that have the same ones: what is
            shared and summed of these. None where all have all.
    """

    everyone: Communicator
    together: Communicator
    shard: Communicator
    replica: Communicator
    secondary: Communicator
    others: tuple[Communicator, ...] = ()
    beside: Mapping[str, Communicator] = field(default_factory=dict)
    whole: Communicator | None = None
    copies: int = 1
    sums_beside: bool = False
    expert: Communicator | None = None
    expert_data: Communicator | None = None

    @property
    def run(self) -> Communicator:
        """All ranks of the run: what a step is decided by."""
        return self.everyone if self.whole is None else self.whole

    @property
    def same_samples(self) -> int:
        """How many ranks are given the same samples: those that share a model, or a sequence."""
        return self.run.world // self.axis("data").world

    def axis(self, name: str) -> Communicator:
        """The ranks along an axis of the mesh; a group of one where it has no others. Those of "data" have samples of
        their own.
        """
        if name in self.beside:
            return self.beside[name]
        if name == "expert" and self.expert is not None:
            return self.expert
        return self.everyone if name == "data" else _alone(self.everyone, name)

    def of(self, role: Role) -> "Groups":
        """Those of a unit whose parameters have a role.

        Raises:
            ValueError: gradients that would have to be summed over replicas as well as along another axis.
        """
        if "expert" in role.cut and self.expert_data is not None:
            same = self.expert_data
            alike = replace(self, everyone=same, together=same, shard=same, expert=None, expert_data=None)
            return alike.of(role)
        copies = prod(self.beside[name].world for name in self._sharing(role))
        partial = [self.axis(name) for name in role.partial if self.axis(name).world > 1]
        if not partial:
            return replace(self, copies=copies)
        if self.replica.world > 1 or len(partial) > 1:
            raise ValueError(
                f"gradients are sums over {', '.join(role.partial)} and over replicas of shards"
                " (zero_optimization.mics_shard_size); allowed: one of the two"
            )
        return replace(self, replica=partial[0], copies=copies, sums_beside=True)

    def replicate(self, tensors: Iterable[Tensor], role: Role) -> None:
        """The same values on all ranks that are to have them, before training."""
        tensors = list(tensors)
        (self.everyone if "expert" not in role.cut else self.of(role).everyone).replicate(tensors)
        for name in self._sharing(role):
            self.beside[name].replicate(tensors)

    def _sharing(self, role: Role) -> list[str]:
        """The axes beside along which what has a role is the same: not its parts, not what is tied to nothing."""
        own = {*OF_SAMPLES, PIPELINE, *role.cut, *({TIED} - {*role.partial})}
        return [name for name in self.beside if name not in own]

    def holders(self, *, sharded: bool) -> int:
        """How many ranks of the run have the same reduced gradient, of a unit that is sharded over `shard` or not."""
        if not sharded:
            return self.copies * self.together.world
        return self.copies * (1 if self.sums_beside else self.replica.world)

    @classmethod
    def only(cls, everyone: Communicator) -> "Groups":
        """Nothing is kept twice."""
        return cls(everyone, everyone, everyone, _alone(everyone), _alone(everyone))

    @classmethod
    def apart(cls, everyone: Communicator) -> "Groups":
        """Every rank steps by itself."""
        alone = _alone(everyone)
        return cls(everyone, alone, alone, alone, alone)

    def each(self) -> tuple[Communicator, ...]:
        """The communicators, each once."""
        kept = (self.everyone, self.together, self.shard, self.replica, self.secondary, *self.others)
        kept += tuple(group for group in (self.expert, self.expert_data) if group is not None)
        return tuple(dict.fromkeys((*kept, *self.beside.values(), self.run)))

    def overflow(self) -> Tensor | None:
        """Whether a collective of gradients made inf or nan of what it sent: a flag on the device [], of this rank."""
        reducing = (self.together, self.shard, self.replica, *([self.expert_data] if self.expert_data else []))
        flags = [group.overflow() for group in dict.fromkeys(reducing)]
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
        communicator: spans all ranks; where there are several axes it is renamed to what they make.

    Raises:
        ValueError: what the config says of communication cannot be done here.
    """
    communicator.follow(settings.communication)
    parallelism = settings.parallelism
    data = settings.redundancy.mesh(settings.sample_ranks)
    mesh = parallelism.mesh(data)
    if len(mesh.axes) == 1 and mesh == data:
        return Groups.only(compressed(communicator, settings.compression, settings.seed))
    communicator.axis = JOINED.join(name for name, _ in mesh.axes)
    if mesh == data:
        return _redundant(communicator, communicator, mesh, settings)
    beside = {
        name: _along(communicator, mesh, name, settings.communication)
        for name, size in parallelism.sizes.items()
        if size > 1 and name != "data"
    }
    names = JOINED.join(name for name, _ in mesh.axes if name in OF_SAMPLES or name in data.sizes)
    samples = JOINED.join(data.sizes)
    everyone = _along(communicator, mesh, names, settings.communication)
    beside["data"] = everyone if samples == names else _along(communicator, mesh, samples, settings.communication)
    if len(data.axes) == 1:
        groups = Groups.only(compressed(everyone, settings.compression, settings.seed))
    else:
        groups = _redundant(communicator, everyone, mesh, settings)
    return replace(groups, beside=beside, whole=communicator)


def tying(groups: Groups, settings: Config, stages: tuple[int, ...]) -> Groups:
    """The same with the axis TIED, which joins the ranks at these places of each pipeline; all ranks must call it."""
    mesh = settings.mesh
    members = tuple(tuple(pipeline[stage] for stage in stages) for pipeline in mesh.groups(PIPELINE))
    tied = _following(groups.run.among(members, TIED), mesh, settings.communication)
    return replace(groups, beside={**groups.beside, TIED: tied})


def _redundant(communicator: Communicator, everyone: Communicator, mesh: Mesh, settings: Config) -> Groups:
    """The groups of data-parallel ranks that keep something twice.

    Args:
        communicator: of all ranks of the mesh; `everyone`: of the data-parallel ones.
    """
    (inner, _), (outer, _) = settings.redundancy.mesh(settings.sample_ranks).axes
    near, far = (_along(communicator, mesh, axis, settings.communication) for axis in (inner, outer))
    if settings.redundancy.expert_ranks > 1:
        groups = Groups.only(compressed(everyone, settings.compression, settings.seed))
        return replace(groups, expert=near, expert_data=compressed(far, settings.compression, settings.seed))
    if settings.redundancy.secondary_ranks > 1:
        # What was gathered for forward has been rounded already; what backward gathers of it goes as it is.
        whole = compressed(everyone, settings.compression, settings.seed, NodeGrid(near, far))
        return Groups(whole, whole, whole, _alone(everyone), near, (far,))
    shard, replica = (compressed(group, settings.compression, settings.seed) for group in (near, far))
    return Groups(everyone, everyone, shard, replica, _alone(everyone))


def _along(communicator: Communicator, mesh: Mesh, axis: str, wishes: Communication) -> Communicator:
    """A group of an axis, which does as the config says."""
    return _following(communicator.along(mesh, axis), mesh, wishes)


def _following(group: Communicator, mesh: Mesh, wishes: Communication) -> Communicator:
    """The group of an axis, from now on as the config says on the network that it sees."""
    seen = tiers_along(mesh.placement(group.axis), wishes.network()) if wishes.tiers else ()
    group.follow(replace(wishes, tiers=tuple(asdict(tier) for tier in seen)))
    return group


def _alone(communicator: Communicator, axis: str | None = None) -> Communicator:
    solo = SoloCommunicator(communicator.axis if axis is None else axis)
    solo.observer = communicator.observer
    return solo
