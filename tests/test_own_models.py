"""`simulate MODULE:FUNCTION`: FLOPs, bytes, memory and parameters of any module against the real one on the CPU."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import own_targets
import pytest
import torch
from hand_made import PROCESSOR
from test_cli import Command, check_refused, command  # noqa: F401  (a fixture)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from windtunnel.collectives.trace import Kernel, Trace, walk
from windtunnel.collectives.zero import UnitSize, Zero, model_state_bytes, padded, sent_bytes_per_step
from windtunnel.engine.batch import call
from windtunnel.engine.loss import loss_of
from windtunnel.experiments.layout import Layout
from windtunnel.experiments.simulate import find_model, flight, simulate
from windtunnel.sim.hardware import load_cluster
from windtunnel.sim.memory import replay_memory
from windtunnel.sim.replay import sent_bytes_by_axis
from windtunnel.sim.result import StepResult

HUGGING_FACE = ("bert", "xlnet", "t5", "t5_fused")
BLOCKS = {"bert": 2, "xlnet": 2, "t5": 4, "t5_fused": 4, "lstm": 0, "gru": 0, "cnn": 0}

WORLD = 3

_CLUSTER = load_cluster("dgx-a100")
UNROUNDED = replace(_CLUSTER, processor=replace(_CLUSTER.processor, allocation_bytes=1))
"""Bytes can be counted exactly where the allocator does not round them up."""


@cache
def real(name: str) -> tuple[nn.Module, Any]:
    if name in HUGGING_FACE:
        pytest.importorskip("transformers", reason="pip install 'windtunnel[hf]'")
    torch.manual_seed(0)
    made: tuple[nn.Module, Any] = getattr(own_targets, name)()
    return made


@cache
def flown(name: str, zero: int) -> tuple[StepResult, Trace]:
    model = find_model(f"own_targets:{name}")
    result = simulate(model, "dgx-a100", gpus=WORLD, zero=zero, precision="fp32")
    return result, flight(model, Layout(**result.layout))


@pytest.mark.parametrize("name", BLOCKS)
def test_parameters_blocks_and_batch_are_counted_as_they_are(name: str) -> None:
    model, _ = real(name)
    seen: Any = find_model(f"own_targets:{name}")
    assert seen.parameters == seen.trainable == sum(parameter.numel() for parameter in model.parameters())
    assert (seen.kind, seen.layers, seen.samples) == (type(model).__name__, BLOCKS[name], own_targets.SAMPLES)
    assert seen.seq == (1 if name == "cnn" else own_targets.SEQ)


@contextmanager
def without_onednn() -> Iterator[None]:
    """`torch.backends.mkldnn.flags` warns of another setting, which it also restores."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "t5_fused"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """Of matrix products and convolutions, forward and backward, exactly."""
    model, batch = real(name)
    # A recurrent layer of oneDNN is one operator that the counter does not know.
    with without_onednn(), FlopCounterMode(display=False) as counter:
        loss_of(call(model, batch)).backward()
    _, trace = flown(name, 0)
    steady = (op for phase, *_, op in walk(trace) if phase.step == 2 and isinstance(op, Kernel))
    assert sum(op.flops for op in steady) == counter.get_total_flops() > 0


def test_a_learned_bias_of_attention_has_a_gradient() -> None:
    real("t5_fused")
    _, trace = flown("t5_fused", 3)
    biased = [phase for phase, *_, op in walk(trace) if isinstance(op, Kernel) and "bias_backward" in op.name]
    # Self-attention of two blocks on either side; between the sides there is no bias.
    assert sum(phase.step == 2 for phase in biased) == 4


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_recurrent_step_is_a_product_and_an_element_wise_kernel(name: str) -> None:
    """As on GPUs; torch's own way on a device without kernels of its own has some ten a step."""
    _, trace = flown(name, 0)
    names = Counter(op.name for phase, *_, op in walk(trace) if phase.step == 2 and isinstance(op, Kernel))
    cells = own_targets.SEQ * 2 * 2  # layers and directions
    assert names["recurrent_cell"] == names["recurrent_cell_backward"] == cells
    # Each layer and direction has a few more: of its inputs, and of the gradients of its weights.
    assert 2 * cells <= names["mm"] <= 2 * cells + 5 * 4
    others = sum(names.values()) - 2 * cells - names["mm"]
    assert others < 90  # of the optimizer, of linear layers, of the loss: none of them in each step


