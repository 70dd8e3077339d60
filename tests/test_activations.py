"""Activations of a transformer layer: closed forms against flights, byte for byte, and against published figures."""

from dataclasses import replace
from typing import Any

import pytest
from windtunnel.collectives.pipeline import peak_in_flight
from windtunnel.collectives.pipeline_schedules import SCHEDULES
from windtunnel.collectives.recompute import activation_bytes
from windtunnel.experiments.layout import Options, resolve
from windtunnel.experiments.models import load_model
from windtunnel.experiments.pipeline import parts_of, schedule_plan, stage_flight
from windtunnel.sim.hardware import load_cluster
from windtunnel.sim.stage_memory import read_flight

SPEC = replace(load_model("gpt-demo"), hidden=64, heads=4, kv_heads=4, ffn=256, tied=False)
GIBI = 1 << 30


def kept_bytes(layers: int, **options: Any) -> int:
    """By a forward of a middle stage with a third of so many layers."""
    ranks = 3 * options.get("tp", 1)
    chosen = Options(pp=3, gpus=ranks, global_batch=3 * options.get("micro_batch", 1), **options)
    layout = resolve(chosen, replace(SPEC, layers=layers), load_cluster("dgx-a100"))
    parts = tuple(parts_of(layers, schedule_plan(layout)))
    return read_flight(stage_flight(replace(SPEC, layers=layers), layout, 1, parts), 1).kept_bytes[0]


@pytest.mark.parametrize(("tensor", "sequence_parallel", "batch"), [(1, False, 3), (4, False, 1), (4, True, 1)])
def test_a_layer_keeps_what_the_formula_says(tensor: int, sequence_parallel: bool, batch: int) -> None:
    """The formula without the s x s terms, which fused attention does not keep, and without masks, as our model has no
    dropout; but with the statistics that both keep to compute backward: fp32, two per norm and one per head."""
    options = {"tp": tensor, "sequence_parallel": sequence_parallel, "micro_batch": batch}
    tokens, cut = SPEC.seq * batch, tensor if sequence_parallel else 1
    shape = {"seq": SPEC.seq, "batch": batch, "hidden": SPEC.hidden, "heads": SPEC.heads}
    paper = activation_bytes("selective", tensor=tensor, sequence_parallel=sequence_parallel, **shape)
    masks = 2 * tokens * SPEC.hidden / cut
    statistics = tokens * (4 * SPEC.heads / tensor + 16 / cut)
    # The paper gathers the inputs of its column-parallel products anew in backward; the engine keeps them.
    gathered = 4 * tokens * SPEC.hidden * (1 - 1 / cut)
    layer = kept_bytes(6, **options) - kept_bytes(3, **options)
    assert layer == paper - masks + statistics + gathered


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "batch", "ranks", "chunks", "policy", "sequence_parallel", "gibibytes"),
    [
        (48, 6144, 64, 4, 1, 1, "none", False, 59.25),
        (48, 6144, 64, 4, 1, 1, "selective", True, 9.5625),
        (96, 12288, 96, 1, 8, 3, "none", False, 66.84375),
        (96, 12288, 96, 1, 8, 3, "selective", True, 12.3515625),
    ],
)
def test_published_activations_of_a_first_stage(
    layers: int, hidden: int, heads: int, batch: int, ranks: int, chunks: int, policy: Any, sequence_parallel: bool,
    gibibytes: float,
) -> None:  # fmt: skip
    """Korthikanti et al. 2022, figure 1, GPT 22B and 175B with 8 tensor ranks: a layer times what the plan has in
    flight on the first rank."""
    shape = {"seq": 2048, "batch": batch, "hidden": hidden, "heads": heads}
    layer = activation_bytes(policy, tensor=8, sequence_parallel=sequence_parallel, **shape)
    schedule = SCHEDULES["interleaved" if chunks > 1 else "1f1b"]
    in_flight = peak_in_flight(schedule.plan(ranks, 64, chunks))[0]
    assert layer * layers / (ranks * chunks) * in_flight == gibibytes * GIBI
