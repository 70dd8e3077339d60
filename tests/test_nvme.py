"""Files of state: what goes in comes out, and nothing that is cut off, lost, foreign or without room goes unsaid."""

import errno
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.engine import nvme
from windtunnel.engine.nvme import PAGE, Buffer, File, Folder, StorageError, whole_pages


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    made = Folder(str(tmp_path / "made for it"), rank=3)
    yield made
    made.close()


def filled(file: File, seed: int) -> Buffer:
    buffer = Buffer(file.nbytes)
    buffer.tensor.random_(generator=torch.Generator().manual_seed(seed))
    return buffer


# Sizes around pages, blocks and the shares of the threads.
sizes = st.one_of(
    st.integers(1, 3 * PAGE),
    st.builds(lambda base, off: base + off, st.sampled_from([1 << 20, 4 << 20, 5 << 20]), st.integers(-2, 2)),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=3), st.integers(0, 1000))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int) -> None:
    folder = Folder(str(tmp_path_factory.mktemp("nvme")), 0)
    files = [folder.file(f"unit {number}", length) for number, length in enumerate(lengths)]
    written = [filled(file, seed + number) for number, file in enumerate(files)]
    for file, buffer in zip(files, written, strict=True):
        file.write(buffer)
    for file, buffer, length in zip(files, written, lengths, strict=True):
        assert file.nbytes == PAGE + whole_pages(length) == file.path.stat().st_size
        back = Buffer(file.nbytes + PAGE)  # a buffer may be larger than the file
        file.read(back)
        assert torch.equal(back.tensor[: file.nbytes], buffer.tensor)
    folder.close()
    assert not folder.path.exists()


@given(st.integers(1, 100), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.integers(0, 30))
def test_views_of_a_buffer_lie_where_they_are_put(elements: int, dtype: torch.dtype, place: int) -> None:
    buffer = Buffer(2 * PAGE)
    assert buffer.tensor.data_ptr() % PAGE == 0
    offset = place * dtype.itemsize
    view = buffer.view(offset, elements, dtype)
    assert view.shape == (elements,)
    assert view.data_ptr() == buffer.tensor.data_ptr() + PAGE + offset


def test_a_file_system_without_direct_io_is_read_and_written_all_the_same(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def without_direct(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    monkeypatch.setattr(nvme.os, "open", without_direct)
    file = folder.file("block 0", 10_000)
    assert not file.direct
    file.write(written := filled(file, 1))
    file.read(back := Buffer(file.nbytes))
    assert torch.equal(back.tensor, written.tensor)


def test_a_file_that_was_cut_off_says_where(folder: Folder) -> None:
    file = folder.file("optimizer of block 7", 3 * PAGE)
    file.write(filled(file, 1))
    os.truncate(file.path, 2 * PAGE + 100)
    message = (
        rf"{file.path}: read of optimizer of block 7 on rank 3 .* at offset 8192: expected 8192 bytes, found \d+; the"
        r" file should have 16384 bytes and has 8292: .* start again from a checkpoint"
    )
    with pytest.raises(StorageError, match=message.replace("offset 8192: expected 8192", r"offset \d+: expected \d+")):
        file.read(Buffer(file.nbytes))


def test_a_file_that_is_missing(folder: Folder) -> None:
    file = folder.file("root", 100)
    file.path.unlink()
    for move in (file.read, file.write):
        with pytest.raises(StorageError, match=r"cannot open it to (read|write): No such file .* state of root on"):
            move(Buffer(file.nbytes))


def test_a_file_of_somebody_else(folder: Folder) -> None:
    mine, other = folder.file("block 1", 100), folder.file("block 2", 100)
    for file in (mine, other):
        file.write(filled(file, 1))
    mine.path.write_bytes(other.path.read_bytes())
    with pytest.raises(StorageError, match=r"not the state of block 1 on rank 3 .*block 2.*give each job a folder"):
        mine.read(Buffer(mine.nbytes))


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """As on a drive that is full: no file may grow beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_drive_without_room_shows_before_training(folder: Folder) -> None:
    with (
        largest_file(10 * PAGE),
        pytest.raises(StorageError, match=r"cannot make it: .*state of block 3.*, 135168 bytes in all; \d+ bytes are"),
    ):
        folder.file("block 3", 32 * PAGE)
    assert list(folder.path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_names_its_place(folder: Folder, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    file = folder.file("block 3", 100)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(nvme.os, "pwritev", fail)
    advice = "make room, or set nvme_path to another drive" if code == errno.ENOSPC else "start again from a checkpoint"
    with pytest.raises(StorageError, match=rf"cannot write it at offset 0, 8192 bytes expected .*{advice}"):
        file.write(Buffer(file.nbytes))


def test_short_moves_are_continued(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real_read, real_write = folder.file("block 0", 5 * PAGE), os.preadv, os.pwritev
    monkeypatch.setattr(nvme.os, "preadv", lambda handle, parts, at: real_read(handle, [parts[0][:PAGE]], at))
    monkeypatch.setattr(nvme.os, "pwritev", lambda handle, parts, at: real_write(handle, [parts[0][:PAGE]], at))
    file.write(written := filled(file, 2))
    file.read(back := Buffer(file.nbytes))
    assert torch.equal(back.tensor, written.tensor)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"nvme_path = '.*/file': .*; allowed: a folder that this process may write"):
        Folder(str(tmp_path / "file"), 0)


def test_a_label_that_does_not_fit_in_the_header(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match=r"label 'xxx.* of 5000 characters"):
        File(tmp_path / "x", "x" * 5000, 100, pool)
