"""Transformers whose layers are shared by Gloo ranks, against one process; what they send, against the closed form."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from tensor_runs import ADAMW, SAMPLES, SEQ, SPECS, batch, build, started
from torch import Tensor
from windtunnel.collectives.ring import RING
from windtunnel.collectives.tensor import Sent, SharedLayers, sent_bytes
from windtunnel.engine.optim import Lamb
from windtunnel.engine.pilot import Plan, fly
from windtunnel.engine.world import World
from windtunnel.sim.replay import sent_bytes_by_axis

TOLERANCE = 1e-10
"""float64; sums are taken in another order, and Adam enlarges rounding (tests/test_zero.py)."""

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Lamb": Lamb}

STEPS = 5


@dataclass(frozen=True)
class Layout:
    """Of a run; only `model`, `clip` and `optimizer` mean something to one process."""

    model: str
    tensor: int
    sequence: bool = False
    stage: int = 0
    clip: float = 0.5
    optimizer: str = "AdamW"
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "train_batch_size": SAMPLES,
            "gradient_clipping": self.clip,
            "zero_optimization": {"stage": self.stage},
            "optimizer": {**ADAMW, "type": self.optimizer},
            "parallel": {"tensor": self.tensor, "sequence_parallel": self.sequence},
            **self.keys,
        }


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    parameters: dict[str, Tensor]
    norms: list[float | None]
    logits: Tensor


@cache
def alone(name: str, clip: float, kind: str) -> Outcome:
    model = build(name)
    optimizer = OPTIMIZERS[kind](model.parameters(), **ADAMW["params"])
    losses, norms = [], []
    for step in range(STEPS):
        loss = model(*batch(step))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    logits = model(batch(0)[0]).detach()
    return Outcome(losses, {name: p.detach() for name, p in model.named_parameters()}, norms, logits)


def train(rank: int, world: int, layout: Layout) -> Outcome:
    engine = started(build(layout.model, seed=1 + rank), layout.config)
    samples = engine.groups.axis("data")
    losses, norms = [], []
    for step in range(STEPS):
        x, y = (each.chunk(samples.world)[samples.rank] for each in batch(step))
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
    with torch.no_grad():
        logits = engine(batch(0)[0])
    outcome = Outcome(losses, engine.full_state_dict(), norms, logits)
    engine.close()
    return outcome


def check(world: World, layout: Layout) -> None:
    wanted = alone(layout.model, layout.clip, layout.optimizer)
    for outcome in world.run(train, layout):
        state = outcome.parameters
        assert set(wanted.parameters) <= set(state)
        for name, value in wanted.parameters.items():
            assert float((state[name] - value).norm() / value.norm()) <= TOLERANCE, name
        assert outcome.norms == pytest.approx(wanted.norms, rel=TOLERANCE)
        torch.testing.assert_close(outcome.logits, wanted.logits, rtol=1e-9, atol=1e-9)
        if layout.tensor == world.size:
            assert outcome.losses == pytest.approx(wanted.losses, rel=TOLERANCE)


FULL = {"activation_checkpointing": {"policy": "full"}}
SELECTIVE = {"activation_checkpointing": {"policy": "selective"}}
BUDGET = {"activation_checkpointing": {"policy": "budget", "budget_bytes": 100_000}}
IN_PARTS = {"activation_checkpointing": {"policy": "full", "partition_activations": True}}


@pytest.mark.parametrize(
    "layout",
    [
        Layout("gpt", 2),
        Layout("gpt", 2, sequence=True, keys=FULL),
        Layout("llama", 2, keys=SELECTIVE, optimizer="Lamb"),
        Layout("llama", 2, sequence=True, keys=SELECTIVE),
        Layout("alibi", 2, keys=BUDGET),
        Layout("gpt", 2, keys=IN_PARTS),
    ],
    ids=str,
)
def test_two_ranks_equal_one_process(two_ranks: World, layout: Layout) -> None:
    check(two_ranks, layout)


@pytest.mark.parametrize(
    "layout",
    [
        Layout("gpt", 4, sequence=True),
        Layout("alibi", 4, keys=FULL),
        Layout("gpt", 2, stage=1),
        Layout("llama", 2, sequence=True, stage=0),
        Layout("gpt", 2, sequence=True, stage=2),
        Layout("llama", 2, sequence=True, stage=3, keys=FULL),
        Layout("gpt", 2, stage=3, optimizer="Lamb"),
    ],
    ids=str,
)
def test_four_ranks_equal_one_process(four_ranks: World, layout: Layout) -> None:
    check(four_ranks, layout)


# What travels: the closed form, the ranks' ledger and the flight, all exact #


LETTERS = {"fp32": 4}


def flat_config(sequence: bool, policy: str) -> dict[str, Any]:
    return {
        "activation_checkpointing": {"policy": policy},
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": ADAMW,
        "parallel": {"tensor": 2, "sequence_parallel": sequence},
        "communication": {"algorithms": dict.fromkeys(RING, "ring")},
    }


def ledger(rank: int, world: int, name: str, sequence: bool, policy: str) -> tuple[Counter[Sent], list[int]]:
    """Of one step on the tensor axis, without few-element reductions, and the sizes of what is partial."""
    engine = started(build(name).float(), flat_config(sequence, policy))
    group = engine.groups.axis("tensor")
    group.ledger.clear()
    for step in range(2):
        engine.backward(engine(*batch(step)))
        engine.step()
    entries = group.ledger.items()
    found = {Sent(e.kind, e.elements, LETTERS[e.dtype]): 0 for e, _ in entries if not e.scalar}
    for entry, count in entries:
        if not entry.scalar:
            found[Sent(entry.kind, entry.elements, LETTERS[entry.dtype])] += count
    partial = [unit.elements for unit in engine.runtime.units if unit.part.role.partial]
    engine.close()
    return Counter(found), partial


@pytest.mark.parametrize(
    ("name", "sequence", "policy"),
    [("gpt", False, "none"), ("llama", True, "none"), ("gpt", True, "full"), ("llama", False, "full")],
)
def test_what_is_sent_is_the_closed_form(two_ranks: World, name: str, sequence: bool, policy: str) -> None:
    spec = SPECS[name]
    layers = SharedLayers(
        layers=spec.layers, batch=SAMPLES, seq=SEQ, hidden=spec.hidden, ranks=2, sequence_parallel=sequence,
        recomputed=policy == "full", element_bytes=4,
    )  # fmt: skip
    for found, partial in two_ranks.run(ledger, name, sequence, policy):
        assert bool(partial) == sequence
        assert found == layers.step(2, partial)
        arguments = {"spec": spec, "batch": SAMPLES, "seq": SEQ}
        factory = "windtunnel.experiments.transformer:for_flight"
        trace = fly(
            Plan(factory=factory, arguments=arguments, config=flat_config(sequence, policy), world=2, micro_steps=2)
        )
        assert sent_bytes_by_axis(trace, scalars=False)["tensor"] == sent_bytes(found, 2)


def train_stages(rank: int, world: int, layout: Layout) -> dict[str, Tensor]:
    engine = started(build(layout.model), layout.config)
    for step in range(STEPS):
        x, y = batch(step)
        engine.train_batch(iter([((x[:2],), y[:2]), ((x[2:],), y[2:])]))
    found = engine.full_parameters()
    engine.close()
    return found


@pytest.mark.parametrize(("sequence", "schedule"), [(False, "1f1b"), (True, "1f1b"), (True, "zb-h1")])
def test_in_pipeline_stages(four_ranks: World, sequence: bool, schedule: str) -> None:
    """The tied embedding is cut and on both stages."""
    parallel = {
        "parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": sequence},
        "gradient_accumulation_steps": 2,
        "pipeline": {"schedule": schedule},
    }
    wanted = alone("gpt", 0.5, "AdamW").parameters
    for found in four_ranks.run(train_stages, Layout("gpt", 2, keys=parallel)):
        for name, value in wanted.items():
            assert float((found[name] - value).norm() / value.norm()) <= TOLERANCE, name
