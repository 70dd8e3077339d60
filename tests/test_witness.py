"""The witness of memory: known allocations, and the simulator's peak beside the real one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from windtunnel.engine.world import World
from windtunnel.experiments.models import ModelSpec, load_model
from windtunnel.experiments.witness import Allocations, Mark, compare_peak, watch_allocations

SMALL = replace(load_model("gpt-demo"), layers=6, hidden=96, heads=6, kv_heads=6, ffn=384, seq=64)
VARIANTS: dict[str, ModelSpec] = {
    "gpt": SMALL,
    "llama": replace(
        SMALL, layers=3, kv_heads=2, mlp="swiglu", norm="rmsnorm", positions="rope", tied=False, bias=False
    ),
    "bloom": replace(SMALL, layers=3, positions="alibi"),
}


def test_known_allocations_are_counted_and_views_are_not() -> None:
    kept = []

    def run(mark: Mark) -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        with mark("inside"):
            second = torch.empty(500, dtype=torch.uint8)
            first[10:].view(-1)
            del second
            third = torch.empty(200, dtype=torch.uint8)
        first.untyped_storage().resize_(0)
        first.untyped_storage().resize_(300)
        with mark("quiet"):
            kept.append((first, third))
        torch.empty(2000, dtype=torch.uint8)

    seen = watch_allocations(run)
    assert [nbytes for _, nbytes in seen.timeline] == [1000, 1500, 1000, 1200, 200, 500, 2500, 500]
    assert seen.peak_bytes("inside") == 1500
    assert seen.peak_bytes("quiet") == 500  # nothing changes there
    assert seen.peak_bytes() == 2500


def test_a_peak_counts_what_was_there_before() -> None:
    seen = Allocations(((1, 10), (5, 30), (8, 20), (11, 90)), {"step": (6, 10), "all": (1, 12)})
    assert seen.peak_bytes("step") == 30
    assert seen.peak_bytes("all") == seen.peak_bytes() == 90


def compare(variant: str, policy: str, **config: Any) -> float:
    keys = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "activation_checkpointing": {"policy": policy, **({"budget_bytes": 3 << 20} if policy == "budget" else {})},
        **config,
    }
    compared = compare_peak(VARIANTS[variant], keys, batch=8)
    assert compared.predicted.peak["activations"] > 0
    return compared.error


@pytest.mark.parametrize("policy", ["none", "selective", "full", "budget"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_predicted_peak_is_the_real_one_to_the_byte(variant: str, policy: str) -> None:
    assert compare(variant, policy, gradient_clipping=1.0) == 0.0


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_in_16_bits_it_is_within_two_percent(policy: str) -> None:
    # oneDNN's products take scratch in bf16 (up to 196 kB here, whatever the model), which is not simulated; the CPU
    # keeps the statistics of norms in bf16, where GPUs and the simulated device have fp32.
    assert abs(compare("gpt", policy, bf16={"enabled": True})) < 0.02


@pytest.mark.parametrize(("stage", "policy"), [(0, "full"), (1, "none"), (2, "full"), (3, "none")])
def test_a_rank_among_others_has_the_predicted_peak(two_ranks: World, stage: int, policy: str) -> None:
    keys = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "activation_checkpointing": {"policy": policy},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
    }
    found = compare_peak(SMALL, keys, batch=8, world=two_ranks)
    # To the byte, but that in one of some runs 72 bytes more are alive at the peak; whose they are is not known.
    assert abs(found.error) * found.measured_bytes <= 128
