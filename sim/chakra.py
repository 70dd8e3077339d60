"""Jobs as Chakra execution traces, one graph per rank, as ASTRA-sim reads them; and a rank's graph as a Trace again.

A graph holds the steady step. A kernel is a COMP node with its FLOPs, its bytes and its priced duration; a collective a
COMM_COLL node in a numbered group of ranks; a message between stages, or of a ring of shifts, a COMM_SEND node and a
COMM_RECV node; a copy between device and host MEM_STORE or MEM_LOAD. Dependencies are the order of each stream and the
waits between them. Memory and reads of values by the host have no node in that format. Attributes that Chakra does not
name ("windtunnel_...") say the rest of what a Trace has; other programs pass over them.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..collectives.chakra_file import CommType, Node, NodeType, Value
from ..collectives.groups import PIPELINE, TIED, Mesh
from ..collectives.job_file import Job
from ..collectives.pipeline import UPDATE, Action, Plan, Recv, Send, Wait, messages, phase_name
from ..collectives.trace import Call, Collective, Copy, HostWork, Kernel, Op, Phase, Ref, Trace
from ..collectives.trace import Wait as StreamWait
from .hardware import Cluster
from .job import stage_record
from .network import collective_bytes
from .pipeline_timeline import StageRecord
from .recording import Played, stream_of
from .replay import MOST_PLAYED

MICROSECONDS = 1e6

RUN = "#"
"""Between the name of a segment and its number, in a trace that was a graph."""

MOST_RANKS = 256
"""A file per rank of some megabytes each: more ranks are refused."""


@dataclass(frozen=True)
class Groups:
    """The groups of a mesh by number, as ASTRA-sim wants them: 0 is all ranks, and has no entry in its file."""

    mesh: Mesh

    def ranks(self, axis: str, rank: int) -> tuple[int, ...]:
        """The group of a rank on an axis."""
        if axis == TIED:  # the two ends of a pipeline
            whole = self.ranks(PIPELINE, rank)
            return whole[0], whole[-1]
        return self.mesh.placement(axis).group(rank)

    def numbered(self, axes: Sequence[str]) -> dict[tuple[int, ...], int]:
        """A number for each group of several ranks on these axes."""
        numbers: dict[tuple[int, ...], int] = {}
        for axis in axes:
            along = PIPELINE if axis == TIED else axis
            for group in self.mesh.groups(along):
                ranks = (group[0], group[-1]) if axis == TIED else group
                if len(ranks) == self.mesh.world:
                    numbers[ranks] = 0
                elif ranks not in numbers:
                    numbers[ranks] = 1 + max(numbers.values(), default=0)
        return numbers


def export(job: Job, cluster: Cluster, *, fidelity: str = "closed_form") -> "ChakraJob":
    """The job with all that its graphs are made from.

    Raises:
        ValueError: more ranks than there should be files.
    """
    mesh = Mesh.of(job.traces[0].world)
    if mesh.world > MOST_RANKS:
        raise ValueError(f"gpus = {mesh.world} in a Chakra trace, which has a file per rank; allowed: {MOST_RANKS}")
    records = tuple(stage_record(job, trace, cluster, fidelity) for trace in job.traces)
    axes = {op.axis: None for trace in job.traces for segment in trace.segments for op in segment
            if isinstance(op, Collective)}  # fmt: skip
    return ChakraJob(job, mesh, records, Groups(mesh).numbered(tuple(axes)))


@dataclass(frozen=True)
class ChakraJob:
    """A job ready to be written rank by rank.

    Attributes:
        groups: numbers of the groups of ranks.
    """

    job: Job
    mesh: Mesh
    records: tuple[StageRecord, ...]
    groups: Mapping[tuple[int, ...], int]

    def group_file(self) -> str:
        """What ASTRA-sim calls the communicator group file: the ranks of each group that is not all of them."""
        return json.dumps({str(number): ranks for ranks, number in self.groups.items() if number})

    def about(self) -> dict[str, Value]:
        """Attributes of every graph."""
        return {"windtunnel_world": json.dumps(self.mesh.sizes)}

    def nodes(self, rank: int) -> list[Node]:
        """The graph of a rank."""
        stage = self.mesh.position(rank).get(PIPELINE, 0)
        record = self.records[self.job.stages[stage]]
        graph = _Graph(rank, self.mesh, self.groups)
        if len(self.job.stages) == 1:
            for phase in _steady_phases(record.trace):
                graph.play(record, phase)
        else:
            pipeline = Groups(self.mesh).ranks(PIPELINE, rank)
            _play_plan(graph, record, self.job.plan(), stage, pipeline, self.job.message_bytes)
        return graph.nodes


def _steady_phases(trace: Trace) -> Iterator[int]:
    """Numbers of the played phases that make the steady step, the last one again where repetitions were not played."""
    number = 0
    for phase in trace.phases:
        if phase.step == 0:
            continue
        played = min(phase.repeat, MOST_PLAYED)
        if phase.step == trace.phases[-1].step:
            yield from range(number, number + played)
            yield from (number + played - 1 for _ in range(phase.repeat - played))
        number += played


def _play_plan(
    graph: "_Graph", record: StageRecord, plan: Plan, stage: int, pipeline: Sequence[int], message_bytes: int
) -> None:
    """A pipeline rank's program: its actions and its messages, then the update."""
    for item in plan.programs[stage]:
        if isinstance(item, Action):
            graph.play(record, record.steady[phase_name(item, plan.micro_batches_per_step)])
        elif isinstance(item, Wait):
            graph.await_message(_tag(plan, stage, item.message))
        else:
            for message in messages(item):
                graph.message(message, _tag(plan, stage, message), pipeline[message.peer], message_bytes)
    graph.play(record, record.steady[UPDATE])


