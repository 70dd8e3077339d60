"""A Trace as a JSON file, and back."""

import json
from dataclasses import asdict
from typing import Any

from .trace import (
    FORMAT_VERSION,
    Alloc,
    Call,
    Collective,
    Copy,
    Free,
    HostWork,
    Kernel,
    Op,
    Phase,
    Ref,
    Synchronize,
    Trace,
    Wait,
)

KINDS = (Kernel, Collective, Copy, HostWork, Wait, Synchronize, Alloc, Free)
OPS: dict[str, type[Op]] = {kind.__name__: kind for kind in KINDS}


def dumps(trace: Trace) -> str:
    """The trace as one JSON object."""
    return json.dumps(to_plain(trace))


def to_plain(trace: Trace) -> dict[str, Any]:
    """The trace as plain values; an op is its class's name and its fields."""
    segments = [[{"op": type(op).__name__, **asdict(op)} for op in segment] for segment in trace.segments]
    phases = [asdict(phase) for phase in trace.phases]
    return {
        "world": dict(trace.world),
        "blocks": trace.blocks,
        "segments": segments,
        "phases": phases,
        "version": trace.version,
    }


def loads(text: str) -> Trace:
    """The trace that `dumps` wrote.

    Raises:
        ValueError: not a trace, or one of a version that this program does not know.
    """
    try:
        return from_plain(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"not a trace: {error!r}") from None


def from_plain(data: Any) -> Trace:
    """The trace that `to_plain` was given.

    Raises:
        ValueError: as for `loads`.
    """
    try:
        version = data["version"]
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"version = {version!r} of the trace; this program reads versions 1 to {FORMAT_VERSION}: a newer one"
                " reads newer traces"
            )
        return Trace(
            world=data["world"],
            blocks=data["blocks"],
            segments=tuple(tuple(_op(op) for op in segment) for segment in data["segments"]),
            phases=tuple(
                Phase(**{**phase, "calls": tuple(Call(*call) for call in phase["calls"])}) for phase in data["phases"]
            ),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a trace: {error!r}") from None


def _op(data: dict[str, Any]) -> Op:
    fields = {name: value for name, value in data.items() if name != "op"}
    if "ref" in fields:
        fields["ref"] = Ref(*fields["ref"])
    if "shape" in fields:
        fields["shape"] = tuple(fields["shape"])
    return OPS[data["op"]](**fields)
