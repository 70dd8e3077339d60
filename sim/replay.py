"""Replays a Trace on a hardware model: what the host issues, what the streams do meanwhile, and what waits for what.

The host walks the trace in program order and only ever waits where the program reads a value, so it runs ahead of the
device as on CUDA; overlap and exposed communication come out of that instead of being assumed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod

import simpy
from simpy.events import Event, ProcessGenerator

from ..collectives.groups import Mesh
from ..collectives.trace import Call, Collective, Copy, HostWork, Kernel, Op, Phase, Synchronize, Trace, Wait
from .fusion import fuse
from .hardware import Cluster
from .kernel import kernel_seconds
from .network import collective_seconds, sent_bytes
from .runs import Runs
from .streams import Busy, CommunicationStream, ComputeStream, Interference, Run, Span
from .topology import Topology, topology
from .transfers import Transfers

UPDATE, GRADIENTS = "update", "gradients"
"""The phase that steps the optimizer, and the label of reductions that it waits for."""

MOST_PLAYED = 3
"""How often a repeated phase is played; further repetitions cost what the last one played did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A steady training step of one rank.

    Attributes:
        breakdown_s: where the compute stream spent the step; sums to `step_time_s`.
        phases_s: seconds by cause of each phase of the step, once, in order: (name of the phase, seconds).
        communication_s: by axis, how long its collectives took: `exposed_s`, for which the compute stream waited, and
            `hidden_s`, while it did something else.
        phases_communication_s: the same of each phase, once, in order.
        sent_bytes: by axis.
        forward_flops: of matrix products, attention and convolutions in the forward pass.
        executed_flops: of the same in the whole step, attention's backward counted as twice its forward.
        spans: what ran when, if asked for; both steps, repeated phases as often as they were played.
        phase_spans: when the compute stream was in which phase, likewise; a span for each time that it was played.
        events: how many simpy events it took.
    """

    step_time_s: float
    breakdown_s: dict[str, float]
    phases_s: tuple[tuple[str, dict[str, float]], ...]
    communication_s: dict[str, dict[str, float]]
    phases_communication_s: tuple[tuple[str, dict[str, dict[str, float]]], ...]
    sent_bytes: dict[str, int]
    forward_flops: float
    executed_flops: float
    spans: tuple[Span, ...]
    phase_spans: tuple[Span, ...]
    events: int


def replay(
    trace: Trace,
    cluster: Cluster,
    *,
    fidelity: str = "closed_form",
    fusion: str = "none",
    overlap: bool = True,
    record: bool = False,
) -> Replay:
    """Play two steps and report the second.

    Args:
        fidelity: how collectives are priced, see sim/network.py.
        fusion: how element-wise kernels are, see sim/fusion.py.
        overlap: False for programs that reduce gradients when backward has ended, and begin the next forward when all
            parameters have been gathered.
        record: keep the spans.
    """
    rank = _Rank(trace, cluster, fidelity, fusion, overlap, record)
    rank.env.run(rank.finished)
    step = _between(rank.marks[1], rank.marks[2])
    breakdown = _causes(step)
    phases = [(phase.name, seconds) for phase, seconds in rank.phases_s if phase.step == 2]
    spans = tuple(rank.compute.spans or ()) + tuple(s for stream in rank.streams.values() for s in stream.spans)
    spans += tuple(rank.transfers.spans)
    return Replay(
        step_time_s=sum(breakdown.values()),
        breakdown_s=breakdown,
        phases_s=tuple((name, _causes(seconds)) for name, seconds in phases),
        communication_s=_communication(step),
        phases_communication_s=tuple((name, _communication(seconds)) for name, seconds in phases),
        sent_bytes=sent_bytes_by_axis(trace, rank.network),
        forward_flops=flops(trace, forward_only=True),
        executed_flops=flops(trace, forward_only=False),
        spans=spans,
        phase_spans=tuple(rank.phase_spans),
        events=rank.env.steps,
    )


Started = Collective | Copy | HostWork
"""Ops that run beside the compute stream, and that a Wait may point to."""

CAUSES = ("compute", "exposed_communication", "bubble", "host", "offload")

EXPOSED, BUSY = "exposed ", "busy "
"""Before the name of an axis: how long its collectives were waited for, and how long they took."""

Mark = dict[str, float]
"""Seconds since the start: by cause, and of each axis."""


class CountingEnvironment(simpy.Environment):
    """A simpy clock that counts its events."""

    steps = 0

    def step(self) -> None:
        self.steps += 1
        super().step()


class _Rank:
    """The host of one rank, and its streams."""

    def __init__(self, trace: Trace, cluster: Cluster, fidelity: str, fusion: str, overlap: bool, record: bool) -> None:
        self.trace, self.cluster, self.fidelity, self.overlap = trace, cluster, fidelity, overlap
        self.env = CountingEnvironment()
        self.processor = cluster.processor
        self._launch_s = self.processor.launch_s if self.processor.asynchronous else 0.0
        interference = Interference(
            self.env,
            {
                "compute": self.processor.compute_rate_under_communication,
                "communication": self.processor.communication_rate_under_compute,
            },
        )
        self.compute = ComputeStream(self.env, interference, record)
        self.mesh = Mesh.of(trace.world)
        self.streams = {axis: CommunicationStream(self.env, axis, interference, record) for axis in axes(trace)}
        self.transfers = Transfers(self.env, cluster, prod(trace.world.values()), record)
        self.network = topology(cluster, prod(trace.world.values()))
        self.marks: dict[int, Mark] = {}
        self.phases_s: list[tuple[Phase, Mark]] = []
        self.record, self.phase_spans = record, list[Span]()
        self._skipped: Mark = defaultdict(float)
        self._late: dict[Event, tuple[str, Callable[[], object]]] = {}  # what waits for the end of backward
        self._updating: list[tuple[Event, str]] | None = None  # in an update: what it has started
        self._runs = Runs()
        self._started: dict[tuple[str, int, int, int], tuple[Event, str | None]] = {}
        self._seconds: dict[Collective, float] = {}
        keys: dict[int, set[str]] = defaultdict(set)
        for phase in trace.phases:
            for call in phase.calls:
                keys[call.segment].add(call.key)
        whole = fusion == "none"
        self._prepared = [
            self._prepare(enumerate(segment) if whole else fuse(segment, keys[number]), len(segment))
            for number, segment in enumerate(trace.segments)
        ]
        self.finished = self.env.process(self._host())

    def _prepare(self, ops: Iterable[tuple[int, Op]], end: int) -> list[tuple[int, Run | Started | Wait | Synchronize]]:
        """The ops of a segment of length `end`, its kernels priced and joined into runs: (position, what to do)."""
        prepared: list[tuple[int, Run | Started | Wait | Synchronize]] = []
        kernels: list[Kernel] = []
        for position, op in ops:
            if isinstance(op, Kernel):
                kernels.append(op)
            elif isinstance(op, Started | Wait | Synchronize):
                if kernels:
                    prepared.append((position, self._run(kernels)))
                    kernels = []
                prepared.append((position, op))
        if kernels:
            prepared.append((end, self._run(kernels)))
        return prepared

    def _run(self, kernels: list[Kernel]) -> Run:
        """Kernels in a row on the rank, of those that wait for each other, that takes longest."""
        # A host that computes itself pays for issuing each op; one that runs ahead of a device is only sometimes late.
        launch_s, overhead_s = self._launch_s, self.processor.launch_s - self._launch_s
        runs = [
            [(op.name, pace.factor * (kernel_seconds(op, pace.processor) + overhead_s)) for op in kernels]
            for pace in self.cluster.paces
        ]
        return Run.of(max(runs, key=lambda run: sum(seconds for _, seconds in run)), launch_s)

    # The host #

    def _host(self) -> ProcessGenerator:
        for step, phases in groupby(self.trace.phases, key=lambda phase: phase.step):
            if step > 0:  # what precedes training takes no part in a step
                for phase in phases:
                    yield from self._host_phase(phase)
            self.compute.mark(partial(self._end_step, step))
        yield self._drained()

    def _end_step(self, step: int) -> None:
        self.marks[step] = self._clock()

    def _host_phase(self, phase: Phase) -> ProcessGenerator:
        """Issue a phase as often as it is worth playing, and charge the rest at the price of the last one.

        A phase that not every step has is charged with its share.
        """
        ends: list[Mark] = []
        self.compute.mark(lambda: ends.append(self._clock()))
        for _ in range(min(phase.repeat, MOST_PLAYED)):
            self._runs.play()
            if phase.name == UPDATE and not self.overlap:
                self._begin_update()
            for call in phase.calls:
                yield from self._host_call(call)
            self._end_update()
            self.compute.mark(lambda: ends.append(self._clock()))
            if self.record:
                self.compute.mark(partial(self._record_phase, phase.name))
        self._runs.end()
        self.compute.mark(lambda: self.phases_s.append((phase, _between(*ends[-2:]))))
        left = phase.repeat - MOST_PLAYED
        if left > 0:
            self.compute.mark(lambda: self._skip(ends, left))
        if phase.every > 1:
            self.compute.mark(lambda: self._skip([ends[0], self._clock()], 1 / phase.every - 1))

    def _record_phase(self, name: str) -> None:
        """Phases follow each other on the compute stream without gaps."""
        began_s = self.phase_spans[-1].end_s if self.phase_spans else 0.0
        self.phase_spans.append(Span("phases", name, began_s, self.env.now))

    def _skip(self, ends: list[Mark], times: float) -> None:
        """Charge what came to pass between the last two ends so many times more."""
        for name, seconds in _between(*ends[-2:]).items():
            self._skipped[name] += times * seconds

    def _host_call(self, call: Call) -> ProcessGenerator:
        now = self._runs.begin(call.key, call.block)
        for position, op in self._prepared[call.segment]:
            match op:
                case Run():
                    self.compute.run(op)
                    if self._launch_s > 0:
                        yield self.env.timeout(len(op.kernels) * self._launch_s)
                case Collective() | Copy() | HostWork():
                    axis = op.axis if isinstance(op, Collective) else None
                    self._started[call.key, call.block, now, position] = self._start(op), axis
                case Wait():
                    block = op.ref.block_from(call.block)
                    if op.ref.key.startswith("initialize"):
                        continue  # long done: what precedes training takes no time
                    places = ((op.ref.key, block, run, op.ref.op) for run in self._runs.back(op.ref, block))
                    done, axis = next(self._started[place] for place in places if place in self._started)
                    if done in self._late:
                        continue
                    if op.stream in ("compute", "program"):
                        self.compute.wait(done, axis)
                        if op.stream == "program" and not done.processed:
                            yield done
                    else:
                        self.transfers.wait(op.stream, done)
                case Synchronize():
                    yield self._drained()

    def _start(self, op: Started) -> Event:
        if not isinstance(op, Collective):
            return self.transfers.start(op, self._drained())
        seconds = self._collective_seconds(op)
        start = partial(self.streams[op.axis].start, f"{op.kind} {op.label}", seconds)
        if not self.overlap and op.label == GRADIENTS and self._updating is None:
            done = self.env.event()
            self._late[done] = op.axis, lambda: start(after=self._drained(), done=done)
            return done
        done = start(after=self._drained())
        if self._updating is not None:
            self._updating.append((done, op.axis))
        return done

    def _begin_update(self) -> None:
        """Perform the reductions that have waited for the end of backward, before anything else."""
        self._updating = []
        for _, start in self._late.values():
            start()
        for done, (axis, _) in self._late.items():
            self.compute.wait(done, axis)
        self._late.clear()

    def _end_update(self) -> None:
        """What the update has started ends in it."""
        for done, axis in self._updating or ():
            self.compute.wait(done, axis)
        self._updating = None

    def _collective_seconds(self, op: Collective) -> float:
        if op not in self._seconds:
            placed = self.mesh.placement(op.axis)
            self._seconds[op] = collective_seconds(op, placed, self.network, self.fidelity)
        return self._seconds[op]

    def _drained(self) -> Event:
        """When the compute stream has done all that was issued so far."""
        event = self.env.event()
        self.compute.mark(event.succeed)
        return event

    def _clock(self) -> Mark:
        busy: Busy = self.compute.busy
        played = {
            "compute": busy.compute,
            "exposed_communication": busy.exposed_communication,
            "bubble": 0.0,
            "host": busy.host,
            "offload": busy.offload,
        }
        for axis, stream in self.streams.items():
            played[EXPOSED + axis] = busy.exposed_s.get(axis, 0.0)
            played[BUSY + axis] = stream.busy_s
        return {name: seconds + self._skipped[name] for name, seconds in played.items()}


def _between(before: Mark, after: Mark) -> Mark:
    return {name: after[name] - before[name] for name in after}


def _causes(mark: Mark) -> dict[str, float]:
    return {cause: mark[cause] for cause in CAUSES}


def _communication(mark: Mark) -> dict[str, dict[str, float]]:
    """By axis. A wait that outlasts its collective (which queued behind another) hides nothing."""
    named = [name.removeprefix(BUSY) for name in mark if name.startswith(BUSY)]
    return {
        axis: {"exposed_s": mark[EXPOSED + axis], "hidden_s": max(0.0, mark[BUSY + axis] - mark[EXPOSED + axis])}
        for axis in named
    }


def axes(trace: Trace) -> tuple[str, ...]:
    """The axes of the trace's mesh, and those joined ones whose groups do something."""
    named = (op.axis for segment in trace.segments for op in segment if isinstance(op, Collective))
    return tuple(dict.fromkeys((*trace.world, *named)))