def _tag(plan: Plan, stage: int, message: Send | Recv) -> int:
    """A number that sender and receiver agree on."""
    tag = plan.tag(stage, message)
    return (tag.micro_batch * plan.stages + tag.stage) * 2 + tag.gradient


@dataclass
class _Graph:
    """The nodes of a rank so far, and what the next one on each stream follows from."""

    rank: int
    mesh: Mesh
    groups: Mapping[tuple[int, ...], int]
    nodes: list[Node] = field(default_factory=list)
    _streams: list[str] = field(default_factory=list)
    _last: dict[str, int] = field(default_factory=dict)
    _awaited: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    _latest: dict[Played, int] = field(default_factory=dict)
    _received: dict[int, int] = field(default_factory=dict)

    def play(self, record: StageRecord, phase: int) -> None:
        """The ops of a phase of a flight."""
        for one in record.ops_of(phase):
            if isinstance(one.op, StreamWait):
                stream = "compute" if one.op.stream == "program" else one.op.stream.replace("_", " ")
                if one.target in self._latest:
                    self._awaited[stream].append(self._latest[one.target])
            elif stream_of(one.op) is not None:
                seconds = one.span.end_s - one.span.start_s if one.span is not None else 0.0
                self._latest[one] = self._op(one.op, one.key.partition(RUN)[0], seconds)

    def message(self, message: Send | Recv, tag: int, peer: int, nbytes: int) -> None:
        """A message between stages; sends follow what was computed, receives each other."""
        sends = isinstance(message, Send)
        ends = (self.rank, peer) if sends else (peer, self.rank)
        about = {"comm_src": ends[0], "comm_dst": ends[1], "comm_tag": tag, "comm_size": nbytes, "is_cpu_op": False}
        kind = NodeType.COMM_SEND if sends else NodeType.COMM_RECV
        stream = f"send to {peer}" if sends else f"receive from {peer}"
        number = self._add(f"{message.what} {message.micro_batch}", kind, stream, about, after_compute=sends)
        if not sends:
            self._received[tag] = number

    def await_message(self, tag: int) -> None:
        self._awaited["compute"].append(self._received[tag])

    def _op(self, op: Op, key: str, seconds: float) -> int:
        """A node for an op, or two for a shift, of which the second one follows from the first."""
        stream = stream_of(op)
        assert stream is not None
        micros = round(seconds * MICROSECONDS)
        match op:
            case Kernel():
                about: dict[str, Value] = {
                    "is_cpu_op": False,
                    "num_ops": round(op.flops),
                    "tensor_size": op.read_bytes + op.write_bytes,
                    "windtunnel_family": op.family,
                    "windtunnel_flops": float(op.flops),
                    "windtunnel_read_bytes": op.read_bytes,
                    "windtunnel_dtype": op.dtype,
                    "windtunnel_shape": op.shape,
                    "windtunnel_causal": op.causal,
                    "windtunnel_segment": key,
                }
                return self._add(op.name, NodeType.COMP, stream, about, micros)
            case Collective(kind="shift"):
                return self._shift(op, key, stream, micros)
            case Collective():
                ranks = Groups(self.mesh).ranks(op.axis, self.rank)
                share = len(ranks) if op.kind == "all_gather" else 1  # what a rank puts in (ASTRA-sim, Ring.cc)
                about = {
                    "comm_type": int(CommType[op.kind.upper()]),
                    "comm_size": collective_bytes(op) // share,
                    "pg_name": str(self.groups[ranks]),
                    **_of_collective(op, key),
                }
                return self._add(f"{op.kind} {op.label}", NodeType.COMM_COLL, stream, about, micros, after_compute=True)
            case Copy():
                kind = NodeType.MEM_STORE if op.direction in ("to_host", "to_nvme") else NodeType.MEM_LOAD
                about = {
                    "is_cpu_op": False,
                    "tensor_size": op.nbytes,
                    "windtunnel_direction": op.direction,
                    "windtunnel_segment": key,
                }
                return self._add(op.label, kind, stream, about, micros, after_compute="nvme" not in op.direction)
            case HostWork():
                about = {
                    "is_cpu_op": True,
                    "num_ops": 0,
                    "tensor_size": op.read_bytes + op.write_bytes,
                    "windtunnel_read_bytes": op.read_bytes,
                    "windtunnel_segment": key,
                }
                return self._add(op.name, NodeType.COMP, stream, about, micros)
        raise AssertionError(op)

    def _shift(self, op: Collective, key: str, stream: str, micros: int) -> int:
        """Every rank hands its elements to the next one of its group."""
        ranks = Groups(self.mesh).ranks(op.axis, self.rank)
        place = ranks.index(self.rank)
        after, before = ranks[(place + 1) % len(ranks)], ranks[place - 1]
        number = len(self.nodes)
        about: dict[str, Value] = {"comm_size": collective_bytes(op), "comm_tag": self._last.get(stream, -1) + 1}
        sent = about | {"comm_src": self.rank, "comm_dst": after} | _of_collective(op, key)
        got = about | {"comm_src": before, "comm_dst": self.rank, "is_cpu_op": False}
        self._add(f"shift {op.label}", NodeType.COMM_SEND, stream, sent, micros, after_compute=True)
        self._add(f"shift {op.label}", NodeType.COMM_RECV, stream, got, micros)
        return number + 1

    def _add(
        self,
        name: str,
        kind: NodeType,
        stream: str,
        about: Mapping[str, Value],
        micros: int = 0,
        after_compute: bool = False,
    ) -> int:
        number = len(self.nodes)
        before = [self._last[one] for one in (stream, *(["compute"] if after_compute else [])) if one in self._last]
        before += self._awaited.pop(stream, [])
        if after_compute:  # what the compute stream waits for now comes before its results, too
            before += self._awaited["compute"]
        latest = {self._streams[dep]: dep for dep in sorted(before)}  # earlier ones of a stream have ended by then
        self.nodes.append(
            Node(
                id=number,
                name=name,
                kind=kind,
                data_deps=tuple(sorted(latest.values())),
                duration_micros=micros,
                attributes=about,
            )
        )
        self._last[stream] = number
        self._streams.append(stream)
        return number


