"""Chakra execution traces as files: the graph of one rank, node by node, and back.

A file is a row of protobuf messages, each after its length as a varint: first a GlobalMetadata, then Nodes (MLCommons
Chakra, schema/protobuf/et_def.proto; framing as its src/third_party/utils/protolib.py writes and ASTRA-sim reads it).
Of the schema this needs two messages and a handful of fields, so they are encoded here, by the protobuf wire format
(protobuf.dev, "Encoding"): the simulator stays free of a package whose generated code must match its version.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

VERSION = "0.0.4"
"""Of the schema, as Chakra's own generator writes it."""

Value = bool | int | float | str | tuple[int, ...]
"""Of an attribute."""


class NodeType(IntEnum):
    """What a node does."""

    INVALID = 0
    METADATA = 1
    MEM_LOAD = 2
    MEM_STORE = 3
    COMP = 4
    COMM_SEND = 5
    COMM_RECV = 6
    COMM_COLL = 7


class CommType(IntEnum):
    """Values of the attribute "comm_type"; names are those of collectives/algorithms.py in capitals."""

    ALL_REDUCE = 0
    REDUCE = 1
    ALL_GATHER = 2
    GATHER = 3
    SCATTER = 4
    BROADCAST = 5
    ALL_TO_ALL = 6
    REDUCE_SCATTER = 7
    REDUCE_SCATTER_BLOCK = 8
    BARRIER = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of a rank's graph.

    Attributes:
        kind: a NodeType.
        data_deps, ctrl_deps: ids of the nodes that end before this one begins.
        duration_micros: whole microseconds, 0 where it is left to whoever replays the graph.
        attributes: by name: "num_ops", "tensor_size", "comm_type", "comm_size", "pg_name", ...
    """

    id: int
    name: str
    kind: int
    data_deps: tuple[int, ...] = ()
    ctrl_deps: tuple[int, ...] = ()
    start_micros: int = 0
    duration_micros: int = 0
    attributes: Mapping[str, Value] = field(default_factory=dict)


def dumps(nodes: Iterable[Node], about: Mapping[str, Value] | None = None) -> bytes:
    """The file of a rank.

    Args:
        about: attributes of the whole graph.
    """
    head = _text(1, VERSION) + b"".join(_bytes(2, _attribute(*item)) for item in (about or {}).items())
    return b"".join(_framed(message) for message in (head, *map(_node, nodes)))


def loads(data: bytes) -> tuple[list[Node], dict[str, Value]]:
    """(nodes, attributes of the whole graph) of a file, this program's or another's.

    Raises:
        ValueError: the file is cut off or no Chakra trace.
    """
    try:
        messages = list(_frames(data))
        if not messages:
            raise ValueError("it is empty")
        about = dict(_read_attribute(value) for number, value in _fields(messages[0]) if number == 2)
        return [_read_node(message) for message in messages[1:]], about
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"not a Chakra trace: {error}") from None


# Messages #

_KINDS = {
    "num_ops": "int64",
    "tensor_size": "uint64",
    "comm_type": "int64",
    "comm_size": "int64",
    "comm_priority": "int32",
    "comm_src": "int32",
    "comm_dst": "int32",
    "comm_tag": "int32",
}
"""Types of the whole numbers that Chakra's feeder reads (src/feeder/et_feeder_node.cpp); others are int64."""

_NUMBERS = {"int32": 7, "int64": 9, "uint32": 11, "uint64": 13}
_DOUBLE, _FLOAT, _INT64_LIST, _BOOL, _STRING = 3, 5, 10, 27, 29
"""Fields of an AttributeProto's `value`."""

_SIGNED = {7, 9}


def _attribute(name: str, value: Value) -> bytes:
    head = _text(1, name)
    match value:
        case bool():
            return head + _number(_BOOL, value)
        case int():
            return head + _number(_NUMBERS[_KINDS.get(name, "int64")], value)
        case float():
            return head + _key(_DOUBLE, 1) + struct.pack("<d", value)
        case str():
            return head + _text(_STRING, value)
        case tuple():
            return head + _bytes(_INT64_LIST, _packed(1, value))


