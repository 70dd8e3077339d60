"""What one rank did in a training step, as data: ops in segments, segments in calls, calls in phases.

A flight on the `sim` device writes a Trace; `sim` prices it. An op that needs an earlier one points to it with a Ref.
A Ref names a segment and a block rather than a serial number, so that the forward of block 7 and the forward of
block 8 are *equal* values where they do the same work: `stretch` then turns the flight of a shallow model into that of
a deep one by repeating the middle block, and a test holds the result against the full flight, op for op.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

FORMAT_VERSION = 3
"""Version 1 had no Copy, no HostWork, and waits of the compute stream only; version 2 did not say which attention is
causal. A trace of either means the same today."""

TIERS = ("device", "host", "nvme")
"""Where bytes may rest: memory of the device, memory of its node, files on the node's NVMe drives."""

DIRECTIONS = ("to_host", "to_device", "to_nvme", "from_nvme")
"""Of a Copy: between device and host, or between host and NVMe. Each is a stream of its own; host work is another."""

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "buffers", "temporary")
"""Where a byte of device memory belongs. Gathered units are buffers, fp32 masters are optimizer. An Alloc may also say
"counters": the optimizer's scalars, such as Adam's step number, which the formulas for optimizer state leave out."""


class Ref(NamedTuple):
    """Points to the op that made a storage or started a collective, a copy or host work.

    The target is op number `op` of the run of segment `key` at block `block` that began `age` runs before the latest
    one (0 is the latest). A relative block counts from the block of the segment that holds the Ref.
    """

    key: str
    block: int
    relative: bool
    age: int
    op: int

    def block_from(self, here: int) -> int:
        """The block of the target, seen from a segment at block `here`."""
        return here + self.block if self.relative else self.block


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel on the compute stream.

    Attributes:
        name: the operator without its overload, e.g. "addmm".
        family: "matmul" (shape is batch, m, n, k), "attention" (batch, heads, queries, keys, head size),
            "convolution", or "memory" for all that moves bytes (shape of the first output).
        flops: floating-point operations; 0 for family "memory".
        read_bytes, write_bytes: each operand once.
        dtype: of the inputs: "fp64", "fp32", "bf16", "fp16", "int64", ...
        causal: of attention: whether a query sees no later key. `flops` counts all pairs all the same, as model FLOPs
            do.
    """

    name: str
    family: str
    flops: float
    read_bytes: int
    write_bytes: int
    dtype: str
    shape: tuple[int, ...]
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Collective:
    """Start of a collective on the stream of its axis; it begins when the compute issued before it has ended.

    Attributes:
        kind: as in algorithms.py, or "shift" (shift.py), whose elements are those that a rank sends.
        axis: the mesh axis whose group takes part, e.g. "data"; or neighbouring ones, as "shard*replica".
        elements: of the whole buffer (the gathered one, the unreduced one).
        dtype: as in Kernel.
        algorithm: None unless one was forced; it is chosen on the target cluster.
        label: what it carries, e.g. "gradients"; for timelines.
        scalar: True for the few-element bookkeeping reductions that the payload formulas leave out.
    """

    kind: str
    axis: str
    elements: int
    dtype: str
    algorithm: str | None
    label: str
    scalar: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """Start of a copy between tiers on the stream of its direction, one at a time.

    Between device and host it begins when the compute issued before it has ended; to and from NVMe it does not care.

    Attributes:
        direction: one of DIRECTIONS.
        label: what it carries, e.g. "gradients"; for timelines.
    """

    direction: str
    nbytes: int
    label: str


@dataclass(frozen=True, slots=True)
class HostWork:
    """Start of arithmetic on the host, on the stream "host", such as the optimizer step of a unit that rests there.

    Attributes:
        read_bytes, write_bytes: of host memory, whose bandwidth bounds an element-wise step.
    """

    name: str
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True, slots=True)
class Wait:
    """A stream waits for a collective, a copy or host work before it goes on with what is issued after this.

    Attributes:
        stream: "compute", "host", one of DIRECTIONS, or "program": the program itself waits, and so issues nothing.
    """

    ref: Ref
    stream: str = "compute"


@dataclass(frozen=True, slots=True)
class Synchronize:
    """The program itself waits until the compute stream is idle, because it reads a value."""


@dataclass(frozen=True, slots=True)
class Alloc:
    """A storage comes to life, in program order (a caching allocator works in program order, not in device time)."""

    nbytes: int
    category: str
    tier: str = "device"


@dataclass(frozen=True, slots=True)
class Free:
    ref: Ref


Op = Kernel | Collective | Copy | HostWork | Wait | Synchronize | Alloc | Free
Segment = tuple[Op, ...]


class Call(NamedTuple):
    """Run segment number `segment` of the trace as segment `key` of block `block`."""

    segment: int
    key: str
    block: int


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a step that repeats as a whole.

    Attributes:
        name: "initialize", "micro-step first" / "middle" / "last", "update", or "agree".
        step: 0 for what precedes training, 1 for the first step, 2 for the steady step.
        calls: what it runs, in program order.
        repeat: how many times in a row.
        every: it is part of one step in so many; of the others not.
    """

    name: str
    step: int
    calls: tuple[Call, ...]
    repeat: int = 1
    every: int = 1


