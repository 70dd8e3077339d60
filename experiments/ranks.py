"""What the ranks of `verify` and `demo` do: a plain torch loop in one process, and the same training under ZeRO."""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives.ring import RING
from ..collectives.zero import UnitSize, padded
from ..engine.engine import Engine, initialize
from ..engine.gloo import GlooCommunicator
from ..engine.sockets import framing_bytes
from .samples import Sample, as_dtype, make_sample, run_model, share, to_sim

LEARNING_RATE = 1e-3
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP_STEPS = 3
"""Steps that are left out of the measured time: first touches of memory, connections between ranks."""


@dataclass(frozen=True, slots=True)
class Task:
    """A verification as the ranks see it; `reference_path` is where one process's results are kept."""

    target: str
    steps: int | None
    precision: str
    accumulation: int
    timeout_s: float
    reference_path: str

    def config(self, stage: int) -> dict[str, Any]:
        return {
            "gradient_accumulation_steps": self.accumulation,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}},
            "bf16": {"enabled": self.precision == "bf16"},
            # Every byte through one program of ours and the kernel, so that it can be witnessed.
            "communication": {"transport": "sockets", "algorithms": dict.fromkeys(RING, "ring")},
        }

    def sample(self) -> Sample:
        """The user's model and batches in the precision of the task."""
        model, batches = make_sample(self.target, self.steps)
        if self.precision in ("fp32", "fp64"):
            model = model.to(DTYPES[self.precision])
        if self.precision == "bf16":  # the engine would do it; here it precedes the baseline of the memory measurement
            for buffer in model.buffers():
                buffer.data = as_dtype(buffer, torch.bfloat16)
        return model, [as_dtype(batch, DTYPES[self.precision]) for batch in batches]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one rank found: distances from one process, bytes written to sockets per step, bytes kept.

    `unused` counts pieces of parameters that never got a gradient, and so have no optimizer state.
    """

    losses: tuple[float, ...]
    step_s: float
    max_rel_loss_diff: float
    max_tensor_rel_diff: float
    global_rel_param_diff: float
    first_difference: dict[str, Any] | None
    measured_bytes: int
    model_state_bytes: int
    units: tuple[UnitSize, ...]
    unused: int
    master_bytes: int


# One process #


def reference(rank: int, world: int, task: Task, every_step: bool = False) -> None:
    """Plain torch on the whole batch, on rank 0; its losses and parameters go to the task's file."""
    if rank != 0:
        return
    model, batches = task.sample()
    if task.precision == "bf16":
        model = model.bfloat16()
    masters = {p: p.detach().float() if task.precision == "bf16" else p for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(masters.values()), lr=LEARNING_RATE)
    losses, snapshots = [], []
    for batch in batches:
        loss = run_model(model, batch)
        loss.backward()
        losses.append(loss.item())
        _step_masters(masters, optimizer)
        if every_step:
            snapshots.append(_snapshot(model))
    torch.save({"losses": losses, "final": _snapshot(model), "steps": snapshots}, task.reference_path)


def _step_masters(masters: dict[nn.Parameter, Tensor], optimizer: torch.optim.Optimizer) -> None:
    for parameter, master in masters.items():
        if master is not parameter:
            master.grad = None if parameter.grad is None else parameter.grad.float()
    optimizer.step()
    optimizer.zero_grad()
    for parameter, master in masters.items():
        if master is not parameter:
            parameter.grad = None
            parameter.data.copy_(master)


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Many processes #


def measure(rank: int, world: int, task: Task, stage: int, watch: float | None = None) -> RankReport:
    """Train under ZeRO and compare with the reference.

    Args:
        watch: compare after every step too, and report the first parameter that is further off than this.
    """
    before = live_bytes()
    model, batches = task.sample()
    others = live_bytes() - before - sum(p.numel() * p.element_size() for p in set(model.parameters()))
    engine, *_ = initialize(model, task.config(stage), timeout_s=task.timeout_s)
    communicator = engine.communicator
    if isinstance(communicator, GlooCommunicator):
        communicator.metered = True
    known = torch.load(task.reference_path)
    calls = _count_calls(engine)
    losses, seconds, difference = [], [], None
    for number, batch in enumerate(batches):
        began = time.perf_counter()
        losses.append(_train_step(engine, batch, rank, world, task.accumulation))
        seconds.append(time.perf_counter() - began)
        if watch is not None and difference is None:
            difference = _place(dict(_distances(engine, known["steps"][number])), watch, number, rank)
    del known["steps"]
    engine.settle()
    written = _written_per_step(communicator, len(batches))
    communicator.release_buffers()
    reference_bytes = sum(t.numel() * t.element_size() for t in known["final"].values())
    kept = live_bytes() - before - others - reference_bytes
    means = _mean_losses(losses, engine)
    distances = dict(_distances(engine, known["final"]))
    report = RankReport(
        losses=tuple(means),
        step_s=statistics.median(seconds[WARM_UP_STEPS:] or seconds),
        max_rel_loss_diff=max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(means, known["losses"], strict=True)),
        max_tensor_rel_diff=max(off / max(size, 1e-30) for off, size in distances.values()),
        global_rel_param_diff=_root(off for off, _ in distances.values())
        / _root(size for _, size in distances.values()),
        first_difference=difference,
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


def _train_step(engine: Engine, batch: Any, rank: int, world: int, accumulation: int) -> float:
    """One optimizer step on this rank's share of a global batch; the mean loss of its micro-steps."""
    total = 0.0
    for micro_step in range(accumulation):
        part = share(batch, world * accumulation, micro_step * world + rank)
        loss = run_model(engine, part)
        engine.backward(loss)
        engine.step()
        total += loss.item() / accumulation
    return total


def _mean_losses(losses: list[float], engine: Engine) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    engine.communicator.all_reduce(total, "losses", scalar=True).wait()
    return (total / engine.communicator.world).tolist()


def _distances(engine: Engine, known: dict[str, Tensor]) -> Iterator[tuple[str, tuple[float, float]]]:
    """(name, (||a - b||, ||b||)) of every parameter, in float64."""
    for name, values in engine.runtime.gathered_parameters():
        wanted = known[name].double()
        yield name, (float((values.double() - wanted).norm()), float(wanted.norm()))


def _place(distances: dict[str, tuple[float, float]], tolerance: float, step: int, rank: int) -> dict[str, Any] | None:
    for name, (off, size) in distances.items():
        if off > tolerance * size:
            return {"step": step, "rank": rank, "parameter": name}
    return None


def _root(values: Iterator[float]) -> float:
    return sum(value * value for value in values) ** 0.5


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