def _read_attribute(data: bytes | int) -> tuple[str, Value]:
    name = ""
    found: Value | None = None
    for number, value in _fields(_message(data)):
        match number:
            case 1:
                name = _message(value).decode()
            case _ if number in _SIGNED and isinstance(value, int):
                found = _signed(value)
            case 11 | 13 if isinstance(value, int):
                found = value
            case 3 | 5 if isinstance(value, bytes):
                (found,) = struct.unpack("<d" if number == _DOUBLE else "<f", value)
            case 10 if isinstance(value, bytes):
                found = tuple(_signed(v) for n, own in _fields(value) if n == 1 for v in _unpacked(own))
            case 27:
                found = bool(value)
            case 29:
                found = _message(value).decode()
            case 2:
                pass  # a doc string
            case _:
                raise ValueError(
                    f"attribute {name!r} has a value of field {number}; known are numbers, text and int64s"
                )
    if found is None:
        raise ValueError(f"attribute {name!r} has no value")
    return name, found


def _node(node: Node) -> bytes:
    parts = [_number(1, node.id), _text(2, node.name), _number(3, node.kind)]
    parts += [_packed(4, node.ctrl_deps), _packed(5, node.data_deps)]
    parts += [_number(6, node.start_micros), _number(7, node.duration_micros)]
    parts += [_bytes(10, _attribute(*item)) for item in node.attributes.items()]
    return b"".join(parts)


def _read_node(data: bytes) -> Node:
    numbers = {1: 0, 3: 0, 6: 0, 7: 0}
    deps: dict[int, list[int]] = {4: [], 5: []}
    name = ""
    attributes: dict[str, Value] = {}
    for number, value in _fields(data):
        if number in numbers and isinstance(value, int):
            numbers[number] = value
        elif number in deps:
            deps[number] += _unpacked(value)
        elif number == 2:
            name = _message(value).decode()
        elif number == 10:
            key, found = _read_attribute(value)
            attributes[key] = found
    return Node(
        id=numbers[1],
        name=name,
        kind=numbers[3],
        ctrl_deps=tuple(deps[4]),
        data_deps=tuple(deps[5]),
        start_micros=numbers[6],
        duration_micros=numbers[7],
        attributes=attributes,
    )


# The wire format #


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; a negative number as its two's complement of 64 bits."""
    rest, made = value & (1 << 64) - 1, bytearray()
    while rest > 0x7F:
        made.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes((*made, rest))


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number, the position after it)."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("it ends inside a number")
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            return value, at
        if shift >= 70:
            raise ValueError("a number has more than 64 bits")


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _number(number: int, value: int) -> bytes:
    return _key(number, 0) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, 2) + _varint(len(value)) + value


def _text(number: int, value: str) -> bytes:
    return _bytes(number, value.encode())


def _packed(number: int, values: Iterable[int]) -> bytes:
    body = b"".join(map(_varint, values))
    return _bytes(number, body) if body else b""


def _unpacked(value: bytes | int) -> list[int]:
    """A repeated number, packed or one at a time."""
    if isinstance(value, int):
        return [value]
    found, at = [], 0
    while at < len(value):
        one, at = _read_varint(value, at)
        found.append(one)
    return found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _message(value: bytes | int) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a message or text belongs")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of each field; values of fixed width are their bytes."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        match key & 7:
            case 0:
                value, at = _read_varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                length = 8
            case 2:
                length, at = _read_varint(data, at)
            case 5:
                length = 4
            case other:
                raise ValueError(f"a field has wire type {other}; known are 0, 1, 2 and 5")
        if at + length > len(data):
            raise ValueError("it ends inside a field")
        yield key >> 3, data[at : at + length]
        at += length


def _framed(message: bytes) -> bytes:
    return _varint(len(message)) + message


def _frames(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        length, at = _read_varint(data, at)
        if at + length > len(data):
            raise ValueError("it ends inside a message")
        yield data[at : at + length]
        at += length
