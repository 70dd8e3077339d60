"""Which parameters travel together: repeated blocks, ties, shared modules, overrides."""

import pytest
import torch
from torch import nn
from windtunnel.engine.partition import Part, partition, repeated_blocks


def one_group(model: nn.Module) -> list[dict]:
    return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]


def names(parts: list[Part]) -> dict[int, list[list[str]]]:
    """Parameter names of the parts by block."""
    found: dict[int, list[list[str]]] = {}
    for part in parts:
        found.setdefault(part.block, []).append([slot.name for slot in part.slots])
    return found


class Block(nn.Module):
    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) if inner else None


class Model(nn.Module):
    def __init__(self, blocks: int = 3, inner: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 2)
        self.blocks = nn.ModuleList([Block(inner) for _ in range(blocks)])
        self.head = nn.Linear(2, 5, bias=False)


def test_repeated_blocks_of_a_list() -> None:
    model = Model()
    assert repeated_blocks(model) == list(model.blocks)


def test_outermost_list_wins() -> None:
    model = Model(inner=True)
    assert repeated_blocks(model) == list(model.blocks)


def test_two_lists_are_both_found() -> None:
    model = nn.ModuleDict({"encoder": Model(2), "decoder": Model(3)})
    assert repeated_blocks(model) == [*model["encoder"].blocks, *model["decoder"].blocks]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(2, 2), nn.Tanh()),
        nn.Sequential(nn.Tanh(), nn.Tanh()),
        nn.Sequential(nn.Linear(2, 2)),
        nn.Linear(2, 2),
        Model(blocks=1),
    ],
    ids=["two classes", "no parameters", "one child", "no list", "list of one"],
)
def test_nothing_repeats(model: nn.Module) -> None:
    assert repeated_blocks(model) == []


def test_a_list_inside_the_only_block_of_a_list() -> None:
    model = Model(blocks=1, inner=True)
    assert repeated_blocks(model) == list(model.blocks[0].inner)


def test_a_sequential_model_of_equal_layers_repeats_itself() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert repeated_blocks(model) == list(model)


def test_parts() -> None:
    model = Model()
    blocks, parts = partition(model, one_group(model))
    assert blocks == list(model.blocks)
    assert names(parts) == {
        -1: [["embedding.weight", "head.weight"]],
        **{n: [[f"blocks.{n}.linear.weight"]] for n in range(3)},
    }
    assert [part.owner for part in parts] == [model, *model.blocks]
    assert [part.label for part in parts] == ["root", "block 0", "block 1", "block 2"]


def test_a_parameter_tied_across_blocks_belongs_to_the_root() -> None:
    model = Model()
    model.blocks[2].linear.weight = model.blocks[0].linear.weight
    _, parts = partition(model, one_group(model))
    assert names(parts) == {
        -1: [["embedding.weight", "blocks.0.linear.weight", "head.weight"]],
        1: [["blocks.1.linear.weight"]],
    }


def test_a_parameter_tied_between_root_and_block_belongs_to_the_root() -> None:
    model = Model()
    model.head.weight = model.embedding.weight
    model.blocks[1].linear.tied = model.embedding.weight
    _, parts = partition(model, one_group(model))
    assert names(parts)[-1] == [["embedding.weight"]]
    assert names(parts)[1] == [["blocks.1.linear.weight"]]


def test_a_parameter_tied_inside_a_block_stays_there() -> None:
    model = Model(inner=True)
    model.blocks[1].inner[0].weight = model.blocks[1].linear.weight
    _, parts = partition(model, one_group(model))
    assert "blocks.1.linear.weight" in names(parts)[1][0]
    assert len(names(parts)[-1][0]) == 2


def test_a_module_registered_in_two_blocks_belongs_to_both() -> None:
    model = Model()
    model.blocks[2].linear = model.blocks[0].linear
    _, parts = partition(model, one_group(model))
    assert "blocks.0.linear.weight" in names(parts)[-1][0]


def test_a_block_listed_twice_is_one_unit() -> None:
    model = Model()
    model.blocks.append(model.blocks[0])
    blocks, parts = partition(model, one_group(model))
    assert blocks == list(model.blocks)[:3]
    assert names(parts)[0] == [["blocks.0.linear.weight"]]


def test_the_lowest_common_unit_of_nested_overrides() -> None:
    """A tie between two inner units goes to the unit that holds both, not to the root."""
    model = Model(inner=True)
    outer = model.blocks[1]
    outer.inner[0].weight = outer.inner[1].weight
    blocks, parts = partition(model, one_group(model), units=[outer, *outer.inner])
    assert blocks == [outer, *outer.inner]
    found = names(parts)
    assert found[0] == [["blocks.1.linear.weight", "blocks.1.inner.0.weight"]]
    assert found[1] == [["blocks.1.inner.0.bias"]]
    assert found[2] == [["blocks.1.inner.1.bias"]]


def test_units_override_the_blocks() -> None:
    model = Model()
    blocks, parts = partition(model, one_group(model), units=[model.head, model.head, model])
    assert blocks == [model.head]
    assert names(parts)[0] == [["head.weight"]]
    assert len(names(parts)[-1][0]) == 4


def test_parts_split_by_dtype_trainability_and_group() -> None:
    model = Model(blocks=2)
    model.blocks[0].half = nn.Linear(2, 2, dtype=torch.float16)
    model.blocks[0].still = nn.Linear(2, 2).requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    biases = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    _, parts = partition(model, [{"params": weights}, {"params": biases}])
    assert names(parts)[0] == [
        ["blocks.0.linear.weight"],
        ["blocks.0.half.weight"],
        ["blocks.0.half.bias"],
        ["blocks.0.still.weight", "blocks.0.still.bias"],
    ]
    assert [slot.group for part in parts if part.block == 0 for slot in part.slots] == [0, 0, 1, -1, -1]
    assert [part.trainable for part in parts if part.block == 0] == [True, True, True, False]
    assert [part.label for part in parts if not part.trainable] == ["block 0 part 3 (frozen)"]


def test_a_frozen_parameter_in_a_group_is_kept_apart() -> None:
    model = Model()
    model.head.requires_grad_(False)
    _, parts = partition(model, [{"params": list(model.parameters())}])
    assert names(parts)[-1] == [["embedding.weight"], ["head.weight"]]
    assert [part.trainable for part in parts if part.block == -1] == [True, False]


def test_a_unit_of_another_model() -> None:
    model = Model()
    with pytest.raises(ValueError, match="units: Linear is not a module of the model"):
        partition(model, one_group(model), units=[nn.Linear(2, 2)])


def test_a_parameter_of_another_model() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"a parameter of shape \(3, 7\) that is not in the model"):
        partition(model, [*one_group(model), {"params": [nn.Parameter(torch.zeros(3, 7))]}])


def test_a_trainable_parameter_in_no_group() -> None:
    model = Model()
    groups = [{"params": [parameter for parameter in model.parameters() if parameter is not model.head.weight]}]
    with pytest.raises(ValueError, match=r"parameter 'head.weight' requires a gradient but is in no parameter group"):
        partition(model, groups)
