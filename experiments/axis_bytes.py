"""What each rank of a job with tensor, pipeline and data axes sends in a step, by axis: simulated and counted."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from ..collectives.pipeline import sent_messages
from ..collectives.pipeline_messages import with_communication
from ..collectives.ring import RING
from ..engine.communicator import Communicator
from ..engine.engine import initialize
from ..engine.gloo import GlooCommunicator
from ..engine.pipeline import PipelineEngine
from ..engine.sockets import framing_bytes
from ..engine.wire import written_bytes
from ..sim.hardware import Cluster
from ..sim.network import DTYPE_BYTES
from ..sim.stages import sent_by_axis
from .layout import Layout, engine_config
from .models import ModelSpec
from .pipeline import composed, layers_by_stage, message_bytes, parts_of, schedule_plan
from .transformer import Transformer, initialize_weights

RINGS: dict[str, Any] = {"communication": {"transport": "sockets", "algorithms": dict.fromkeys(RING, "ring")}}
"""Keys of a config under which every collective is a program of ours over sockets, where the kernel counts bytes."""


def predicted(spec: ModelSpec, layout: Layout, machine: Cluster) -> list[dict[str, int]]:
    """By pipeline rank, bytes by axis that each of its ranks sends, from flights of the stages.

    Flown is the first tensor rank, which has the largest part of what does not divide evenly. Of few-element reductions
    over the whole job the mean is predicted: some ranks of a ring send more of them than others.
    """
    plan, stages, _ = composed(spec, layout, machine)
    nbytes = message_bytes(spec, layout)
    return [dict(sent_by_axis(plan, rank, stage, nbytes)) for rank, stage in enumerate(stages)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What a rank sent in one step.

    Attributes:
        pipeline_rank: its stage.
        by_axis: payload, from the ledgers and the programs that were played; few-element reductions are in it.
        written: payload that the kernel counted, of all axes together.
        units: of its flat buffers of parameters (elements with padding, the axes that its gradient is summed along).
        messages: that its plan has it send.
    """

    pipeline_rank: int
    by_axis: dict[str, int]
    written: int
    units: tuple[tuple[int, tuple[str, ...]], ...]
    messages: int


def count(rank: int, world: int, spec: ModelSpec, layout: Layout) -> Counted:
    """The body of a rank: the second step of training on Gloo; the first one tells stages the shapes too."""
    model = Transformer(spec)
    initialize_weights(model, seed=1)
    engine, *_ = initialize(model, performed_config(spec, layout), timeout_s=60.0)
    assert isinstance(engine, PipelineEngine)
    tokens = torch.zeros(layout.micro_batch, layout.seq, dtype=torch.int64)
    batches = [(tokens, tokens)] * layout.accumulation
    engine.train_batch(iter(batches))
    engine.settle()
    groups = engine.groups.each()
    for group in groups:
        group.ledger.clear()
    before = written_bytes()
    engine.train_batch(iter(batches))
    engine.settle()
    written = written_bytes() - before
    sent: Counter[str] = Counter()
    for group in groups:
        payload, framing = _sent(group)
        sent[group.axis] += payload
        written -= framing
    plan, stage = with_communication(engine.plan), engine.pipeline.rank
    found = Counted(
        pipeline_rank=stage,
        by_axis=dict(sent),
        written=written,
        units=tuple((unit.elements, unit.part.role.partial) for unit in engine.runtime.units),
        messages=sum(sent_messages(plan, stage).values()),
    )
    engine.close()
    return found


def performed_config(spec: ModelSpec, layout: Layout) -> dict[str, Any]:
    """The config of a flight, with the stages that are flown, for ranks that train."""
    plan = schedule_plan(layout)
    config = engine_config(layout)
    layers = layers_by_stage(parts_of(spec.layers, plan), plan)
    return config | {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "pipeline": {**config["pipeline"], "partition": "layers", "layers": layers},
    }


def _sent(group: Communicator) -> tuple[int, int]:
    """(payload, framing) that a ledger says this rank wrote."""
    payload, framing = 0, 0
    if isinstance(group, GlooCommunicator):
        for entry, times in group.ledger.items():
            steps = group.steps(entry)
            elements = sum(message.stop - message.start for step in steps for message in step.sends)
            payload += times * elements * DTYPE_BYTES[entry.dtype]
            framing += times * framing_bytes(steps)
    return payload, framing
