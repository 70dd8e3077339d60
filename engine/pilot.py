"""Sends training steps to be flown in a child process that has torch and the `sim` device; this side has neither.

The child stays alive between flights: the first one pays for starting torch, the next ones take milliseconds.
"""

import atexit
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from ..collectives.trace import Trace

LIMIT_S = 600.0


class FlightError(RuntimeError):
    """A flight that did not come back: the child died, or ran past its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageToFly:
    """One rank of a pipeline.

    Attributes:
        rank: its place in the pipeline.
        blocks: repeated blocks that it has.
        hands_on: (shape, dtype) of each tensor that one stage hands to the next.
        tokens: of a whole sequence.
    """

    rank: int
    blocks: int
    hands_on: tuple[tuple[tuple[int, ...], str], ...]
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A training step to fly.

    Attributes:
        factory: "module:function", called in the child on the sim device; it returns the model and a function that
            makes the arguments of one micro-step's forward, whose result is the loss.
        arguments: what the factory is called with.
        config: as for `initialize`.
        world: ranks.
        micro_steps: forward and backward passes per optimizer step; 3 stand for any larger number.
        stage: which rank of a pipeline flies; None without stages.
    """

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    world: int
    micro_steps: int = 1
    stage: StageToFly | None = None

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ValueError(f"world = {self.world}; allowed: at least 1 rank")
        if self.micro_steps < 1:
            raise ValueError(f"micro_steps = {self.micro_steps}; allowed: at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Something to find out in the child, which has torch.

    Attributes:
        function: "module:function", called in the child; what it returns is pickled.
        arguments: what it is called with.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Pilot:
    """The child process. One serves a whole session; see `fly`."""

    def __init__(self) -> None:
        request_read, request_write = os.pipe()
        answer_read, answer_write = os.pipe()
        code = "import sys; from windtunnel.engine.flight import serve; serve(*map(int, sys.argv[1:]))"
        command = [sys.executable, "-c", code, str(request_read), str(answer_write)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._child = subprocess.Popen(
            command, pass_fds=(request_read, answer_write), env=environment, stdin=subprocess.DEVNULL
        )
        os.close(request_read)
        os.close(answer_write)
        self._requests = Connection(request_write, readable=False)
        self._answers = Connection(answer_read, writable=False)

    def fly(self, plan: Plan, limit_s: float = LIMIT_S) -> Trace:
        """The trace of `plan`; raises as `ask` does."""
        trace: Trace = self.ask(plan, limit_s)
        return trace

    def ask(self, request: Plan | Question, limit_s: float = LIMIT_S) -> Any:
        """The child's answer: a Trace to a Plan, what its function returns to a Question.

        Raises:
            ValueError: the plan's model or config is wrong; the child's message.
            FlightError: the child died or did not answer in time.
        """
        try:
            self._requests.send(request)
            if not self._answers.poll(limit_s):
                self.close()
                raise FlightError(f"the flight did not end within {limit_s:.0f} s")
            good, answer = pickle.loads(self._answers.recv_bytes())
        except (EOFError, BrokenPipeError):
            raise FlightError(f"the flight's process died with exit code {self._child.wait()}") from None
        if not good:
            kind, message = answer
            raise ValueError(message) if kind == "ValueError" else FlightError(f"{kind}: {message}")
        return answer

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def close(self) -> None:
        self._requests.close()
        try:
            self._child.wait(5.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(5.0)


_pilots: list[Pilot] = []


def fly(plan: Plan) -> Trace:
    """The trace of `plan`, flown by this process's one pilot, who is hired at the first call."""
    return _pilot().fly(plan)


def ask(question: Question) -> Any:
    """The answer of the same pilot."""
    return _pilot().ask(question)


def _pilot() -> Pilot:
    while _pilots and not _pilots[-1].alive:
        _pilots.pop()
    if not _pilots:
        _pilots.append(Pilot())
        atexit.register(_pilots[-1].close)
    return _pilots[-1]
