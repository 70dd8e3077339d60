"""Which samples each rank reads when, as numbers: the same global batches for any ranks and micro-batches.

[Note: a global batch is a run of samples]
An epoch is one order of all samples. A global batch of G is the next G of them, and of those micro-step k of W ranks
with micro-batches of M takes the k-th M W, rank r the r-th M of these. So the samples of a global batch depend on G
alone; and a position in an epoch is one number, the samples taken by all ranks together, which means the same at
another number of ranks, another micro-batch or another G.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..reading import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class DataLoadingSection:
    """`data_loader`: ours; how the loader of `initialize(training_data=...)` works.

    Attributes:
        shuffle: every epoch has an order of its own; else that of the dataset.
        num_workers: processes that read ahead.
        pin_memory: batches are put where a GPU can copy them from by itself.
    """

    __pydantic_config__ = STRICT
    shuffle: bool = True
    num_workers: int = 0
    pin_memory: bool = False

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"num_workers = {self.num_workers}; allowed: at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataLoading:
    """How a loader works.

    Attributes:
        shuffle: each epoch has an order of its own; else that of the dataset.
        drop_last: samples that do not fill a global batch are left out of an epoch; else it is filled up with samples
            from the beginning of the epoch's order. (DeepSpeed's default is to fill up, which trains on them twice.)
        num_workers, pin_memory: as in torch's DataLoader.
    """

    shuffle: bool = True
    drop_last: bool = True
    num_workers: int = 0
    pin_memory: bool = False

    @classmethod
    def of(cls, section: DataLoadingSection, *, drop_last: bool) -> "DataLoading":
        return cls(
            shuffle=section.shuffle,
            drop_last=drop_last,
            num_workers=section.num_workers,
            pin_memory=section.pin_memory,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of one rank in every global batch."""

    micro_batch: int
    accumulation: int
    rank: int
    world: int

    @property
    def per_micro_step(self) -> int:
        """Samples that all ranks together take at once."""
        return self.micro_batch * self.world

    @property
    def global_batch(self) -> int:
        return self.per_micro_step * self.accumulation

    def places(self, start: int) -> range:
        """This rank's places in the order, of the micro-step that begins at `start`."""
        first = start + self.rank * self.micro_batch
        return range(first, first + self.micro_batch)


def global_batches(samples: int, batch: int, drop_last: bool) -> int:
    """How many global batches `samples` make."""
    return samples // batch if drop_last else -(-samples // batch)


def epoch_places(samples: int, consumed: int, share: Share, drop_last: bool) -> Iterator[range]:
    """Of each micro-step from position `consumed` to the end of the epoch, this rank's places in the order.

    Places from `samples` on, of which there are some unless the last batch is dropped, stand for those from 0 on.
    """
    batches = global_batches(samples - consumed, share.global_batch, drop_last)
    for micro_step in range(batches * share.accumulation):
        yield share.places(consumed + micro_step * share.per_micro_step)
