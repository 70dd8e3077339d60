"""`verify` says ok where training is right, and where it is not says where it first went wrong."""

from pathlib import Path

import pytest
from windtunnel.engine.world import World
from windtunnel.experiments.verify import StageResult, Verification, to_dict, verify

CONTRACT = {
    "zero", "max_rel_loss_diff", "max_tensor_rel_diff", "global_rel_param_diff", "expected_bytes", "predicted_bytes",
    "measured_bytes", "expected_model_state_bytes", "measured_model_state_bytes", "first_difference", "ok",
}  # fmt: skip
"""Fields of a stage in `verify --json` (docs/contract.md)."""


def run(target: str, ranks: World, **options: object) -> Verification:
    return verify(f"verify_targets:{target}", world=ranks.size, ranks=ranks, **options)  # type: ignore[arg-type]


def check_exact(result: StageResult) -> None:
    assert result.ok, result
    assert result.first_difference is None
    assert result.expected_bytes == result.predicted_bytes == result.measured_bytes > 0
    assert (
        result.expected_model_state_bytes == result.predicted_model_state_bytes == result.measured_model_state_bytes > 0
    )
    # float64: sums in another order cost about 1e-15 a step
    assert result.max_tensor_rel_diff < 1e-12
    assert result.max_rel_loss_diff < 1e-12


@pytest.mark.parametrize(("target", "accumulation"), [("tied", 3)])
def test_right_models_are_ok_and_their_bytes_exact(two_ranks: World, target: str, accumulation: int) -> None:
    verification = run(target, two_ranks, precision="fp64", accumulation=accumulation)
    assert verification.ok
    assert verification.notes == ()
    assert [result.zero for result in verification.results] == [0, 1, 2, 3]
    for result in verification.results:
        check_exact(result)
    states = [result.measured_model_state_bytes for result in verification.results]
    assert states == sorted(states, reverse=True)
    assert len(set(states)) == 4  # each stage keeps less than the one before


def test_convolutions_and_lstms_are_ok(two_ranks: World) -> None:
    for target in ("cnn", "lstm"):
        (result,) = run(target, two_ranks, precision="fp64", zero=(3,)).results
        check_exact(result)


def test_units_that_do_not_divide_are_exact_too(four_ranks: World) -> None:
    # 166 parameters on 4 ranks: 2 elements of padding.
    for result in run("mlp", four_ranks, precision="fp64").results:
        check_exact(result)


@pytest.mark.parametrize(
    ("target", "precision", "accumulation"),
    [("tied", "bf16", 3), ("frozen", "fp32", 1), ("frozen", "fp16", 2)],
)
def test_bytes_and_memory_are_exact_in_every_combination(
    two_ranks: World, target: str, precision: str, accumulation: int
) -> None:
    verification = run(target, two_ranks, precision=precision, accumulation=accumulation, steps=2)
    assert verification.notes == ()
    for result in verification.results:
        assert result.ok, result
        assert result.expected_bytes == result.predicted_bytes == result.measured_bytes > 0
        states = (result.expected_model_state_bytes, result.predicted_model_state_bytes)
        assert states == (result.measured_model_state_bytes,) * 2


def test_a_config_of_the_users_own(two_ranks: World, tmp_path: Path) -> None:
    """Its optimizer and clipping are one process's, too; its precision and accumulation are taken from it."""
    path = tmp_path / "ds.json"
    path.write_text(
        '{"train_batch_size": 999, "gradient_accumulation_steps": 3, "gradient_clipping": 0.05,'
        ' "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}, "bf16": {"enabled": true},'
        ' "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}'
    )
    verification = run("tied", two_ranks, config=path, zero=(0, 2, 3))
    assert verification.ok, verification
    assert (verification.precision, verification.accumulation) == ("bf16", 3)
    in_full = run("tied", two_ranks, config=path, precision="fp64", zero=(2,), every_step=True).results[0]
    check_exact(in_full)
    assert in_full.rel_gradient_diff < 1e-12
    assert in_full.rel_state_diff < 1e-12


@pytest.mark.parametrize(
    "config",
    [
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 1}},  # a scale that moves
    ],
)
def test_one_process_computes_in_the_same_formats(two_ranks: World, config: dict) -> None:
    verification = run("tied", two_ranks, config=config, zero=(0, 2))
    assert verification.ok, verification


def test_what_the_closed_forms_do_not_know_is_said(two_ranks: World) -> None:
    config = {"communication_compression": {"gradients": "fp16", "min_elements": 1}}
    verification = run("mlp", two_ranks, config=config, zero=(1,), tolerance=1.0, gradient_tolerance=1.0)
    assert "not judged, because of communication_compression" in verification.notes[0]
    (result,) = verification.results
    assert result.ok
    assert result.rel_gradient_diff > 1e-5  # what fp16 on the wire costs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_are_within_their_tolerances(two_ranks: World, precision: str) -> None:
    verification = run("with_keywords", two_ranks, precision=precision, zero=(3,), accumulation=2)
    (result,) = verification.results
    assert result.ok, result
    assert result.expected_bytes == result.predicted_bytes == result.measured_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_buffers_are_no_model_state(two_ranks: World, precision: str) -> None:
    (result,) = run("with_buffers", two_ranks, precision=precision, zero=(2,)).results
    assert result.ok, result
    assert result.expected_model_state_bytes == result.predicted_model_state_bytes == result.measured_model_state_bytes


