"""Tests on ranks, for any suite: `@pytest.mark.ranks(4)`, a pool of worlds, and `assert_trains_alike`.

    @pytest.mark.ranks(4, timeout_s=30)
    @pytest.mark.parametrize("size", [8, 1000])
    def test_sums(rank, world_size, size):      # runs on each of 4 Gloo ranks
        values = torch.full((size,), float(rank))
        torch.distributed.all_reduce(values)
        assert values[0] == 6

    def test_my_model(windtunnel_verify):        # runs here, and trains there
        windtunnel_verify(my_model_and_batches, world=2, zero=(1, 2, 3))

Fixtures of a test on ranks are made in pytest's own process; ranks get copies of their values. Ranks start once per
session. Nothing of torch is imported until a test asks for ranks.
"""

import inspect
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ..engine.world import World
    from .verify import Verification

TIMEOUT = "windtunnel_timeout_s"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        TIMEOUT, "seconds that a rank waits for the others in one collective, and a test for its ranks", default="60"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "ranks(size, timeout_s=...): run the test on that many Gloo ranks; `rank` and `world_size` are fixtures",
    )


class Worlds:
    """Living worlds by size: `worlds(4)` starts one at the first call, and again when a test has ended it."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._running: dict[int, World] = {}

    def __call__(self, size: int) -> "World":
        from ..engine.world import World

        if size not in self._running or not self._running[size].alive:
            self._running[size] = World(size, timeout_s=self.timeout_s, threads=1)
        return self._running[size]

    def close(self) -> None:
        for world in self._running.values():
            world.close()


@pytest.fixture(scope="session")
def world(pytestconfig: pytest.Config) -> Iterator[Worlds]:
    """`world(4).run(function, ...)` calls `function(rank, world, ...)`, which ranks can import, on 4 ranks."""
    worlds = Worlds(float(pytestconfig.getini(TIMEOUT)))
    yield worlds
    worlds.close()


@pytest.fixture
def rank(request: pytest.FixtureRequest) -> int:
    """This rank's number, in a test that is marked `ranks`."""
    return _on_ranks_only(request, "rank")


@pytest.fixture
def world_size(request: pytest.FixtureRequest) -> int:
    """The number of ranks, in a test that is marked `ranks`."""
    return _on_ranks_only(request, "world_size")


def _on_ranks_only(request: pytest.FixtureRequest, name: str) -> int:
    if request.node.get_closest_marker("ranks") is None:
        raise pytest.UsageError(f"fixture {name!r} is for tests marked @pytest.mark.ranks(N)")
    return -1  # each rank puts its own here


@pytest.fixture
def windtunnel_verify(world: Worlds) -> Callable[..., "Verification"]:
    """`assert_trains_alike` on the session's ranks."""

    def verify(model_and_batches: Callable[[], Any] | str, *, world_size: int = 2, **options: Any) -> "Verification":
        return assert_trains_alike(model_and_batches, ranks=world(world_size), world=world_size, **options)

    return verify


def assert_trains_alike(
    model_and_batches: Callable[[], Any] | str, *, world: int = 2, zero: Sequence[int] = (0, 1, 2, 3), **options: Any
) -> "Verification":
    """Check that a model trains on ranks as it does in one process: losses, gradients, optimizer state, parameters.

    Args:
        model_and_batches: a function of a module, or "MODULE:FUNCTION": see `windtunnel.verify`, as for the options.

    Raises:
        AssertionError: with a line for each stage, and where it first goes wrong.
        ValueError: a wrong option, function or batch.
    """
    from .tables import plain_verification
    from .verify import verify

    result = verify(_target(model_and_batches), world=world, zero=zero, **options)
    if not result.ok:
        raise AssertionError(plain_verification(result))
    return result


def _target(function: Callable[[], Any] | str) -> str:
    """A function as "FILE.py:FUNCTION", which ranks find however the test's module was imported."""
    if isinstance(function, str):
        return function
    name = getattr(function, "__qualname__", repr(function))
    if not inspect.isfunction(function) or "." in name:
        raise ValueError(f"model_and_batches = {name}; allowed: a function of a module, which ranks can find by name")
    return f"{inspect.getfile(function)}:{name}"


# The marker #


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    marker = pyfuncitem.get_closest_marker("ranks")
    if marker is None:
        return None
    from ..engine.world import WorldError
    from .remote import Body, Skipped, perform

    size, limit_s = _size_and_limit(marker, pyfuncitem)
    owner = f"{pyfuncitem.cls.__qualname__}." if pyfuncitem.cls is not None else ""
    body = Body(str(pyfuncitem.path), pyfuncitem.module.__name__, owner + pyfuncitem.originalname)
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    worlds: Worlds = pyfuncitem._request.getfixturevalue("world")
    try:
        answers = worlds(size).run(perform, body, _pickled(arguments), limit_s=limit_s)
    except WorldError as error:
        pytest.fail(str(error).replace("; rank ", "\nrank "), pytrace=False)
    if skipped := [answer for answer in answers if isinstance(answer, Skipped)]:
        pytest.skip(skipped[0].reason)
    return True


def _size_and_limit(marker: pytest.Mark, item: pytest.Function) -> tuple[int, float]:
    def read(size: int, timeout_s: float = float(item.config.getini(TIMEOUT))) -> tuple[int, float]:
        if not isinstance(size, int) or size < 1:
            raise pytest.UsageError(f"{item.name}: @pytest.mark.ranks({size!r}); allowed: an integer >= 1")
        return size, timeout_s

    try:
        return read(*marker.args, **marker.kwargs)
    except TypeError as error:
        raise pytest.UsageError(f"{item.name}: @pytest.mark.ranks(size, timeout_s=...): {error}") from None


def _pickled(arguments: dict[str, Any]) -> bytes:
    for name, value in arguments.items():
        try:
            pickle.dumps(value)
        except Exception as error:  # whatever an object's own pickling may raise
            raise TypeError(
                f"fixture {name!r} is a {type(value).__name__}, which cannot be sent to the ranks ({error}); allowed:"
                " values that can be pickled"
            ) from None
    return pickle.dumps(arguments)
