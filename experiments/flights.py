"""Traces of flights, each flown once: in this process, and for programs of this package once for all processes.

Where nothing is sharded, a rank does the same however many data-parallel ranks there are: two flights that differ in
their number alone show whether that is so, and stand for others then.

What a flight does follows from its plan, this package's source and torch's version, and the name of a kept trace is a
digest of all three. Traces of users' programs, whose source is not known here, are kept in memory only.
`WINDTUNNEL_FLIGHTS` names the folder (else windtunnel/flights in the user's cache folder); "off" keeps no files.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from ..collectives.trace import Collective, Trace
from ..collectives.trace_file import dumps, loads
from ..engine.pilot import Plan, fly
from .files import write_whole

MOST_IN_MEMORY = 128
"""Traces that this process remembers."""

MOST_BYTES = 256 << 20
"""Of the folder; the traces that were not used for longest make room."""

CLASSES_OF_MICRO_STEPS = 3
"""Of a step's micro-steps the first, one in the middle and the last are flown."""

PACKAGE = Path(__file__).parent.parent

DATA = "data"

AXES = {"tensor", "context", DATA, "pipeline"}
"""Of meshes whose data-parallel ranks are all alike."""

SIZES = 2
"""How many flights that differ in data-parallel ranks alone are kept to tell others from: the first ones."""

_known: dict[str, Trace] = {}
_by_size: dict[str, dict[int, Trace]] = {}
"""By family, flown traces by number of ranks."""


def flown(plan: Plan) -> Trace:
    """The trace of `plan`, flown now or before.

    Raises:
        ValueError, FlightError: as `engine.pilot.fly`.
    """
    plan = replace(plan, micro_steps=min(plan.micro_steps, CLASSES_OF_MICRO_STEPS))
    name = repr(plan)
    trace = _known.pop(name, None) or _resized(plan) or _kept(plan, name)
    _known[name] = trace
    if len(_known) > MOST_IN_MEMORY:
        del _known[next(iter(_known))]
    return trace


def forget() -> None:
    """Drop what this process remembers; files stay."""
    _known.clear()
    _by_size.clear()


def _resized(plan: Plan) -> Trace | None:
    """The trace from those of two other worlds that differ in data-parallel ranks alone, if these do the same.

    Buffers are padded to multiples of the ranks. One that has the same size at two numbers of ranks and is a multiple
    of a third one, larger than the smaller of them, has that size there too: padding is shorter than there are ranks.
    """
    seen = sorted(_by_size.get(_family(plan), {}).items())
    if len(seen) < 2:
        return None
    (world, one), (_, other) = seen[:2]
    ranks, rest = divmod(plan.world * one.world.get(DATA, 1), world)
    if rest or ranks <= one.world.get(DATA, 1) or replace(other, world=one.world) != one:
        return None
    padded = any(
        isinstance(op, Collective) and DATA in op.axis and not op.scalar and op.elements % ranks
        for segment in one.segments
        for op in segment
    )
    return None if padded else replace(one, world={**one.world, DATA: ranks})


def _family(plan: Plan) -> str:
    """Plans with the same name differ in the number of ranks alone."""
    return repr(replace(plan, world=1))


def _kept(plan: Plan, name: str) -> Trace:
    """The trace from its file; flown, and written there, if there is none that can be read."""
    trace = _read_or_fly(plan, name)
    if (
        trace.world.keys() <= AXES
        and trace.world.get(DATA, 1) > 1
        and plan.config.get("parallel", {}).get("expert", 1) == 1
    ):
        seen = _by_size.setdefault(_family(plan), {})
        if len(seen) < SIZES:
            seen[plan.world] = trace
        if len(_by_size) > MOST_IN_MEMORY:
            del _by_size[next(iter(_by_size))]
    return trace


def _read_or_fly(plan: Plan, name: str) -> Trace:
    folder = flights_folder()
    if folder is None or not plan.factory.startswith(f"{__name__.partition('.')[0]}."):
        return fly(plan)
    path = folder / f"{sha256(f'{_program()} {name}'.encode()).hexdigest()}.json"
    try:
        trace = loads(path.read_text())
        os.utime(path)
    except (OSError, ValueError):
        trace = fly(plan)
        _keep(path, trace)
    return trace


def _keep(path: Path, trace: Trace) -> None:
    """Write a trace; a folder that cannot be written keeps none, which costs time and nothing else."""
    try:
        write_whole(path, dumps(trace))
        _make_room(path.parent.glob("*.json"))
    except OSError as error:
        print(f"note: flights are not kept: {error}; WINDTUNNEL_FLIGHTS names another folder, or off", file=sys.stderr)


def flights_folder() -> Path | None:
    """Where traces are kept; None where they are not."""
    said = os.environ.get("WINDTUNNEL_FLIGHTS")
    if said == "off":
        return None
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(said) if said else cache_folder / "windtunnel" / "flights"


def _make_room(paths: Iterable[Path]) -> None:
    """Remove the files that were not used for longest until the rest is small enough."""
    files = sorted(((path.stat().st_mtime_ns, path.stat().st_size, path) for path in paths), reverse=True)
    total = 0
    for _, nbytes, path in files:
        total += nbytes
        if total > MOST_BYTES:
            path.unlink(missing_ok=True)


@cache
def _program() -> str:
    """A digest of everything that a flight of this package's models follows from, but its plan."""
    digest = sha256(f"{version('torch')} {sys.version}".encode())
    rooms = ("collectives", "engine", "kernels")
    for path in sorted([*PACKAGE.glob("*.py"), *(p for room in rooms for p in (PACKAGE / room).glob("**/*.py"))]):
        digest.update(path.read_bytes())
    for name in ("models", "transformer"):
        digest.update((PACKAGE / "experiments" / f"{name}.py").read_bytes())
    return digest.hexdigest()
