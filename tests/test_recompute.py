"""Recomputation changes no bit of a loss or a gradient, leaves the model alone, and works with sharded parameters."""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ZOO, Gpt, Run, start_engine, token_batch, train_alone, train_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from windtunnel.engine.activation_section import ActivationSection
from windtunnel.engine.config import Config
from windtunnel.engine.engine import Engine
from windtunnel.engine.partition import repeated_blocks
from windtunnel.engine.recompute import Recompute, recompute_blocks
from windtunnel.engine.shelf import ALIGNMENT_BYTES, Arena
from windtunnel.engine.unit import Residency
from windtunnel.engine.world import World

CPU = torch.device("cpu")

POLICIES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "selective": {"policy": "selective"},
    "tight budget": {"policy": "budget", "budget_bytes": 40_000},
    "wide budget": {"policy": "budget", "budget_bytes": 10**9},
    "host": {"policy": "full", "cpu_checkpointing": True},
    "arena": {"policy": "selective", "contiguous_memory_optimization": True, "number_checkpoints": 5},
    "arena on the host": {"policy": "full", "cpu_checkpointing": True, "contiguous_memory_optimization": True,
                          "number_checkpoints": 5},
}  # fmt: skip


def recomputed(model: nn.Module, blocks: Sequence[nn.Module] | None = None, **section: Any) -> Recompute | None:
    return recompute_blocks(model, blocks or repeated_blocks(model), ActivationSection(**section), CPU)


