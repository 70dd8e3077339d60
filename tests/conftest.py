"""Worlds of Gloo ranks that start once per session, and are started again when a test has ended one."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from windtunnel.engine.world import World

pytest_plugins = ["windtunnel.experiments.pytest_plugin"]

settings.register_profile("windtunnel", deadline=None)  # a deadline is a timed assertion, and machines are busy
settings.load_profile("windtunnel")

WorldOf = Callable[[int], World]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models are tiny: more threads would only take the ranks' cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world_of(world: WorldOf) -> WorldOf:
    """`world_of(size)` is a living world of that size; ask again after a test that may have ended it."""
    return world


# The worlds below last for the session; only the look-up is repeated for each test, so that it finds a living one.


@pytest.fixture
def two_ranks(world_of: WorldOf) -> World:
    return world_of(2)


@pytest.fixture
def four_ranks(world_of: WorldOf) -> World:
    return world_of(4)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes may run the suite (pytest-xdist): one has all tests that need ranks, and so the only pool."""
    for item in items:
        needs_ranks = "world" in getattr(item, "fixturenames", ()) or item.get_closest_marker("ranks") is not None
        shares = needs_ranks or hasattr(getattr(item, "module", None), "World")
        item.add_marker(pytest.mark.xdist_group("ranks" if shares else item.path.name))
