"""The loss scale: a state machine of a few numbers, the same on every rank because all of them see the same overflows.

Small gradients are lost in fp16, so the loss is multiplied by a scale before backward and the gradients are divided by
it when the optimizer steps (Micikevicius et al. 2018, Mixed Precision Training, section 3.2). A dynamic scale looks for
the largest that does not overflow. With scale s, hysteresis h, window w and floor f, after an optimizer step:

    overflow   the step is skipped; if h' > 1 then h' <- h' - 1, else s <- max(s / 2, f)
    clean      after w clean steps in a row, and after each further w: s <- 2 s and h' <- h

where h' starts as h, and `consecutive` also resets h' <- h after every clean step. An overflow at s = f with h' = 1
ends the training: smaller scales are not allowed, and this one has just failed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


class LossScaleError(RuntimeError):
    """The gradients still overflow at the smallest loss scale that is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePolicy:
    """What is decided before training.

    Attributes:
        initial: the first scale; a static one keeps it.
        skip: whether a step with a gradient that is not finite is skipped; else it is taken, as torch would.
        dynamic: whether the scale follows what overflows.
        window: clean steps before the scale doubles.
        hysteresis: overflows until the scale halves; the first `hysteresis` - 1 only skip their steps.
        consecutive: only overflows in a row count towards the hysteresis.
        floor: the smallest dynamic scale.
    """

    initial: float = 1.0
    skip: bool = False
    dynamic: bool = False
    window: int = 1000
    hysteresis: int = 2
    consecutive: bool = False
    floor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleState:
    """Where training is.

    Attributes:
        scale: what the next loss is multiplied by.
        patience: overflows until the scale halves (h' above).
        clean: steps without an overflow since the last one with it.
        overflows: steps with an overflow since the last one without it.
        skipped: steps that were skipped since training began.
    """

    scale: float
    patience: int
    clean: int = 0
    overflows: int = 0
    skipped: int = 0


def begin(policy: ScalePolicy) -> ScaleState:
    return ScaleState(scale=policy.initial, patience=policy.hysteresis)


def after(policy: ScalePolicy, state: ScaleState, overflow: bool) -> ScaleState:
    """The state after a step.

    Args:
        overflow: whether any gradient of any rank was inf or nan; the step was skipped then.

    Raises:
        LossScaleError: an overflow where the scale is at its floor and hysteresis is used up.
    """
    if overflow:
        state = replace(state, clean=0, overflows=state.overflows + 1, skipped=state.skipped + 1)
        if not policy.dynamic:
            return state
        if state.patience > 1:
            return replace(state, patience=state.patience - 1)
        if state.scale <= policy.floor:
            raise LossScaleError(
                f"loss scale = {state.scale:g}, its floor (fp16.min_loss_scale = {policy.floor:g}), and"
                f" {state.overflows} {'step' if state.overflows == 1 else 'steps'} in a row overflowed: the gradients"
                " are inf or nan without any help of the scale; look for the first loss that is not finite, lower the"
                " learning rate, clip, or train in bf16"
            )
        return replace(state, scale=max(state.scale / 2, policy.floor))
    state = replace(state, clean=state.clean + 1, overflows=0)
    if not policy.dynamic:
        return state
    grows = state.clean % policy.window == 0
    patience = policy.hysteresis if grows or policy.consecutive else state.patience
    return replace(state, scale=state.scale * 2 if grows else state.scale, patience=patience)


class LossScaler:
    """The state of a run under its policy; saved and restored like an optimizer's.

    Attributes:
        policy: as configured.
        state: replaced after each optimizer step.
    """

    def __init__(self, policy: ScalePolicy) -> None:
        self.policy, self.state = policy, begin(policy)

    @property
    def scale(self) -> float:
        """What the next loss is multiplied by."""
        return self.state.scale

    def update(self, overflow: bool) -> None:
        """A step was taken or, with an `overflow`, skipped.

        Raises:
            LossScaleError: see `after`.
        """
        self.state = after(self.policy, self.state, overflow)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Where the policy is static its own scale holds: the config has the last word."""
        loaded = ScaleState(**state)
        self.state = loaded if self.policy.dynamic else replace(loaded, scale=self.policy.initial)
