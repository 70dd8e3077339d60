"""The queues below a device as simpy processes: copies in each direction, work on the host."""

from collections import defaultdict
from collections.abc import Sequence

import simpy
from simpy.events import Event, ProcessGenerator

from ..collectives.trace import Copy, HostWork, Kernel
from .hardware import Cluster
from .host import copy_seconds, work_seconds
from .kernel import kernel_seconds
from .streams import Queue, Span


class Transfers:
    """Copies and host work of one rank: first in, first out in each direction.

    On a CPU rank the device's memory is the host's: a copy between them is a kernel that copies.

    Args:
        ranks: of one node, which share what its GPUs share.
        record: keep the spans.
    """

    def __init__(self, env: simpy.Environment, cluster: Cluster, ranks: int, record: bool) -> None:
        self.env, self.cluster, self.record = env, cluster, record
        self.ranks = min(ranks, cluster.gpus_per_node)
        self.spans: list[Span] = []
        self._queues: dict[str, Queue] = {}
        self._waits: dict[str, list[Event]] = defaultdict(list)

    def wait(self, stream: str, done: Event) -> None:
        """What is started next on `stream` begins after `done`."""
        self._waits[stream].append(done)

    def start(self, op: Copy | HostWork, computed: Event) -> Event:
        """Queue an op; the event is its end. `computed` is when the device has done what was issued so far."""
        stream = "host" if isinstance(op, HostWork) else op.direction
        after = self._waits.pop(stream, [])
        if stream in ("to_host", "to_device"):
            after = [*after, computed]
        if stream not in self._queues:
            self._queues[stream] = Queue(self.env)
            self.env.process(self._serve(stream))
        done = self.env.event()
        self._queues[stream].put((_name(op), self.seconds(op), after, done))
        return done

    def seconds(self, op: Copy | HostWork) -> float:
        """What an op takes.

        Raises:
            ValueError: the cluster does not say what lies below its GPUs.
        """
        host = self.cluster.host
        if host is not None:
            return copy_seconds(op, host, self.ranks) if isinstance(op, Copy) else work_seconds(op, host, self.ranks)
        processor = self.cluster.processor
        if processor.kind == "cpu" and not (isinstance(op, Copy) and "nvme" in op.direction):
            read, written = (op.nbytes, op.nbytes) if isinstance(op, Copy) else (op.read_bytes, op.write_bytes)
            return kernel_seconds(Kernel("copy_", "memory", 0.0, read, written, "fp32", ()), processor)
        raise ValueError(
            f"cluster {self.cluster.name!r} has no [host]: give its memory, links and drives to simulate offload, or a"
            " base that has them"
        )

    def _serve(self, stream: str) -> ProcessGenerator:
        while True:
            name, seconds, after, done = yield from self._queues[stream].take()
            yield from _all(after)
            began = self.env.now
            yield self.env.timeout(seconds)
            done.succeed()
            if self.record:
                self.spans.append(Span(stream.replace("_", " "), name, began, self.env.now))


def _all(events: Sequence[Event]) -> ProcessGenerator:
    for event in events:
        if not event.processed:
            yield event


def _name(op: Copy | HostWork) -> str:
    return op.name if isinstance(op, HostWork) else op.label
