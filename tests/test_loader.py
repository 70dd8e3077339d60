"""The loader: global batches that do not depend on the ranks, and a position that survives any restart."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset
from windtunnel.engine.config import Config
from windtunnel.engine.engine import initialize
from windtunnel.engine.loader import RepeatingLoader, ResumableLoader, epoch_order, evaluation_loader
from windtunnel.engine.sampling import DataLoading, Share
from windtunnel.engine.world import World


class Stream(IterableDataset):
    """0, 1, ... , n - 1, from another start in each epoch."""

    def __init__(self, samples: int) -> None:
        self.samples, self.epoch = samples, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(number + self.epoch) % self.samples for number in range(self.samples)])


def loaders(data: Any, micro: int, accumulation: int, world: int, **options: Any) -> list[ResumableLoader]:
    """Those of all ranks."""
    return [
        ResumableLoader(
            data,
            Share(micro_batch=micro, accumulation=accumulation, rank=rank, world=world),
            seed=options.get("seed", 5),
            options=DataLoading(**{name: value for name, value in options.items() if name != "seed"}),
        )
        for rank in range(world)
    ]


def global_batches(ranks: list[ResumableLoader], steps: int | None = None) -> list[list[int]]:
    """The samples of each global batch of the epoch (or the first `steps`), sorted; ranks advance together."""
    iterators = [iter(loader) for loader in ranks]
    share, batches = ranks[0].share, []
    while steps is None or len(batches) < steps:
        taken: list[int] = []
        for _ in range(share.accumulation):
            for iterator in iterators:
                batch = next(iterator, None)
                if batch is None:
                    assert not taken, "an epoch ends within a global batch"
                    continue
                assert len(batch) == share.micro_batch
                taken += batch.tolist()
        if not taken:
            break
        batches.append(sorted(taken))
    return batches


def flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


@st.composite
def factorisations(draw: st.DrawFn, most: int = 24) -> tuple[int, tuple[int, int, int], tuple[int, int, int]]:
    """(global batch, two ways to cut it as micro-batch, accumulation and ranks)."""
    batch = draw(st.integers(1, most))

    def cut() -> tuple[int, int, int]:
        micro = draw(st.sampled_from([size for size in range(1, batch + 1) if batch % size == 0]))
        steps = draw(st.sampled_from([count for count in range(1, batch // micro + 1) if batch // micro % count == 0]))
        return micro, steps, batch // micro // steps

    return batch, cut(), cut()


# Orders #


@given(st.integers(1, 50), st.integers(-5, 5), st.integers(0, 5))
def test_an_order_has_every_sample_once(samples: int, seed: int, epoch: int) -> None:
    order = epoch_order(samples, seed, epoch)
    assert sorted(order.tolist()) == list(range(samples))
    assert torch.equal(order, epoch_order(samples, seed, epoch))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    assert epoch_order(4, 0, 9, shuffle=False).tolist() == [0, 1, 2, 3]


# Global batches #


@given(factorisations(), st.integers(0, 60), st.booleans(), st.booleans())
def test_global_batches_do_not_depend_on_the_ranks(
    sizes: tuple[int, tuple[int, int, int], tuple[int, int, int]], more: int, shuffle: bool, drop_last: bool
) -> None:
    batch, one_cut, other_cut = sizes
    data = range(batch + more)
    one, other = (loaders(data, *cut, shuffle=shuffle, drop_last=drop_last) for cut in (one_cut, other_cut))
    for epoch in range(2):
        found = global_batches(one)
        assert found == global_batches(other)
        order = epoch_order(len(data), 5, epoch, shuffle).tolist()
        assert found == [
            sorted((order * 2)[start : start + batch])
            for start in range(0, len(order) - (batch - 1 if drop_last else 0), batch)
        ]
        assert [len(loader) for loader in one] == [len(found) * one_cut[1]] * one_cut[2]


@given(factorisations(), st.data())
def test_a_restart_at_any_number_of_ranks_goes_on_where_it_was(
    sizes: tuple[int, tuple[int, int, int], tuple[int, int, int]], data: st.DataObject
) -> None:
    batch, before, after = sizes
    samples = data.draw(st.integers(batch, 5 * batch))
    whole = loaders(range(samples), *before)
    wanted = global_batches(whole) + global_batches(whole)
    first = loaders(range(samples), *before)
    stop = data.draw(st.integers(0, samples // batch))
    seen = global_batches(first, stop)
    states = [loader.state_dict() for loader in first]
    assert all(state == states[0] for state in states)
    second = loaders(range(samples), *after, seed=99)
    for loader in second:
        loader.load_state_dict(states[0])
    while len(seen) < len(wanted):
        seen += global_batches(second)
    assert seen == wanted


@given(factorisations(8), factorisations(8), st.data())
def test_no_sample_is_lost_or_seen_twice_when_the_batch_changes(old: Any, new: Any, data: st.DataObject) -> None:
    samples = data.draw(st.integers(old[0] + new[0], 40))
    first, second = loaders(range(samples), *old[1]), loaders(range(samples), *new[1])
    seen = flat(global_batches(first, data.draw(st.integers(1, (samples - new[0]) // old[0]))))
    for loader in second:
        loader.load_state_dict(first[0].state_dict())
    seen += flat(global_batches(second))
    assert len(seen) == len(set(seen))
    assert samples - len(seen) < new[0]  # what does not fill a batch is left out
    assert {(loader.epoch, loader.consumed) for loader in second} == {(1, 0)}


def test_a_loop_that_is_left_is_continued() -> None:
    loader = loaders(range(12), 2, 1, 1, shuffle=False)[0]
    for _ in loader:
        break
    assert loader.state_dict() == {"epoch": 0, "consumed": 2, "seed": 5, "samples": 12}
    assert [batch.tolist() for batch in loader] == [[2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert (loader.epoch, loader.consumed) == (1, 0)


def test_an_iteration_follows_the_position() -> None:
    loader = loaders(range(8), 2, 1, 1, shuffle=False)[0]
    batches = iter(loader)
    assert next(batches).tolist() == [0, 1]
    loader.load_state_dict({"epoch": 3, "consumed": 4, "seed": 5, "samples": 8})
    assert [batch.tolist() for batch in batches] == [[4, 5], [6, 7]]
    assert loader.epoch == 4
    loader.set_epoch(7)
    next(iter(loader))
    loader.set_epoch(7)  # the one under way
    assert (loader.epoch, loader.consumed) == (7, 2)


def test_a_position_at_the_end_is_the_start_of_the_next_epoch() -> None:
    first, second = loaders(range(7), 2, 1, 1)[0], loaders(range(7), 2, 1, 1)[0]
    batches = iter(first)
    for _ in range(3):
        next(batches)
    second.load_state_dict(first.state_dict())
    assert (second.epoch, second.consumed) == (1, 0)


def test_without_end() -> None:
    loader = loaders(range(6), 2, 1, 1)[0]
    endless = RepeatingLoader(loader)
    seen = [next(endless).tolist() for _ in range(9)]
    orders = [epoch_order(6, 5, epoch).tolist() for epoch in range(3)]
    assert flat(seen) == flat(orders)
    with pytest.raises(ValueError, match="list gives no batches"):
        next(RepeatingLoader([]))


def test_workers_do_not_move_the_position() -> None:
    """They read ahead; what counts is what was handed out. torch's own source of random numbers is left alone."""
    loader, alone = (loaders(range(40), 2, 1, 1, num_workers=workers)[0] for workers in (1, 0))
    before = torch.get_rng_state()
    batches, others = iter(loader), iter(alone)
    assert [next(batches).tolist() for _ in range(3)] == [next(others).tolist() for _ in range(3)]
    assert loader.state_dict() == alone.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    batches.close()  # type: ignore[attr-defined]


