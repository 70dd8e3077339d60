"""Ranks that step on their own gradients and agree now and then: Local SGD, post-local SGD, DiLoCo.

Every rank keeps whole copies (ZeRO stage 0). Between agreements nothing is sent, so all that a step knows of gradients
is this rank's: their norm and clipping, which parameters were used, and the loss. What the ranks agree on is parameters
alone: the moments of their optimizers stay their own, as in the papers, and so do a model's buffers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .groups import Groups
from .redundancy import LocalUpdates
from .unit import FlatUnit
from .zero import ZeroRuntime


class LocalTraining:
    """Lets the ranks of a run step apart, and brings them together every `settings.every` steps.

    Attributes:
        steps: optimizer steps since training began.
        together: the groups of synchronous steps, on which ranks agree.
        agreed: whether all ranks have the same parameters.
    """

    def __init__(self, settings: LocalUpdates, runtime: ZeroRuntime) -> None:
        self.settings, self.runtime, self.together = settings, runtime, runtime.groups
        self.steps, self.agreed = 0, True
        self._units = [unit for unit in runtime.units if unit.trainable]
        self._outer: dict[FlatUnit, torch.optim.SGD] = {}
        self._follow_steps()

    def after_step(self) -> None:
        """The optimizer has stepped, on all ranks."""
        self.steps += 1
        self.agreed = self.runtime.groups is self.together
        if self.settings.due(self.steps):
            self.agree()
        self._follow_steps()

    @torch.no_grad()
    def agree(self) -> None:
        """Let all ranks have the same parameters again, from which each goes on by itself.

        `average` sends parameters, `nesterov` how far they have come: 2 P (n-1)/n values per rank in a ring. Both are
        worked out in the optimizer's precision, in place of the rank's own values.
        """
        communicator = self.together.everyone
        handles = []
        for unit in self._units:
            self._enter("agree", unit)
            if unit in self._outer:
                torch.sub(self._last(unit), unit.master, out=unit.master)
            unit.master.div_(communicator.world)
            handles.append(communicator.all_reduce(unit.master, f"agreement on {unit.label}"))
        for unit, handle in zip(self._units, handles, strict=True):
            self._enter("agree.end", unit)
            handle.wait()
            if unit in self._outer:
                self._step_outer(unit)
            if unit.master is not unit.shard:
                unit.shard.copy_(unit.master)
        self.agreed = True

    def _step_outer(self, unit: FlatUnit) -> None:
        """The mean way back, in `unit.master`, is the gradient of what the ranks agreed on last."""
        last = self._last(unit)
        last.grad = unit.master
        with self.runtime.observer.category("optimizer"):
            self._outer[unit].step()
        last.grad = None
        unit.master.copy_(last)

    def _follow_steps(self) -> None:
        """Together while steps are few, apart from then on."""
        apart = self.steps >= self.settings.warmup_steps
        if apart == (self.runtime.groups is not self.together):
            return
        self._outer.clear()
        self.runtime.work_in(Groups.apart(self.together.everyone) if apart else self.together)
        if apart and self.settings.outer == "nesterov":
            for unit in self._units:
                with self.runtime.observer.category("optimizer"):
                    last = unit.master.clone()
                self._outer[unit] = torch.optim.SGD(
                    [last], lr=self.settings.outer_lr, momentum=self.settings.outer_momentum, nesterov=True
                )

    def _last(self, unit: FlatUnit) -> Tensor:
        """[S] what the ranks agreed on last."""
        values: Tensor = self._outer[unit].param_groups[0]["params"][0]
        return values

    def _enter(self, key: str, unit: FlatUnit) -> None:
        self.runtime.observer.enter(key if unit.block >= 0 else f"{key}.root", unit.block)

    # Checkpoints #

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs besides parameters and optimizer state: the same on all ranks.

        Returns:
            "steps", and by parameter name "outer": what was agreed on last, "momentum": of the outer optimizer; empty
            where there is none (yet).
        """
        return {
            "steps": self.steps,
            "outer": {name: last for name, last, _ in self._outer_values()},
            "momentum": {name: momentum for name, _, momentum in self._outer_values() if momentum is not None},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; the parameters have been loaded already.

        Raises:
            ValueError: outer values of other parameters than the model's.
        """
        self.steps, self.agreed = int(state["steps"]), True
        self._follow_steps()
        for unit in self._outer:
            if state["momentum"]:
                self._outer[unit].state[self._last(unit)]["momentum_buffer"] = torch.zeros_like(unit.master)
        names = {name for name, *_ in self._outer_values()}
        if names != set(state["outer"]):
            wrong = ", ".join(sorted(names ^ set(state["outer"]))[:3])
            raise ValueError(f"outer state: {wrong} is missing or not in the model; load the state of the same model")
        for name, last, momentum in self._outer_values():
            last.copy_(state["outer"][name])
            if momentum is not None:
                momentum.copy_(state["momentum"][name])

    def _outer_values(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """(name, values last agreed on, outer momentum) of every parameter that has them, shaped as it is."""
        for unit, optimizer in self._outer.items():
            last = self._last(unit)
            momentum = optimizer.state[last].get("momentum_buffer") if last in optimizer.state else None
            for slot in unit.part.slots:
                start, stop = unit.views[slot.parameter]
                shaped = [
                    None if flat is None else flat[start:stop].view(slot.parameter.shape) for flat in (last, momentum)
                ]
                assert shaped[0] is not None
                yield slot.name, shaped[0], shaped[1]