def units_of(name: str) -> list[UnitSize]:
    """The root and the blocks; what is not in a list of blocks belongs to the root."""
    model, _ = real(name)
    outer = re.compile(r"[a-z_.]*\.(layer|block)\.\d+")  # of transformers' stacks, not of what is in their blocks
    blocks = [module for path, module in model.named_modules() if outer.fullmatch(path)]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    assert len(blocks) == BLOCKS[name]
    sizes.append(sum(parameter.numel() for parameter in model.parameters()) - sum(sizes))
    return [UnitSize(elements=padded(n, WORLD), element_bytes=4, padding=padded(n, WORLD) - n) for n in sizes]


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        ("bert", 3),
        ("xlnet", 1),
        ("xlnet", 3),
        ("t5", 2),
        ("t5_fused", 3),
        ("lstm", 0),
        ("lstm", 3),
        ("gru", 2),
        ("cnn", 3),
    ],
)
def test_bytes_and_memory_are_the_closed_forms(name: str, zero: int) -> None:
    units, stage = units_of(name), Zero.of_stage(zero)
    result, trace = flown(name, zero)
    assert sum(sent_bytes_by_axis(trace, scalars=False).values()) == sent_bytes_per_step(units, stage, WORLD, 1)
    assert dict(replay_memory(trace, PROCESSOR).state) == model_state_bytes(
        units, stage, WORLD, moments=2, master_bytes=4
    )
    assert sum(result.breakdown_s.values()) == pytest.approx(result.step_time_s)


def test_tokens_or_samples_are_counted() -> None:
    tokens, samples = flown("lstm", 0)[0], flown("cnn", 0)[0]
    assert (tokens.layout["counts"], samples.layout["counts"]) == ("tokens", "samples")
    per_step = WORLD * own_targets.SAMPLES
    assert tokens.tokens_per_s * tokens.step_time_s == pytest.approx(per_step * own_targets.SEQ)
    assert samples.tokens_per_s * samples.step_time_s == pytest.approx(per_step)


def test_a_model_of_32_g_parameters_is_never_made() -> None:
    seen: Any = find_model("own_targets:chain")
    assert seen.parameters == own_targets.DEEP * own_targets.WIDE**2 + own_targets.WIDE  # the shared one counted once
    result = simulate(seen, UNROUNDED, gpus=64, zero=3)
    # 16 bytes a parameter in bf16, a share of each; a unit is padded by less than an element per rank.
    assert 0 <= result.model_state_bytes - 16 * seen.parameters / 64 <= 16 * (own_targets.DEEP + 1) + 256
    forward = 2 * 2 * own_targets.DEEP * own_targets.WIDE**2
    # The first layer's inputs are no parameters, but their scale is: all backwards are whole.
    assert result.tflops_per_gpu * 1e12 * result.step_time_s == pytest.approx(3 * forward)


def test_micro_batch_accumulation_and_recomputation() -> None:
    once = flown("lstm", 0)[0]
    result = simulate(
        "own_targets:lstm", "dgx-a100", gpus=WORLD, micro_batch=2 * own_targets.SAMPLES, precision="fp32",
        global_batch=WORLD * 2 * own_targets.SAMPLES * 5,
    )  # fmt: skip
    assert (result.layout["micro_batch"], result.layout["accumulation"]) == (2 * own_targets.SAMPLES, 5)
    flops, before = (step.tflops_per_gpu * step.step_time_s for step in (result, once))
    assert flops == pytest.approx(10 * before)
    full = simulate("own_targets:block_chain", "dgx-a100", gpus=2, zero=3, recompute="full")
    # Of the two layers of a block backward needs the output of the first, so that one is computed again. The first
    # of all six has an input that wants no gradient.
    assert full.hardware_tflops_per_gpu == pytest.approx((3 + 1 / 2 - 1 / 6) / 3 * full.tflops_per_gpu)