# Streams #


@given(factorisations(8), st.integers(1, 30), st.integers(0, 3))
def test_a_stream_is_shared_and_resumed(sizes: Any, samples: int, stop: int) -> None:
    batch, before, after = sizes
    whole = loaders(Stream(samples), *before)
    wanted = global_batches(whole)
    assert flat(wanted) == list(range(samples // batch * batch))
    assert all(loader.epoch == 1 for loader in whole)
    first, second = loaders(Stream(samples), *before), loaders(Stream(samples), *after)
    seen = global_batches(first, min(stop, len(wanted)))
    for loader in second:
        loader.load_state_dict(first[0].state_dict())
    if first[0].epoch == 0:
        assert seen + global_batches(second) == wanted


def test_a_stream_is_told_its_epoch() -> None:
    loader = loaders(Stream(4), 2, 1, 1)[0]
    assert [[batch.tolist() for batch in loader] for _ in range(2)] == [[[0, 1], [2, 3]], [[1, 2], [3, 0]]]
    with pytest.raises(TypeError, match="Stream has no length"):
        len(loader)


# What is refused #


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (range(7), {}, "training_data has 7 samples; allowed: at least one global batch of 8"),
        (range(0), {"drop_last": False}, "training_data has 0 samples"),
        (Stream(9), {"num_workers": 2}, "data_loader.num_workers = 2 with an IterableDataset"),
        (Stream(9), {"drop_last": False}, "dataloader_drop_last = False with an IterableDataset"),
        (iter([1]), {}, "training_data: list_iterator has no length"),
    ],
)
def test_data_that_is_refused(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaders(data, 2, 2, 2, **options)


def test_a_position_in_other_data_is_refused() -> None:
    one, other = loaders(range(8), 2, 1, 1)[0], loaders(range(9), 2, 1, 1)[0]
    with pytest.raises(ValueError, match="training_data has 9 samples, and the saved position is in one of 8"):
        other.load_state_dict(one.state_dict())


def test_keys_of_the_config() -> None:
    config = {"data_loader": {"shuffle": False, "num_workers": 3, "pin_memory": True}, "dataloader_drop_last": False}
    assert Config.read(config, 1).data_loading == DataLoading(
        shuffle=False, drop_last=False, num_workers=3, pin_memory=True
    )
    with pytest.raises(ValueError, match="data_loader: num_workers = -1; allowed: at least 0"):
        Config.read({"data_loader": {"num_workers": -1}}, 1)
    with pytest.raises(ValueError, match=r"unknown key 'data_loader.workers'.*'num_workers'"):
        Config.read({"data_loader": {"workers": 1}}, 1)


# With the engine #


class Dropped(nn.Module):
    """Dropout, so that drawing random numbers elsewhere would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def train(rank: int, world: int, stop: int | None) -> tuple[list[float], list[list[float]]]:
    """(losses, batches) of 7 steps, epochs of 3; after `stop` of them the loader is a new one with the old state."""
    data = TensorDataset(torch.randn(13, 3, generator=torch.Generator().manual_seed(1)))

    def start() -> Any:
        config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
        return initialize(Dropped(), config, training_data=data, timeout_s=20.0)

    engine, _, loader, _ = start()
    assert engine.stateful["data_loader"] is loader
    torch.manual_seed(rank)
    batches, losses, seen = iter(RepeatingLoader(loader)), [], []
    for step in range(7):
        if step == stop:
            other, _, fresh, _ = start()
            torch.manual_seed(rank)
            for _ in range(stop):
                nn.functional.dropout(torch.ones(2, 5))  # what the steps before have drawn
            fresh.load_state_dict(loader.state_dict())
            batches = iter(RepeatingLoader(fresh))
            other.close()
        (x,) = next(batches)
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        seen.append(x.flatten().tolist())
    engine.close()
    return losses, seen


def test_a_run_with_a_new_loader_is_the_same_run(two_ranks: World) -> None:
    whole = two_ranks.run(train, None)
    assert whole[0][1] != whole[1][1]
    assert two_ranks.run(train, 2) == whole
    assert two_ranks.run(train, 3) == whole


# For evaluation #


@given(st.integers(0, 30), st.integers(1, 5), st.integers(1, 4))
def test_an_evaluation_reads_every_sample_once(samples: int, micro: int, world: int) -> None:
    shares = [evaluation_loader(range(samples), micro, rank, world) for rank in range(world)]
    batches = [[batch.tolist() for batch in share] for share in shares]
    assert sorted(flat(flat(batches))) == list(range(samples))
    assert all(len(batch) == micro for share in batches for batch in share[:-1])


def test_a_stream_is_not_shared_for_evaluation() -> None:
    with pytest.raises(ValueError, match="Stream has no length to share; pass this rank's batches"):
        evaluation_loader(Stream(3), 1, 0, 1)
