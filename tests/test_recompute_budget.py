"""What to keep under a budget: the solver against brute force, the description and the bytes against real runs."""

from dataclasses import replace
from itertools import chain, combinations
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_flight import SPEC, flight
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from windtunnel.collectives.recompute import (
    FLOPS_PER_BYTE,
    BlockActivations,
    Choice,
    Key,
    Operation,
    activation_bytes,
    cheapest,
    choice,
    segment_length,
)
from windtunnel.collectives.trace import Alloc, Free, Trace, walk
from windtunnel.engine.activation_section import ActivationSection
from windtunnel.engine.recompute import Recompute, recompute_blocks
from windtunnel.experiments.layout import Layout, Options, resolve
from windtunnel.experiments.models import ModelSpec, load_model
from windtunnel.experiments.simulate import flight as flight_of
from windtunnel.experiments.simulate import simulate
from windtunnel.experiments.transformer import Block
from windtunnel.experiments.witness import Mark, watch_allocations
from windtunnel.sim.hardware import load_cluster

# The solver #


@st.composite
def blocks(draw: st.DrawFn, most: int = 12) -> BlockActivations:
    operations = tuple(
        Operation(
            key=("op", number),
            nbytes=draw(st.integers(0, 20)),
            flops=float(draw(st.integers(0, 5000))),
            moved_bytes=draw(st.integers(0, 30)),
            again=draw(st.booleans()),
            keepable=draw(st.booleans()),
        )
        for number in range(draw(st.integers(0, most)))
    )
    inputs = draw(st.integers(0, 10))
    return BlockActivations(operations, inputs, inputs + draw(st.integers(0, 100)))


def played(block: BlockActivations, kept: frozenset[Key]) -> float:
    """The work of the recomputation, operation by operation: kept ones return, the others run, until none is needed."""
    work, last = 0.0, max((n for n, op in enumerate(block.operations) if op.again), default=-1)
    for operation in block.operations[: last + 1]:
        if operation.again and operation.key not in kept:
            work += operation.flops + FLOPS_PER_BYTE * operation.moved_bytes
    return work


@given(blocks(), st.integers(0, 150))
def test_no_other_set_under_the_budget_leaves_less_work(block: BlockActivations, budget: int) -> None:
    if budget >= block.plain_bytes:
        assert cheapest(block, budget).kept is None
        assert cheapest(block, budget).work == 0
        return
    if budget < block.input_bytes:
        with pytest.raises(ValueError, match=f"allowed: at least {block.input_bytes}, its inputs"):
            cheapest(block, budget)
        return
    found = cheapest(block, budget)
    assert found.kept is not None
    assert found.nbytes <= budget
    assert found == choice(block, found.kept)
    assert found.work == pytest.approx(played(block, found.kept))
    sets = every_set([op.key for op in block.operations if op.keepable])
    allowed = [keys for keys in sets if choice(block, keys).nbytes <= budget]
    assert found.work == pytest.approx(min(played(block, frozenset(keys)) for keys in allowed))


def every_set(keys: list[Key]) -> list[tuple[Key, ...]]:
    return list(chain.from_iterable(combinations(keys, size) for size in range(len(keys) + 1)))


@given(blocks(most=20), st.integers(0, 200), st.integers(0, 50))
def test_a_larger_budget_never_costs_more(block: BlockActivations, budget: int, more: int) -> None:
    budget += block.input_bytes
    assert cheapest(block, budget + more).work <= cheapest(block, budget).work * (1 + 1e-12)


def test_a_hundred_operations_of_many_sizes_are_solved() -> None:
    operations = tuple(
        Operation(("op", n), nbytes=7919 * (n + 3) % 10_007 + 1, flops=float(104_729 * n % 9973), moved_bytes=0)
        for n in range(100)
    )
    block = BlockActivations(operations, 0, 10**9)
    found = cheapest(block, 100_000)
    assert found.nbytes <= 100_000
    # The fractional knapsack is an upper bound of what can be saved (Dantzig 1957).
    left, bound = 100_000.0, 0.0
    for operation in sorted(operations, key=lambda op: -op.work / op.nbytes):
        share = min(1.0, left / operation.nbytes)
        bound, left = bound + share * operation.work, left - share * operation.nbytes
    saved = sum(operation.work for operation in operations) - found.work
    assert bound - max(operation.work for operation in operations) <= saved <= bound


