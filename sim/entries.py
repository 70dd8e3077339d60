"""The files of the catalogue: which entries a folder has, and where a name or a user's path leads."""

from functools import cache
from pathlib import Path

from ..reading import nearest

CATALOGUE = Path(__file__).parent / "catalogue"


@cache
def entries(folder: str) -> tuple[str, ...]:
    """Names of the entries of a folder of the catalogue, sorted."""
    return tuple(sorted(path.stem for path in (CATALOGUE / folder).glob("*.toml")))


def find(name_or_path: str | Path, folder: str, what: str) -> Path:
    """The file of a catalogue entry, or the user's.

    Args:
        what: what an error calls an entry of this folder.

    Raises:
        ValueError: neither a name of the catalogue nor a path; the message shows the nearest name.
    """
    name = str(name_or_path)
    if name in entries(folder):
        return CATALOGUE / folder / f"{name}.toml"
    if isinstance(name_or_path, Path) or looks_like_path(name):
        return Path(name_or_path)
    raise ValueError(f"{unknown(what, name, entries(folder))}; a TOML file is given by its path")


def looks_like_path(name: str) -> bool:
    return name.endswith(".toml") or "/" in name


def beside(path: Path, name: str) -> str | Path:
    """A catalogue name as it is; a path relative to the file that names it."""
    return path.parent / name if looks_like_path(name) else name


def unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    return f"unknown {what} {name!r}; the catalogue has {', '.join(known)}{nearest(name, known)}"


def in_catalogue(path: Path) -> bool:
    return CATALOGUE in path.parents


def where(path: Path) -> str:
    """What an error calls a file: the catalogue's by its name, a user's by its path."""
    return path.name if in_catalogue(path) else str(path)
