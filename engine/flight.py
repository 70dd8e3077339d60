"""Flies a training step on the `sim` device: the same `initialize`, forward, backward and step, in a world of any size.

This process stands for rank 0 of that world. It runs in the pilot's child process (engine/pilot.py).
"""

import importlib
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..collectives.groups import Mesh
from ..collectives.shift import KIND as SHIFT
from ..collectives.trace import Collective, Trace
from .batch import call
from .communicator import DONE, DTYPE_NAMES, Call, Communicator, Handle, SoloCommunicator
from .config import Config
from .engine import initialize
from .flight_errors import naming
from .loss import flown_loss
from .partition import repeated_blocks
from .pilot import Plan, Question
from .pipeline import performer
from .recorder import Address, Recorder
from .sim_device import register
from .stage_flight import FlownStage, flown_stage, fly_stage

NOT_FLOWN = 1 << 30
"""A step that no flight gets to."""


class SimCommunicator(Communicator):
    """Writes down what would be sent."""

    def __init__(self, axis: str, world: int, recorder: Recorder, rank: int = 0) -> None:
        super().__init__(axis, rank, world)
        self.observer = self.recorder = recorder

    def along(self, mesh: Mesh, axis: str) -> Communicator:
        self.recorder.world = mesh.sizes
        return super().along(mesh, axis)

    def among(self, members: Sequence[tuple[int, ...]], axis: str) -> Communicator:
        mine = next((group for group in members if self.rank in group), (self.rank,))
        if len(mine) == 1:
            alone = SoloCommunicator(axis)
            alone.observer = self.recorder
            return alone
        return SimCommunicator(axis, len(mine), self.recorder, mine.index(self.rank))

    def post(self, calls: Sequence[Call]) -> list[Handle]:
        """Messages between stages are priced by the schedule's plan."""
        return [DONE] * len(calls)

    def perform(self, call: Call) -> Handle:
        entry = call.entry
        what = call.label.partition(" of ")[0]  # without the block, which a repeated segment cannot name
        algorithm = None if entry.algorithm == "native" else entry.algorithm
        op = Collective(entry.kind, entry.axis, entry.elements, entry.dtype, algorithm, what, entry.scalar)
        return _SimHandle(self.recorder, self.recorder.collective(op))

    def shift(self, outgoing: Tensor, incoming: Tensor, label: str) -> list[Handle]:
        what, dtype = label.partition(" of ")[0], DTYPE_NAMES[outgoing.dtype]
        op = Collective(SHIFT, self.axis, outgoing.numel(), dtype, None, what)
        return [_SimHandle(self.recorder, self.recorder.collective(op))]

    def replicate(self, tensors: Iterable[Tensor]) -> None:
        """Happens before training, which is not priced."""


class _SimHandle:
    def __init__(self, recorder: Recorder, started: Address) -> None:
        self.recorder, self.started = recorder, started

    def wait(self) -> None:
        self.recorder.wait(self.started)


_communicator: ContextVar[SimCommunicator] = ContextVar("communicator")


def current_communicator() -> SimCommunicator:
    """The communicator of the flight under way.

    Raises:
        ValueError: no flight is under way.
    """
    try:
        return _communicator.get()
    except LookupError:
        raise ValueError("device 'sim' exists inside a flight only: use windtunnel.simulate") from None


def fly(plan: Plan) -> Trace:
    """Fly `plan` in this process, which becomes one with a `sim` device.

    Raises:
        ValueError: the plan's factory cannot be found, or the config does not fit.
    """
    register()
    factory = _find(plan.factory)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("sim"):
            model, make_batch = factory(**plan.arguments)
        recorder = Recorder({"data": plan.world})
        with recorder.watching():
            fly_it = _fly_all if plan.stage is None else _fly_stage
            return fly_it(model, make_batch, plan, recorder)


def _fly_all(model: nn.Module, make_batch: Callable[[], tuple], plan: Plan, recorder: Recorder) -> Trace:
    recorder.blocks = len(repeated_blocks(model))
    with _using(_communicator, SimCommunicator("data", plan.world, recorder)):
        return _train(model, make_batch, plan, recorder)


def _fly_stage(model: nn.Module, make_batch: Callable[[], tuple], plan: Plan, recorder: Recorder) -> Trace:
    assert plan.stage is not None
    recorder.blocks = plan.stage.blocks
    config = {**plan.config, "gradient_accumulation_steps": min(plan.micro_steps, 3)}
    mesh = Config.read(config, plan.world).mesh
    rank = mesh.groups("pipeline")[0][plan.stage.rank]
    with (
        _using(_communicator, SimCommunicator("data", plan.world, recorder, rank)),
        _using(performer, flown_stage(plan.stage, recorder)),
    ):
        engine, *_ = initialize(model, config)
        assert isinstance(engine, FlownStage)
        return fly_stage(engine, make_batch, recorder)


@contextmanager
def _using(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _train(model: nn.Module, make_batch: Callable[[], tuple], plan: Plan, recorder: Recorder) -> Trace:
    """The trace of two steps: the second one is the steady one.

    Where ranks agree every so many steps, each flown step ends with it, in a phase that says how rare it is.
    """
    flown = min(plan.micro_steps, 3)
    config = {**plan.config, "gradient_accumulation_steps": flown}
    local = config.get("local_updates")
    if local is not None:
        config["local_updates"] = {**local, "every": NOT_FLOWN, "warmup_steps": 0}
    engine, *_ = initialize(model, config)
    for step in (1, 2):
        for micro_step in range(flown):
            recorder.phase(_micro_step_name(micro_step, flown), step)
            recorder.enter("input", -1)
            with torch.device("sim"):
                batch = make_batch()
            with naming(model):
                loss = flown_loss(call(engine, batch))
                engine.backward(loss)
            del loss, batch
            if micro_step == flown - 1:
                recorder.phase("update", step)
            engine.step()
        if engine.local_updates is not None and local is not None:
            recorder.phase("agree", step, every=local["every"])
            engine.local_updates.agree()
    return recorder.trace()  # here, where the engine and its memory are still alive


def _micro_step_name(number: int, of: int) -> str:
    return "micro-step last" if number == of - 1 else "micro-step first" if number == 0 else "micro-step middle"


def _find(path: str) -> Callable[..., Any]:
    """The function that "module:function" names; the current folder counts as a place for modules."""
    module_name, _, function_name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r}: no such MODULE:FUNCTION: {error}") from None
    return function


def _answer(question: Question) -> Any:
    return _find(question.function)(**question.arguments)


def serve(requests_fd: int, answers_fd: int) -> None:
    """The child's loop: plans and questions in, answers or errors out, until the parent hangs up."""
    torch.set_num_threads(1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a user's module prints is no part of the parent's answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle: when it ends, so does this
    requests, answers = Connection(requests_fd, writable=False), Connection(answers_fd, readable=False)
    while True:
        try:
            request = requests.recv()
        except EOFError:
            return
        try:
            answer: tuple[bool, Any] = (True, fly(request) if isinstance(request, Plan) else _answer(request))
        except Exception as error:
            answer = (False, (type(error).__name__, str(error).strip() or repr(error)))
        try:
            answers.send_bytes(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))
        except BrokenPipeError:  # the parent has ended meanwhile
            return