@dataclass(frozen=True, slots=True)
class Trace:
    """One rank's program: what is allocated at first, a first step and a steady step.

    Attributes:
        world: sizes of the mesh axes, innermost first, e.g. {"data": 1024} or {"shard": 8, "replica": 128}.
        blocks: how many repeated blocks the model has (indices 0 to blocks - 1).
    """

    world: dict[str, int]
    blocks: int
    segments: tuple[Segment, ...]
    phases: tuple[Phase, ...]
    version: int = FORMAT_VERSION


def walk(trace: Trace) -> Iterator[tuple[Phase, Call, int, Op]]:
    """Every op in program order, repetition spelled out: (phase, call, position in its segment, op)."""
    for phase in trace.phases:
        for _ in range(phase.repeat):
            for call in phase.calls:
                for position, op in enumerate(trace.segments[call.segment]):
                    yield phase, call, position, op


def repeat_phase(trace: Trace, name: str, times: int) -> Trace:
    """The same trace with the phases called `name` run `times` times each; with 0 they are left out."""
    phases = (replace(phase, repeat=times) if phase.name == name else phase for phase in trace.phases)
    return replace(trace, phases=tuple(phase for phase in phases if phase.repeat))


SHALLOWEST = 8
MIDDLE = 3

DEEPER = 4
"""How many blocks more are flown, and how much later the middle is, where units are stepped off the device."""


def stretch(trace: Trace, blocks: int, middle: int = MIDDLE) -> Trace:
    """The trace of the same model with `blocks` repeated blocks, from the flight of a shallower one.

    Deferred waits reach two blocks back, and the positions they point to settle two blocks later: at least
    `SHALLOWEST` blocks are flown, and blocks `middle` and `middle - 1` of them must do the same work.

    Args:
        middle: the block to repeat. Units that are stepped off the device reach further, so their flights have more
            blocks on either side: see `DEEPER`.

    Raises:
        ValueError: too few flown blocks, fewer blocks asked for than flown, or middle blocks that differ.
    """
    flown = trace.blocks
    if blocks == flown:
        return trace
    if flown < SHALLOWEST or blocks < flown:
        raise ValueError(f"can stretch a flight of at least {SHALLOWEST} blocks to more, got {flown} to {blocks}")
    shift = blocks - flown
    rewritten = [_shift_absolute(segment, shift, middle) for segment in trace.segments]
    phases = tuple(
        replace(phase, calls=_stretch_calls(phase.calls, rewritten, shift, middle)) for phase in trace.phases
    )
    return replace(trace, blocks=blocks, segments=tuple(rewritten), phases=phases)


def _shift_absolute(segment: Segment, shift: int, middle: int) -> Segment:
    """Absolute blocks at or past the middle belong to the far end of the model, which moves out by `shift`."""

    def moved(ref: Ref) -> Ref:
        return ref if ref.relative or ref.block < middle else ref._replace(block=ref.block + shift)

    return tuple(replace(op, ref=moved(op.ref)) if isinstance(op, Wait | Free) else op for op in segment)


def _stretch_calls(calls: tuple[Call, ...], segments: list[Segment], shift: int, middle: int) -> tuple[Call, ...]:
    """Repeat every run of calls at block `middle` `shift` more times, in the direction in which the blocks go by."""
    stretched: list[Call] = []
    position = 0
    while position < len(calls):
        block = calls[position].block
        run = _run_at(calls, position)
        position += len(run)
        if block != middle:
            stretched.extend(call._replace(block=block + shift * (block > middle)) for call in run)
            continue
        before = stretched[-1].block if stretched else -1
        ascending = before < middle
        twin = _run_at(calls, position) if not ascending else _run_ending(calls, position - len(run))
        _check_same_work(run, twin, segments, middle)
        copies = range(middle, middle + shift + 1)
        for copy in copies if ascending else reversed(copies):
            stretched.extend(call._replace(block=copy) for call in run)
    return tuple(stretched)


def _run_at(calls: tuple[Call, ...], start: int) -> tuple[Call, ...]:
    """The consecutive calls from `start` on that are at the same block."""
    stop = start
    while stop < len(calls) and calls[stop].block == calls[start].block:
        stop += 1
    return calls[start:stop]


def _run_ending(calls: tuple[Call, ...], stop: int) -> tuple[Call, ...]:
    """The consecutive calls just before `stop` that are at the same block."""
    start = stop
    while start > 0 and calls[start - 1].block == calls[stop - 1].block:
        start -= 1
    return calls[start:stop]


def _check_same_work(run: tuple[Call, ...], twin: tuple[Call, ...], segments: list[Segment], middle: int) -> None:
    work = [(call.key, segments[call.segment]) for call in run]
    other = [(call.key, segments[call.segment]) for call in twin]
    if work != other:
        where = next((a[0] for a, b in zip(work, other, strict=False) if a != b), "their number of segments")
        raise ValueError(
            f"blocks {middle} and {middle - 1} of the flight differ in {where!r}: fly the model at full depth"
        )
