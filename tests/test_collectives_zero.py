"""ZeRO's formulas against the numbers that the paper prints, and against a count over the rings."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.program import chunk_bounds, sent_elements
from windtunnel.collectives.ring import RING
from windtunnel.collectives.zero import (
    UnitSize,
    Zero,
    agreement_bytes,
    model_state_bytes,
    padded,
    secondary_bytes_per_step,
    sent_bytes_per_step,
    shard_group_bytes_per_step,
)

STAGES = st.sampled_from(range(4)).map(Zero.of_stage)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_papers_example(stage: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters, mixed-precision Adam (K = 12), 64 ranks."""
    unit = UnitSize(elements=7_500_000_000, element_bytes=2)
    held = model_state_bytes([unit], Zero.of_stage(stage), 64, moments=2, master_bytes=4)
    assert f"{sum(held.values()) / 1e9:.1f}" == f"{gigabytes:.1f}"


@given(elements=st.integers(0, 10**9), ranks=st.integers(1, 4096))
def test_padded(elements: int, ranks: int) -> None:
    assert padded(elements, ranks) % ranks == 0
    assert 0 <= padded(elements, ranks) - elements < ranks


@given(
    shards=st.lists(st.integers(0, 10**6), max_size=5),
    ranks=st.integers(1, 64),
    micro_steps=st.integers(1, 9),
    element_bytes=st.sampled_from([2, 4, 8]),
)
def test_traffic_of_trainable_units(shards: list[int], ranks: int, micro_steps: int, element_bytes: int) -> None:
    """2, 2, k + 1 and 3 k times P (n - 1) / n elements by stage (Rajbhandari et al., section 7)."""
    units = [UnitSize(elements=shard * ranks, element_bytes=element_bytes) for shard in shards]
    once = Fraction(sum(unit.elements for unit in units) * (ranks - 1) * element_bytes, ranks)
    for stage, rounds in enumerate([2, 2, micro_steps + 1, 3 * micro_steps]):
        assert sent_bytes_per_step(units, Zero.of_stage(stage), ranks, micro_steps) == rounds * once


@pytest.mark.parametrize(
    ("stage", "collectives"),
    [
        (0, ["all_reduce"]),
        (1, ["reduce_scatter", "all_gather"]),
        (2, ["reduce_scatter"] * 3 + ["all_gather"]),
        (3, ["all_gather", "all_gather", "reduce_scatter"] * 3),
    ],
)
@given(ranks=st.integers(2, 16), shard=st.integers(1, 999))
def test_traffic_equals_that_of_the_rings(stage: int, collectives: list[str], ranks: int, shard: int) -> None:
    """Three micro-steps, written out: the formula knows rounds, the programs know messages."""
    bounds = chunk_bounds(shard * ranks, ranks)
    sent = sum(sent_elements(RING[kind].program(0, ranks), bounds) for kind in collectives)
    unit = UnitSize(elements=shard * ranks, element_bytes=1)
    assert sent_bytes_per_step([unit], Zero.of_stage(stage), ranks, 3) == sent


@given(
    stage=st.integers(1, 3), shards=st.integers(1, 16), replicas=st.integers(1, 16), micro_steps=st.integers(1, 9),
    part=st.integers(1, 999),
)  # fmt: skip
def test_traffic_of_shard_groups(stage: int, shards: int, replicas: int, micro_steps: int, part: int) -> None:
    """ZeRO over s ranks inside; outside 2 (r - 1)/r of P / s once per step, which is all of it where s = 1."""
    unit, zero = UnitSize(elements=part * shards * replicas, element_bytes=2), Zero.of_stage(stage)
    sent = shard_group_bytes_per_step([unit], zero, shards, replicas, micro_steps)
    assert sent["shard"] == sent_bytes_per_step([unit], zero, shards, micro_steps)
    assert sent["replica"] * replicas * shards == 2 * unit.elements * 2 * (replicas - 1)
    if shards == 1:
        assert sent == {"shard": 0, "replica": sent_bytes_per_step([unit], Zero(), replicas, micro_steps)}


@given(inside=st.integers(1, 8), nodes=st.integers(1, 8), micro_steps=st.integers(1, 9), persistent=st.booleans())
def test_traffic_of_second_shards(inside: int, nodes: int, micro_steps: int, persistent: bool) -> None:
    """A round of three moves inside, unless parameters stay whole anyway."""
    ranks = inside * nodes
    unit = UnitSize(elements=12 * ranks, element_bytes=2, persistent=persistent)
    sent = secondary_bytes_per_step([unit], ranks, inside, micro_steps)
    plain = sent_bytes_per_step([unit], Zero.of_stage(3), ranks, micro_steps)
    moved = 0 if persistent else micro_steps * 24
    assert sent == {"inside": moved * nodes * (inside - 1), "inside*across": plain - moved * (ranks - 1)}
    state = model_state_bytes(
        [unit], Zero.of_stage(3), ranks, moments=2, master_bytes=4, secondary_ranks=max(2, inside)
    )
    without = model_state_bytes([unit], Zero.of_stage(3), ranks, moments=2, master_bytes=4)
    more = 0 if persistent else 12 * ranks // max(2, inside) * 2
    assert state["parameters"] - without["parameters"] == more


def test_an_agreement_costs_an_all_reduce_of_what_is_trained() -> None:
    units = [UnitSize(elements=80, element_bytes=2), UnitSize(elements=80, element_bytes=2, trainable=False)]
    assert agreement_bytes(units, 8, 4) == 2 * 70 * 4


def test_frozen_units_are_gathered_and_nothing_else() -> None:
    unit = UnitSize(elements=80, element_bytes=4, trainable=False)
    assert [sent_bytes_per_step([unit], Zero.of_stage(stage), 8, 3) for stage in range(4)] == [0, 0, 0, 2 * 3 * 70 * 4]
    held = model_state_bytes([unit], Zero.of_stage(3), 8, moments=2, master_bytes=4)
    assert held == {"parameters": 40, "gradients": 0, "optimizer": 0}


@given(zero=STAGES, shard=st.integers(0, 10**6), ranks=st.integers(1, 64), moments=st.integers(0, 2))
def test_a_master_copy_only_in_mixed_precision(zero: Zero, shard: int, ranks: int, moments: int) -> None:
    def optimizer_bytes(element_bytes: int) -> int:
        unit = UnitSize(elements=shard * ranks, element_bytes=element_bytes)
        return model_state_bytes([unit], zero, ranks, moments=moments, master_bytes=4)["optimizer"]

    kept = shard if zero.optimizer else shard * ranks
    assert optimizer_bytes(4) == kept * moments * 4
    assert optimizer_bytes(2) == kept * (moments + 1) * 4


@pytest.mark.parametrize("stage", range(4))
def test_stage_and_booleans(stage: int) -> None:
    zero = Zero.of_stage(stage)
    assert zero.stage == stage
    assert [zero.optimizer, zero.gradients, zero.parameters] == [stage > level for level in range(3)]


@pytest.mark.parametrize("stage", [-1, 4])
def test_unknown_stage(stage: int) -> None:
    with pytest.raises(ValueError, match=rf"zero stage = {stage}; allowed: 0, 1, 2, 3"):
        Zero.of_stage(stage)
