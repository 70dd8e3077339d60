"""Figures with the units that their names end in, in the size that reads best."""

from typing import Any

UNITS = {
    "_bytes_per_s": "B/s",
    "_bytes_per_s_per_node": "B/s per node",
    "_flops": "FLOP/s",
    "_bytes": "B",
    "_s": "s",
    "_hours": "h",
    "_usd": "USD",
}
"""Unit of a figure by how its name ends; the longest ending counts. A share or a count has none."""

PREFIXES = (
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "u"),
    (1e-9, "n"),
)
WITHOUT_PREFIX = ("h", "USD")


def unit_of(name: str) -> str:
    """Unit of a figure called `name`, or nothing; members of a table of rates have the table's ("peak_flops.bf16")."""
    table, _, member = name.partition(".")
    for ending in sorted(UNITS, key=len, reverse=True):
        if any(f"_{part}".endswith(ending) for part in (member, table)):
            return UNITS[ending]
    return ""


def with_unit(name: str, value: Any) -> str:
    """A value as text: "300 GB/s", "3.4 us", "0.941"."""
    unit = unit_of(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not unit:
        return f"{value:,.6g}"
    if unit in WITHOUT_PREFIX or value == 0:
        return f"{value:,.6g} {unit}"
    factor, prefix = next(((factor, prefix) for factor, prefix in PREFIXES if abs(value) >= factor), PREFIXES[-1])
    return f"{value / factor:.6g} {prefix}{unit}"
