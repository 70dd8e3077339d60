"""Who imports whom (docs/decisions.md, "Rooms"), read from the source; and what starts without torch, tried."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ROOMS: dict[str, set[str]] = {
    "collectives": set(),
    "kernels": set(),
    "engine": {"collectives", "kernels"},
    "sim": {"collectives"},
    "experiments": {"collectives", "kernels", "engine", "sim"},
}
"""The rooms, and the other rooms that each may import. All may import the root's reading.py."""

LIBRARIES: dict[str, set[str]] = {
    "collectives": set(),
    "kernels": {"torch", "triton"},
    "engine": {"torch", "safetensors"},
    "sim": {"simpy", "numpy"},
}
"""What a room may import besides the standard library; experiments may import anything."""

SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Absolute dotted names of all imports anywhere in a file, those for type checkers and inside functions included.

    Args:
        package: the package of the file, e.g. ("windtunnel", "sim").
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = [*base, *(node.module.split(".") if node.module else [])]
            # `from .. import sim` imports a room by name.
            yield from (".".join([*stem, alias.name]) for alias in node.names)


def offences(source: str, package: tuple[str, ...]) -> list[str]:
    """The imports that a file of `package` may not make."""
    room = package[1]
    found = []
    for name in imported(source, package):
        top, *rest = name.split(".")
        if top == "windtunnel":
            allowed = rest and (rest[0] == room or rest[0] in ROOMS[room] or rest[0] == "reading")
        else:
            allowed = top in sys.stdlib_module_names or room not in LIBRARIES or top in LIBRARIES[room]
        if not allowed:
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = ("windtunnel", *path.relative_to(ROOT).parent.parts)
    assert offences(path.read_text(), package) == []


@pytest.mark.parametrize(
    ("room", "line", "forbidden"),
    [
        ("sim", "from ..engine.wire import written_bytes", True),
        ("sim", "from .. import engine", True),
        ("sim", "from windtunnel.engine import wire", True),
        ("sim", "import torch", True),
        ("sim", "def f():\n    from torch import nn", True),
        ("sim", "if TYPE_CHECKING:\n    from ..experiments.models import ModelSpec", True),
        ("sim", "from ..collectives.trace import Trace", False),
        ("sim", "from ..reading import read_toml", False),
        ("sim", "from .replay import replay", False),
        ("sim", "import simpy, json", False),
        ("collectives", "import numpy", True),
        ("collectives", "from .ring import RING", False),
        ("collectives", "from ..kernels import adam", True),
        ("kernels", "from ..collectives.zero import Zero", True),
        ("engine", "from ..sim.hardware import Gpu", True),
        ("engine", "from ..kernels import adam", False),
        ("engine", "import simpy.events", True),
        ("experiments", "from ..sim.hardware import Gpu\nimport matplotlib", False),
        ("experiments", "from windtunnel import demo", True),
    ],
)
def test_the_guard_itself(room: str, line: str, forbidden: bool) -> None:
    assert bool(offences(line, ("windtunnel", room))) == forbidden


def test_a_deeper_folder_is_resolved() -> None:
    package = ("windtunnel", "sim", "inner")
    assert list(imported("from ...collectives.trace import Trace", package)) == ["windtunnel.collectives.trace.Trace"]
    assert offences("from ...engine import wire", package) == ["windtunnel.engine.wire"]


def test_every_room_has_sources() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(ROOMS)


WITHOUT_TORCH = [
    "windtunnel",
    "windtunnel.collectives.zero",
    "windtunnel.engine.pilot",
    "windtunnel.experiments.cli",
    *(f"windtunnel.sim.{path.stem}" for path in sorted((ROOT / "sim").glob("*.py"))),
]


@pytest.mark.parametrize("module", [name.removesuffix(".__init__") for name in WITHOUT_TORCH])
def test_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch was loaded' if 'torch' in sys.modules else 0)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("room", ["collectives", "engine", "experiments", "kernels", "sim"])
def test_a_room_lists_its_files(room: str) -> None:
    """The docstring of a room is its table of contents: one line for each module, and none for anything else."""
    docstring = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())) or ""
    listed = [line.split()[0] for line in docstring.splitlines()[1:] if line.strip()]
    folders = {path.parent.name for path in (ROOT / room).glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}
    assert sorted(listed) == sorted(modules | folders)