@pytest.mark.parametrize(("blocks_", "every"), [(1, 1), (2, 1), (4, 2), (10, 3), (96, 10), (100, 10)])
def test_segments_of_the_square_root(blocks_: int, every: int) -> None:
    assert segment_length("auto", blocks_) == every
    assert segment_length(7, blocks_) == 7


# A real model #

WIDE = replace(SPEC, hidden=48, heads=4, kv_heads=4, ffn=192, seq=32)
DEPTH = 4


class Stack(nn.Module):
    def __init__(self, spec: ModelSpec = WIDE) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(spec) for _ in range(DEPTH)])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def stacked(**section: Any) -> tuple[Stack, Recompute | None]:
    model = Stack()
    return model, recompute_blocks(model, list(model.blocks), ActivationSection(**section), torch.device("cpu"))


def hidden_states() -> Tensor:
    return torch.randn(3, WIDE.seq, WIDE.hidden, generator=torch.Generator().manual_seed(2)).requires_grad_()


def described() -> BlockActivations:
    model, recompute = stacked(policy="budget", budget_bytes=10**9)
    assert recompute is not None
    model(hidden_states())
    (description,) = recompute.descriptions.values()
    return description


INPUT_BYTES = 3 * WIDE.seq * WIDE.hidden * 4


def test_the_description_is_that_of_the_block() -> None:
    description = described()
    unit = 3 * WIDE.seq * WIDE.hidden * 4  # fp32
    assert description.input_bytes == unit
    # Of the block's products only the last is not needed again: it leaves the block.
    products = {op.key: op.flops for op in description.operations if op.flops > 0}
    tokens, D, F, S = 3 * WIDE.seq, WIDE.hidden, WIDE.ffn, WIDE.seq
    assert sorted(products.values()) == sorted(
        [
            2.0 * tokens * D * 3 * D,
            4.0 * tokens * S * D,
            2.0 * tokens * D * D,
            2.0 * tokens * D * F,
            2.0 * tokens * D * F,
        ]
    )
    assert [op.again for op in description.operations if op.flops > 0] == [True, True, True, True, False]
    # Norm inputs and outputs (4), query, key and value (3), attention's result (1), the two of the mlp (4 + 4), and
    # the statistics of two norms and attention's log-sum-exp.
    assert description.plain_bytes == 16 * unit + 3 * WIDE.seq * 4 * (2 * 2 + WIDE.heads)


@pytest.fixture(scope="module")
def measured() -> list[tuple[int, int, int, float, Choice]]:
    """By budget, descending: (budget, bytes that rest after forward, the most at once, FLOPs, the choice)."""
    description = described()
    rows = []
    top = description.plain_bytes * DEPTH
    for budget in (2 * top, top, *(INPUT_BYTES * DEPTH * n for n in (12, 9, 6, 4, 3, 2, 1))):
        rows.append((budget, *measure(budget)))
    return rows


def attention_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    return 4 * query.numel() * key[-2]


CPU_ATTENTION: Any = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
"""torch's counter knows the fused attention of GPUs alone."""


def measure(budget: int) -> tuple[int, int, float, Choice]:
    model, recompute = stacked(policy="budget", budget_bytes=budget)
    assert recompute is not None
    model(hidden_states())  # describes
    x = hidden_states()
    gradient = torch.ones_like(x)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        model(x).backward(gradient)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x.grad = torch.zeros_like(x)
    outputs: list[Tensor] = []

    def run(mark: Mark) -> None:
        with mark("forward"):
            outputs.append(model(x))
        with mark("backward"):
            outputs.pop().backward(gradient)

    allocations = watch_allocations(run)
    after_forward = [n for time, n in allocations.timeline if time <= allocations.marks["forward"][1]][-1]
    (chosen,) = recompute.choices.values()
    return after_forward, allocations.peak_bytes(), float(counter.get_total_flops()), chosen


def test_what_rests_is_under_the_budget_and_the_peak_a_block_above_it(measured: list[tuple]) -> None:
    block_bytes = described().plain_bytes
    for budget, rests, most, *_ in measured:
        # The input of the first block was there before; the result of the last is no block's input.
        assert rests <= budget
        # While a block is computed again its activations are here, beside the gradients on their way: of one
        # activation of the widest kind (the mlp's, 4 inputs) at most two and of the input two, and of its parameters.
        parameters = sum(p.numel() for p in Block(WIDE).parameters()) * 4
        assert most <= budget + block_bytes + 10 * INPUT_BYTES + parameters


