"""Replays a Trace on a hardware model: what the host issues, what the streams do meanwhile, and what waits for what.

The host walks the trace in program order and only ever waits where the program reads a value, so it runs ahead of the
device as on CUDA; overlap and exposed communication come out of that instead of being assumed.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod

import simpy
from simpy.events import Event, ProcessGenerator

from ..collectives.groups import Mesh
from ..collectives.trace import Call, Collective, Copy, HostWork, Kernel, Phase, Segment, Synchronize, Trace, Wait
from .hardware import Cluster
from .kernel import kernel_seconds
from .network import collective_seconds, sent_bytes
from .streams import Busy, CommunicationStream, ComputeStream, Interference, Run, Span
from .topology import Topology, topology
from .transfers import Transfers

MOST_PLAYED = 3
"""How often a repeated phase is played; further repetitions cost what the last one played did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A steady training step of one rank.

    Attributes:
        breakdown_s: where the compute stream spent the step; sums to `step_time_s`.
        phases_s: seconds by cause of each phase of the step, once, in order: (name of the phase, seconds).
        sent_bytes: by axis.
        forward_flops: of matrix products, attention and convolutions in the forward pass.
        executed_flops: of the same in the whole step, attention's backward counted as twice its forward.
        spans: what ran when, if asked for; both steps, repeated phases as often as they were played.
        events: how many simpy events it took.
    """

    step_time_s: float
    breakdown_s: dict[str, float]
    phases_s: tuple[tuple[str, dict[str, float]], ...]
    sent_bytes: dict[str, int]
    forward_flops: float
    executed_flops: float
    spans: tuple[Span, ...]
    events: int


def replay(trace: Trace, cluster: Cluster, *, fidelity: str = "closed_form", record: bool = False) -> Replay:
    """Play two steps and report the second.

    Args:
        fidelity: how collectives are priced, see sim/network.py.
        record: keep the spans.
    """
    rank = _Rank(trace, cluster, fidelity, record)
    rank.env.run(rank.finished)
    before, after = rank.marks[1], rank.marks[2]
    breakdown = _between(before, after)
    spans = tuple(rank.compute.spans or ()) + tuple(s for stream in rank.streams.values() for s in stream.spans)
    spans += tuple(rank.transfers.spans)
    return Replay(
        step_time_s=sum(breakdown.values()),
        breakdown_s=breakdown,
        phases_s=tuple((phase.name, seconds) for phase, seconds in rank.phases_s if phase.step == 2),
        sent_bytes=sent_bytes_by_axis(trace, rank.network),
        forward_flops=flops(trace, forward_only=True),
        executed_flops=flops(trace, forward_only=False),
        spans=spans,
        events=rank.env.steps,
    )


Started = Collective | Copy | HostWork
"""Ops that run beside the compute stream, and that a Wait may point to."""

Mark = dict[str, float]
"""Seconds by cause since the start."""


class CountingEnvironment(simpy.Environment):
    """A simpy clock that counts its events."""

    steps = 0

    def step(self) -> None:
        self.steps += 1
        super().step()


class _Rank:
    """The host of one rank, and its streams."""

    def __init__(self, trace: Trace, cluster: Cluster, fidelity: str, record: bool) -> None:
        self.trace, self.cluster, self.fidelity = trace, cluster, fidelity
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
        self._skipped: Mark = defaultdict(float)
        self._runs: Counter[tuple[str, int]] = Counter()
        self._started: dict[tuple[str, int, int, int], tuple[Event, bool]] = {}
        self._seconds: dict[Collective, float] = {}
        self._prepared = [self._prepare(segment) for segment in trace.segments]
        self.finished = self.env.process(self._host())

    def _prepare(self, segment: Segment) -> list[tuple[int, Run | Started | Wait | Synchronize]]:
        """A segment with its kernels priced and joined into runs: (position of the op, what to do)."""
        prepared: list[tuple[int, Run | Started | Wait | Synchronize]] = []
        kernels: list[Kernel] = []
        for position, op in enumerate(segment):
            if isinstance(op, Kernel):
                kernels.append(op)
            elif isinstance(op, Started | Wait | Synchronize):
                if kernels:
                    prepared.append((position, self._run(kernels)))
                    kernels = []
                prepared.append((position, op))
        if kernels:
            prepared.append((len(segment), self._run(kernels)))
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
            for call in phase.calls:
                yield from self._host_call(call)
            self.compute.mark(lambda: ends.append(self._clock()))
        self.compute.mark(lambda: self.phases_s.append((phase, _between(*ends[-2:]))))
        left = phase.repeat - MOST_PLAYED
        if left > 0:
            self.compute.mark(lambda: self._skip(ends, left))
        if phase.every > 1:
            self.compute.mark(lambda: self._skip([ends[0], self._clock()], 1 / phase.every - 1))

    def _skip(self, ends: list[Mark], times: float) -> None:
        """Charge what came to pass between the last two ends so many times more."""
        for name, seconds in _between(*ends[-2:]).items():
            self._skipped[name] += times * seconds

    def _host_call(self, call: Call) -> ProcessGenerator:
        self._runs[call.key, call.block] += 1
        for position, op in self._prepared[call.segment]:
            match op:
                case Run():
                    self.compute.run(op)
                    if self._launch_s > 0:
                        yield self.env.timeout(len(op.kernels) * self._launch_s)
                case Collective() | Copy() | HostWork():
                    place = (call.key, call.block, self._runs[call.key, call.block], position)
                    self._started[place] = self._start(op), not isinstance(op, Collective)
                case Wait():
                    block = op.ref.block_from(call.block)
                    run = self._runs[op.ref.key, block] - op.ref.age
                    if op.ref.key.startswith("initialize"):
                        continue  # long done: what precedes training takes no time
                    done, offload = self._started[op.ref.key, block, run, op.ref.op]
                    if op.stream in ("compute", "program"):
                        self.compute.wait(done, offload=offload)
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
        name = f"{op.kind} {op.label}"
        return self.streams[op.axis].start(name, seconds, after=self._drained())

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
        return {name: seconds + self._skipped[name] for name, seconds in played.items()}


def _between(before: Mark, after: Mark) -> Mark:
    return {name: after[name] - before[name] for name in after}


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


def flops(trace: Trace, *, forward_only: bool) -> float:
    total = 0.0
    for segment, forward, times in _steady(trace):
        if forward_only and not forward:
            continue
        for op in trace.segments[segment]:
            if isinstance(op, Kernel):
                share = ATTENTION_BACKWARD_SHARE if op.name == "attention_backward" else 1.0
                total += times * share * op.flops
    return total