def _of_collective(op: Collective, key: str) -> dict[str, Value]:
    """What a Trace says besides what Chakra's own attributes do."""
    return {
        "is_cpu_op": False,
        "windtunnel_kind": op.kind,
        "windtunnel_axis": op.axis,
        "windtunnel_elements": op.elements,
        "windtunnel_dtype": op.dtype,
        "windtunnel_algorithm": op.algorithm or "",
        "windtunnel_label": op.label,
        "windtunnel_scalar": op.scalar,
        "windtunnel_segment": key,
    }


# Back #


def to_trace(nodes: Sequence[Node], about: Mapping[str, Value]) -> Trace:
    """The trace of a graph that `ChakraJob.nodes` made of a job without stages, two equal steps, without memory.

    Raises:
        ValueError: a node lacks what a Trace has and Chakra has not.
    """
    if "windtunnel_world" not in about:
        raise ValueError("the Chakra trace has no 'windtunnel_world': only one that windtunnel wrote is a trace again")
    calls: list[tuple[str, list[Op]]] = []
    places: dict[int, tuple[str, int, str]] = {}
    for node in nodes:
        if node.kind == NodeType.COMM_RECV and node.name.startswith("shift "):
            places[node.id] = places[node.id - 1]
            continue
        if "windtunnel_segment" not in node.attributes:
            raise ValueError(f"node {node.id} ({node.name!r}) has no 'windtunnel_segment': a message between stages?")
        segment = str(node.attributes["windtunnel_segment"])
        if not calls or calls[-1][0].partition(RUN)[0] != segment:
            calls.append((f"{segment}{RUN}{len(calls)}", []))
        key, ops = calls[-1]
        op = _op_of(node)
        stream = str(stream_of(op))
        for target, position, other in (places[dep] for dep in node.data_deps):
            if other not in (stream, "compute"):
                waits = "compute" if isinstance(op, Collective) else stream.replace(" ", "_")
                ops.append(StreamWait(Ref(target, -1, False, 0, position), waits))
        places[node.id] = key, len(ops), stream
        ops.append(op)
    segments = tuple(tuple(ops) for _, ops in calls)
    made = tuple(Call(number, key, -1) for number, (key, _) in enumerate(calls))
    world = json.loads(str(about["windtunnel_world"]))
    return Trace(world, 0, segments, (Phase("step", 1, made), Phase("step", 2, made)))


