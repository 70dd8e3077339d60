"""Loaders: this rank's micro-batches of a dataset, from a position that survives a restart with any number of ranks."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from .sampling import DataLoading, Share, epoch_places, global_batches

Collate = Callable[[list[Any]], Any]


def epoch_order(samples: int, seed: int, epoch: int, shuffle: bool = True) -> Tensor:
    """[samples] int64: the order of an epoch, the same on every rank."""
    return torch.randperm(samples, generator=generator_for(seed, epoch)) if shuffle else torch.arange(samples)


def generator_for(*numbers: int) -> torch.Generator:
    """A source of random numbers of its own for each tuple of numbers.

    Its seed is a checksum of them: torch's CPU generator takes no more than 32 bits. What draws from such a source
    leaves torch's global one alone, which dropout depends on.
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


class ResumableLoader:
    """Iterates over this rank's micro-batches, from where it is to the end of the epoch.

    What is handed out is taken: a loop that is left early is continued by the next one. The position counts the
    samples that all ranks have taken (engine/sampling.py), so a state saved after `engine.step()` can be loaded with
    another number of ranks, micro-batch or accumulation, and the epoch goes on with the samples that are left.
    An iteration under way follows when the position is changed.

    A dataset without a length (IterableDataset) is read whole by every rank, which keeps its own samples; a position
    in it is reached by reading up to it. It gives its own order, and `set_epoch(epoch)` of it is called if it has one.

    Attributes:
        epoch: number of the epoch, from 0.
        consumed: samples of it that all ranks together have taken.
    """

    def __init__(
        self,
        dataset: Dataset,
        share: Share,
        *,
        seed: int = 0,
        options: DataLoading | None = None,
        collate: Collate | None = None,
    ) -> None:
        self.dataset, self.share, self.seed, self.collate = dataset, share, seed, collate
        self.options = DataLoading() if options is None else options
        self.epoch = self.consumed = 0
        self.samples = _length(dataset)
        if self.samples is None:
            self._check_stream()
        elif global_batches(self.samples, share.global_batch, self.options.drop_last) == 0:
            raise ValueError(
                f"training_data has {self.samples} samples; allowed: at least one global batch of {share.global_batch}"
            )

    def _check_stream(self) -> None:
        if self.options.num_workers:
            raise ValueError(
                f"data_loader.num_workers = {self.options.num_workers} with an IterableDataset, which each worker would"
                " read whole; allowed: 0"
            )
        if not self.options.drop_last:
            raise ValueError(
                "dataloader_drop_last = False with an IterableDataset, whose beginning is gone at its end; allowed:"
                " True"
            )

    @property
    def batch_size(self) -> int:
        return self.share.micro_batch

    def __len__(self) -> int:
        """Micro-batches of a whole epoch.

        Raises:
            TypeError: the dataset has no length.
        """
        if self.samples is None:
            raise TypeError(f"{type(self.dataset).__name__} has no length")
        batches = global_batches(self.samples, self.share.global_batch, self.options.drop_last)
        return batches * self.share.accumulation

    def __iter__(self) -> Iterator[Any]:
        """Micro-batches to the end of the epoch; then the position is the start of the next one."""
        while True:
            for batch in self._from_here():
                self.consumed += self.share.per_micro_step
                here = (self.epoch, self.consumed)
                yield batch
                if (self.epoch, self.consumed) != here:
                    break  # somebody else moved the position: go on from there
            else:
                self.epoch, self.consumed = self.epoch + 1, 0
                return

    def _from_here(self) -> Iterable[Any]:
        if self.samples is None:
            return self._of_stream()
        order = epoch_order(self.samples, self.seed, self.epoch, self.options.shuffle)
        places = epoch_places(self.samples, self.consumed, self.share, self.options.drop_last)
        return DataLoader(
            self.dataset,
            batch_sampler=(order[torch.tensor(mine) % self.samples].tolist() for mine in places),
            num_workers=self.options.num_workers,
            pin_memory=self.options.pin_memory,
            collate_fn=self.collate,
            generator=generator_for(self.seed, self.epoch, self.consumed),
        )

    def _of_stream(self) -> Iterator[Any]:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        stream = islice(iter(self.dataset), self.consumed, None)
        collate = self.collate or default_collate
        while len(batch := list(islice(stream, self.share.global_batch))) == self.share.global_batch:
            for start in range(0, len(batch), self.share.per_micro_step):
                yield collate([batch[place] for place in self.share.places(start)])

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless it is the one under way."""
        if epoch != self.epoch:
            self.epoch, self.consumed = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """The position. Between optimizer steps only: micro-batches of half a global batch count as taken."""
        return {"epoch": self.epoch, "consumed": self.consumed, "seed": self.seed, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the seed is the saved one, because the order goes with it.

        Raises:
            ValueError: the dataset has another length than the one that the position is in.
        """
        if state["samples"] != self.samples:
            raise ValueError(
                f"training_data has {self.samples} samples, and the saved position is in one of {state['samples']};"
                " allowed: the same dataset"
            )
        self.epoch, self.consumed, self.seed = state["epoch"], state["consumed"], state["seed"]
        if self.samples is not None:
            left = global_batches(self.samples - self.consumed, self.share.global_batch, self.options.drop_last)
            if left <= 0:  # saved after the last batch, or too little is left for one of today's size
                self.epoch, self.consumed = self.epoch + 1, 0


def _length(dataset: Any) -> int | None:
    """Samples of a dataset; None for one that is only iterated over."""
    if isinstance(dataset, IterableDataset):
        return None
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"training_data: {type(dataset).__name__} has no length; allowed: a dataset with __len__ and __getitem__,"
            " or a torch IterableDataset"
        )
    return len(dataset)


class RepeatingLoader:
    """Iterates over a loader again and again, without end.

    Raises:
        ValueError: while iterating: the loader gives nothing.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self._batches = iter(loader)

    def __iter__(self) -> "RepeatingLoader":
        return self

    def __next__(self) -> Any:
        for _ in range(3):  # this iteration may be at its end, and so may a position that was loaded
            for batch in self._batches:
                return batch
            self._batches = iter(self.loader)
        raise ValueError(f"{type(self.loader).__name__} gives no batches to repeat")


def evaluation_loader(
    dataset: Dataset, micro_batch: int, rank: int, world: int, collate: Collate | None = None
) -> DataLoader:
    """Every sample of a dataset once, in its own order: this rank's are those of numbers rank, rank + world, ...

    The last batch may be short, and ranks may have unequal numbers of batches.

    Raises:
        ValueError: the dataset has no length.
    """
    samples = _length(dataset)
    if samples is None:
        raise ValueError(
            f"{type(dataset).__name__} has no length to share; pass this rank's batches, as of a DataLoader"
        )
    mine = range(rank, samples, world)
    batches = [list(mine[start : start + micro_batch]) for start in range(0, len(mine), micro_batch)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, generator=generator_for(0))
