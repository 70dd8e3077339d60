"""Worlds of Gloo ranks that start once per session, and are started again when a test has ended one."""

import os
from collections.abc import Callable
from typing import Any

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


@pytest.fixture(scope="session", autouse=True)
def _flights_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test has flown another may use, and no test sees what was flown before."""
    os.environ["WINDTUNNEL_FLIGHTS"] = str(tmp_path_factory.mktemp("flights"))


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


NEEDS_MANY_RANKS = ("four_ranks", "world_of", "pytest.mark.ranks", "windtunnel_verify")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two processes may run the suite (pytest-xdist): one has all files that need more than two ranks, whose worlds
    are dear. A world of two may be started in both.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OnePool(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            text = (config.rootpath / file).read_text()
            return "ranks" if any(word in text for word in NEEDS_MANY_RANKS) else file

    return OnePool(config, log)