def test_memory_falls_and_work_rises_with_the_budget(measured: list[tuple]) -> None:
    _, rests, most, flops, choices = (list(column) for column in zip(*measured, strict=True))
    assert rests == sorted(rests, reverse=True)
    assert most == sorted(most, reverse=True)
    work = [chosen.work for chosen in choices]
    assert work == sorted(work)
    assert work[0] == work[1] == 0  # all fits
    assert len(set(rests)) >= 7
    assert len(set(work)) >= 7
    # FLOPs are those that were planned. They alone need not rise step by step: work counts bytes, too.
    assert [count - flops[0] for count in flops] == [DEPTH * chosen.flops for chosen in choices]
    assert flops[0] < flops[-1] == max(flops)


def test_a_budget_below_the_inputs_names_the_least() -> None:
    least = DEPTH * INPUT_BYTES
    model, _ = stacked(policy="budget", budget_bytes=least - 1)
    with pytest.raises(ValueError, match=f"budget_bytes = {least - 1}; allowed: at least {least}, the inputs of 4"):
        model(hidden_states())
    model, recompute = stacked(policy="budget", budget_bytes=least)
    model(hidden_states())
    assert recompute is not None
    assert [chosen.kept for chosen in recompute.choices.values()] == [frozenset()]


def test_inputs_on_the_host_do_not_count() -> None:
    model, recompute = stacked(policy="budget", budget_bytes=0, cpu_checkpointing=True)
    model(hidden_states())
    assert recompute is not None
    assert [described.input_bytes for described in recompute.descriptions.values()] == [0]


def test_other_shapes_are_described_anew() -> None:
    model, recompute = stacked(policy="budget", budget_bytes=6 * DEPTH * INPUT_BYTES)
    assert recompute is not None
    for length in (32, 16, 32):
        model(hidden_states()[:, :length]).sum().backward()
    small, large = sorted(recompute.descriptions.values(), key=lambda each: each.plain_bytes)
    assert len(recompute.choices) == 2
    assert large.plain_bytes > 1.8 * small.plain_bytes  # both inputs are views of one storage


