"""Plays collective programs: every message a flow that shares the links it takes with all others, max-min fairly.

The clock is simpy's, one event per instant at which something happens: so a collective is a process among others. All
that happens at one instant is done at once, on arrays: a process per rank and message would take twenty times as long.
"""

from collections.abc import Sequence
from math import inf, lcm

import numpy as np
import simpy

from ..collectives.program import Algorithm, Program
from .flows import TIE, Floats, Integers, max_min_rates
from .messages import Messages, messages_of, messages_of_programs
from .topology import Topology

MOST_REMEMBERED = 4_000_000
"""Rates that are kept, all sets of flows together, before the memory is emptied."""


def play(algorithm: Algorithm, world: int, nbytes: float, topology: Topology, *, fold: bool = True) -> float:
    """Seconds until the last rank has played its program on a buffer of `nbytes` bytes, on an idle network.

    Where algorithm and network both repeat, one period of ranks is played for all: a message that leaves it stands for
    its image that arrives. This is exact, as every rank and every link has the same history as its images.

    Args:
        fold: False to play every rank.

    Raises:
        ValueError: too many messages to play, or a rank that the network does not reach.
    """
    ranks = played_ranks(algorithm, world, topology) if fold else world
    return _alone(messages_of(algorithm, world, nbytes, ranks), topology)


def play_programs(programs: Sequence[Program], chunk_bytes: float, topology: Topology) -> float:
    """Seconds until the last rank has played its program, all chunks being of `chunk_bytes` bytes, on an idle network.

    Raises:
        ValueError: programs that do not fit together, that wait for each other, or that the network does not reach.
    """
    return _alone(messages_of_programs(programs, chunk_bytes), topology)


def played_ranks(algorithm: Algorithm, world: int, topology: Topology) -> int:
    """How many ranks stand for all."""
    period = lcm(algorithm.period(world), topology.period(world))
    return period if world % period == 0 else world


def _alone(messages: Messages, topology: Topology) -> float:
    env = simpy.Environment()
    env.run(env.process(playing(env, messages, topology)))
    return float(env.now)


def playing(env: simpy.Environment, messages: Messages, topology: Topology) -> simpy.events.ProcessGenerator:
    """Play messages on a network that nobody else uses: a simpy process that lasts as long as they take.

    A step posts its messages when it begins. A message occupies all links of its route at its fair rate until its last
    byte has left, and arrives a latency later. A rank's step ends when the messages that it posted have left and those
    that it awaits have arrived.
    """
    start_s = env.now
    state = _State(messages, topology)
    while (now_s := state.next_s()) < inf:
        if start_s + now_s > env.now:
            yield env.timeout(start_s + now_s - env.now)
        state.advance(now_s)
    state.check_finished()