def _op_of(node: Node) -> Op:
    def number(name: str) -> int:
        value = node.attributes[name]
        if not isinstance(value, int):
            raise ValueError(f"attribute {name!r} of node {node.id} is {value!r}; allowed: a whole number")
        return value

    try:
        match node.kind:
            case NodeType.COMP:
                read = number("windtunnel_read_bytes")
                written = number("tensor_size") - read
                if node.attributes["is_cpu_op"]:
                    return HostWork(node.name, read, written)
                shape, flops = node.attributes["windtunnel_shape"], node.attributes["windtunnel_flops"]
                if not isinstance(shape, tuple) or not isinstance(flops, float):
                    raise ValueError(f"node {node.id} has shape {shape!r} and {flops!r} FLOPs; allowed: numbers")
                family, dtype = str(node.attributes["windtunnel_family"]), str(node.attributes["windtunnel_dtype"])
                causal = bool(node.attributes["windtunnel_causal"])
                return Kernel(node.name, family, flops, read, written, dtype, shape, causal)
            case NodeType.MEM_LOAD | NodeType.MEM_STORE:
                return Copy(str(node.attributes["windtunnel_direction"]), number("tensor_size"), node.name)
            case NodeType.COMM_COLL | NodeType.COMM_SEND:
                return Collective(
                    str(node.attributes["windtunnel_kind"]),
                    str(node.attributes["windtunnel_axis"]),
                    number("windtunnel_elements"),
                    str(node.attributes["windtunnel_dtype"]),
                    str(node.attributes["windtunnel_algorithm"]) or None,
                    str(node.attributes["windtunnel_label"]),
                    bool(node.attributes["windtunnel_scalar"]),
                )
    except KeyError as error:
        raise ValueError(f"node {node.id} ({node.name!r}) has no attribute {error}") from None
    raise ValueError(f"node {node.id} ({node.name!r}) is of kind {node.kind}, which no trace has")
