"""Real text that every machine has: the source of Python's standard library, as bytes and as batches of bytes."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def corpus_bytes(limit_bytes: int) -> bytes:
    """The first `limit_bytes` bytes of the library's *.py files, put together in the order of their paths.

    Shorter if the library is. The same on each call; another Python version has another text.

    Raises:
        ValueError: a limit below 1, or a Python that ships no source.
    """
    if limit_bytes < 1:
        raise ValueError(f"limit_bytes = {limit_bytes} must be >= 1")
    root = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in _sources(root):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    if not text:
        raise ValueError(f"the standard library at {root} has no *.py files; run under a Python that ships its source")
    return bytes(text[:limit_bytes])


def _sources(root: Path) -> Iterator[Path]:
    """The *.py files of a folder, then those of its folders, each in the order of their names."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def batches(data: bytes, *, batch: int, seq: int, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """`steps` pairs (tokens, targets) of shape (batch, seq), int64: random windows and the same windows one byte on.

    Raises:
        ValueError: a size below 1, or fewer than seq + 1 bytes.
    """
    for field, value in (("batch", batch), ("seq", seq), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{field} = {value} must be >= 1")
    if len(data) <= seq:
        raise ValueError(f"seq = {seq} needs at least {seq + 1} bytes of text, got {len(data)}")
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - seq, (steps, batch, 1), generator=generator)
    windows = text[starts + torch.arange(seq + 1)].long()
    return [(window[:, :-1].contiguous(), window[:, 1:].contiguous()) for window in windows]
