"""Optimizer steps on the host: each unit as soon as its gradient is there, while those of the next ones still come.

Ren et al. 2021 (ZeRO-Offload), section 4: gradients go down while backward goes on, the host steps them there. Where
nothing needs all gradients first, a unit is stepped when its reduction ends; a clipped step begins when the norm is
known; a delayed one runs on through the next forward and backward (section 5.2).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .optimizer_rest import OptimizerRest
from .tier import Tiers

if TYPE_CHECKING:
    from .optimizer import ShardedOptimizer
    from .unit import FlatUnit


class HostSteps:
    """Starts the steps of the units whose optimizer state rests off the device, and brings their results up.

    Attributes:
        delayed: whether parameters show an update one step late by now.
    """

    def __init__(self, tiers: Tiers, units: "Sequence[FlatUnit]") -> None:
        """`units` in the order in which backward finishes with them."""
        self.tiers, self.placement = tiers, tiers.placement
        self.units = [unit for unit in units if unit.rest is not None]
        self.steps = 0
        self._begun: dict[FlatUnit, dict[str, Any]] = {}
        self._late: set[FlatUnit] = set()
        self._may_begin: Callable[[FlatUnit], bool] = lambda unit: False

    def serve(self, optimizer: "ShardedOptimizer") -> None:
        """Step as this optimizer says."""
        self.optimizer, self.runtime = optimizer, optimizer.runtime
        needs_all = optimizer.clip > 0.0 or optimizer.scaler.policy.skip
        if self.placement.step_in_backward and not needs_all and self.placement.delay_after is None:
            self._may_begin = self._has_all_gradients

    @property
    def delayed(self) -> bool:
        return self.placement.delay_after is not None and self.steps > self.placement.delay_after

    # In backward #

    def reducing(self, unit: "FlatUnit") -> None:
        """The unit's gradients are on their way: its state may be, too."""
        if unit.rest is not None and self._may_begin(unit):
            unit.rest.fetch()

    def reduced(self, unit: "FlatUnit") -> None:
        """The unit's gradient is going down: step it when it is there."""
        if unit.rest is not None and self._may_begin(unit):
            self._begun[unit] = self.optimizer.hyper(unit)
            self._start(unit, set(unit.parameters), 1.0 / self.optimizer.scaler.scale)

    def _has_all_gradients(self, unit: "FlatUnit") -> bool:
        """No other rank can add to what is used: every parameter of the unit got a gradient here."""
        return self.runtime.at_boundary and self.runtime.used.issuperset(unit.parameters)

    # In the step #

    def start_others(self, used: set, multiplier: float) -> None:
        """Start the units that backward has not started.

        Raises:
            RuntimeError: a learning rate (or the like) was changed after a unit was stepped with the old one.
        """
        for unit, hyper in self._begun.items():
            if hyper != self.optimizer.hyper(unit):
                raise RuntimeError(
                    f"a parameter group was changed between backward and step, but {unit.label} was stepped in"
                    " backward: change it before, or set zero_optimization.offload_optimizer.step_in_backward = false"
                )
        self.steps += 1
        if self._late:
            self.bring_late()
        for unit in self.units:
            if unit not in self._begun:
                self.optimizer.enter("host", unit)
                self._start(unit, used, multiplier)
        self._begun.clear()
        if self.delayed:
            self._late = set(self.units)

    def _start(self, unit: "FlatUnit", used: set, multiplier: float) -> None:
        rest, hyper = _rest(unit), self.optimizer.hyper(unit)

        def job() -> None:
            copied = self.optimizer.step_unit(unit, used, multiplier, hyper)
            if not copied and rest.outgoing is not rest.master:
                rest.outgoing.copy_(rest.master)

        rest.step(job)

    def finish(self, unit: "FlatUnit") -> bool:
        """Bring the stepped parameters up; False if they are to come with the next step."""
        if unit in self._late:
            return False
        unit.renew()
        return True

    def bring_late(self) -> None:
        """Bring the update up that parameters do not show yet, if there is one; all ranks must."""
        for unit in self.units:
            if unit in self._late:
                self._late.discard(unit)
                self.optimizer.enter("late", unit)
                unit.renew()
                unit.publish()


def _rest(unit: "FlatUnit") -> OptimizerRest:
    assert unit.rest is not None
    return unit.rest