def test_parameters_without_state_are_said_to_be_so(two_ranks: World) -> None:
    verification = run("never_used", two_ranks, precision="fp64", zero=(1,))
    assert verification.ok
    assert "never used and have no optimizer state" in verification.notes[0]
    (result,) = verification.results
    assert result.measured_model_state_bytes < result.expected_model_state_bytes


@pytest.mark.parametrize(("target", "stage"), [("no_gradients_are_reduced", 2), ("no_parameters_are_published", 1)])
def test_a_missing_collective_is_found_and_placed(target: str, stage: int) -> None:
    # The ranks of this world are patched for good, so it is not a shared one.
    verification = verify(f"verify_targets:{target}", zero=(stage,), precision="fp64")
    (result,) = verification.results
    assert not verification.ok
    assert not result.ok
    assert result.max_tensor_rel_diff > 1e-6
    # Each rank has its own gradients from the first step on: the first that backward makes lies in rank 1's shard. What
    # rank 0 steps, the beginning of the model, rank 1 lacks.
    what, parameter = {
        "no_gradients_are_reduced": ("gradient", "layers.4.bias"),
        "no_parameters_are_published": ("parameter", "layers.0.weight"),
    }[target]
    assert result.first_difference == {"step": 0, "rank": 1, "parameter": parameter, "what": what}
    # Two witnesses say what should be sent, the wire says that it was not: a round less.
    assert result.measured_bytes < result.expected_bytes == result.predicted_bytes


def test_bytes_that_nobody_expects_are_not_ok() -> None:
    verification = verify("verify_targets:parameters_are_published_twice", zero=(1,), precision="fp64")
    (result,) = verification.results
    assert result.max_tensor_rel_diff < 1e-12  # the training itself is right
    assert result.measured_bytes == result.expected_bytes * 3 // 2  # three rounds where there should be two
    assert result.expected_bytes == result.predicted_bytes
    assert not result.ok
    assert result.first_difference is None


def test_a_tolerance_of_nothing_is_not_met(two_ranks: World) -> None:
    verification = run("with_keywords", two_ranks, precision="fp32", zero=(0,), tolerance=0.0)
    (result,) = verification.results
    assert not result.ok
    assert result.first_difference is not None
    assert result.expected_bytes == result.measured_bytes


def test_the_contract_is_kept(two_ranks: World) -> None:
    answer = to_dict(run("mlp", two_ranks, precision="fp64", zero=(0,), steps=1))
    assert answer["world"] == 2
    (result,) = answer["results"]
    assert set(result) >= CONTRACT


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("mlp", {"world": 0}, "world = 0; allowed: an integer >= 1"),
        ("mlp", {"accumulation": 0}, "accumulation = 0; allowed: an integer >= 1"),
        ("mlp", {"steps": 0}, "steps = 0; allowed: an integer >= 1"),
        ("mlp", {"steps": 5}, "steps = 5; allowed: 1 to 4"),
        ("mlp", {"zero": ()}, "zero is empty; allowed: some of 0, 1, 2, 3"),
        ("mlp", {"zero": (4,)}, "zero stage = 4; allowed: 0, 1, 2, 3"),
        ("mlp", {"precision": "fp8"}, "precision = fp8; allowed: fp64, fp32, bf16, fp16"),
        ("mlp", {"tolerance": -1.0}, "tolerance = -1.0; allowed: >= 0"),
        ("mlp", {"gradient_tolerance": float("nan")}, "gradient_tolerance = nan; allowed: >= 0"),
        ("mlp", {"config": "nowhere.json"}, "config = 'nowhere.json': "),
        ("mlp", {"config": {"gradient_cliping": 1.0}}, "gradient_cliping"),
        ("mlp", {"world": 5}, r"shape \(12, 7\) does not divide among world \* accumulation = 5"),
        ("mlp", {"accumulation": 4}, r"does not divide among world \* accumulation = 8; allowed: a multiple of 8"),
        ("nothing_of_that_name", {}, "has no attribute 'nothing_of_that_name'"),
        ("A_NUMBER", {}, "is a int; allowed: a function"),
        ("raises", {}, "the function failed with KeyError"),
        ("only_a_model", {}, r"must return \(model, batches\), got Mlp"),
        ("no_batches", {}, "steps = None; allowed: "),
        ("uneven", {}, r"shape \(5, 7\) does not divide"),
        ("a_scalar_batch", {}, r"shape \(\) does not divide"),
    ],
)
def test_bad_input_is_refused_before_a_rank_is_started(
    monkeypatch: pytest.MonkeyPatch, target: str, options: dict, message: str
) -> None:
    def no_world(*arguments: object, **keywords: object) -> World:
        raise AssertionError("a world was started")

    monkeypatch.setattr("windtunnel.experiments.verify.World", no_world)
    with pytest.raises(ValueError, match=message):
        verify(f"verify_targets:{target}", **options)
