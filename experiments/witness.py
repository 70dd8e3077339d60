"""A witness of memory that shares nothing with the simulator: the allocation events of the PyTorch profiler.

The profiler sees every block that torch's CPU allocator hands out or takes back, also those inside operators, and
resized storages; views are no blocks, and the CPU's allocator keeps no cache. What libraries allocate by themselves
(oneDNN's and BLAS's scratch), Python objects and memory that ranks share are not in it. A block that was there before
the profiler is not counted when it goes either, so a model must be built under it.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..engine.engine import initialize
from ..engine.pilot import Plan, fly
from ..engine.world import World
from ..sim.memory import Memory, replay_memory
from .judgement import exact_cluster
from .models import ModelSpec
from .transformer import Transformer, initialize_weights

MEMORY_EVENT = "[memory]"
MARK = "windtunnel: "

Mark = Callable[[str], AbstractContextManager[Any]]
"""Names a stretch of a watched run: `with mark("step 2"): ...`."""


@dataclass(frozen=True, slots=True)
class Allocations:
    """What the allocator did in a run.

    Attributes:
        timeline: (time in ns, bytes allocated since the beginning) at each change.
        marks: (beginning, end) in ns of what was marked.
    """

    timeline: tuple[tuple[int, int], ...]
    marks: Mapping[str, tuple[int, int]]

    def peak_bytes(self, mark: str | None = None) -> int:
        """The most bytes allocated at once, in a marked stretch or at all."""
        if mark is None:
            return max(nbytes for _, nbytes in self.timeline)
        began, ended = self.marks[mark]
        before = [nbytes for time, nbytes in self.timeline if time < began]
        inside = [nbytes for time, nbytes in self.timeline if began <= time <= ended]
        return max(inside + before[-1:])


def watch_allocations(run: Callable[[Mark], None]) -> Allocations:
    """Run something under the profiler, with all threads of this process, and say what was allocated on the CPU."""

    def mark(name: str) -> record_function:
        gc.collect()  # when Python collects cycles is chance
        return record_function(MARK + name)

    gc.collect()  # what an earlier run left must not be freed during this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(mark)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    marks = {
        event.name().removeprefix(MARK): (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.name().startswith(MARK)
    }
    return Allocations(tuple(_running_sum(events)), marks)


def _running_sum(events: list[Any]) -> Iterator[tuple[int, int]]:
    allocated = 0
    for event in events:
        if event.name() == MEMORY_EVENT and event.device_type().name == "CPU":
            allocated += event.nbytes()
            yield event.start_ns(), allocated


STEADY = "steady step"


def witness_step(
    model: Callable[[], nn.Module], batch: Callable[[], tuple[Tensor, ...]], config: Mapping[str, Any]
) -> Allocations:
    """Two training steps of one process with the engine; the second is marked `STEADY`.

    Args:
        model: makes a model whose forward returns the loss of a batch.
        batch: makes the arguments of one micro-step's forward.
    """

    def run(mark: Mark) -> None:
        engine, *_ = initialize(model(), config)
        for name in ("first step", STEADY):
            with mark(name):
                for _ in range(engine.gradient_accumulation_steps()):
                    inputs = batch()
                    loss = engine(*inputs)
                    engine.backward(loss)
                    del loss, inputs
                    engine.step()
        engine.close()

    return watch_allocations(run)


@dataclass(frozen=True, slots=True)
class PeakComparison:
    """The most memory of a training step on one rank, witnessed and predicted."""

    measured_bytes: int
    predicted: Memory

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted.total_bytes / self.measured_bytes - 1.0


def compare_peak(
    spec: ModelSpec, config: Mapping[str, Any], *, batch: int, world: World | None = None
) -> PeakComparison:
    """The peak of a training step of `spec` on a real CPU rank beside the simulator's.

    Args:
        batch: samples of one rank.
        world: the ranks, of which rank 0 is watched; None: this process alone.
    """
    arguments = {"spec": spec, "batch": batch, "seq": spec.seq}
    plan = Plan(
        factory="windtunnel.experiments.transformer:for_flight",
        arguments=arguments,
        config=config,
        world=1 if world is None else world.size,
    )
    watched = (
        witness_spec(0, 1, spec, config, batch) if world is None else world.run(witness_spec, spec, config, batch)[0]
    )
    return PeakComparison(watched.peak_bytes(STEADY), replay_memory(fly(plan), exact_cluster().processor))


def witness_spec(rank: int, world: int, spec: ModelSpec, config: Mapping[str, Any], batch: int) -> Allocations:
    """What one rank of a world allocates in training our transformer; the body of `World.run`."""

    def model() -> Transformer:
        made = Transformer(spec)
        initialize_weights(made, seed=0)
        return made

    def tokens() -> tuple[Tensor, Tensor]:
        drawn = torch.zeros(batch, spec.seq, dtype=torch.int64)
        return drawn, torch.zeros_like(drawn)

    return witness_step(model, tokens, config)
