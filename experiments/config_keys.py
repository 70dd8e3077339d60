"""The keys of the engine's config as a document: read from the dataclasses that read them, so that it is never stale.

    python -m windtunnel.experiments.config_keys docs/config.md

writes the generated parts of that file again, the what-if table (experiments/what_if.py) among them.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..engine.config import Json
from ..engine.dialect import ALWAYS, AUTO, REFUSED, RENAMED
from .files import write_whole
from .what_if import KEYS_WITHOUT_PRICE, RESULTS, VARIANTS, markdown_rows


@dataclass(frozen=True, slots=True)
class Key:
    """One key that is honoured.

    Attributes:
        path: "zero_optimization.stage".
        default: as JSON shows it.
        meaning: the line of the field in the docstring of its dataclass, under Attributes; empty where there is none.
    """

    path: str
    default: str
    meaning: str


def keys() -> list[Key]:
    """Every key of the JSON file that is honoured, sections spelled out, in the order of the dataclasses."""
    return list(_keys(Json, ""))


def _keys(kind: Any, prefix: str) -> Iterator[Key]:
    meanings = attribute_lines(kind)
    hints = get_type_hints(kind)
    for field in fields(kind):
        section = _section(hints[field.name])
        if section is not None:
            yield from _keys(section, f"{prefix}{field.name}.")
        else:
            yield Key(prefix + field.name, _default(field), meanings.get(field.name, ""))


def _section(hint: Any) -> Any:
    """The dataclass that a field holds, if it is (optionally) one."""
    inner = [option for option in (hint, *get_args(hint)) if is_dataclass(option)]
    return inner[0] if inner else None


def _default(field: "Field[Any]") -> str:
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        return "must be given"
    return "not set" if value is None else json.dumps(value)


def attribute_lines(kind: type) -> dict[str, str]:
    """The lines under `Attributes:` in a docstring, by attribute, each joined to one line."""
    _, _, block = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in block.splitlines():
        begins = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if begins:
            name, text = begins[1], begins[2]
            found.update(dict.fromkeys(name.split(", "), text))
        elif name and line.startswith("        "):
            for each in name.split(", "):
                found[each] += " " + line.strip()
        elif line and not line.startswith(" "):
            break  # another heading
    return found


# The document #


def generated() -> dict[str, str]:
    """The parts of docs/config.md that are written by this module, by the name in their markers."""
    always = ((f"`{path}`", _values(key.values), key.reason) for path, key in ALWAYS.items())
    return {
        "keys": _table(
            ("key", "default", "what it does", "what it costs or saves"),
            ((f"`{key.path}`", f"`{key.default}`", key.meaning, _price(key.path)) for key in keys()),
        ),
        "what if": "\n".join(markdown_rows(RESULTS)),
        "always": _table(("key", "accepted", "because"), always),
        "auto": _table(("key", "attribute of `args`"), ((f"`{path}`", f"`{name}`") for path, name in AUTO.items())),
        "refused": _table(
            ("key", "why, or what to do instead"),
            [
                *((f"`{path}`", reason) for path, reason in REFUSED.items()),
                *((f"`{path}`", f"is called `{present}` now") for path, present in RENAMED.items()),
            ],
        ),
    }


def _values(values: tuple[Any, ...] | None) -> str:
    if values is None:
        return "any value"
    return " or ".join(f'`"{value}"`' if isinstance(value, str) else f"`{str(value).lower()}`" for value in values)


def price_of(path: str) -> str | None:
    """Which variants of the what-if table change a key, or why none does; None where nothing is said of it."""
    numbers = [str(number) for number, variant in enumerate(VARIANTS, 1) if path in variant.paths]
    if numbers:
        return f"what if {', '.join(numbers)}"
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        if (reason := KEYS_WITHOUT_PRICE.get(".".join(parts[:length]))) is not None:
            return reason
    return None


def _price(path: str) -> str:
    return price_of(path) or ""


def _table(columns: tuple[str, ...], rows: Any) -> str:
    lines = [" | ".join(columns), "|".join("---" for _ in columns), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def filled(document: str) -> str:
    """A document with its generated parts, between `<!-- NAME -->` and `<!-- end -->`, written again.

    Raises:
        ValueError: a part without a place.
    """
    for name, text in generated().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(document):
            raise ValueError(f"the document has no place for {name!r}: <!-- {name} --> ... <!-- end -->")
        document = pattern.sub(rf"\1{text.replace(chr(92), chr(92) * 2)}\n\2", document)
    return document


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_whole(target, filled(target.read_text()))
