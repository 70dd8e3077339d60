"""Reads what users write (JSON, TOML) into frozen dataclasses. Every error is one line that names the field.

All rooms may use it. pydantic does the checking and is imported only when something is read.
"""

import difflib
import json
import tomllib
from collections.abc import Collection, Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_type_hints

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

STRICT: Any = {"extra": "forbid", "strict": True}
"""Set as `__pydantic_config__` on a dataclass that is read: no unknown keys, no "3" for 3."""


def nearest(name: str, known: Collection[str]) -> str:
    """ "; did you mean 'x'?" when something known is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ValueError: the file is missing or is not TOML; the message names it and, for a syntax error, the line.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None


def read_into(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """Check `data` against a (nested) frozen dataclass and build it.

    Args:
        where: what an error calls the place, e.g. a file name.

    Raises:
        ValueError: one line with `where`, the field, the value and what is allowed; an unknown key shows the nearest.
    """
    from pydantic import ValidationError

    try:
        built: T = _adapter(cast("Hashable", kind)).validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where}: {_sentence(kind, first)}") from None
    return built


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    """The checker of a dataclass; making one takes longer than using it."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _sentence(kind: type, error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)
    match error["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            known = _known_keys(kind, path[:-1])
            return f"unknown key {name!r}; allowed: {', '.join(known)}{nearest(path[-1], known)}"
        case "missing":
            return f"{name!r} is missing"
        case "value_error":
            reason = str(error["ctx"]["error"])
            return f"{name}: {reason}" if name else reason
        case _:
            return f"{name} = {error['input']!r}: {error['msg'].lower()}"


def _known_keys(kind: Any, path: list[str]) -> list[str]:
    """Field names of the dataclass that `path` leads to from `kind`."""
    for part in path:
        hint = get_type_hints(kind).get(part)
        inner = [option for option in getattr(hint, "__args__", (hint,)) if is_dataclass(option)]
        if not inner:
            return []
        kind = inner[0]
    return [field.name for field in fields(kind)]
