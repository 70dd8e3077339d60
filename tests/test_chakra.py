"""Chakra execution traces: the file format beside Google's protobuf, and graphs that are traces again."""

import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hand_made import CLUSTER, gather, kernel, two_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.collectives.chakra_file import CommType, Node, NodeType, dumps, loads
from windtunnel.collectives.job_file import Job
from windtunnel.collectives.pipeline import phase_name
from windtunnel.collectives.pipeline_schedules import SCHEDULES
from windtunnel.collectives.trace import Alloc, Call, Collective, Copy, HostWork, Kernel, Op, Phase, Ref, Trace, Wait
from windtunnel.sim.chakra import export, to_trace
from windtunnel.sim.host import Host
from windtunnel.sim.replay import replay

int64s = st.integers(-(2**63), 2**63 - 1)
values = st.one_of(
    st.booleans(), int64s, st.floats(allow_nan=False), st.text(max_size=6), st.lists(int64s, max_size=3).map(tuple)
)
ids = st.integers(0, 2**64 - 1)
nodes = st.builds(
    Node,
    id=ids,
    name=st.text(max_size=6),
    kind=st.integers(0, 7),
    data_deps=st.lists(ids, max_size=3).map(tuple),
    ctrl_deps=st.lists(ids, max_size=3).map(tuple),
    start_micros=ids,
    duration_micros=ids,
    attributes=st.dictionaries(st.text(max_size=6), values, max_size=4),
)


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same type: True is not 1."""
    return bool(one == other) and repr(one) == repr(other)


@given(st.lists(nodes, max_size=4), st.dictionaries(st.text(max_size=6), values, max_size=3))
def test_a_graph_comes_back_equal(graph: list[Node], about: dict[str, Any]) -> None:
    assert same(loads(dumps(graph, about)), (graph, about))


# Google's protobuf on the published schema (MLCommons Chakra, schema/protobuf/et_def.proto), for what is used of it #


def schema() -> dict[str, Any]:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="et_def.proto", package="ChakraProtoMsg", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, Any, bool, str | None]) -> Any:
        made = file.message_type.add(name=name)
        for label, number, kind, repeated, of in fields:
            made.field.add(
                name=label,
                number=number,
                type=kind,
                label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL,
                type_name=of,
            )
        return made

    message("Int64List", ("values", 1, field.TYPE_INT64, True, None))
    attribute = message(
        "AttributeProto",
        ("name", 1, field.TYPE_STRING, False, None),
        ("double_val", 3, field.TYPE_DOUBLE, False, None),
        ("int32_val", 7, field.TYPE_INT32, False, None),
        ("int64_val", 9, field.TYPE_INT64, False, None),
        ("int64_list", 10, field.TYPE_MESSAGE, False, ".ChakraProtoMsg.Int64List"),
        ("uint64_val", 13, field.TYPE_UINT64, False, None),
        ("bool_val", 27, field.TYPE_BOOL, False, None),
        ("string_val", 29, field.TYPE_STRING, False, None),
    )
    attribute.oneof_decl.add(name="value")
    for value in attribute.field[1:]:
        value.oneof_index = 0
    message(
        "GlobalMetadata",
        ("version", 1, field.TYPE_STRING, False, None),
        ("attr", 2, field.TYPE_MESSAGE, True, ".ChakraProtoMsg.AttributeProto"),
    )
    message(
        "Node",
        ("id", 1, field.TYPE_UINT64, False, None),
        ("name", 2, field.TYPE_STRING, False, None),
        ("type", 3, field.TYPE_INT32, False, None),  # an enum on the wire
        ("ctrl_deps", 4, field.TYPE_UINT64, True, None),
        ("data_deps", 5, field.TYPE_UINT64, True, None),
        ("start_time_micros", 6, field.TYPE_UINT64, False, None),
        ("duration_micros", 7, field.TYPE_UINT64, False, None),
        ("attr", 10, field.TYPE_MESSAGE, True, ".ChakraProtoMsg.AttributeProto"),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"ChakraProtoMsg.{name}"))
        for name in ("GlobalMetadata", "Node")
    }


SCHEMA = schema()


def frames(data: bytes) -> list[bytes]:
    """The messages of a file, by lengths of up to two bytes."""
    stream, found = BytesIO(data), []
    while first := stream.read(1):
        size = first[0] if first[0] < 128 else (first[0] & 127) + 128 * stream.read(1)[0]
        found.append(stream.read(size))
    return found


def plain(attribute: Any) -> Any:
    value = getattr(attribute, attribute.WhichOneof("value"))
    return tuple(value.values) if hasattr(value, "values") else value


@given(st.lists(nodes, max_size=3), st.dictionaries(st.text(max_size=6), values, max_size=3))
def test_protobuf_reads_what_is_written(graph: list[Node], about: dict[str, Any]) -> None:
    head, *rest = frames(dumps(graph, about))
    metadata = SCHEMA["GlobalMetadata"].FromString(head)
    assert metadata.version == "0.0.4"
    assert same({one.name: plain(one) for one in metadata.attr}, about)
    for node, data in zip(graph, rest, strict=True):
        read = SCHEMA["Node"].FromString(data)
        assert (read.id, read.name, read.type) == (node.id, node.name, node.kind)
        assert (tuple(read.ctrl_deps), tuple(read.data_deps)) == (node.ctrl_deps, node.data_deps)
        assert (read.start_time_micros, read.duration_micros) == (node.start_micros, node.duration_micros)
        assert same({one.name: plain(one) for one in read.attr}, dict(node.attributes))


@given(st.lists(nodes, max_size=3))
def test_what_protobuf_writes_is_read(graph: list[Node]) -> None:
    def framed(message: Any) -> bytes:
        data = message.SerializeToString()
        size = bytes([len(data)]) if len(data) < 128 else bytes([len(data) % 128 + 128, len(data) // 128])
        return size + data

    made = [framed(SCHEMA["GlobalMetadata"](version="0.0.4"))]
    for node in graph:
        made.append(
            framed(
                SCHEMA["Node"](
                    id=node.id,
                    name=node.name,
                    type=node.kind,
                    ctrl_deps=node.ctrl_deps,
                    data_deps=node.data_deps,
                    start_time_micros=node.start_micros,
                    duration_micros=node.duration_micros,
                )
            )
        )
    assert loads(b"".join(made)) == ([replace(node, attributes={}) for node in graph], {})


@given(st.binary(max_size=40))
def test_other_files_are_refused_in_one_line(data: bytes) -> None:
    try:
        loads(data)
    except ValueError as error:
        assert str(error).startswith("not a Chakra trace: ")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


def test_a_file_that_is_cut_off_is_refused() -> None:
    data = dumps([Node(id=1, name="one", kind=NodeType.COMP, attributes={"num_ops": 3})])
    with pytest.raises(ValueError, match="not a Chakra trace: it ends inside a message"):
        loads(data[:-1])
    with pytest.raises(ValueError, match="not a Chakra trace: it is empty"):
        loads(b"")


# Jobs #

WIDE = replace(
    CLUSTER,
    gpus_per_node=8,
    host=Host(
        memory_bytes=1,
        memory_bytes_per_s=8.0,
        memory_efficiency=1.0,
        link_bytes_per_s=4.0,
        gpus_per_link=1,
        nvme_bytes=1,
        nvme_read_bytes_per_s=8.0,
        nvme_write_bytes_per_s=8.0,
    ),
)
LAYOUT = {"pp": 1, "schedule": "1f1b", "accumulation": 1, "interleave": 1}


def job_of(trace: Trace) -> Job:
    return Job(layout=LAYOUT, precision="fp32", tokens_per_step=1, message_bytes=0, traces=(trace,), stages=(0,))


@st.composite
def segments(draw: Any) -> tuple[Op, ...]:
    """Kernels, collectives on two axes, shifts, copies and host work, and waits for some of what was started."""
    ops: list[Op] = []
    started: list[int] = []
    for _ in range(draw(st.integers(1, 9))):
        match draw(st.sampled_from(["kernel", "gather", "reduce", "shift", "copy", "host", "wait"])):
            case "kernel":
                shape, causal = (1, 1, 2, 2, 2), draw(st.booleans())
                ops.append(Kernel("attention", "attention", 8.0, 3, draw(st.integers(1, 5)), "fp32", shape, causal))
                continue
            case "wait" if started:
                ops.append(Wait(Ref("forward", -1, False, 0, draw(st.sampled_from(started)))))
                continue
            case "gather":
                ops.append(Collective("all_gather", "data", 2 * draw(st.integers(1, 9)), "fp32", None, "p"))
            case "reduce":
                ops.append(Collective("all_reduce", "tensor", 4, "bf16", "ring", "g", True))
            case "shift":
                ops.append(Collective("shift", "tensor", 2, "fp32", None, "k"))
            case "copy":
                ops.append(Copy(draw(st.sampled_from(["to_host", "to_device"])), 4, "moments"))
            case "host":
                ops.append(HostWork("adam", 2, 6))
            case "wait":
                continue
        started.append(len(ops) - 1)
    return (*ops, kernel(1))


@settings(max_examples=60)  # each plays four steps
@given(segments(), st.integers(1, 2), st.integers(0, 3))
def test_a_graph_is_the_trace_again(ops: tuple[Op, ...], repeat: int, rank: int) -> None:
    trace = two_steps([("forward", ops, repeat)], world={"tensor": 2, "data": 2})
    graphs = export(job_of(trace), WIDE)
    graph, about = loads(dumps(graphs.nodes(rank), graphs.about()))
    again = to_trace(graph, about)
    # All that takes time is there, in order; so is all that something waits for: both steps take as long.
    timed = (Kernel, Collective, Copy, HostWork)
    found = [op for segment in again.segments for op in segment if isinstance(op, timed)]
    assert found == [op for op in ops if isinstance(op, timed)] * repeat
    assert replay(again, WIDE).step_time_s == pytest.approx(replay(trace, WIDE).step_time_s, rel=1e-9)
    twice = export(job_of(again), WIDE)
    assert twice.nodes(rank) == graph


def test_nodes_say_what_astra_sim_reads() -> None:
    ops = (
        kernel(3, "add"),
        gather(5),
        Wait(Ref("forward", 0, True, 0, 1)),
        Kernel("mm", "matmul", 80.0, 1, 1, "fp32", (1, 2, 4, 5)),
    )
    graphs = export(job_of(two_steps([("forward", ops, 1)], world={"tensor": 2, "data": 2})), WIDE)
    add, gathered, product = graphs.nodes(1)
    assert [node.kind for node in (add, gathered, product)] == [NodeType.COMP, NodeType.COMM_COLL, NodeType.COMP]
    assert (add.attributes["num_ops"], add.attributes["tensor_size"], add.duration_micros) == (0, 3, 3_000_000)
    assert gathered.attributes["comm_type"] == CommType.ALL_GATHER
    assert gathered.attributes["comm_size"] == 5  # a rank's own part of 10 bytes
    assert gathered.data_deps == (add.id,)
    assert set(product.data_deps) == {add.id, gathered.id}
    assert product.attributes["num_ops"] == 80
    # Data groups of a mesh of 2 x 2 are ranks two apart; rank 1 is in the second one.
    assert json.loads(graphs.group_file()) == {"1": [0, 2], "2": [1, 3]}
    assert gathered.attributes["pg_name"] == "2"
    everyone = export(job_of(two_steps([("forward", ops, 1)])), CLUSTER)
    assert everyone.nodes(0)[1].attributes["pg_name"] == "0"
    assert json.loads(everyone.group_file()) == {}


def stage(ranks: int, micro_batches: int) -> Trace:
    """A flight of a pipeline rank: forward 1 s, backward 2 s on any micro-batch, update 1 s."""
    plan = SCHEDULES["1f1b"].plan(ranks, micro_batches, 1)
    names = dict.fromkeys(phase_name(action, micro_batches) for action in plan.actions(0))
    work = [(name, (Alloc(8, "activations"), kernel(1 if "forward" in name else 2, name))) for name in names]
    work.append(("update", (kernel(1, "update"),)))
    made = tuple(
        Phase(name, step, (Call(number, name, -1),)) for step in (1, 2) for number, (name, _) in enumerate(work)
    )
    return Trace({"data": 2, "pipeline": ranks}, 0, tuple(ops for _, ops in work), made)


@given(st.integers(2, 3), st.integers(1, 4))
def test_messages_of_a_pipeline_meet(ranks: int, micro_batches: int) -> None:
    job = Job(
        layout={**LAYOUT, "pp": ranks, "accumulation": micro_batches},
        precision="fp32",
        tokens_per_step=1,
        message_bytes=16,
        traces=(stage(ranks, micro_batches),),
        stages=(0,) * ranks,
    )
    graphs = export(job, WIDE)
    sent, received = [], []
    for rank in range(2 * ranks):
        for node in graphs.nodes(rank):
            if node.kind in (NodeType.COMM_SEND, NodeType.COMM_RECV):
                about = node.attributes
                own, into = ("comm_src", sent) if node.kind == NodeType.COMM_SEND else ("comm_dst", received)
                assert about[own] == rank
                into.append((about["comm_src"], about["comm_dst"], about["comm_tag"], about["comm_size"]))
            elif str(node.name).startswith("backward"):
                assert node.data_deps
    assert sorted(sent) == sorted(received)
    assert len(set(sent)) == len(sent) == 2 * 2 * (ranks - 1) * micro_batches  # both ways, two pipelines
    assert all(abs(int(one[0]) - int(one[1])) == 2 for one in sent)  # neighbours, across the data ranks


def test_too_many_ranks_and_foreign_graphs_are_refused() -> None:
    many = two_steps([("forward", (kernel(1),), 1)], world={"data": 512})
    with pytest.raises(ValueError, match="gpus = 512 in a Chakra trace"):
        export(job_of(many), CLUSTER)
    with pytest.raises(ValueError, match="no 'windtunnel_world'"):
        to_trace([], {})
    with pytest.raises(ValueError, match=r"node 0 \('x'\) has no 'windtunnel_segment'"):
        to_trace([Node(id=0, name="x", kind=NodeType.COMP)], {"windtunnel_world": "{}"})
