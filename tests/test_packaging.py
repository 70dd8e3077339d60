"""The wheel holds every module, the catalogues and py.typed, and nothing of the tests."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("collectives", "engine", "experiments", "kernels", "sim")
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")


def shipped() -> set[str]:
    """What a user needs, by its name in the wheel."""
    files = [*ROOT.glob("*.py"), ROOT / "py.typed"]
    for room in ROOMS:
        files += [*(ROOT / room).rglob("*.py"), *(ROOT / room).rglob("*.toml"), *(ROOT / room).rglob("*.cpp")]
    return {f"windtunnel/{path.relative_to(ROOT).as_posix()}" for path in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from a copy, so that the build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "wheels")]
    built = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (path,) = (folder / "wheels").glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_every_module_and_catalogue_is_shipped(wheel: list[str]) -> None:
    assert shipped() - set(wheel) == set()


def test_nothing_else_is_shipped(wheel: list[str]) -> None:
    """No tests, no results of benchmarks, no stray packages."""
    others = {name for name in wheel if ".dist-info/" not in name} - shipped()
    assert {name for name in others if name.endswith(".py") or not name.startswith("windtunnel/")} == set()
    assert not [name for name in wheel if Path(name).name.startswith("test_") or "/tests/" in name]


def test_command_line_is_declared(wheel: list[str]) -> None:
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)
