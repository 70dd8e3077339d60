"""ZeRO performed: when a unit is gathered, reduced and freed. One code path for stages 0 to 3.

Hooks on the unit modules and on their parameters drive it, so any `nn.Module` works unchanged:

    forward of a unit      its parameters arrive, those of the next unit are asked for; afterwards they are freed
    backward reaches it    likewise, towards the front of the model
    a gradient is ready    it moves into the unit's buffer
    backward moves on      the reduction of the unit that it has left starts

Where nothing is sharded, the same calls find nothing to do.
"""

import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives.zero import Zero
from .batch import tensors
from .communicator import Communicator, Handle
from .groups import Groups
from .host_step import HostSteps
from .observer import Observer
from .partition import Part
from .sections import Buffers
from .unit import FlatUnit, Residency

# [Note: one reduction behind]
# While the reduction of a unit is under way, backward fills the gradient buffer of the next one. Before a third buffer
# is taken the oldest reduction is waited for, so gradients in full never take more than two units' memory, whatever
# the depth of the model.
REDUCTIONS_BEHIND = 1  # see [Note: one reduction behind]

BOUNDLESS = Buffers()


# [Note: when a unit is reduced]
# Not when its last gradient arrives: a rank that misses one (a branch not taken) would start the reduction later than
# the others, among other gathers, and ranks that order their collectives differently wait for ever. It is reduced when
# backward reaches the output of another unit after all calls of this one, which every rank that runs the same modules
# sees at the same place. Autograd runs later-made nodes first, so by then the unit's gradients are all here.


# [Note: several backwards in a micro-step]
# Two losses, or two pairs of forward and backward, between two steps: in torch their gradients add, so they do here.
# `engine.step` ends a micro-step; until then each further backward is reduced by itself and added to what is reduced.
# With accumulation nobody could tell a second loss from a second micro-step whose `step` was forgotten, and the two
# mean different sums: there it must be announced. A backward over a graph that an earlier one went through already may
# reach a module any number of times, so what was not called anew is reduced at its end. So is what ran in training mode
# without a graph: a reentrant checkpoint will run it again inside backward, any number of times.


def reduce_order(part: Part) -> tuple[int, int]:
    """Sorts units by their parts into the order in which every rank reduces them."""
    return -part.block if part.block >= 0 else 1, -part.number