def test_one_file_drives_engine_and_simulator(tmp_path: Path) -> None:
    keys = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "gradient_accumulation_steps": 2}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(keys))
    by_file = simulate("own_targets:lstm", "dgx-a100", gpus=WORLD, config=file)
    batch = own_targets.SAMPLES
    by_options = simulate("own_targets:lstm", "dgx-a100", gpus=WORLD, zero=2, global_batch=2 * batch * WORLD)
    assert by_file.layout["micro_batch"] == batch  # the file leaves it open
    assert by_file.step_time_s == by_options.step_time_s
    stated = simulate("own_targets:lstm", "dgx-a100", gpus=2, config={**keys, "train_micro_batch_size_per_gpu": 6})
    assert (stated.layout["micro_batch"], stated.layout["global_batch"]) == (6, 24)


def test_batches_for_verify_serve_too() -> None:
    first: Any = find_model("own_targets:batches")
    assert (first.samples, first.tokens) == (own_targets.SAMPLES, own_targets.SAMPLES * own_targets.SEQ)


SIMULATE = ("simulate", "--cluster", "dgx-a100", "--gpus", "2", "--model")


def test_the_command_line_takes_them(command: Command) -> None:  # noqa: F811
    answer = command(*SIMULATE, "own_targets:chain", "--zero", "3", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["layout"]["model"] == "own_targets:chain"
    assert "32,000,040,000 parameters, 20 of its blocks repeat" in answer.err
    assert "tokens_per_s counts samples" in answer.err
    shown = command(*SIMULATE, "own_targets:cnn", "--tokens", "1e9")
    assert "samples/s" in shown.out
    assert "1e+09 samples on 2 GPUs" in shown.out


def test_a_file_beside_the_user_is_found(
    command: Command,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mine_to_fly.py").write_text(
        "import torch\ndef tiny():\n    return torch.nn.Linear(3, 1), torch.ones(5, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("mine_to_fly.py:tiny", "mine_to_fly:tiny"):
        answer = command(*SIMULATE, name, "--json")
        assert answer.code == 0, answer.err
        assert json.loads(answer.out)["layout"]["micro_batch"] == 5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("branch", ("module 'inner' (a Looking)", "_local_scalar_dense", "needs values")),
        ("select", ("module 'inner' (a Looking)", "aten.nonzero", "needs values")),
        ("elsewhere", ("module 'inner' (a Looking)", "register it as a buffer")),
        ("wrong_batch", ("(a Linear)", "RuntimeError")),
        ("no_model", ("must return (model, batch), got Tensor",)),
        ("fails", ("the function failed with KeyError: 'weights'",)),
        ("absent", ("own_targets:absent", "has no attribute 'absent'")),
    ],
)
def test_what_cannot_fly_is_refused_in_a_line(command: Command, name: str, words: tuple[str, ...]) -> None:  # noqa: F811
    check_refused(command(*SIMULATE, f"own_targets:{name}"), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tp", "2"), ("parallel.tensor) = 2, but there is no tensor plan for a Recurrent; allowed: models with",)),
        (("--pp", "2"), ("pp",)),
        (("--seq", "64"), ("seq = 64; allowed: 12, as in the sample batch",)),
        (("--micro-batch", "8"), ("micro-batch = 8", "(2, 24)")),
    ],
)
def test_options_that_it_does_not_have_are_refused(
    command: Command,  # noqa: F811
    options: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    check_refused(command(*SIMULATE, "own_targets:two_sizes", *options), *words)