def loss_and_gradients(model: nn.Module, *batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(*batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(first: tuple[Tensor, dict[str, Tensor]], second: tuple[Tensor, dict[str, Tensor]]) -> bool:
    """Bitwise."""
    equal = first[1].keys() == second[1].keys() and torch.equal(first[0], second[0])
    return equal and all(torch.equal(first[1][name], second[1][name]) for name in first[1])


# Any model, any policy #


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("animal", [name for name in ZOO if name not in ("mlp", "lstm")])
def test_every_bit_is_the_same(animal: str, policy: str) -> None:
    run = Run(animal)
    for step in (0, 1):
        plain, other = run.build(), run.build()
        recomputed(other, **POLICIES[policy])
        # Twice: the first call under a budget only describes the block.
        for _ in range(2):
            plain.zero_grad()
            other.zero_grad()
            assert same(loss_and_gradients(plain, *run.batch(step)), loss_and_gradients(other, *run.batch(step)))


class Chain(nn.Module):
    """`depth` blocks, each of which takes what the one before it returned."""

    def __init__(self, depth: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([make() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Mixer(nn.Module):
    """A residual block; `drop` of its values are dropped, twice."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 11), nn.Linear(11, 6)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(self.drop(nn.functional.gelu(self.up(self.norm(x))))))


def sample(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@settings(max_examples=15)
@given(depth=st.integers(1, 7), every=st.one_of(st.integers(1, 8), st.just("auto")), arena=st.booleans())
def test_segments_change_no_bit(depth: int, every: Any, arena: bool) -> None:
    plain, other = Chain(depth, lambda: Mixer(0.3)), Chain(depth, lambda: Mixer(0.3))
    recompute = recomputed(other, list(other.blocks), policy="full", every=every, contiguous_memory_optimization=arena)
    assert recompute is not None
    assert recompute.every == (every if every != "auto" else round(depth**0.5))
    for _ in range(2):
        results = []
        for model in (plain, other):
            torch.manual_seed(1)
            results.append(loss_and_gradients(model, sample(4, 6)))
        assert same(*results)


@pytest.mark.parametrize(("every", "forwards"), [(1, 6), (2, 6), (3, 6), (6, 6), ("auto", 6)])
def test_each_block_runs_once_more_and_segments_keep_only_their_first_input(every: Any, forwards: int) -> None:
    model = Chain(6, Mixer)
    model.blocks[0].requires_grad_(True)
    norms: list[int] = []
    for block in model.blocks:
        assert isinstance(block, Mixer)
        block.norm.register_forward_hook(lambda *_: norms.append(1))
    kept = []
    recomputed(model, policy="full", every=every, contiguous_memory_optimization=True)
    arena = model.blocks[0].forward._recompute.shelf.arena  # type: ignore[union-attr]
    loss = model(sample(4, 6).requires_grad_())
    kept.append(arena.slots - len(arena._free))
    assert len(norms) == forwards
    loss.backward()
    assert len(norms) == 2 * forwards
    assert len(arena._free) == arena.slots  # all slots are free again
    length = 2 if every == "auto" else every
    assert kept == [6 // length]


def test_blocks_that_do_not_chain_cannot_be_segments() -> None:
    run = Run("one element")  # h = h + block(h)
    model = run.build()
    recomputed(model, list(model.blocks), policy="full", every=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"every = 2: a Sequential does not take what the block before it returned"):
        model(*run.batch(0))


@pytest.mark.parametrize("policy", POLICIES)
def test_dropout_drops_the_same_and_the_generator_goes_on(policy: str) -> None:
    results, states = [], []
    for section in ({"policy": "none"}, POLICIES[policy]):
        model = Chain(4, lambda: Mixer(0.5))
        recomputed(model, **section)
        torch.manual_seed(7)
        for _ in range(2):
            results.append(loss_and_gradients(model, sample(3, 6)))
        states.append(torch.get_rng_state())
    assert same(results[1], results[3])
    assert torch.equal(*states)


class Varied(nn.Module):
    """Arguments of all kinds: by keyword, nested, without gradients, and no tensors; several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, pair: tuple[Tensor, dict[str, Tensor]], *, scale: Tensor, times: int) -> Any:
        y = torch.tanh(self.linear(x)) * pair[0] + pair[1]["mask"] * scale
        return {"x": y * times, "rest": (x * scale, None)}


class VariedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Varied(), Varied(), Varied()])
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        side = x * self.scale
        for block in self.blocks:
            out = block(x, (side, {"mask": mask}), scale=self.scale, times=2)
            x = out["x"] + out["rest"][0]
        return x.sum()


@pytest.mark.parametrize("policy", POLICIES)
def test_arguments_of_all_kinds(policy: str) -> None:
    plain, other = VariedModel(), VariedModel()
    recomputed(other, **POLICIES[policy])
    batch = sample(4, 6), (sample(4, 6) > 0).float()
    for _ in range(2):
        assert same(loss_and_gradients(plain, *batch), loss_and_gradients(other, *batch))


@pytest.mark.parametrize("policy", ["full", "selective", "tight budget", "arena"])
def test_layouts_of_inputs_are_kept(policy: str) -> None:
    """Kernels round differently on another layout."""
    results = []
    for section in ({"policy": "none"}, POLICIES[policy]):
        model = Chain(2, lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
        recomputed(model, **section)
        strides: set[tuple[int, ...]] = set()
        first = model.blocks[0][0]  # type: ignore[index]
        first.register_forward_pre_hook(lambda _, args, seen=strides: seen.add(args[0].stride()))
        x = sample(6, 4).requires_grad_().t()
        for _ in range(2):
            model.zero_grad()
            results.append(loss_and_gradients(model, x))
        assert strides == {(1, 4)}
    assert same(results[1], results[3])


def test_autocast_holds_in_recomputation() -> None:
    results = []
    for section in ({"policy": "none"}, {"policy": "full"}, {"policy": "selective"}):
        model = Chain(3, Mixer)
        recomputed(model, **section)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(sample(4, 6))
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


# Autograd's other doors #


def test_a_retained_graph_and_gradients_of_gradients() -> None:
    wanted = []
    for section in ({"policy": "none"}, {"policy": "full"}, {"policy": "full", "every": 2}):
        model = Chain(4, lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
        recomputed(model, **section)
        x = sample(3, 6).requires_grad_()
        loss = model(x)
        once = torch.autograd.grad(loss, x, retain_graph=True)[0]
        weight = model.blocks[1][0].weight  # type: ignore[index]
        partial = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        twice = torch.autograd.grad(slope.square().sum(), x)[0]
        wanted.append((once, partial, twice))
    for other in wanted[1:]:
        for a, b in zip(wanted[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)  # sums of a retained graph may associate differently


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_models_own_checkpoints_lie_inside_and_around(policy: str) -> None:
    class Inside(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False) * 2  # type: ignore[no-any-return]

    class Around(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    for plain, other in (
        (Chain(3, Inside), Chain(3, Inside)),
        (Around(3, lambda: Mixer(0.3)), Around(3, lambda: Mixer(0.3))),
    ):
        recomputed(other, list(other.blocks), policy=policy)
        results = []
        for model in (plain, other):
            torch.manual_seed(3)
            results.append(loss_and_gradients(model, sample(4, 6)))
        assert same(*results)


def test_without_gradients_nothing_is_kept() -> None:
    model = Chain(3, Mixer)
    recompute = recomputed(model, policy="full", contiguous_memory_optimization=True)
    assert recompute is not None
    assert recompute.shelf.arena is not None
    with torch.no_grad():
        model(sample(2, 6))
    assert recompute.shelf.arena.buffer is None


def test_an_input_that_is_changed_in_place_is_an_error() -> None:
    class Changes(Chain):
        def forward(self, x: Tensor) -> Tensor:
            h = self.blocks[0](x * 1.0)
            out: Tensor = self.blocks[1](h)
            h.add_(1.0)
            return out.sum()

    model = Changes(2, Mixer)
    recomputed(model, list(model.blocks), policy="full")
    loss = model(sample(2, 6))
    with pytest.raises(RuntimeError, match=r"an input of shape \(2, 6\) of a block was changed in place"):
        loss.backward()


def test_a_forward_that_differs_the_second_time_is_an_error() -> None:
    class Grows(nn.Linear):
        seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return super().forward(torch.cat([torch.tanh(x)] * self.seen))

    model = Chain(1, lambda: Grows(6, 6))
    recomputed(model, list(model.blocks), policy="full")
    loss = model(sample(2, 6).requires_grad_())
    with pytest.raises(RuntimeError, match=r"computed again, a Grows saved .* its forward must do the same every time"):
        loss.backward()


# The model is left alone #


def test_names_values_modules_and_hooks_are_untouched() -> None:
    plain, other = Gpt(), Gpt()
    modules = {name: module for name, module in other.named_modules()}
    parameters = dict(other.named_parameters())
    calls: list[str] = []
    block = other.blocks[1]
    block.register_forward_pre_hook(lambda *_: calls.append("before"))
    block.register_forward_hook(lambda *_: calls.append("after"))
    block.register_full_backward_hook(lambda *_: calls.append("backward"))
    hooks = len(block._forward_hooks), len(block._forward_pre_hooks), len(block._backward_hooks)
    signature = inspect.signature(block.forward)
    recomputed(other, policy="selective")
    assert dict(other.named_modules()) == modules
    assert all(p is parameters[name] for name, p in other.named_parameters())
    assert (len(block._forward_hooks), len(block._forward_pre_hooks), len(block._backward_hooks)) == hooks
    assert inspect.signature(block.forward) == signature
    state = other.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    loss_and_gradients(other, *token_batch(0))
    assert calls == ["before", "after", "backward"]
    twin = copy.deepcopy(other)  # its blocks compute with its own parameters
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(twin(*token_batch(0)), other(*token_batch(0)))


# Sharded parameters #


def train_recomputing(rank: int, world: int, run: Run, section: dict[str, Any]) -> tuple[list[float], Any, list[int]]:
    """(losses, parameters, gathered units at most in each backward)."""
    engine = start_engine(run, run.build(), activation_checkpointing=section)
    most = watch_gathered(engine)
    losses = [train_step(engine, run, step, rank, world) for step in range(run.steps)]
    assert run.stage < 3 or all(unit.residency is Residency.SHARDED for unit in engine.runtime.units)
    parameters = engine.full_parameters()
    engine.close()
    return losses, parameters, most


def watch_gathered(engine: Engine) -> list[int]:
    """Fills with the number of blocks' units that are not sharded, whenever a block's forward begins."""
    most: list[int] = []

    def count(*_: Any) -> None:
        blocks = [unit for unit in engine.runtime.units if unit.block >= 0]
        most.append(sum(unit.residency is not Residency.SHARDED for unit in blocks))

    for module in {unit.owner for unit in engine.runtime.units if unit.block >= 0}:
        for child in module.children():
            child.register_forward_pre_hook(count)
    return most


SHARDED: list[tuple[str, dict[str, Any]]] = [
    ("gpt", {"policy": "full"}),
    ("gpt", {"policy": "full", "every": 2}),
    ("tied", {"policy": "selective"}),
    ("tied", {"policy": "budget", "budget_bytes": 30_000}),
    ("used twice", {"policy": "full"}),
    ("used twice", {"policy": "selective"}),
    ("recomputed", {"policy": "full"}),
    ("recomputed", {"policy": "none"}),
    ("frozen", {"policy": "full", "contiguous_memory_optimization": True}),
    ("sometimes used in blocks", {"policy": "full", "cpu_checkpointing": True}),
]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(("animal", "section"), SHARDED)
def test_ranks_agree_with_one_process(animal: str, section: dict[str, Any], stage: int, two_ranks: World) -> None:
    run = Run(animal, stage=stage, accumulation=3, steps=4)
    alone = train_alone(run)
    for losses, parameters, most in two_ranks.run(train_recomputing, run, section):
        assert losses != []
        for name, values in alone.parameters.items():
            torch.testing.assert_close(parameters[name], values, rtol=1e-10, atol=1e-12)  # order of summation
        if stage == 3 and animal != "used twice":  # itself, the next, and the one whose reduction has not begun
            assert max(most) <= 3


def count_gathers(rank: int, world: int, every: int) -> int:
    run = Run("gpt", stage=3, steps=1)
    engine = start_engine(run, run.build(), activation_checkpointing={"policy": "full", "every": every})
    train_step(engine, run, 0, rank, world)
    gathers = sum(times for entry, times in engine.communicator.ledger.items() if entry.kind == "all_gather")
    engine.close()
    return gathers


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_segment_costs_one_more_gather_for_each_block_but_its_last_two(every: int, two_ranks: World) -> None:
    # Backward brings the last one of a segment, and the one before it is on its way by then.
    root_and_blocks, inner = 1 + 3, {1: 0, 2: 0, 3: 1}[every]
    assert two_ranks.run(count_gathers, every) == [2 * root_and_blocks + inner] * 2


# Where inputs rest #


def test_inputs_lie_in_one_buffer() -> None:
    model = Chain(4, Mixer)
    recompute = recomputed(model, policy="full", contiguous_memory_optimization=True)
    assert recompute is not None
    assert recompute.shelf.arena is not None
    buffers = []
    for _ in range(2):
        x = sample(5, 6).requires_grad_()
        loss = model(x)
        buffer = recompute.shelf.arena.buffer
        assert buffer is not None
        assert buffer.numel() == 4 * ALIGNMENT_BYTES * 2  # 120 bytes each, rounded
        rows = buffer.view(torch.float32).view(4, -1)[:, : x.numel()].reshape(4, 5, 6)
        assert torch.equal(rows[0], x)
        assert not torch.equal(rows[1], x)
        buffers.append(buffer.data_ptr())
        loss.backward()
    assert buffers[0] == buffers[1]


def test_more_inputs_than_places_is_an_error() -> None:
    model = Chain(4, Mixer)
    recomputed(model, policy="full", contiguous_memory_optimization=True, number_checkpoints=3)
    with pytest.raises(RuntimeError, match=r"all 3 places for saved inputs are taken: raise .*number_checkpoints"):
        model(sample(2, 6).requires_grad_())


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.integers(1, 5), st.data())
def test_slots_never_overlap(sizes: list[int], slots: int, data: st.DataObject) -> None:
    arena = Arena(slots, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    live: list[tuple[Tensor, int]] = []
    for number, size in enumerate(sizes):
        try:
            place = arena.take(size)
        except RuntimeError:
            assert sum(_inside(tensor, arena.buffer) for tensor, _ in live) == slots
            live.clear()
            place = arena.take(size)
        arena.release_with([place])
        assert place.numel() == size
        live.append((place.fill_(number), number))
        del place
        assert all(bool((tensor == value).all()) for tensor, value in live)
        if data.draw(st.booleans()):
            live.pop(data.draw(st.integers(0, len(live) - 1)))


def _inside(tensor: Tensor, buffer: Tensor | None) -> bool:
    return buffer is not None and tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def divided(rank: int, world: int, section: dict[str, Any]) -> tuple[bool, int, int]:
    """(bits are the same, bytes that rest of one input, its bytes)."""
    from windtunnel.engine.device import communicator_for

    group = communicator_for(CPU, 20.0)
    plain, other = Chain(3, Mixer), Chain(3, Mixer)
    recompute = recompute_blocks(other, list(other.blocks), ActivationSection(**section), CPU, group=group)
    assert recompute is not None
    x = sample(3, 5, 6)[:, :, ::2].repeat_interleave(2, -1)[:, 1:]  # 72 values
    results = [loss_and_gradients(model, x.clone().requires_grad_()) for model in (plain, other)]
    rest = recompute.shelf._rest_elements(x) * 4
    gathers = sum(times for entry, times in group.ledger.items() if entry.kind == "all_gather")
    assert gathers == (3 if section.get("partition_activations") else 0)
    group.close()
    return same(*results), rest, x.numel() * 4


@pytest.mark.parametrize("more", [{}, {"cpu_checkpointing": True}, {"contiguous_memory_optimization": True}])
def test_inputs_are_divided_among_ranks(more: dict[str, bool], two_ranks: World, four_ranks: World) -> None:
    for world in (two_ranks, four_ranks):
        section = {"policy": "selective", "partition_activations": True, **more}
        assert world.run(divided, section) == [(True, 288 // world.size, 288)] * world.size
        assert world.run(divided, {"policy": "full", **more}) == [(True, 288, 288)] * world.size


# Config #


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"policy": "some"}, "activation_checkpointing.policy = 'some'"),
        ({"polcy": "full"}, "unknown key 'activation_checkpointing.polcy'.*did you mean 'policy'"),
        ({"policy": "full", "every": 0}, "every = 0; allowed: an integer >= 1, or 'auto'"),
        ({"policy": "selective", "every": 2}, "every = 2 with policy = 'selective'; allowed: 1, or policy 'full'"),
        ({"policy": "budget"}, "policy = 'budget' without budget_bytes"),
        ({"policy": "full", "budget_bytes": 3}, "budget_bytes = 3 with policy = 'full'"),
        ({"policy": "budget", "budget_bytes": -3}, "budget_bytes = -3"),
        ({"cpu_checkpointing": True}, "cpu_checkpointing = true with policy = 'none'"),
        ({"partition_activations": True}, "partition_activations = true with policy = 'none'"),
        ({"policy": "full", "synchronize_checkpoint_boundary": True}, "boundary is not supported"),
        ({"profile": True}, "activation_checkpointing.profile is not supported"),
        ({"policy": "full", "number_checkpoints": 3}, "number_checkpoints = 3 without contiguous_memory_optimization"),
        (
            {"policy": "full", "contiguous_memory_optimization": True, "number_checkpoints": 0},
            "number_checkpoints = 0; allowed: an integer >= 1",
        ),
    ],
)
def test_what_is_not_done_is_refused_by_name(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.read({"activation_checkpointing": section}, 2)


def test_deepspeeds_defaults_are_read() -> None:
    section = {
        "partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False,
        "number_checkpoints": None, "synchronize_checkpoint_boundary": False, "profile": False,
    }  # fmt: skip
    assert Config.read({"activation_checkpointing": section}, 2).activations == ActivationSection()


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="policy = 'full', but the model has no repeated blocks; allowed: none, or"):
        recompute_blocks(nn.Linear(2, 2), [], ActivationSection(policy="full"), CPU)
