"""`simulate` for any module: MODULE:FUNCTION returns `(model, batch)`, and that is what is flown. No torch here.

The function is called in the flight's process (experiments/own_flight.py), where no weight is ever made. What options
and tables need of the model, its sizes, comes back as an OwnModel.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..collectives.trace import Trace, repeat_phase
from ..engine.pilot import Plan, Question, ask, fly
from .layout import Layout, Options, engine_config, refuse

FLIGHT = "windtunnel.experiments.own_flight"

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu")
"""Keys of a DeepSpeed file from which a micro-batch follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnModel:
    """A module of a user's own and its sample micro-batch, as numbers.

    Attributes:
        name: MODULE:FUNCTION or FILE.py:FUNCTION.
        folder: where a relative file or a module beside it is looked for.
        kind: the class of the model.
        parameters, trainable: how many, tied ones once.
        layers: repeated blocks (engine/partition.py).
        samples: of the sample batch: the size of dimension 0 of its first tensor.
        tokens: of the sample batch: elements of its first tensor of integers with two dimensions or more; 0 without.
    """

    name: str
    folder: str
    kind: str
    parameters: int
    trainable: int
    layers: int
    samples: int
    tokens: int

    @property
    def counts(self) -> str:
        """What `tokens_per_s` counts."""
        return "tokens" if self.tokens else "samples"

    @property
    def seq(self) -> int:
        """Tokens of a sample; where there are none, a sample counts as one."""
        return self.tokens // self.samples if self.tokens else 1

    @property
    def positions(self) -> str:
        """Not of the kinds that `ModelSpec` has."""
        return "own"

    @property
    def attention_kernel(self) -> str:
        """What the module calls is what flies."""
        return "fused"

    @property
    def described(self) -> str:
        """One line for a reader."""
        batch = f"{self.samples:,} sample{'s' * (self.samples > 1)}"
        batch += f" of {self.seq:,} tokens" if self.tokens else ", and tokens_per_s counts samples"
        frozen = f", {self.parameters - self.trainable:,} of them frozen" if self.trainable < self.parameters else ""
        return (
            f"{self.name} is a {self.kind} with {self.parameters:,} parameters{frozen}, {self.layers} of its blocks"
            f" repeat; its sample batch has {batch}"
        )


def is_own(model: object) -> bool:
    """Whether a model's name is MODULE:FUNCTION or FILE.py:FUNCTION."""
    module, colon, function = str(model).rpartition(":")
    return bool(colon) and module.removesuffix(".py") != "" and function.isidentifier()


def look_at(target: str) -> OwnModel:
    """The sizes of the model and batch that a function makes. The module is loaded once in a process.

    Raises:
        ValueError: no such function, one that fails, or one that returns something else; one line.
    """
    return _look_at(target, os.getcwd())


@lru_cache(maxsize=64)
def _look_at(target: str, folder: str) -> OwnModel:
    seen: OwnModel = ask(Question(function=f"{FLIGHT}:look", arguments={"target": target, "folder": folder}))
    return seen


def with_sample(
    model: OwnModel, chosen: Options, config: str | Path | Mapping[str, Any] | None
) -> tuple[Options, str | Path | Mapping[str, Any] | None]:
    """Options and config with the sample's micro-batch, where neither says how large one is.

    Raises:
        ValueError: options that a module of one's own does not have.
    """
    if chosen.seq not in (None, model.seq):
        refuse("seq", chosen.seq, f"{model.seq}, as in the sample batch of {model.name}; change it there")
    if chosen.attention not in (None, model.attention_kernel):
        refuse("attention", chosen.attention, f"to leave it out: {model.name} has an attention of its own")
    if chosen.micro_batch is not None:
        return chosen, config
    if config is None:
        return replace(chosen, micro_batch=model.samples), None
    from ..engine.config import load_json

    _, keys = load_json(config)
    if any(keys.get(name, "auto") != "auto" for name in BATCH_KEYS):
        return chosen, config
    return chosen, {**keys, "train_micro_batch_size_per_gpu": model.samples}


def own_flight(model: OwnModel, layout: Layout) -> Trace:
    """The trace of a layout, at the model's full depth, flown once per process.

    Raises:
        ValueError: pipeline stages; or what the flight says: a model without a tensor plan, an operator that needs
            values.
    """
    if layout.pp > 1:
        refuse("pp", layout.pp, f"1 for {model.name}: only models of the catalogue and of TOML files have stages")
    return _flight(
        model,
        world=layout.gpus,
        micro_batch=layout.micro_batch,
        precision=layout.precision,
        accumulation=layout.accumulation,
        engine=json.dumps(engine_config(layout)),
    )


@lru_cache(maxsize=64)
def _flight(model: OwnModel, *, world: int, micro_batch: int, precision: str, accumulation: int, engine: str) -> Trace:
    trace = fly(
        Plan(
            factory=f"{FLIGHT}:for_flight",
            arguments={
                "target": model.name,
                "folder": model.folder,
                "micro_batch": micro_batch,
                "precision": precision,
            },
            config=json.loads(engine),
            world=world,
            micro_steps=accumulation,
        )
    )
    return repeat_phase(trace, "micro-step middle", max(0, accumulation - 2))
