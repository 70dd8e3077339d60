"""Starts a script on several ranks of this machine: torchrun's agent with what one machine needs filled in."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOOPBACK = "127.0.0.1"


class LaunchError(RuntimeError):
    """A rank failed; the message names it and how it ended."""


def launch(script: str | Path, arguments: Sequence[str] = (), *, ranks: int, threads: int | None = None) -> None:
    """Run a Python script on `ranks` ranks of this machine, until all have ended.

    The ranks find each other on the loopback address, at a free port; they read and write this process's standard
    streams. When one fails, the others are ended.

    Args:
        arguments: of the script.
        threads: that torch uses in each rank; OMP_NUM_THREADS where that is set, else an equal share of the cores.

    Raises:
        ValueError: no such script, or a number below 1.
        LaunchError: a rank failed.
    """
    if not Path(script).is_file():
        raise ValueError(f"script = {str(script)!r}; allowed: the path of a Python file")
    for name, value in (("ranks", ranks), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}; allowed: an integer >= 1")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0",
        local_addr=LOOPBACK,
        max_restarts=0,
    )
    command = [sys.executable, "-u", str(script), *arguments]
    with _threads(threads or _share(ranks)), _silent_agent():
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise LaunchError(f"rank {rank} of {ranks} ended with {_ending(failure.exitcode)}: {script}") from None


def _share(ranks: int) -> int:
    stated = os.environ.get("OMP_NUM_THREADS")
    return int(stated) if stated else max(1, (os.cpu_count() or 1) // ranks)


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Processes that are started inside use so many threads."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(number)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


@contextmanager
def _silent_agent() -> Iterator[None]:
    """What the agent would log of a failed rank is in the error, and the rank has written its traceback itself."""
    logger = logging.getLogger("torch.distributed.elastic")
    before = logger.disabled, logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.disabled, logger.level = before
