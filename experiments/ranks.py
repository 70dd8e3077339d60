"""What the ranks of `verify` and `demo` do: train under ZeRO, compare with one process, measure."""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives.ring import RING
from ..collectives.zero import UnitSize, padded
from ..engine.communicator import Communicator
from ..engine.engine import Engine, initialize
from ..engine.gloo import GlooCommunicator
from ..engine.inspection import Share, optimizer_state, reduced_gradients
from ..engine.sockets import framing_bytes
from .comparison import GRADIENT, PARAMETER, STATE, Offs, compare
from .samples import MicroStep, Sample, as_dtype, make_training, share, to_sim

LEARNING_RATE = 1e-3
LOSS_SCALE = 1024.0
"""In fp16, where the config has nothing about it: small gradients survive, and nothing that trains overflows."""

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""Keys of a user's config that mean nothing here, where the batches are given."""

WARM_UP_STEPS = 3
"""Steps that are left out of the measured time: first touches of memory, connections between ranks."""


@dataclass(frozen=True, slots=True)
class Task:
    """A verification as the ranks see it.

    Attributes:
        folder: where one process's results are kept.
        settings: the user's DeepSpeed JSON, which what is verified (stage, precision, accumulation) overrides.
    """

    target: str
    steps: int | None
    precision: str
    accumulation: int
    timeout_s: float
    folder: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self, stage: int) -> dict[str, Any]:
        """The engine's config."""
        given = {key: value for key, value in self.settings.items() if key not in BATCH_KEYS}
        usual = {
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}},
            # Every byte through one program of ours and the kernel, so that it can be witnessed.
            "communication": {"transport": "sockets", "algorithms": dict.fromkeys(RING, "ring")},
        }
        verified = {
            "gradient_accumulation_steps": self.accumulation,
            "zero_optimization": {**given.get("zero_optimization", {}), "stage": stage},
            "bf16": {**given.get("bf16", {}), "enabled": self.precision == "bf16"},
            "fp16": {**given.get("fp16", {"loss_scale": LOSS_SCALE}), "enabled": self.precision == "fp16"},
        }
        return {**usual, **given, **verified}

    def snapshot_path(self, step: int) -> Path:
        """Where one process's tensors of a step are."""
        return Path(self.folder) / f"step{step}.pt"

    def training(self) -> tuple[nn.Module, list[Any], MicroStep]:
        """The user's model, batches and micro-step in the precision of the task."""
        model, batches, micro_step = make_training(self.target, self.steps)
        dtype = DTYPES[self.precision]
        if self.precision in ("fp32", "fp64"):
            model = model.to(dtype)
        else:  # the engine would do it; here it precedes the baseline of the memory measurement
            for buffer in model.buffers():
                buffer.data = as_dtype(buffer, dtype)
        return model, [as_dtype(batch, dtype) for batch in batches], micro_step

    def sample(self) -> Sample:
        """The user's model and batches in the precision of the task."""
        model, batches, _ = self.training()
        return model, batches


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one rank found: losses (means over all ranks), bytes written to sockets per step, bytes kept.

    `compared` has, for each step that was looked at, how far this rank's tensors are from one process's. `unused`
    counts pieces of parameters that never got a gradient, and so have no optimizer state.
    """

    losses: tuple[float, ...]
    step_s: float
    compared: dict[int, Offs]
    measured_bytes: int
    model_state_bytes: int
    units: tuple[UnitSize, ...]
    unused: int
    master_bytes: int


def measure(rank: int, world: int, task: Task, stage: int, watch: Collection[int] = ()) -> RankReport:
    """Train under ZeRO and compare with one process.

    Args:
        watch: numbers of the steps whose gradients, optimizer state and parameters are compared.
    """
    before = live_bytes()
    model, batches, micro_step = task.training()
    others = live_bytes() - before - sum(p.numel() * p.element_size() for p in set(model.parameters()))
    engine, *_ = initialize(model, task.config(stage), timeout_s=task.timeout_s)
    communicator = engine.communicator
    if isinstance(communicator, GlooCommunicator):
        communicator.metered = True
    calls = _count_calls(engine)
    losses, seconds, compared = [], [], {}
    for number, batch in enumerate(batches):
        look = Look(engine, task.snapshot_path(number)) if number in watch else None
        began = time.perf_counter()
        losses.append(train_share(engine, micro_step, batch, rank, world, task.accumulation, look))
        seconds.append(time.perf_counter() - began - (look.seconds if look else 0.0))
        if look is not None:
            compared[number] = look.after_step()
    look = None
    engine.settle()
    written = _written_per_step(communicator, len(batches))
    communicator.release_buffers()
    kept = live_bytes() - before - others
    report = RankReport(
        losses=tuple(_mean_losses(losses, engine)),
        step_s=statistics.median(seconds[WARM_UP_STEPS:] or seconds),
        compared=compared,
        measured_bytes=written,
        model_state_bytes=kept,
        units=tuple(_unit_sizes(engine, calls, len(batches) * task.accumulation)),
        unused=sum(
            piece not in engine.optimizer.state for group in engine.optimizer.param_groups for piece in group["params"]
        ),
        master_bytes=8 if task.precision == "fp64" else 4,
    )
    engine.close()
    return report


class Look:
    """Compares one step with one process's.

    Attributes:
        seconds: what that took before the optimizer's step.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine, self.known = engine, torch.load(path)
        self.offs: Offs = {}
        self.seconds = 0.0

    def before_step(self) -> None:
        """Between the last reduction and the optimizer's step."""
        began = time.perf_counter()
        if any(what == GRADIENT for what, _ in self.known):  # else one process skips the step, for they are not finite
            self.offs.update(compare(GRADIENT, reduced_gradients(self.engine), self.known))
        self.seconds = time.perf_counter() - began

    def after_step(self) -> Offs:
        """What the step made; parameters as the next forward will see them, gathered anew where they are sharded."""
        self.offs.update(compare(STATE, optimizer_state(self.engine), self.known))
        self.engine.settle()
        with _unmetered(self.engine.communicator):
            for name, values in self.engine.runtime.gathered_parameters():
                share = Share(name, PARAMETER, 0, values.numel(), values.flatten())
                self.offs.update(compare(PARAMETER, [share], self.known))
        return self.offs


