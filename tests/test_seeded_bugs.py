"""`verify` finds each bug that is seeded into the engine and says where; what other engines get wrong is right here."""

from collections.abc import Iterator

import pytest
import seeded_targets
from conftest import WorldOf
from windtunnel.engine.world import World, WorldError
from windtunnel.experiments.judgement import StageResult
from windtunnel.experiments.verify import Verification, verify


@pytest.fixture
def ranks(world_of: WorldOf) -> Iterator[World]:
    """Two ranks, healthy again afterwards."""
    world = world_of(2)
    yield world
    if world.alive:
        world.run(seeded_targets.restore)


def run(target: str, ranks: World, *, stage: int, accumulation: int = 1) -> StageResult:
    (result,) = verify(
        f"seeded_targets:{target}", zero=(stage,), accumulation=accumulation, precision="fp64", ranks=ranks
    ).results
    return result


def check_found(result: StageResult, step: int, parameter: str, what: str) -> None:
    assert not result.ok
    place = result.first_difference
    assert place is not None
    assert (place["step"], place["parameter"], place["what"]) == (step, parameter, what)


@pytest.mark.parametrize("stage", [2])
def test_a_missing_reduction(ranks: World, stage: int) -> None:
    result = run("a_reduction_is_missing", ranks, stage=stage)
    # Of what the middle block has, backward makes the last bias first; the blocks after it are right.
    check_found(result, 0, "blocks.1.mlp.down.bias", "gradient")
    assert result.rel_gradient_diff > 0.1
    assert result.measured_bytes < result.expected_bytes == result.predicted_bytes


@pytest.mark.parametrize("stage", [3])
def test_a_wrong_accumulation_scale(ranks: World, stage: int) -> None:
    result = run("accumulation_is_not_divided_by", ranks, stage=stage, accumulation=3)
    check_found(result, 0, "head.weight", "gradient")
    # Three times the gradient. Adam hides that: its first step is of the learning rate's size whatever the scale.
    assert result.rel_gradient_diff > 1
    assert result.measured_bytes == result.expected_bytes


def test_a_stale_gather(ranks: World) -> None:
    result = run("gathers_are_stale", ranks, stage=3)
    # Gradients and the optimizer's state of the first step are right; what comes out of the gather is not.
    assert result.first_difference is not None
    assert (result.first_difference["step"], result.first_difference["what"]) == (0, "parameter")


@pytest.mark.parametrize("stage", [3])
def test_a_dropped_tied_gradient(ranks: World, stage: int) -> None:
    check_found(run("a_tied_gradient_is_dropped", ranks, stage=stage), 0, "embedding.weight", "gradient")


def test_the_same_unbroken(ranks: World) -> None:
    for target in ("tied", "shared", "with_undeclared_backwards"):
        assert run(target, ranks, stage=1).ok


# A module shared by two checkpointed calls #


def verified(target: str, ranks: World, accumulation: int = 1, zero: tuple[int, ...] = (0, 1, 2, 3)) -> Verification:
    return verify(f"seeded_targets:{target}", precision="fp64", accumulation=accumulation, zero=zero, ranks=ranks)


@pytest.mark.parametrize("target", ["shared", "shared_reentrant"])
def test_a_module_shared_by_checkpointed_calls_is_right(ranks: World, target: str) -> None:
    for result in verified(target, ranks, zero=(2, 3)).results:
        assert result.max_tensor_rel_diff < 1e-12
        assert result.rel_gradient_diff < 1e-12
        assert result.first_difference is None


def test_shared_gradients_that_overwrite_are_found(ranks: World) -> None:
    result = run("shared_gradients_overwrite", ranks, stage=2)
    check_found(result, 0, "blocks.0.1.bias", "gradient")


# Two backwards between steps #


@pytest.mark.parametrize(("target", "accumulation"), [("with_two_backwards", 3), ("with_one_graph", 1)])
def test_announced_backwards_are_right(ranks: World, target: str, accumulation: int) -> None:
    verification = verified(target, ranks, accumulation, zero=(1, 3))
    assert verification.ok, verification
    assert "a micro_step of the target's own" in verification.notes[0]


def test_undeclared_ones_are_right_or_refused(ranks: World) -> None:
    assert verified("with_undeclared_backwards", ranks, zero=(0, 2)).ok
    with pytest.raises(WorldError, match=r"backward number 2 since the last engine\.step\(\).*more=True"):
        verified("with_undeclared_backwards", ranks, accumulation=3, zero=(2,))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_second_reduction_of_the_same_is_found(ranks: World, stage: int) -> None:
    result = run("what_is_reduced_is_reduced_again", ranks, stage=stage)
    assert not result.ok
    assert result.rel_gradient_diff > 0.1
    assert result.first_difference is not None
    assert (result.first_difference["step"], result.first_difference["what"]) == (0, "gradient")
