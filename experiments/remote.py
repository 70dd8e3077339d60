"""What a rank does with a test: finds its function, gives it its arguments, and lets its assertions speak."""

import ast
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from _pytest.assertion.rewrite import rewrite_asserts  # what makes `assert a == b` show a and b; it has no public name


@dataclass(frozen=True, slots=True)
class Body:
    """A test function, by its file, its module's name, and its own name in there ("Class.method" of a class)."""

    file: str
    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A rank's answer: the test was skipped there."""

    reason: str


def perform(rank: int, world: int, body: Body, arguments: bytes) -> Skipped | None:
    """Run a test's body on this rank.

    Args:
        arguments: pickled; they may be of types that the test's module defines, so it is loaded first.
    """
    function: Any = _load(body)
    for part in body.name.split("."):
        function = getattr(function, part)
        if isinstance(function, type):
            function = function()
    given: dict[str, Any] = pickle.loads(arguments)
    given.update({name: value for name, value in (("rank", rank), ("world_size", world)) if name in given})
    try:
        function(**given)
    except pytest.skip.Exception as skipped:
        return Skipped(str(skipped.msg))
    return None


def _load(body: Body) -> ModuleType:
    """The test's module from its file, with assertions that say what they compared."""
    known = sys.modules.get(body.module)
    if known is not None and getattr(known, "__file__", None) == body.file:
        return known  # a second copy would define its classes again
    source = Path(body.file).read_bytes()
    tree = ast.parse(source, filename=body.file)
    rewrite_asserts(tree, source, body.file)
    module = ModuleType(body.module)
    module.__file__ = body.file
    folder = str(Path(body.file).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[body.module] = module  # what it defines can be unpickled
    try:
        exec(compile(tree, body.file, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[body.module]
        raise
    return module
