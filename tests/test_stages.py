"""Which layers make which stage: the partition against all others, and chunks that keep the model's names."""

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from windtunnel.collectives.partition_stages import balanced
from windtunnel.collectives.pipeline import Send, Wait
from windtunnel.collectives.pipeline_acknowledge import acknowledgements
from windtunnel.collectives.pipeline_schedules import SCHEDULES
from windtunnel.engine.layer_flops import layer_flops
from windtunnel.engine.pipeline_section import PipelineSection, in_flight_by_stage
from windtunnel.engine.stages import (
    Layer,
    LayerList,
    bounds_of,
    chunks_of,
    drop_others,
    layers_of,
    tied_ranks,
)
from windtunnel.experiments.models import ModelSpec
from windtunnel.experiments.transformer import Transformer, initialize_weights

COSTS = st.lists(st.integers(0, 20), min_size=1, max_size=9)


def worst(bounds: tuple[int, ...], costs: list[int], per_copy: list[int], copies: list[int]) -> int:
    parts = zip(bounds, bounds[1:], copies, strict=False)
    return max(sum(costs[a:b]) + times * sum(per_copy[a:b]) for a, b, times in parts)


@given(costs=COSTS, data=st.data())
def test_no_partition_is_better(costs: list[int], data: st.DataObject) -> None:
    count = len(costs)
    parts = data.draw(st.integers(1, count))
    per_copy = data.draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
    copies = data.draw(st.lists(st.integers(0, 4), min_size=parts, max_size=parts))
    found = balanced(costs, parts, per_copy, copies)
    assert len(found) == parts + 1
    assert (found[0], found[-1]) == (0, count)
    assert all(a < b for a, b in pairwise(found))
    every = ((0, *inner, count) for inner in combinations(range(1, count), parts - 1))
    assert worst(found, costs, per_copy, copies) == min(worst(each, costs, per_copy, copies) for each in every)


@pytest.mark.parametrize(
    ("costs", "parts", "words"),
    [([1.0], 2, "1 layers in 2 stages"), ([1.0, -1.0], 1, "negative"), ([1.0, float("nan")], 1, "not finite")],
)
def test_what_cannot_be_cut(costs: list[float], parts: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        balanced(costs, parts)


def row() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 1))


@pytest.mark.parametrize(
    ("method", "costs", "bounds"),
    [
        ("uniform", (), (0, 2, 4)),
        ("parameters", (), (0, 1, 4)),  # 72 | 0 + 72 + 9
        ("cost", (1.0, 1.0, 1.0, 5.0), (0, 3, 4)),
        # States 1152 | 0 | 1152 | 144 bytes. The first stage keeps two micro-batches of activations, the last one.
        ("memory", (1000.0, 10.0, 10.0, 10.0), (0, 1, 4)),
        ("memory", (10.0, 10.0, 10.0, 4000.0), (0, 3, 4)),
    ],
)
def test_methods(method: str, costs: tuple[float, ...], bounds: tuple[int, ...]) -> None:
    model = row()
    assert bounds_of(model, layers_of(model), 2, method, costs, [2, 1]) == bounds


class Wide(nn.Sequential):
    """Its layers in the middle are deeper than those at the ends."""

    def __init__(self) -> None:
        deep = [nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth))) for depth in (1, 4, 3, 1)]
        super().__init__(*deep, nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))


def test_cut_by_traced_cost() -> None:
    """A Linear on B rows takes 2 * B * in * out; a uniform cut would put both deep layers on the first stage."""
    model, x = Wide(), torch.randn(3, 8)
    state = torch.get_rng_state()
    costs = layer_flops(model, (x,))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert costs == (*(2 * 3 * 64 * depth for depth in (1, 4, 3, 1)), 0, 0, 2 * 3 * 16)
    section = PipelineSection(partition="cost", costs=costs)
    layers = layers_of(model)
    assert bounds_of(model, layers, 2, section.partition, section.costs) == (0, 2, 7)
    assert bounds_of(model, layers, 2, "uniform") == (0, 3, 7)


def test_the_traced_cost_of_a_transformer() -> None:
    """Matrix products of a block by hand, and attention of all heads: 2 * 2 * S * S * hidden; on meta as well."""
    model = transformer(attention="full")
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    costs = layer_flops(model, (tokens,), (tokens,))
    weights, rows = 8 * 24 + 8 * 8 + 2 * 8 * 12, 2 * 6
    assert costs == (0, *[2 * rows * weights + 2 * 4 * 6 * 6 * 8] * 3, 2 * rows * 8 * 17)
    on_meta = tokens.to("meta")
    assert layer_flops(model.to("meta"), (on_meta,), (on_meta,)) == costs