# Sums that need no clock #


def _steady(trace: Trace) -> list[tuple[int, bool, float]]:
    """(number of a segment, whether it belongs to a forward, how often the steady step runs it in the mean)."""
    last = trace.phases[-1].step
    times: dict[tuple[int, bool], float] = defaultdict(float)
    for phase in trace.phases:
        if phase.step == last:
            for call in phase.calls:
                times[call.segment, call.key.startswith("forward")] += phase.repeat / phase.every
    return [(segment, forward, number) for (segment, forward), number in times.items()]


def sent_bytes_by_axis(trace: Trace, network: Topology | None = None, *, scalars: bool = True) -> dict[str, int]:
    """Bytes that the rank sends in the steady step, in the mean over steps, with or without few-element reductions.

    Args:
        network: on which algorithms are chosen, see sim/network.py.
    """
    sent = dict.fromkeys(axes(trace), 0.0)
    mesh = Mesh.of(trace.world)
    for segment, _, times in _steady(trace):
        for op in trace.segments[segment]:
            if isinstance(op, Collective) and (scalars or not op.scalar):
                sent[op.axis] += times * sent_bytes(op, mesh.placement(op.axis), network)
    return {axis: round(nbytes) for axis, nbytes in sent.items()}


ATTENTION_BACKWARD_SHARE = 4 / 5
"""Fused attention multiplies five times in backward, once to make the scores again; model FLOPs count four."""


LOSS_WITH_GRADIENTS = "linear_cross_entropy"
"""An operator of the forward that makes its gradients there: a product for the logits, and one for each gradient."""


def flops(trace: Trace, *, forward_only: bool) -> float:
    total = 0.0
    for segment, forward, times in _steady(trace):
        if forward_only and not forward:
            continue
        for op in trace.segments[segment]:
            if isinstance(op, Kernel):
                share = ATTENTION_BACKWARD_SHARE if op.name == "attention_backward" else 1.0
                if forward_only and op.name == LOSS_WITH_GRADIENTS:
                    share = 1 / op.shape[0]
                total += times * share * op.flops
    return total
