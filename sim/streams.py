"""The units of one rank's device as simpy processes: a compute stream, a stream per communication axis.

Streams take what the host issues in order, one thing at a time. Computation and communication that overlap may slow
each other down (they share a GPU's multiprocessors, or a laptop's cores): `Interference` says by how much.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import simpy
from simpy.events import Event, ProcessGenerator


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took place on a stream, for timelines."""

    stream: str
    name: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class Busy:
    """What the compute stream has done so far, in seconds; the sum is its clock.

    Attributes:
        exposed_s: what of `exposed_communication` it waited for collectives of each axis.
    """

    compute: float = 0.0
    exposed_communication: float = 0.0
    host: float = 0.0
    offload: float = 0.0
    exposed_s: dict[str, float] = field(default_factory=dict)


class Interference:
    """Runs work at full speed alone, and at a lower rate while work of the other kind is under way.

    Args:
        rates: share of full speed by kind ("compute", "communication") while the other kind is active.
    """

    def __init__(self, env: simpy.Environment, rates: dict[str, float]) -> None:
        self.env, self.rates = env, rates
        self._active = dict.fromkeys(rates, 0)
        self._changed = env.event()
        self._matters = any(rate != 1.0 for rate in rates.values())

    def work(self, kind: str, seconds: float) -> ProcessGenerator:
        """Do `seconds` worth of work of a kind, as a simpy process body."""
        if not self._matters:
            yield self.env.timeout(seconds)
            return
        with self._activity(kind):
            while seconds > 0:
                rate, began = self._rate(kind), self.env.now
                finish = self.env.timeout(seconds / rate)
                yield finish | self._changed
                # The remainder of a float subtraction is no work: finishing is finishing.
                seconds = 0.0 if finish.processed else seconds - (self.env.now - began) * rate

    def _rate(self, kind: str) -> float:
        others = any(count for other, count in self._active.items() if other != kind)
        return self.rates[kind] if others else 1.0

    @contextmanager
    def _activity(self, kind: str) -> Iterator[None]:
        self._shift(kind, +1)
        yield
        self._shift(kind, -1)

    def _shift(self, kind: str, change: int) -> None:
        """Tell work under way when a kind begins or ends to be active, since its rate changes then."""
        before = self._active[kind]
        self._active[kind] += change
        if bool(before) != bool(self._active[kind]):
            changed, self._changed = self._changed, self.env.event()
            changed.succeed()


class Queue:
    """What was issued and not yet taken, first in, first out; it costs an event only where the taker has to wait."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self._items: deque[Any] = deque()
        self._filled: Event | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._filled is not None:
            self._filled.succeed()
            self._filled = None

    def take(self) -> ProcessGenerator:
        """The next item, as a simpy process body; there is one taker."""
        if not self._items:
            self._filled = self.env.event()
            yield self._filled
        return self._items.popleft()


@dataclass(frozen=True, slots=True)
class Run:
    """Kernels that nothing comes between.

    Attributes:
        seconds: their sum.
        latest_s: the earliest end of the last one, counted from when the host issues the first: the host issues one
            every `launch_s`, so the end is at least (j + 1) launch_s + the durations from kernel j on, for every j.
        kernels: (name, seconds) of each.
    """

    seconds: float
    latest_s: float
    kernels: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, kernels: list[tuple[str, float]], launch_s: float) -> "Run":
        left, latest = sum(seconds for _, seconds in kernels), 0.0
        total = left
        for number, (_, seconds) in enumerate(kernels):
            latest = max(latest, (number + 1) * launch_s + left)
            left -= seconds
        return cls(total, latest, tuple(kernels))


class ComputeStream:
    """Runs kernels in the order in which the host issued them, and waits where the host told it to.

    Attributes:
        busy: what it spent its time on.
        spans: what it ran, if anyone asked for it.
    """

    def __init__(self, env: simpy.Environment, interference: Interference, record: bool) -> None:
        self.env, self.interference = env, interference
        self.busy = Busy()
        self.spans: list[Span] | None = [] if record else None
        self._queue = Queue(env)
        env.process(self._serve())

    def run(self, run: Run) -> None:
        """Queue kernels that the host begins to issue now."""
        self._queue.put((self._compute, run, self.env.now))

    def wait(self, done: Event, axis: str | None) -> None:
        """Queue a wait for a collective of an axis, or for a copy or work of the host (None)."""
        self._queue.put((self._await_offload if axis is None else partial(self._await, axis), done, self.env.now))

    def mark(self, act: Callable[[], object]) -> None:
        """Queue an action that takes no time, such as recording an event."""
        self._queue.put((self._act, act, self.env.now))

    def _serve(self) -> ProcessGenerator:
        while True:
            idle_since = self.env.now
            perform, subject, issued_at = yield from self._queue.take()
            self.busy.host += self.env.now - idle_since
            yield from perform(subject, issued_at)

    def _compute(self, run: Run, issued_at: float) -> ProcessGenerator:
        began = self.env.now
        # The stream idles where the host is late with the next kernel: that part does not compete with anything.
        idle = max(0.0, issued_at + run.latest_s - (began + run.seconds))
        yield self.env.timeout(idle)
        yield from self.interference.work("compute", run.seconds)
        self.busy.host += idle
        self.busy.compute += self.env.now - began - idle
        if self.spans is not None:
            self._record(run, began + idle)

    def _record(self, run: Run, began: float) -> None:
        stretch = (self.env.now - began) / run.seconds if run.seconds > 0 else 1.0
        at = began
        assert self.spans is not None
        for name, seconds in run.kernels:
            self.spans.append(Span("compute", name, at, at := at + seconds * stretch))

    def _await(self, axis: str, done: Event, _: float) -> ProcessGenerator:
        began = self.env.now
        if not done.processed:
            yield done
        waited = self.env.now - began
        self.busy.exposed_communication += waited
        self.busy.exposed_s[axis] = self.busy.exposed_s.get(axis, 0.0) + waited

    def _await_offload(self, done: Event, _: float) -> ProcessGenerator:
        began = self.env.now
        if not done.processed:
            yield done
        self.busy.offload += self.env.now - began

    def _act(self, act: Callable[[], object], _: float) -> ProcessGenerator:
        act()
        yield from ()


@dataclass(slots=True)
class CommunicationStream:
    """Performs the collectives of one axis in the order in which they were started.

    Attributes:
        busy_s: how long it has communicated; one under way counts from its end.
    """

    env: simpy.Environment
    axis: str
    interference: Interference
    record: bool
    busy_s: float = 0.0
    spans: list[Span] = field(default_factory=list)
    _queue: Queue = field(init=False)

    def __post_init__(self) -> None:
        self._queue = Queue(self.env)
        self.env.process(self._serve())

    def start(self, name: str, seconds: float, after: Event, done: Event | None = None) -> Event:
        """Queue a collective that may begin when `after` has happened; the event is its end."""
        done = done or self.env.event()
        self._queue.put((name, seconds, after, done))
        return done

    def _serve(self) -> ProcessGenerator:
        while True:
            name, seconds, after, done = yield from self._queue.take()
            if not after.processed:
                yield after
            began = self.env.now
            yield from self.interference.work("communication", seconds)
            self.busy_s += self.env.now - began
            done.succeed()
            if self.record:
                self.spans.append(Span(f"communication {self.axis}", name, began, self.env.now))