def test_micro_batches_in_flight() -> None:
    """1F1B keeps ranks - rank, GPipe all of them."""
    assert in_flight_by_stage(SCHEDULES["1f1b"].plan(4, 8)) == [4, 3, 2, 1]
    assert in_flight_by_stage(SCHEDULES["gpipe"].plan(4, 8)) == [8, 8, 8, 8]


def transformer(**changes: Any) -> Transformer:
    sizes: dict[str, Any] = {
        "name": "tiny", "layers": 3, "hidden": 8, "heads": 2, "ffn": 12, "vocab": 17, "seq": 6, "mlp": "gelu",
        "norm": "layernorm", "positions": "learned", "attention": "causal", "tied": True, "bias": True,
    }  # fmt: skip
    model = Transformer(ModelSpec(**(sizes | changes)))
    initialize_weights(model, seed=0)
    return model


@pytest.mark.parametrize("changes", [{}, {"positions": "rope"}, {"positions": "alibi"}, {"tied": False}])
def test_chunks_compute_what_the_model_does_under_its_names(changes: dict[str, Any]) -> None:
    model = transformer(**changes)
    layers = layers_of(model)
    chunks = chunks_of(model, layers, bounds_of(model, layers, 3, "uniform"))
    tokens = torch.randint(17, (2, 5), generator=torch.Generator().manual_seed(0))
    value: Tensor = tokens
    for chunk in chunks[:-1]:
        value = chunk((value,))
    assert torch.equal(chunks[-1]((value,), (tokens,)), model(tokens, tokens))
    whole = dict(model.named_parameters())
    assert {name for chunk in chunks for name, _ in chunk.named_parameters()} == set(whole)
    assert all(whole[name] is parameter for chunk in chunks for name, parameter in chunk.named_parameters())


def test_what_two_stages_use_is_tied() -> None:
    model = transformer()
    chunks = chunks_of(model, layers_of(model), (0, 2, 4, 5))
    assert tied_ranks(chunks, [0, 1, 2]) == {model.embedding.weight: (0, 2)}
    assert tied_ranks(chunks, [0, 1, 0]) == {}


def test_a_second_name_gives_way_to_the_first() -> None:
    model = transformer(tied=False)
    assert model.head is not None
    model.head.weight = model.embedding.weight
    last = chunks_of(model, layers_of(model), (0, 4, 5))[1]
    assert "embedding.weight" in dict(last.named_parameters())


def test_others_are_freed() -> None:
    model = row()
    first, second = chunks_of(model, layers_of(model), (0, 2, 4))
    drop_others(model, [second])
    assert all(parameter.isnan().all() for parameter in first.parameters())
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in first.parameters())
    assert [parameter.shape for parameter in first.parameters()] == [(8, 8), (8,)]
    assert not any(parameter.isnan().any() for parameter in second.parameters())


def test_a_layer_may_come_twice() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    assert len(layers_of(model)) == 3
    chunks = chunks_of(model, layers_of(model), (0, 1, 3))
    assert tied_ranks(chunks, [0, 1]) == dict.fromkeys(shared.parameters(), (0, 1))


def test_a_layer_that_names_nothing() -> None:
    with pytest.raises(ValueError, match="'head' is neither a submodule nor a parameter"):
        chunks_of(row(), [Layer(torch.tanh, ("head",))], (0, 1))
    with pytest.raises(ValueError, match="layer 1 is a int"):
        LayerList([torch.tanh, 3])  # type: ignore[list-item]


@given(
    name=st.sampled_from([name for name, each in SCHEDULES.items() if each.performed]),
    ranks=st.integers(2, 5),
    groups=st.integers(1, 4),
    ahead=st.integers(0, 3),
)
def test_what_is_acknowledged_has_arrived(name: str, ranks: int, groups: int, ahead: int) -> None:
    """A peer waited for the message, and only then posted the one that is taken for its receipt."""
    section = PipelineSection(schedule=name, ahead=ahead)
    plan = section.posted(section.plan(ranks, groups * ranks))
    listed = 0
    for rank in range(ranks):
        for receive, sends in acknowledgements(plan, rank).items():
            for send in sends:
                listed += 1
                tag, reply = plan.tag(rank, send), plan.tag(rank, receive)
                assert receive.peer == send.peer
                order = [
                    plan.tag(send.peer, each)
                    for item in plan.programs[send.peer]
                    for each in ([item.message] if isinstance(item, Wait) else getattr(item, "messages", ()))
                    if isinstance(item, Wait) or isinstance(each, Send)
                ]
                assert order.index(tag) < order.index(reply)
                program = plan.programs[rank]
                posted = next(n for n, item in enumerate(program) if send in getattr(item, "messages", ()))
                assert posted < program.index(Wait(receive))
    # Every activation of a rank but the last is answered by a gradient at some time.
    assert listed >= (ranks - 1) * groups * ranks