class Overwrites(nn.Module):
    """Keeping the product would keep what the operation in place has made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.out(torch.relu_(self.linear(x)))
        return torch.tanh(h)


def test_what_is_overwritten_is_not_kept() -> None:
    grads = []
    for section in ({"policy": "none"}, {"policy": "budget", "budget_bytes": 2 * 5 * 6 * 4 * 2}):
        torch.manual_seed(0)
        model = nn.Sequential(Overwrites(), Overwrites())
        recompute = recompute_blocks(model, list(model), ActivationSection(**section), torch.device("cpu"))
        for _ in range(2):
            model.zero_grad()
            model(torch.ones(5, 6, requires_grad=True)).sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        if recompute is not None:
            (description,) = recompute.descriptions.values()
            keepable = {op.key: op.keepable for op in description.operations if op.flops > 0}
            assert list(keepable.values()) == [False, True]
            (chosen,) = recompute.choices.values()
            assert chosen.kept == frozenset([("aten.addmm.default", 1)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]


# The closed forms, and what our transformer keeps on the simulated device #


def test_the_published_sizes() -> None:
    # Korthikanti et al. 2022, section 4.2.2 and table 2: GPT-3 (a = 96, s = 2048, h = 12288) has 5 a s / h = 80, the
    # 530 B model (a = 128, h = 20480) 64; selective saves 70 % and 65 %.
    gpt3 = {"seq": 2048, "batch": 1, "hidden": 12288, "heads": 96, "tensor": 8, "sequence_parallel": True}
    nlg = {"seq": 2048, "batch": 1, "hidden": 20480, "heads": 128, "tensor": 8, "sequence_parallel": True}
    for sizes, core, saved in ((gpt3, 80, 0.70), (nlg, 64, 0.65)):
        unit = 2048 * sizes["hidden"]
        assert activation_bytes("none", **sizes) * 8 / unit == pytest.approx(34 + core)  # type: ignore[arg-type]
        kept = activation_bytes("selective", **sizes) / activation_bytes("none", **sizes)  # type: ignore[arg-type]
        assert 1 - kept == pytest.approx(saved, abs=0.005)
        assert activation_bytes("full", **sizes) == 2 * unit  # type: ignore[arg-type]
    whole = {"seq": 128, "batch": 2, "hidden": 64, "heads": 4, "tensor": 4}
    assert activation_bytes("selective", **whole) == 128 * 2 * 64 * (10 + 24 / 4)  # type: ignore[arg-type]
    assert activation_bytes("none", **whole) == 128 * 2 * 64 * (10 + 24 / 4 + 5 * 4 * 128 / (64 * 4))  # type: ignore[arg-type]


Policy = Literal["none", "selective", "full"]


def kept_per_layer(policy: Policy, spec: ModelSpec, batch: int) -> int:
    """Bytes of activations alive when backward begins, of one layer: the difference that one more makes."""
    traces = [
        flight(replace(spec, layers=layers), stage=0, recompute=policy, bf16={"enabled": True}) for layers in (2, 3)
    ]
    few, many = map(alive_when_backward_begins, traces)
    return (many - few) * batch // 2


def alive_when_backward_begins(trace: Trace) -> int:
    alive, seen = 0, 0
    sizes: dict[tuple, int] = {}
    runs: dict[tuple[str, int], int] = {}
    previous = None
    for phase, call, position, op in walk(trace):
        if (phase, call) != previous or position == 0:
            runs[call.key, call.block] = runs.get((call.key, call.block), 0) + 1
            previous = (phase, call)
        if call.key == "backward.begin" and position == 0:
            seen += 1
            if seen == 2:
                break
        if isinstance(op, Alloc) and (op.category, op.tier) == ("activations", "device"):
            sizes[call.key, call.block, runs[call.key, call.block], position] = op.nbytes
            alive += op.nbytes
        elif isinstance(op, Free):
            block = op.ref.block_from(call.block)
            made = (op.ref.key, block, runs.get((op.ref.key, block), 0) - op.ref.age, op.ref.op)
            alive -= sizes.pop(made, 0)
    return alive


def test_what_our_transformer_keeps_beside_the_formula() -> None:
    """No dropout (2 s b h of masks, and those of attention), no s x s matrices; instead small statistics in fp32."""
    spec = replace(SPEC, hidden=32, heads=4, kv_heads=4, ffn=128, seq=64)
    s, b, h, a = spec.seq, 2, spec.hidden, spec.heads
    unit, logsumexp, statistics = s * b * h, 4 * s * b * a, 2 * 2 * 4 * s * b
    paper = {"seq": s, "batch": b, "hidden": h, "heads": a}
    assert kept_per_layer("full", spec, b) == activation_bytes("full", **paper) == 2 * unit
    core, masks = 5 * a * s * s * b, 2 * unit
    none = activation_bytes("none", **paper) - core - masks + logsumexp + statistics
    assert kept_per_layer("none", spec, b) == none
    # Ours keeps products and attention: the input (2), query, key and value (6), attention (2), its projection (2), the
    # mlp's two (8 + 2). Theirs keeps all but the core of attention.
    assert kept_per_layer("selective", spec, b) == 22 * unit + logsumexp
    assert activation_bytes("selective", **paper) == 34 * unit


GPT3_LAYERS = replace(load_model("gpt3-175b"), layers=8, vocab=512)
_CLUSTER = load_cluster("dgx-a100")
UNROUNDED = replace(_CLUSTER, processor=replace(_CLUSTER.processor, allocation_bytes=1))


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_layers_of_gpt3_have_the_flops_and_the_memory_of_the_formulas(policy: Policy) -> None:
    spec = GPT3_LAYERS
    result = simulate(spec, UNROUNDED, gpus=8, zero=3, recompute=policy)
    s, h, F, L = spec.seq, spec.hidden, spec.ffn, spec.layers
    model_flops = 3 * spec.forward_flops(1, s)
    again = spec.forward_flops(1, s) - 2 * s * h * (spec.vocab + L * F) if policy == "full" else 0
    # Narayanan et al. 2021, equation 3: 96 against 72 B s l h^2, less here the products that leave the blocks.
    assert result.tflops_per_gpu * 1e12 * result.step_time_s == pytest.approx(model_flops)
    assert result.hardware_tflops_per_gpu * 1e12 * result.step_time_s == pytest.approx(model_flops + again)
    unit, logsumexp, statistics = s * h, 4 * s * spec.heads, 2 * 2 * 4 * s
    layer = {"none": 32 * unit + logsumexp + statistics, "selective": 22 * unit + logsumexp, "full": 2 * unit}[policy]
    eight, nine = (
        alive_when_backward_begins(flown(replace(spec, layers=layers), gpus=8, zero=3, recompute=policy))
        for layers in (8, 9)
    )
    assert nine - eight == layer
    # Beside the layers: what the last one returned, the last norm (2 s h and statistics), logits in 16 and 32 bits and
    # their log-softmax, tokens and targets.
    assert 0 < eight - 8 * layer <= 4 * unit + 8 * s + s * (2 + 4 + 4) * spec.vocab + 16 * s + 64


def flown(spec: ModelSpec, **options: Any) -> Trace:
    return flight_of(spec, resolve(Options(**options), spec, UNROUNDED))


def test_a_budget_flies() -> None:
    spec = replace(load_model("gpt2"), layers=4)
    unit = 2 * 2 * spec.seq * spec.hidden  # 16-bit inputs of two sequences
    rows = [
        simulate(spec, UNROUNDED, gpus=8, zero=1, micro_batch=2, recompute="budget", recompute_budget=budget)
        for budget in (40 * 4 * unit, 9 * 4 * unit, 5 * 4 * unit, 4 * unit)
    ]
    none, full = (simulate(spec, UNROUNDED, gpus=8, zero=1, micro_batch=2, recompute=name) for name in ("none", "full"))
    memory = [row.peak_memory_bytes["activations"] for row in rows]
    assert memory == sorted(memory, reverse=True)
    assert memory[0] == none.peak_memory_bytes["activations"]
    assert memory[-1] == full.peak_memory_bytes["activations"]
    seconds = [row.breakdown_s["compute"] for row in rows]
    assert seconds == sorted(seconds)
    ends = none.breakdown_s["compute"], full.breakdown_s["compute"]
    assert (seconds[0], seconds[-1]) == pytest.approx(ends, rel=1e-9)  # the rounding of a sum of kernels
    with pytest.raises(ValueError, match=rf"budget_bytes = 5; allowed: at least {4 * unit}, the inputs of 4 blocks"):
        simulate(spec, UNROUNDED, gpus=8, zero=1, micro_batch=2, recompute="budget", recompute_budget=5)


def test_a_file_says_what_is_computed_again(tmp_path: Any) -> None:
    import json

    def simulated(section: dict[str, Any], **options: Any) -> Any:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"activation_checkpointing": section}))
        return simulate("gpt-demo", UNROUNDED, gpus=8, config=path, precision="bf16", **options)

    full = simulated({"policy": "full"})
    assert full.layout["recompute"] == "full"
    assert full.peak_memory_bytes == simulate("gpt-demo", UNROUNDED, gpus=8, recompute="full").peak_memory_bytes
    segments = simulated({"policy": "full", "every": 2})
    few, many = (
        alive_when_backward_begins(flight_of(load_model("gpt-demo"), Layout(**result.layout)))
        for result in (segments, full)
    )
    assert few == many - 2 * 2 * 128 * 256  # two of four blocks' inputs
    assert segments.hardware_tflops_per_gpu * segments.step_time_s > full.hardware_tflops_per_gpu * full.step_time_s
    assert simulated({"policy": "full"}, recompute="none").layout["recompute"] == "none"
    arena = simulated({"policy": "full", "contiguous_memory_optimization": True})
    assert arena.hardware_tflops_per_gpu * arena.step_time_s == pytest.approx(
        full.hardware_tflops_per_gpu * full.step_time_s
    )
    host = simulated({"policy": "full", "cpu_checkpointing": True})
    inputs_bytes = 4 * 2 * 128 * 256  # of four blocks, in bf16
    assert host.offloaded_bytes_per_node["host"] == 8 * inputs_bytes
    assert host.breakdown_s["offload"] > 0
    kept, away = (
        alive_when_backward_begins(flight_of(load_model("gpt-demo"), Layout(**result.layout)))
        for result in (full, host)
    )
    assert away == kept - inputs_bytes