class _State:
    """What the ranks and the messages are at.

    Attributes:
        at: [ranks] the step that each rank is in.
        goes_on_s: [ranks] when it goes on to the next; infinite while that is not known.
        pending: [steps] how many messages of the step have still to leave, or to arrive.
        end_s: [steps] when the last of those that have, had or will.
        active: messages under way, in the order in which they were posted.
        left_bytes, since_s: [messages] what was left of it when its rate last changed, and when that was.
        rate, leaves_s: [messages] its rate now, and when it will have left at this rate.
    """

    def __init__(self, messages: Messages, topology: Topology) -> None:
        self.messages = messages
        steps = int(messages.first_step[-1])
        self._rank_of = np.repeat(np.arange(messages.ranks), np.diff(messages.first_step))
        self._first_message = np.searchsorted(messages.posted, np.arange(steps + 1))
        self._rates = _Rates(messages, topology)
        self.at = messages.first_step[:-1] - 1
        self.goes_on_s = np.zeros(messages.ranks)
        self.pending = np.bincount(np.concatenate([messages.posted, messages.awaited]), minlength=steps)
        self.end_s = np.zeros(steps)
        self.active: Integers = np.empty(0, np.int64)
        self.left_bytes = messages.nbytes.copy()
        self.since_s, self.rate = np.zeros_like(self.left_bytes), np.zeros_like(self.left_bytes)
        self.leaves_s = np.full_like(self.left_bytes, inf)

    def next_s(self) -> float:
        """When something happens next; infinite if nothing does."""
        return float(min(self.goes_on_s.min(initial=inf), self.leaves_s[self.active].min(initial=inf)))

    def advance(self, now_s: float) -> None:
        """Do all that happens now, up to rounding."""
        late_s = now_s * (1 + TIE)
        leaving = self.leaves_s[self.active] <= late_s
        going_on = np.flatnonzero(self.goes_on_s <= late_s)
        if leaving.any():
            self._leave(self.active[leaving], now_s)
            self.active = self.active[~leaving]
        if going_on.size:
            self._go_on(going_on, now_s)
        self._share(now_s)

    def _leave(self, gone: Integers, now_s: float) -> None:
        messages = self.messages
        steps = np.concatenate([messages.posted[gone], messages.awaited[gone]])
        times_s = np.concatenate([np.full(gone.size, now_s), now_s + self._rates.latency_s[messages.pair[gone]]])
        np.subtract.at(self.pending, steps, 1)
        np.maximum.at(self.end_s, steps, times_s)
        self._end(steps[self.at[self._rank_of[steps]] == steps])

    def _go_on(self, ranks: Integers, now_s: float) -> None:
        self.goes_on_s[ranks] = inf
        self.at[ranks] += 1
        ranks = ranks[self.at[ranks] < self.messages.first_step[ranks + 1]]
        steps = self.at[ranks]
        self.end_s[steps] = np.maximum(self.end_s[steps], now_s)
        posted = _ranges(self._first_message[steps], self._first_message[steps + 1])
        self.since_s[posted] = now_s
        self.active = np.concatenate([self.active, posted])
        self._end(steps)

    def _end(self, steps: Integers) -> None:
        """The ranks in these steps go on when they end, if that is known."""
        over = steps[self.pending[steps] == 0]
        self.goes_on_s[self._rank_of[over]] = self.end_s[over]

    def _share(self, now_s: float) -> None:
        rate = self._rates.of(self.active)
        changed = rate != self.rate[self.active]
        if changed.any():
            flows, rate = self.active[changed], rate[changed]
            left = self.left_bytes[flows] - self.rate[flows] * (now_s - self.since_s[flows])
            self.left_bytes[flows] = np.maximum(left, 0.0)
            self.since_s[flows], self.rate[flows] = now_s, rate
            self.leaves_s[flows] = now_s + self.left_bytes[flows] / rate

    def check_finished(self) -> None:
        """Raises ValueError when a rank waits for what never comes."""
        waiting = np.flatnonzero(self.at < self.messages.first_step[1:])
        if waiting.size:
            rank = waiting[0]
            step = self.at[rank] - self.messages.first_step[rank]
            raise ValueError(f"{waiting.size} ranks wait for each other; rank {rank} is stuck in step {step}")


class _Rates:
    """Rates of flows, with a memory: a regular collective has the same sets of flows under way again and again."""

    def __init__(self, messages: Messages, topology: Topology) -> None:
        self._pair = messages.pair
        links, self.latency_s = topology.routes(messages.sources, messages.targets, messages.ranks)
        numbers, routes = np.unique(links, return_inverse=True)
        self._routes = routes.reshape(links.shape)
        self._capacities = np.where(numbers < 0, inf, topology.capacities(numbers))
        self._known: dict[bytes, Floats] = {}
        self._remembered = 0

    def of(self, active: Integers) -> Floats:
        """[active] bytes/s of each of these messages while they are under way together."""
        pairs = self._pair[active]
        key = pairs.tobytes()
        if (rates := self._known.get(key)) is None:
            rates = max_min_rates(self._capacities, self._routes[pairs])
            self._remembered += rates.size
            if self._remembered > MOST_REMEMBERED:
                self._known.clear()
                self._remembered = rates.size
            self._known[key] = rates
        return rates


def _ranges(starts: Integers, stops: Integers) -> Integers:
    """start, start + 1, ..., stop - 1 of each range, one after the other."""
    lengths = stops - starts
    shifts = starts - np.cumsum(lengths) + lengths
    return np.repeat(shifts, lengths) + np.arange(lengths.sum())
