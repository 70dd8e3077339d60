"""Flies one rank of a pipeline: what its chunks do with a micro-batch, each action a phase of the trace.

The rank performs a rehearsal: micro-batches one after the other, so that a single one is in flight. How they really
overlap is for the schedule's plan to say, with which `sim` composes a step; messages between stages are priced there.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..collectives.pipeline import UPDATE, Action, Plan, phase_name
from ..collectives.pipeline_rehearsal import rehearsal
from ..collectives.trace import Trace
from .device import DTYPES
from .pilot import StageToFly
from .pipeline import PipelineEngine
from .pipeline_format import Format
from .recorder import Recorder


class FlownStage(PipelineEngine):
    """A pipeline rank in a flight.

    Attributes:
        flown: which rank, and what stages hand to each other; `flown_stage` sets it.
        recorder: of the flight; likewise.
        flown_step: 1 or 2, the step under way.
    """

    flown: StageToFly
    recorder: Recorder
    flown_step = 1

    def _make_plan(self) -> Plan:
        section, ranks = self.settings.pipeline, self.pipeline.world
        return rehearsal(section.plan(ranks, ranks), self.settings.accumulation)

    def _learn_formats(self, inputs: tuple[Any, ...]) -> tuple[list[Format], list[Format]]:
        between: Format = tuple((torch.Size(shape), DTYPES[dtype]) for shape, dtype in self.flown.hands_on)
        enters = [() if chunk.first else between for chunk in self._chunks]
        return enters, [() if chunk.last else between for chunk in self._chunks]

    def _sequence_tokens(self) -> int:
        return self.flown.tokens

    def _announce(self, action: Action | None) -> None:
        name = UPDATE if action is None else phase_name(action, self.plan.micro_batches)
        self.recorder.phase(name, self.flown_step)


def flown_stage(stage: StageToFly, recorder: Recorder) -> type[FlownStage]:
    """The kind of engine that flies a stage."""
    return type("FlownStage", (FlownStage,), {"flown": stage, "recorder": recorder})


def fly_stage(engine: FlownStage, make_batch: Callable[[], tuple], recorder: Recorder) -> Trace:
    """The trace of two steps of a pipeline rank."""
    for step in (1, 2):
        engine.flown_step = step
        recorder.phase("begin", step)
        with torch.device("sim"):
            batches = [make_batch() for _ in range(engine.settings.accumulation)]
        engine.train_batch(iter(batches))
        del batches
    return recorder.trace()  # here, where the engine and its memory are still alive
