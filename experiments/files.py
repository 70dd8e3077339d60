"""Tables in files that are whole or absent."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.durable import write_whole

__all__ = ["write_csv", "write_whole"]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A table with the keys of the first row as its header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_whole(path, text.getvalue())
