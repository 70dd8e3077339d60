"""A flat unit: parameters that are gathered, reduced, stepped and freed together.

They lie end to end in one buffer, padded to a multiple of the ranks; each `Parameter` object is kept and becomes a view
of it. Memory is freed by resizing the storage: views, and what autograd saved of them, stay valid for the next gather.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor, nn

from ..collectives.zero import UnitSize, Zero, padded
from .communicator import DONE, Communicator, Handle
from .groups import Groups
from .observer import Observer
from .optimizer_rest import OptimizerRest
from .parameter_rest import ParameterRest
from .partition import Part
from .tier import StateLayout, Tiers

FULL_PRECISION = {torch.float64: torch.float64}
"""dtype of an optimizer's values by dtype of the parameters; all others are stepped in fp32."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the optimizer's values for parameters of `dtype`."""
    return FULL_PRECISION.get(dtype, torch.float32)


class Residency(Enum):
    """Where the parameters of a unit are."""

    SHARDED = auto()  # my 1/n
    GATHERING = auto()  # the rest is on its way
    GATHERED = auto()  # all of them: the only state that a forward or a backward may see


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one parameter that lies in this rank's shard, in elements of the shard."""

    parameter: nn.Parameter
    start: int
    stop: int


class FlatUnit:
    """The buffers of one unit on one rank, and the moves between them.

    S elements in the unit with padding, s = S / n in a shard of n ranks (s = S at ZeRO stage 0, where all is kept
    whole), t = S / m in a second shard of m ranks, where there is one.

    Attributes:
        full: [S] parameters; its storage is empty while the unit is SHARDED.
        shard: [s] this rank's parameters: a view of `full` unless parameters are sharded; not set where they rest off
            the device.
        master: [s] what the optimizer steps: `shard` itself, or an fp32 copy where that is 16 bits wide.
        gradient: [S] gradients of this backward, in the parameters' dtype or in one of their own, in which they are
            also reduced; its storage is empty outside of backward when gradients are sharded.
        gradient_shard: [s] reduced gradients: a view of `gradient` unless gradients are sharded.
        secondary: [t] parameters as they were last gathered for a forward, from which backward gathers them inside
            the secondary group; [0] where there is no such group.
        rest: master and gradient shard, if they rest off the device.
        away: the shard of the parameters, if it rests off the device.
        kept: [s] what was reduced before another backward of the same step began, where it must not be reduced again.
        between_replicas: whether the gradient shard is summed over replicas already.
    """

    rest: OptimizerRest | None = None
    away: ParameterRest | None = None

    def __init__(
        self,
        part: Part,
        zero: Zero,
        groups: Groups,
        dtype: torch.dtype,
        observer: Observer,
        gradient_dtype: torch.dtype | None = None,
    ):
        self.part, self.groups, self.observer = part, groups, observer
        self.zero = zero.of_unit(part.persistent)
        self.owner, self.block, self.label, self.trainable = part.owner, part.block, part.label, part.trainable
        self.group = part.slots[0].group
        self.parameters = [slot.parameter for slot in part.slots]
        sharing = groups.shard
        self.elements = padded(
            sum(parameter.numel() for parameter in self.parameters), sharing.world * groups.replica.world
        )
        parts = sharing.world if zero.optimizer else 1
        size = self.elements // parts
        self.bounds = (sharing.rank % parts * size, sharing.rank % parts * size + size)
        self.residency = Residency.GATHERED
        self.arriving: Handle | None = None
        self.seen: set[nn.Parameter] = set()
        self.kept: Tensor | None = None
        self.between_replicas = False
        self._lay_out(dtype)
        self._gradient_dtype = gradient_dtype or dtype

    @property
    def sharded(self) -> bool:
        """Whether its parameters are."""
        return self.zero.parameters

    @property
    def size(self) -> UnitSize:
        """What the closed forms of collectives/zero.py need to know of the unit."""
        return UnitSize(
            elements=self.elements,
            padding=self.elements - sum(parameter.numel() for parameter in self.parameters),
            element_bytes=self.full.element_size(),
            trainable=self.trainable,
            persistent=self.part.persistent,
            gradient_bytes=self._gradient_dtype.itemsize if self.trainable else None,
            optimizer_tier="device" if self.rest is None else self.rest.tier,
            parameter_tier="device" if self.away is None else self.away.tier,
        )

    def _lay_out(self, dtype: torch.dtype) -> None:
        """Copy the parameters into one buffer and make them views of it."""
        device = self.parameters[0].device
        with self.observer.category("parameters"), torch.no_grad():
            self.full = torch.empty(self.elements, dtype=dtype, device=device)
            self.views: dict[nn.Parameter, tuple[int, int]] = {}
            self._here: list[Tensor] = []
            offset = 0
            for parameter in self.parameters:
                stop = offset + parameter.numel()
                view = self.full[offset:stop].view(parameter.shape)
                view.copy_(parameter)
                parameter.data = view
                self._here.append(view)
                self.views[parameter] = (offset, stop)
                offset = stop
            self.full[offset:].zero_()
        if self.zero.parameters:
            with self.observer.category("counters"):
                nowhere = torch.full((), torch.nan, dtype=dtype, device=device)
            self._gone = [nowhere.expand(parameter.shape) for parameter in self.parameters]

    @property
    def wide(self) -> torch.dtype:
        """dtype of the master."""
        return wide_dtype(self.full.dtype)

    def take_shard(self, tiers: Tiers | None = None, layout: StateLayout | None = None) -> None:
        """Once every rank has the same values: keep this rank's shard, its master copy, and free what is sharded.

        Args:
            tiers: where what need not be on the device rests; None: all is on the device.
            layout: what the optimizer keeps per element, if the unit's optimizer state is to rest off the device.
        """
        start, stop = self.bounds
        mine = self.full[start:stop]
        with torch.no_grad():
            if tiers is not None and tiers.placement.parameters != "device" and self.sharded:
                self.away = ParameterRest(tiers, self.label, mine)
            else:
                with self.observer.category("parameters"):
                    self.shard = mine.clone() if self.zero.parameters else mine
            if tiers is not None and layout is not None and self.trainable:
                self.rest = OptimizerRest(tiers, self.label, mine, self.wide, self._gradient_dtype, layout)
                self.master, self.gradient_shard = self.rest.master, self.rest.gradient
            elif self.trainable:
                with self.observer.category("optimizer"):
                    own = self.away is None and mine.dtype == self.wide
                    self.master = self.shard if own else mine.to(self.wide, copy=True)
        if self.trainable:
            self._make_gradients(self._gradient_dtype)
        if self.zero.parameters:
            self.free()
        keeps = self.zero.parameters and self.groups.secondary.world > 1
        with self.observer.category("parameters"):
            kept = self.elements // self.groups.secondary.world if keeps else 0
            self.secondary = self.full.new_empty(kept)
        self._secondary_is_fresh = False

    def _make_gradients(self, dtype: torch.dtype) -> None:
        start, stop = self.bounds
        with self.observer.category("gradients"):
            self.gradient = torch.zeros(self.elements, dtype=dtype, device=self.full.device)
        self._gradient_of = {p: self.gradient[a:b].view(p.shape) for p, (a, b) in self.views.items()}
        if self.zero.gradients:
            if self.rest is None:
                with self.observer.category("gradients"):
                    self.gradient_shard = torch.zeros(stop - start, dtype=dtype, device=self.full.device)
            self._release(self.gradient)
        elif self.rest is None:
            self.gradient_shard = self.gradient[start:stop]
        self.shard_filled = False

    def pieces(self) -> list[Piece]:
        """The trainable parameters that have elements in this rank's shard."""
        start, stop = self.bounds
        cut = ((p, max(a, start) - start, min(b, stop) - start) for p, (a, b) in self.views.items())
        return [Piece(parameter, a, b) for parameter, a, b in cut if a < b]

    # Parameters #

    def fetch(self) -> None:
        """Start to bring this rank's shard up, if it rests off the device and will be needed."""
        if self.away is not None and self.residency is Residency.SHARDED:
            self.away.fetch()

    def gather(self, *, again: bool = False) -> None:
        """Start to collect the parameters from all ranks that share them, unless they are here or on their way.

        Args:
            again: for backward, after a forward that has filled the second shard, where there is one.
        """
        if self.residency is not Residency.SHARDED:
            return
        self._restore(self.full, "buffers")
        self._point_to(self._here)
        nearby = again and self._secondary_is_fresh
        with torch.no_grad():
            if nearby:
                self._part(self.groups.secondary).copy_(self.secondary)
            elif self.away is not None:
                self.away.copy_into(self._part(self.groups.shard))
            else:
                self._part(self.groups.shard).copy_(self.shard)
        self._secondary_is_fresh = nearby  # else it is filled again on arrival, with what this forward computes with
        self._start_gather(self.groups.secondary if nearby else self.groups.shard)

    def master_piece(self, piece: Piece) -> Tensor:
        """A piece of the master as a tensor of its own."""
        return self.master[piece.start : piece.stop] if self.rest is None else self.rest.piece(piece.start, piece.stop)

    @property
    def narrow(self) -> Tensor | None:
        """[s] where a step may write the new values in the parameters' dtype; None if they are to be copied after it,
        or the master is what is computed with.
        """
        if self.rest is not None:
            return None if self.rest.outgoing is self.rest.master else self.rest.outgoing
        return None if self.away is not None or self.master is self.shard else self.shard

    def renew(self) -> None:
        """The master was stepped: the shard takes its values, wherever it is."""
        if self.rest is not None and self.away is not None:
            self.rest.sent = self.away.store(self.rest.outgoing, self.rest.stepped)
        elif self.rest is not None:
            self.rest.send(self.shard)
        elif self.away is not None:
            self.away.store_down(self.master.to(self.full.dtype))
        elif self.master is not self.shard:
            self.shard.copy_(self.master)

    def publish(self) -> None:
        """Start to send this rank's stepped shard to the ranks that keep whole parameters."""
        if self.zero.optimizer and not self.zero.parameters:
            self._start_gather(self.groups.shard)

    def _start_gather(self, group: Communicator) -> None:
        self.arriving = group.all_gather(self.full, f"parameters of {self.label}")
        self.residency = Residency.GATHERING

    def present(self, *, changed: bool = False) -> AbstractContextManager[None]:
        """Inside, master and optimizer state have their values, wherever they rest; `changed` ones are kept."""
        return nullcontext() if self.rest is None else self.rest.present(changed=changed)

    def own_values(self) -> Tensor:
        """[s] what the optimizer steps, or the frozen values: the living ones if they are here, else a copy.

        Where they rest in a file, call it while they are `present`.
        """
        if self.trainable:
            return self.master
        if self.away is None:
            return self.shard
        values = torch.empty(self.away.elements, dtype=self.full.dtype, device=self.full.device)
        self.away.copy_into(values)
        return values

    def show_master(self) -> None:
        """The master was set: the shard takes its values, wherever both are."""
        if self.rest is None:
            self.renew()
            return
        with self.present():
            values = self.master.to(self.full.device, self.full.dtype, copy=True)
        if self.rest.outgoing is not self.rest.master and self.rest.outgoing is not self.rest.gradient:
            self.rest.outgoing.copy_(values)  # what a late update will show
        if self.away is not None:
            self.away.store_down(values)
        else:
            self.shard.copy_(values)

    def gathered_master(self) -> Tensor:
        """[S] what the optimizer steps (or the frozen values), in full in a buffer of its own. All ranks take part."""
        start, stop = self.bounds
        with self.present():
            mine = self.own_values()
            if not self.zero.optimizer and self.rest is None:
                return mine
            flat = torch.empty(self.elements, dtype=mine.dtype, device=self.full.device)
            flat[start:stop].copy_(mine)
        if not self.zero.optimizer:
            return flat
        self.groups.shard.all_gather(flat, f"masters of {self.label}").wait()
        return flat

    def arrive(self) -> None:
        """Wait for the parameters that are on their way."""
        if self.arriving is not None:
            self.arriving.wait()
            self.arriving = None
            self.residency = Residency.GATHERED
            if not self._secondary_is_fresh and self.secondary.numel():
                with torch.no_grad():
                    self.secondary.copy_(self._part(self.groups.secondary))
                self._secondary_is_fresh = True

    def _part(self, group: Communicator) -> Tensor:
        """The part of the gathered parameters that is this rank's in a group."""
        return self.full.view(group.world, -1)[group.rank]

    def free(self) -> None:
        """Keep only the shard, if parameters are sharded."""
        if self.zero.parameters and self.residency is not Residency.SHARDED:
            self.arrive()
            self._point_to(self._gone)
            self._release(self.full)
            self.residency = Residency.SHARDED

    def adopt(self) -> None:
        """Train on from what `full` holds: someone has set the parameters while they were GATHERED."""
        start, stop = self.bounds
        with torch.no_grad():
            mine = self.full[start:stop]
            if self.away is not None:
                self.away.store_down(mine)
            elif self.zero.parameters:
                self.shard.copy_(mine)
            if self.rest is not None:
                self.rest.set(mine)
            elif self.trainable and (self.away is not None or self.master is not self.shard):
                self.master.copy_(mine)

    def _point_to(self, values: list[Tensor]) -> None:
        """Let the parameters show these values: NaN for what is not here, where freed memory would end the process."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value

    # Gradients #

    def accept(self, parameter: nn.Parameter, scale: float) -> None:
        """Take `scale` times the gradient that autograd left on a parameter, and clear it there."""
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        if self.zero.gradients and self.gradient.untyped_storage().size() == 0:
            self._restore(self.gradient, "buffers")
        view = self._gradient_of[parameter]
        with torch.no_grad():
            if parameter in self.seen:
                view.add_(gradient, alpha=scale)
            elif torch.promote_types(gradient.dtype, view.dtype) == gradient.dtype:
                torch.mul(gradient, scale, out=view)
            else:  # widened first: the product would be rounded in the narrow format
                view.copy_(gradient).mul_(scale)
        self.seen.add(parameter)

    def keep_reduced(self) -> None:
        """Before another backward: set apart what is reduced already, so that it is not reduced again."""
        if self.shard_filled and (self.between_replicas or not self.zero.gradients):
            with self.observer.category("gradients"):
                self.kept = self.gradient_shard.clone()
            self.forget_gradients()

    def add_kept(self) -> None:
        """After another backward: put back what was set apart."""
        if self.kept is not None:
            with torch.no_grad():
                self.gradient_shard.add_(self.kept)
            self.kept, self.shard_filled = None, True

    def fill_unseen(self) -> None:
        """Zeros where no gradient came: in parameters that were not used, and in the padding."""
        if self.gradient.untyped_storage().size() == 0:
            self._restore(self.gradient, "buffers")
        with torch.no_grad():
            for parameter, (start, stop) in self.views.items():
                if parameter not in self.seen:
                    self.gradient[start:stop].zero_()
            used = sum(parameter.numel() for parameter in self.parameters)
            if used < self.elements:  # a lossy sum of the last step may have left something there
                self.gradient[used:].zero_()

    def reduce(self) -> Handle:
        """Start to sum the gradients over the ranks that share the unit."""
        self.fill_unseen()
        if self.zero.optimizer:
            return self.groups.shard.reduce_scatter(self.gradient, f"gradients of {self.label}")
        return self.groups.shard.all_reduce(self.gradient, f"gradients of {self.label}")

    def reduce_between_replicas(self) -> Handle:
        """Start to sum the gradient shard over the ranks that have the same one: the second hop of two.

        Once per step: the sums of a step's micro-steps are summed as well as each of them (Zhang et al. 2022, MiCS:
        2-hop gradient synchronization).
        """
        if self.groups.replica.world == 1:
            return DONE
        self.between_replicas = True
        return self.groups.replica.all_reduce(self.gradient_shard, f"gradient shards of {self.label}")

    @property
    def holders(self) -> int:
        """How many ranks of the run have the same reduced gradient shard as this one."""
        return self.groups.holders(sharded=self.zero.optimizer)

    def gradient_norm(self, dtype: torch.dtype) -> Tensor:
        """Norm of the reduced gradient shard, a scalar of `dtype` on the device."""
        if self.rest is not None:
            return self.rest.norm(dtype, self.full.device)
        return torch.linalg.vector_norm(self.gradient_shard, dtype=dtype)

    def absorb(self) -> None:
        """Add the reduced chunk to the gradient shard and free the rest, if gradients are sharded or rest elsewhere."""
        start, stop = self.bounds
        chunk = self.gradient[start:stop]
        if self.rest is not None:
            self.rest.take(chunk, add=self.shard_filled)
        if not self.zero.gradients:
            self.shard_filled = True
            return
        if self.rest is None:
            with torch.no_grad():
                if self.shard_filled:
                    self.gradient_shard.add_(chunk)
                else:
                    self.gradient_shard.copy_(chunk)
        self.shard_filled = True
        self.seen.clear()
        self._release(self.gradient)

    def forget_gradients(self) -> None:
        """The step is taken: the next gradient overwrites instead of adding."""
        self.seen.clear()
        self.shard_filled = self.between_replicas = False

    def drop_gradients(self) -> None:
        """The step is not taken: nothing of its gradients stays, not even in the padding that nobody overwrites."""
        self.forget_gradients()
        if not self.zero.gradients:
            self.gradient.zero_()

    # Storage #

    def _release(self, tensor: Tensor) -> None:
        tensor.untyped_storage().resize_(0)
        self.observer.released(tensor)

    def _restore(self, tensor: Tensor, category: str) -> None:
        tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
        self.observer.restored(tensor, category)