class ZeroRuntime:
    """Moves the units of one model through its steps.

    Attributes:
        units: in the order of the forward pass as far as registration tells it, the root's first.
        used: parameters that got a gradient since the last optimizer step, on this rank.
        host_steps: steps units off the device, if any rest there.
        micro_step: how many micro-steps `end_micro_step` has ended since the last optimizer step.
        backwards: how many backwards have ended in this micro-step.
        announced: whether the next backward will be followed by another one of the same micro-step.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        units: list[FlatUnit],
        zero: Zero,
        groups: Groups,
        accumulation: int,
        buffers: Buffers = BOUNDLESS,
    ) -> None:
        self.model, self.units, self.zero, self.groups = model, units, zero, groups
        self.accumulation, self.buffers = accumulation, buffers
        self.observer: Observer = groups.everyone.observer
        self.micro_step = 0
        self.backwards = 0
        self.announced = False
        self.used: set[nn.Parameter] = set()
        self.host_steps: HostSteps | None = None
        self._owners: list[nn.Module] = [model, *blocks]
        self._block = {module: number - 1 for number, module in enumerate(self._owners)}
        self._of: dict[nn.Module, list[FlatUnit]] = {module: [] for module in self._owners}
        for unit in units:
            self._of[unit.owner].append(unit)
        # Every rank reduces in this order, whatever its own graph looked like: the blocks backwards, their last
        # parameters first, then the root, whose embedding gets its gradient last.
        trainable = [unit for unit in units if unit.trainable]
        self._reduce_order = sorted(trainable, key=lambda unit: reduce_order(unit.part))
        self._unit_of = {parameter: unit for unit in trainable for parameter in unit.parameters}
        self._backward_running = False
        self._pass = 0  # number of the backward that runs, or ran last
        self._more_follow = False  # it was announced that this backward is not the last one of its micro-step
        self._calls_left: Counter[nn.Module] = Counter()  # forwards that backward has not come to
        self._entered: set[nn.Module] = set()  # modules that backward has come to
        self._arrived: Counter[FlatUnit] = Counter()  # gradients of this backward
        self._reduced_inside: list[FlatUnit] = []
        self._called: set[nn.Module] = set()  # since the last backward began
        self._hidden: set[nn.Module] = set()  # called without a graph in this micro-step
        self._last: set[nn.Module] = set()  # whose units are reduced at the end of this backward
        self._behind: deque[tuple[FlatUnit, Handle]] = deque()
        self.before_backward: Callable[[], None] = lambda: None  # called before gradients of a micro-step are taken
        self._between_replicas: list[Handle] = []
        self._install_hooks()

    # State of the step #

    @property
    def communicator(self) -> Communicator:
        """The ranks whose gradients make one step."""
        return self.groups.together

    @property
    def deciding(self) -> Communicator:
        """The ranks that step, or do not, together: all of the run, unless each steps by itself."""
        return self.groups.together if self.groups.together is not self.groups.everyone else self.groups.run

    def work_in(self, groups: Groups) -> None:
        """Between steps, where nothing is sharded: have collectives span other groups from now on."""
        assert not self.zero.optimizer
        self.groups = groups
        for unit in self.units:
            unit.groups = groups

    @property
    def at_boundary(self) -> bool:
        """Whether this micro-step is the last one before the optimizer steps."""
        return self.micro_step == self.accumulation - 1

    @property
    def gradient_scale(self) -> float:
        """What a micro-step's gradient counts in the mean over ranks and micro-steps."""
        return 1.0 / (self.communicator.world * self.accumulation)

    # Hooks #

    def _install_hooks(self) -> None:
        for module in self._owners:
            module.register_forward_pre_hook(self._before_forward)
            module.register_forward_hook(self._after_forward)
        # Such a hook lives where Python's collector does not look: a strong reference would keep the model, the engine
        # and its groups' threads for ever.
        ready = weakref.WeakMethod(self._gradient_ready)
        for parameter in self._unit_of:
            parameter.register_post_accumulate_grad_hook(partial(_tell, ready))
        self.model.register_state_dict_pre_hook(lambda *_: self.settle())

    def _before_forward(self, module: nn.Module, arguments: Any) -> None:
        recomputing = torch._C._current_graph_task_id() != -1
        if not recomputing:
            if self._backward_running:
                raise RuntimeError(
                    "the last backward did not end (it raised an error), so gradients are incomplete and ranks may"
                    " disagree: start again from a checkpoint"
                )
            self.observer.enter("forward" if self._block[module] >= 0 else "forward.after", self._block[module])
        self._bring(module, -1 if recomputing else +1)

    def _after_forward(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # recomputed inside backward, which needs the parameters next and frees them itself
        outputs = [tensor for tensor in tensors(output) if tensor.requires_grad]
        if torch.is_grad_enabled() and outputs:
            self._calls_left[module] += 1
            self._called.add(module)
            reached = self._backward_hook(module)
            for tensor in outputs:
                tensor.register_hook(reached)
        elif module.training and not torch.is_grad_enabled():
            self._hidden.add(module)
        for unit in self._of[module]:
            unit.free()
        if self._block[module] >= 0:
            self.observer.enter("forward.after", self._block[module])

    def _backward_hook(self, module: nn.Module) -> Callable[[Tensor], None]:
        """What to do when a backward reaches the first of a call's outputs; a graph that is kept has several."""
        reached_by = 0

        def reached(gradient: Tensor) -> None:
            nonlocal reached_by
            self._begin_backward()
            if reached_by == self._pass:
                return
            if not reached_by:
                self._calls_left[module] -= 1
            reached_by = self._pass
            self._entered.add(module)
            self._free_reduced_inside()
            if module is not self.model:  # whose output may be its last block's, and that block's backward begins here
                self._reduce_left(module)
            if self._block[module] >= 0:
                self.observer.enter("backward", self._block[module])
            self._bring(module, -1)

        return reached

    def _bring(self, module: nn.Module, direction: int) -> None:
        """Have the module's units here, and those of the module that comes next on their way."""
        again = direction < 0
        for unit in self._of[module]:
            unit.gather(again=again)
        for unit in self._of[module]:
            unit.arrive()
        follows = self._block[module] + direction
        # The root is gathered for the whole pass, so its neighbour is the first block of the pass.
        if self._block[module] < 0:
            follows = 0 if direction > 0 else len(self._owners) - 2
        if 0 <= follows < len(self._owners) - 1:
            self._gather_ahead(self._of[self._owners[follows + 1]], again=again)
        after_that = follows + direction
        if 0 <= after_that < len(self._owners) - 1:
            self._fetch_ahead(self._of[self._owners[after_that + 1]])

    def _gather_ahead(self, units: list[FlatUnit], *, again: bool) -> None:
        """Ask for units before they are needed, within the bounds; all ranks decide alike, by sizes and order alone."""
        sharded = [unit for unit in units if unit.residency is Residency.SHARDED]
        live = sum(unit.elements for unit in self.units if unit.residency is not Residency.SHARDED and unit.sharded)
        ahead = 0
        for unit in sharded:
            ahead += unit.elements
            if ahead > self.buffers.ahead_elements or live + ahead > self.buffers.live_elements:
                return
            unit.gather(again=again)

    def _fetch_ahead(self, units: list[FlatUnit]) -> None:
        """Bring this rank's shards up that are gathered after the next ones, if they rest off the device."""
        ahead = 0
        for unit in units:
            ahead += unit.elements
            if ahead > self.buffers.ahead_elements:
                return
            unit.fetch()

    @contextmanager
    def visiting(self, module: nn.Module) -> Iterator[None]:
        """Have the module's units here while it is computed again. Those that only came for this are freed afterwards.

        Backward has brought them when it reached the module's output, unless it is at a later block of a segment.
        """
        units = self._of.get(module, [])
        absent = [unit for unit in units if unit.residency is Residency.SHARDED]
        for unit in absent:
            unit.gather(again=True)
        for unit in units:
            unit.arrive()
        try:
            yield
        finally:
            for unit in absent:
                unit.free()

    def _gradient_ready(self, parameter: nn.Parameter) -> None:
        self._begin_backward()
        if parameter.grad is None:  # a function in its way returned None: it counts as unused
            return
        unit = self._unit_of[parameter]
        if unit in self._reduced:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} in {unit.label} got another gradient after the unit was"
                " reduced in this backward; a module used twice under a reentrant checkpoint does that:"
                " pass use_reentrant=False"
            )
        unit.accept(parameter, self.gradient_scale)
        self.used.add(parameter)
        self._arrived[unit] += 1
        self._reduce_complete()

    # Backward #

    def _begin_backward(self) -> None:
        if self._backward_running:
            return
        if self.backwards and self.accumulation > 1 and not self._more_follow:
            raise RuntimeError(
                f"backward number {self.backwards + 1} since the last engine.step(), and gradient_accumulation_steps ="
                f" {self.accumulation}: call engine.step() after each micro-step, or, where a micro-step has several"
                " losses, engine.backward(loss, more=True) for all but its last"
            )
        if self.backwards and self.host_steps is not None:
            raise RuntimeError(
                "a second backward before engine.step(), and zero_optimization.offload_optimizer steps what the first"
                " one brought: add the losses and call backward once"
            )
        self.before_backward()
        self._more_follow, self.announced = self.announced, False
        self._pass += 1
        self._last = self._hidden | (set(self._owners) - self._called if self.backwards else set())
        self._called.clear()
        for unit in self._reduce_order:
            unit.keep_reduced()
        self._backward_running = True
        self._reduced: set[FlatUnit] = set()
        self._next_to_reduce = 0
        self._entered.clear()
        self._arrived.clear()
        self.observer.enter("backward.begin", len(self._owners) - 1)
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _reduce_complete(self) -> None:
        """Start the reduction of units of a block that backward is in, but that have all their gradients.

        That bounds the gradients in full by the size of units instead of blocks. It keeps the order of collectives on
        a rank that misses a gradient: inside a block there are no others.
        """
        while self._next_to_reduce < len(self._reduce_order):
            unit = self._reduce_order[self._next_to_reduce]
            alone = len(self._of[unit.owner]) == 1  # it is reduced when backward leaves the block, which comes next
            if alone or self._arrived[unit] < len(unit.parameters):
                return
            if unit.owner not in self._entered or self._calls_left[unit.owner] or unit.owner in self._last:
                return
            self._reduce(unit)
            self._reduced_inside.append(unit)

    def _reduce_left(self, reached: nn.Module) -> None:
        """Start the reductions, in order, of units whose backward is over: see [Note: when a unit is reduced]."""
        if reached is self.model:
            return  # nothing is over at the model's output, which may be its last block's, reached just before
        while self._next_to_reduce < len(self._reduce_order):
            unit = self._reduce_order[self._next_to_reduce]
            if unit.owner in (reached, self.model) or self._calls_left[unit.owner] or unit.owner in self._last:
                return
            unit.free()
            self._reduce(unit)

    def _free_reduced_inside(self) -> None:
        """Free units that were reduced before backward left their block.

        Not when they were reduced: the rest of the block's backward may read a value whose gradient is complete (a
        detached use of it).
        """
        for unit in self._reduced_inside:
            unit.free()
        self._reduced_inside.clear()

    def _reduce(self, unit: FlatUnit) -> None:
        self._next_to_reduce += 1
        self._reduced.add(unit)
        if not (self.zero.gradients or (self.at_boundary and not self._more_follow)):
            return
        while len(self._behind) > self._most_behind:
            self._absorb_oldest()
        if self.host_steps is not None:
            self.host_steps.reducing(unit)
        self._behind.append((unit, unit.reduce()))

    @property
    def _most_behind(self) -> int:
        """Reductions that may be under way when another one begins."""
        return REDUCTIONS_BEHIND

    def _absorb_oldest(self) -> None:
        unit, handle = self._behind.popleft()
        handle.wait()
        unit.absorb()
        if self.at_boundary and not self._more_follow:
            self._reduce_between_replicas(unit)
        if self.host_steps is not None:
            self.host_steps.reduced(unit)

    def _absorb_all(self) -> None:
        while self._behind:
            self._absorb_oldest()

    def _reduce_between_replicas(self, unit: FlatUnit) -> None:
        self._between_replicas.append(unit.reduce_between_replicas())

    def _end_backward(self) -> None:
        """Autograd has run to its end: reduce what is left (units with unused parameters), and wait for all of it."""
        self.observer.enter("backward.end", -1)
        for unit in self._reduce_order[self._next_to_reduce :]:
            self._reduce(unit)
        self._free_reduced_inside()
        self._absorb_all()
        while self._between_replicas:
            self._between_replicas.pop(0).wait()
        for unit in self._reduce_order:
            unit.add_kept()
        for unit in self.units:
            unit.free()
        self._backward_running = False
        self.backwards += 1

    # Step #

    def end_micro_step(self) -> bool:
        """Whether the micro-step that ends here is the last one before the optimizer steps.

        Raises:
            RuntimeError: it has no backward, or one that was announced did not come.
        """
        if not self.backwards:
            raise RuntimeError("engine.step() without a backward before it: nothing has been accumulated")
        if self._more_follow:
            raise RuntimeError(
                "engine.step() after engine.backward(loss, more=True): leave out more=True for the last loss of a"
                " micro-step"
            )
        self._forget_calls()
        self.micro_step += 1
        return self.micro_step == self.accumulation

    def _forget_calls(self) -> None:
        """Calls whose backward never came, of a loss that was dropped, hold up no reduction of the next micro-step."""
        self.backwards = 0
        self._calls_left.clear()
        self._hidden.clear()

    @property
    def missing(self) -> bool:
        """Whether some parameters got no gradient on this rank since the last step."""
        return len(self.used) < len(self._unit_of)

    def used_anywhere(self, missed: bool) -> set[nn.Parameter]:
        """Parameters that got a gradient on any rank since the last step; the others must not be stepped.

        Args:
            missed: whether any rank is `missing` some; only then is the whole bitmap sent.
        """
        parameters = list(self._unit_of)
        if not missed:
            return set(parameters)
        flags = self._largest([parameter in self.used for parameter in parameters], "used parameters")
        return {parameter for parameter, flag in zip(parameters, flags, strict=True) if flag}

    def _largest(self, flags: list[bool], label: str) -> list[int]:
        """Each flag's maximum over the ranks."""
        device = self.units[0].full.device
        tensor = torch.zeros(len(flags), dtype=torch.int32, device=device)
        if any(flags):
            tensor.copy_(torch.tensor(flags))
        self.communicator.all_reduce(tensor, label, largest=True, scalar=True).wait()
        self.observer.synchronized()
        flags_anywhere: list[int] = tensor.tolist()
        return flags_anywhere

    def end_step(self) -> None:
        """The optimizer has stepped: the next backward starts afresh."""
        for unit in self._reduce_order:
            unit.forget_gradients()
        self.used.clear()
        self._forget_calls()
        self.micro_step = 0

    def drop_step(self) -> None:
        """The optimizer does not step: gradients are forgotten, parameters stay as they are."""
        for unit in self._reduce_order:
            unit.drop_gradients()
        self.end_step()

    def settle(self) -> None:
        """Wait for the parameters that the last step sent around, as the next forward would."""
        for unit in self.units:
            unit.arrive()

    def gathered_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter in full as (name, values), one unit in memory at a time; all ranks must take part."""
        for unit in self.units:
            unit.gather()
            unit.arrive()
            for slot in unit.part.slots:
                yield slot.name, slot.parameter.detach()
            unit.free()


def _tell(hook: Callable[[], Callable[[nn.Parameter], None] | None], parameter: nn.Parameter) -> None:
    """Call a runtime's hook, if the runtime is still there."""
    call = hook()
    if call is not None:
        call(parameter)
