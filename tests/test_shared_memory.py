"""The shared-memory transport: its cursors, its limits, its errors; and disagreeing ranks, over both transports."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_performed import TRANSPORTS, make
from windtunnel.collectives.algorithms import algorithm
from windtunnel.collectives.program import sent_elements
from windtunnel.engine import gloo, shared_memory
from windtunnel.engine.channel import SLOT_BYTES, SLOTS, channel_bytes, find_channel, make_channel
from windtunnel.engine.communicator import CommunicationError
from windtunnel.engine.shared_memory import SharedMemory
from windtunnel.engine.world import World

TIMEOUT_S = 1.0
"""How long a collective waits here for other ranks."""

ANSWER_S = 1.0
"""How long a rank that failed waits for the others to say what they did."""


def transport(rank: int, token: str) -> SharedMemory:
    return SharedMemory(rank, (0, 1), token, 0.2, lambda: None)


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[SharedMemory, SharedMemory]]:
    """Both ends of a group of two in this process, with files in a folder of the test."""
    with mock.patch.object(shared_memory, "FOLDER", tmp_path):
        yield transport(0, "test"), transport(1, "test")


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=12), data=st.data())
def test_a_channel_is_a_queue(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    """What is written comes out in order and unchanged, whoever moves when; no more than SLOTS are ever under way."""
    with mock.patch.object(shared_memory, "FOLDER", tmp_path_factory.mktemp("channel")):
        one, other = transport(0, "t"), transport(1, "t")
        sender = make_channel(one._path(0, 1))
        receiver = find_channel(other._path(0, 1))
        assert receiver is not None
        pieces = [torch.arange(length) + 1000 * number for number, length in enumerate(lengths)]
        written = read = 0
        while read < len(pieces):
            assert sender.can_write() == (written - read < SLOTS)
            may_write = written < len(pieces) and sender.can_write()
            if may_write and (written == read or data.draw(st.booleans())):
                sender.write(pieces[written], tag=written)
                written += 1
                continue
            assert receiver.waiting() == (read, pieces[read].nbytes)
            assert torch.equal(receiver.arrived(torch.int64, len(pieces[read])), pieces[read])
            receiver.free(pieces[read].nbytes)
            read += 1
        assert receiver.waiting() is None
        assert sender.drained()
        assert sender.payload_bytes == receiver.payload_bytes == 8 * sum(lengths)


def test_files_are_gone_once_both_have_them(ends: tuple[SharedMemory, SharedMemory]) -> None:
    one, other = ends
    make_channel(one._path(0, 1))
    assert len(list(shared_memory.FOLDER.iterdir())) == 1
    assert find_channel(other._path(0, 1)) is not None
    assert list(shared_memory.FOLDER.iterdir()) == []
    assert find_channel(other._path(0, 1)) is None


def test_what_nobody_fetched_is_removed(ends: tuple[SharedMemory, SharedMemory]) -> None:
    one, _ = ends
    one.outward[1] = make_channel(one._path(0, 1))
    one.outward[1].write(torch.zeros(3), 0)
    one.close(failed=True)
    assert list(shared_memory.FOLDER.iterdir()) == []


def test_no_room_is_an_error_that_says_what_to_do(ends: tuple[SharedMemory, SharedMemory]) -> None:
    one, _ = ends
    full = mock.patch("os.posix_fallocate", side_effect=OSError(28, "No space left on device"))
    with (
        full,
        pytest.raises(RuntimeError, match=rf"no room for {channel_bytes(SLOT_BYTES)} bytes, \d+ are free: enlarge it"),
    ):
        make_channel(one._path(0, 1))
    assert list(shared_memory.FOLDER.iterdir()) == []


def count_bytes(rank: int, world: int, kind: str, name: str, elements: int) -> tuple[int, int, int]:
    """(bytes sent and received as the cursors counted them, bytes that the program sends)."""
    communicator = make("shared memory")
    communicator.force(name)
    getattr(communicator, kind)(torch.zeros(elements), "test").wait()
    moved = communicator.transport
    assert isinstance(moved, SharedMemory)
    sent, received = moved.sent_bytes, moved.received_bytes
    communicator.close()
    played = algorithm(kind, name)
    return sent, received, 4 * sent_elements(played.program(rank, world), played.bounds(elements, world))


@pytest.mark.parametrize(
    ("kind", "name", "elements"),
    [("all_reduce", "ring", 1000), ("all_gather", "direct", 400_000), ("broadcast", "binomial_tree", 7)],
)
def test_the_cursors_count_what_the_program_sends(four_ranks: World, kind: str, name: str, elements: int) -> None:
    counted = four_ranks.run(count_bytes, kind, name, elements)
    assert all(sent == program for sent, _, program in counted)
    assert sum(received for _, received, _ in counted) == sum(program for *_, program in counted)


# Errors, over both transports #

Asked = tuple[str, int, str] | None


def disagree(rank: int, world: int, transport_name: str, asked: list[Asked], algorithm_name: str | None) -> str:
    """What the communicator says when each rank makes its own call; None makes none."""
    with mock.patch.object(gloo, "ANSWER_S", ANSWER_S):
        communicator = make(transport_name, TIMEOUT_S)
        if algorithm_name:
            communicator.force(algorithm_name)
        if (call := asked[rank]) is None:
            return ""
        kind, elements, dtype = call
        try:
            getattr(communicator, kind)(torch.zeros(elements, dtype=getattr(torch, dtype)), "test").wait()
        except CommunicationError as error:
            return str(error)
        return "no error"


DISAGREEMENTS: list[tuple[str, Asked, Asked]] = [
    ("sizes", ("all_reduce", 1000, "float32"), ("all_reduce", 1001, "float32")),
    ("dtypes of one width", ("all_reduce", 1000, "float32"), ("all_reduce", 1000, "int32")),
    ("kinds", ("all_gather", 1000, "float32"), ("reduce_scatter", 1000, "float32")),
]


@pytest.mark.parametrize("algorithm_name", [None, "native"])
@pytest.mark.parametrize("transport_name", TRANSPORTS)
@pytest.mark.parametrize("asked", [case[1:] for case in DISAGREEMENTS], ids=[case[0] for case in DISAGREEMENTS])
def test_ranks_that_disagree(asked: tuple[Asked, Asked], transport_name: str, algorithm_name: str | None) -> None:
    with World(2, threads=1) as ranks:  # of its own: a failed call may break Gloo's connections
        said = ranks.run(disagree, transport_name, list(asked), algorithm_name, limit_s=30.0)
    for rank, message in enumerate(said):
        for number in range(2):
            kind, elements, _ = asked[number] or ("", 0, "")
            assert f"{kind} of {elements}" in message, message
        assert f"rank {1 - rank} was in number 1" in message


@pytest.mark.parametrize("transport_name", TRANSPORTS)
def test_a_rank_that_never_comes(transport_name: str) -> None:
    call = ("all_reduce", 1000, "float32")
    with World(3, threads=1) as ranks:
        said = ranks.run(disagree, transport_name, [call, None, call], None, limit_s=30.0)
    assert said[1] == ""
    for message in (said[0], said[2]):
        assert "all_reduce of 1000 fp32" in message
        assert "rank 1 did not answer" in message