@contextmanager
def _unmetered(communicator: Communicator) -> Iterator[None]:
    """What is sent inside is no part of training: neither the ledger nor the meter keeps it."""
    listed = communicator.ledger.copy()
    metered = getattr(communicator, "metered", False)
    if metered:
        communicator.metered = False  # type: ignore[attr-defined]
    yield
    if metered:
        communicator.metered = True  # type: ignore[attr-defined]
    communicator.ledger.clear()
    communicator.ledger.update(listed)


def train_share(
    engine: Engine, micro_step: MicroStep, batch: Any, rank: int, world: int, accumulation: int, look: Look | None
) -> float:
    """One optimizer step on this rank's share of a global batch; the mean loss of its micro-steps."""
    total = 0.0
    for number in range(accumulation):
        part = share(batch, world * accumulation, number * world + rank)
        loss = micro_step(engine, engine.backward, part)
        if look is not None and number == accumulation - 1:
            look.before_step()
        engine.step()
        total += loss.item() / accumulation
    return total


def _mean_losses(losses: list[float], engine: Engine) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    engine.communicator.all_reduce(total, "losses", scalar=True).wait()
    return (total / engine.communicator.world).tolist()


def _written_per_step(communicator: Any, steps: int) -> int:
    """Payload that this process wrote to sockets for its units, per step: what the kernel counted less headers."""
    if not isinstance(communicator, GlooCommunicator):
        return 0
    total = 0
    for entry, nbytes in communicator.wire_bytes.items():
        if not entry.scalar:
            total += nbytes - communicator.ledger[entry] * framing_bytes(communicator.steps(entry))
    per_step, rest = divmod(total, steps)
    return per_step if rest == 0 else total  # unequal steps would show as a total that no formula expects


def _count_calls(engine: Engine) -> Counter[nn.Module]:
    """Fills with how often the forward of each unit's module runs."""
    calls: Counter[nn.Module] = Counter()
    for module in {unit.owner for unit in engine.runtime.units}:
        module.register_forward_pre_hook(lambda module, _: calls.update([module]))
    return calls


def _unit_sizes(engine: Engine, calls: Counter[nn.Module], forwards: int) -> Iterator[UnitSize]:
    """The units from their parameters' sizes and the number of calls alone; padding as the formula says."""
    for unit in engine.runtime.units:
        own = sum(parameter.numel() for parameter in unit.parameters)
        elements = padded(own, engine.communicator.world)
        width = unit.parameters[0].element_size()
        yield UnitSize(
            elements=elements,
            padding=elements - own,
            element_bytes=width,
            trainable=unit.trainable,
            calls=calls[unit.owner] // forwards,
            persistent=unit.part.persistent,
        )


def live_bytes() -> int:
    """Bytes of all storages that Python can reach through a tensor with at least one dimension.

    A walk over live objects, not the engine's own bookkeeping. Left out are zero-dimensional tensors (step counters)
    and one element shown as many (stride 0 throughout), which is how a parameter that is not here looks.
    """
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and any(thing.stride()) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


# The same on the simulated device #


def for_flight(task: Task, world: int) -> tuple[nn.Module, Callable[[], tuple]]:
    """What a flight needs: the user's model, and rank 0's share of its first batch."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("cpu"):
        model, batches = task.sample()
        part = share(batches[0], world * task.accumulation, 0)
    return to_sim(model, part)
