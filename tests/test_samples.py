"""Batches of any nest, cut and mapped; and what a model's output has as its loss."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from windtunnel.experiments.samples import as_dtype, load_sample, make_sample, map_tensors, run_model, share

Nest = Any


def tensors(rows: int) -> st.SearchStrategy[Tensor]:
    """Whole numbers, so that comparisons are exact."""
    shapes = st.lists(st.integers(1, 3), max_size=2).map(lambda rest: (rows, *rest))
    return st.builds(lambda shape, seed: torch.arange(torch.Size(shape).numel()).reshape(shape) + seed, shapes,
                     st.integers(-9, 9))  # fmt: skip


def nests(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Nest]:
    def containers(inner: st.SearchStrategy[Nest]) -> st.SearchStrategy[Nest]:
        items = st.lists(inner, max_size=3)
        return items | items.map(tuple) | st.dictionaries(st.text(max_size=3), inner, max_size=3)

    return st.recursive(leaf | st.integers() | st.none() | st.text(max_size=3), containers, max_leaves=6)


def leaves(nest: Nest) -> list[Any]:
    if isinstance(nest, dict):
        return [leaf for item in nest.values() for leaf in leaves(item)]
    if isinstance(nest, tuple | list):
        return [leaf for item in nest for leaf in leaves(item)]
    return [nest]


def skeleton(nest: Nest) -> Nest:
    """The nest with every tensor replaced by a word."""
    if isinstance(nest, dict):
        return {name: skeleton(item) for name, item in nest.items()}
    if isinstance(nest, tuple | list):
        return type(nest)(skeleton(item) for item in nest)
    return "tensor" if isinstance(nest, Tensor) else nest


@given(st.data(), st.integers(1, 6), st.integers(1, 3))
def test_the_shares_of_a_batch_are_the_batch(data: st.DataObject, parts: int, rows: int) -> None:
    batch = data.draw(nests(tensors(parts * rows)))
    shares = [share(batch, parts, part) for part in range(parts)]
    assert [skeleton(each) for each in shares] == [skeleton(batch)] * parts
    for number, leaf in enumerate(leaves(batch)):
        if isinstance(leaf, Tensor):
            cut = [leaves(each)[number] for each in shares]
            assert {piece.shape for piece in cut} == {(rows, *leaf.shape[1:])}
            assert torch.equal(torch.cat(cut), leaf)


@given(nests(tensors(2)))
def test_mapping_changes_tensors_and_nothing_else(nest: Nest) -> None:
    seen: list[Tensor] = []
    doubled = map_tensors(nest, lambda tensor: (seen.append(tensor), 2 * tensor)[1])
    assert skeleton(doubled) == skeleton(nest)
    before = [leaf for leaf in leaves(nest) if isinstance(leaf, Tensor)]
    assert len(seen) == len(before)
    assert all(a is b for a, b in zip(seen, before, strict=True))
    after = [leaf for leaf in leaves(doubled) if isinstance(leaf, Tensor)]
    assert all(torch.equal(a, 2 * b) for a, b in zip(after, before, strict=True))


@given(rows=st.integers(0, 40), parts=st.integers(1, 12))
def test_only_what_divides_is_shared(rows: int, parts: int) -> None:
    batch = {"x": torch.zeros(rows, 2)}
    if rows % parts == 0:
        assert share(batch, parts, 0)["x"].shape == (rows // parts, 2)
        return
    with pytest.raises(ValueError, match=rf"shape \({rows}, 2\) does not divide .* = {parts}; allowed: a multiple"):
        share(batch, parts, 0)


def test_a_tensor_without_dimensions_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match=r"shape \(\) does not divide among world \* accumulation = 2"):
        share((torch.ones(4), torch.tensor(1.0)), 2, 0)


@given(nests(tensors(2)), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_only_floating_tensors_take_another_precision(nest: Nest, dtype: torch.dtype) -> None:
    both = (nest, map_tensors(nest, lambda tensor: tensor.float()))
    whole, floating = as_dtype(both, dtype)
    assert {leaf.dtype for leaf in leaves(whole) if isinstance(leaf, Tensor)} <= {torch.int64}
    assert {leaf.dtype for leaf in leaves(floating) if isinstance(leaf, Tensor)} <= {dtype}
    assert skeleton(whole) == skeleton(nest)


class Sum(nn.Module):
    """Adds up its arguments by name and returns them as asked."""

    def __init__(self, wrap: Any = lambda loss: loss) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor, y: Tensor | float = 0.0) -> Any:
        return self.wrap((x + 10 * y).sum())


@pytest.mark.parametrize(
    ("batch", "loss"),
    [
        (torch.tensor([1.0, 2.0]), 3),
        ((torch.tensor([1.0]), torch.tensor([2.0])), 21),
        ([torch.tensor([1.0]), torch.tensor([2.0])], 21),
        ({"y": torch.tensor([1.0]), "x": torch.tensor([2.0])}, 12),
        ((torch.tensor([1.0]),), 1),
    ],
    ids=["a tensor", "a tuple", "a list", "keywords", "one argument"],
)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: loss,
        lambda loss: SimpleNamespace(loss=loss, logits=None),
        lambda loss: (loss, "logits"),
        lambda loss: [loss],
    ],
    ids=["itself", "its .loss", "first of a tuple", "first of a list"],
)
def test_the_loss_is_found(batch: Any, loss: float, wrap: Any) -> None:
    assert run_model(Sum(wrap), batch).item() == loss


# Targets #


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("verify_targets", r"target = 'verify_targets'; allowed: MODULE:FUNCTION"),
        (":mlp", r"target = ':mlp'; allowed: MODULE:FUNCTION"),
        ("verify_targets:", r"target = 'verify_targets:'; allowed: MODULE:FUNCTION"),
        ("no_such_module:mlp", r"target = 'no_such_module:mlp': No module named 'no_such_module'"),
        ("verify_targets:mpl", r"target = 'verify_targets:mpl': .* has no attribute 'mpl'"),
        ("verify_targets:A_NUMBER", r"target = 'verify_targets:A_NUMBER' is a int; allowed: a function"),
    ],
)
def test_a_target_that_is_none_is_named(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_sample(target)


@pytest.mark.parametrize(
    ("target", "steps", "message"),
    [
        ("raises", None, "the function failed with KeyError: 'no data here'"),
        ("only_a_model", None, r"must return \(model, batches\), got Mlp"),
        ("no_batches", None, "steps = None; allowed: "),
        ("mlp", 5, "steps = 5; allowed: 1 to 4, the batches that verify_targets:mlp returns"),
    ],
)
def test_a_sample_that_is_none_is_refused(target: str, steps: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sample(f"verify_targets:{target}", steps)


@pytest.mark.parametrize(("steps", "batches"), [(None, 4), (1, 1), (4, 4)])
def test_as_many_batches_as_asked_for(steps: int | None, batches: int) -> None:
    model, given = make_sample("verify_targets:mlp", steps)
    assert isinstance(model, nn.Module)
    assert len(given) == batches
