"""Files that state rests in: whole reads and writes past the page cache, in parallel, with checks on every one.

A file is a page of header and the payload, padded to whole pages, so that the drive can move it straight to and from a
page-aligned buffer (O_DIRECT). Its space is taken when it is made: a full drive shows before training, not in it. The
header says whose file it is; a file that is missing, cut off or somebody else's is an error that says so.
"""

import contextlib
import errno
import json
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

PAGE = 4096
"""Bytes that offsets, sizes and addresses of direct I/O are a multiple of; drives ask for 512 or 4,096."""

BLOCK_BYTES = 1 << 20
"""Bytes of one request; DeepSpeed's `aio.block_size` has the same default."""

THREADS = 4
"""Requests of one file that are under way at a time."""

LIMIT_S = 600.0
"""How long the parts of one file may take."""

MAGIC = b"windtunnel state 1\n"


class StorageError(OSError):
    """A file that could not be made, read or written as a whole. The message says where, why and what to do."""


def whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


class Buffer:
    """Page-aligned host memory for one file, header included.

    Attributes:
        tensor: [nbytes] uint8; the payload begins at PAGE.
    """

    def __init__(self, nbytes: int, tensor: Tensor | None = None) -> None:
        self.nbytes = whole_pages(nbytes)
        if tensor is None:
            self._map = mmap.mmap(-1, self.nbytes)
            tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self.tensor = tensor

    def memory(self, start: int, stop: int) -> memoryview:
        return memoryview(self._map)[start:stop]

    def view(self, offset: int, elements: int, dtype: torch.dtype) -> Tensor:
        """[elements] of the payload from byte `offset` of it on; a multiple of the element's size."""
        return self.tensor[PAGE + offset : PAGE + offset + elements * dtype.itemsize].view(dtype)


class File:
    """One unit's state of one rank.

    Args:
        label: whose it is; kept in the header, and what errors call it.
        nbytes: of the payload.
        pool: threads for the parts of a read or a write.

    Attributes:
        nbytes: of the file: a multiple of PAGE.
        direct: whether it bypasses the page cache; not every file system can.
    """

    def __init__(self, path: Path, label: str, nbytes: int, pool: ThreadPoolExecutor) -> None:
        self.path, self.label, self.payload_bytes, self._pool = path, label, nbytes, pool
        self.nbytes = PAGE + whole_pages(nbytes)
        self.header = _header(label, nbytes)
        self._flags, self.direct = os.O_RDWR, True
        try:
            handle = self._make()
        except OSError as error:
            raise self._failed("cannot make it", error, 0, 0) from error
        os.close(handle)

    def _make(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        direct = getattr(os, "O_DIRECT", 0)
        try:
            handle = os.open(self.path, flags | direct, 0o600)
            self._flags, self.direct = os.O_RDWR | direct, bool(direct)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with contextlib.suppress(FileNotFoundError):  # some file systems refuse after they have made it
                os.unlink(self.path)
            handle = os.open(self.path, flags, 0o600)
            self.direct = False
        try:
            os.posix_fallocate(handle, 0, self.nbytes)
        except OSError:
            os.close(handle)
            os.unlink(self.path)
            raise
        return handle

    def read(self, buffer: Buffer) -> None:
        """The whole file into the buffer's first bytes.

        Raises:
            StorageError: it is missing, shorter than it was, or not the one that was written.
        """

        def some(handle: int, at: int, stop: int) -> int:
            return os.preadv(handle, [buffer.memory(at, stop)], at)

        self._move(some, "read")
        found = bytes(buffer.memory(0, len(self.header)))
        if found != self.header:
            raise StorageError(
                f"{self.path}: not the state of {self.label}: its header is {found[:60]!r}, expected"
                f" {self.header[:60].rstrip(bytes(1))!r}; another program wrote to it: give each job a folder of its"
                " own as nvme_path, and start again from a checkpoint"
            )

    def write(self, buffer: Buffer) -> None:
        """The buffer's first bytes as the whole file, under a header.

        Raises:
            StorageError: it is missing, or not all bytes could be written.
        """
        buffer.memory(0, len(self.header))[:] = self.header

        def some(handle: int, at: int, stop: int) -> int:
            return os.pwritev(handle, [buffer.memory(at, stop)], at)

        self._move(some, "write")

    def _move(self, some: Callable[[int, int, int], int], verb: str) -> None:
        """All blocks of the file, THREADS at a time."""
        try:
            handle = os.open(self.path, self._flags)
        except OSError as error:
            raise self._failed(f"cannot open it to {verb}", error, 0, 0) from error
        try:
            share = max(BLOCK_BYTES, whole_pages(-(-self.nbytes // THREADS)))
            parts = [(start, min(start + share, self.nbytes)) for start in range(0, self.nbytes, share)]
            moving = [self._pool.submit(self._move_part, some, verb, handle, *part) for part in parts]
            errors = [part.exception(LIMIT_S) for part in moving]
            for failure in errors:
                if failure is not None:
                    raise failure
        finally:
            os.close(handle)

    def _move_part(self, some: Callable[[int, int, int], int], verb: str, handle: int, start: int, stop: int) -> None:
        at = start
        while at < stop:
            end = min(at + BLOCK_BYTES, stop)
            try:
                moved = some(handle, at, end)
            except OSError as error:
                raise self._failed(f"cannot {verb} it", error, at, end - at) from error
            if moved == 0 or (self.direct and moved % PAGE):  # a direct read that is cut within a page is at the end
                raise StorageError(
                    f"{self.path}: {verb} of {self.label} at offset {at}: expected {end - at} bytes, found {moved}; the"
                    f" file should have {self.nbytes} bytes and has {os.fstat(handle).st_size}: something cut it off;"
                    " start again from a checkpoint"
                )
            at += moved

    def _failed(self, what: str, error: OSError, offset: int, nbytes: int) -> StorageError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "start again from a checkpoint"
        if full:
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self.path.parent).free
                advice = f"{free} bytes are free there; make room, or set nvme_path to another drive"
        elif not offset and not nbytes and error.errno != errno.ENOENT:
            advice = "nvme_path must be a folder that this process may write to"
        where = f" at offset {offset}, {nbytes} bytes expected and none moved" if nbytes else ""
        return StorageError(
            f"{self.path}: {what}{where}: {os.strerror(error.errno or 0)}; state of {self.label}, {self.nbytes} bytes"
            f" in all; {advice}"
        )


def _header(label: str, nbytes: int) -> bytes:
    """A page that no other unit's, rank's or job's file has."""
    text = MAGIC + json.dumps({"label": label, "payload_bytes": nbytes}).encode()
    if len(text) > PAGE:
        raise ValueError(f"label {label[:40]!r}... of {len(label)} characters; allowed: what fits in {PAGE} bytes")
    return text.ljust(PAGE, b"\0")


class Folder:
    """A folder for the files of one rank of one job, made under `parent` and removed by `close` or at exit.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, parent: str, rank: int) -> None:
        try:
            Path(parent).mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f"windtunnel-rank{rank}-", dir=parent))
        except OSError as error:
            raise StorageError(
                f"nvme_path = {parent!r}: {os.strerror(error.errno or 0)}; allowed: a folder that this process may"
                " write to"
            ) from error
        self.rank = rank
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="windtunnel file")
        self._count = 0
        self._removal = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def file(self, label: str, nbytes: int) -> File:
        """A new file for a payload of `nbytes`."""
        self._count += 1
        whose = f"{label} on rank {self.rank} in {self.path.name}"
        return File(self.path / f"{self._count}.state", whose, nbytes, self._pool)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._removal()
