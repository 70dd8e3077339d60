"""Recomputation described: what a block keeps for its backward, what it costs to compute again, and what to keep.

A block that is computed again runs its forward from its inputs once more. An operation whose results were kept returns
them; every other one is executed, up to the last one whose result backward needs. So each operation costs its own work
or nothing, whatever else is kept: what it depends on is either kept, or runs before it and is counted there. The
cheapest set under a budget is therefore an exact 0/1 knapsack, with bytes for weights and work for values. What the
model leaves out: an operation that nothing needs any more, because all its users are kept, is executed all the same.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

FLOPS_PER_BYTE = 153.0
"""Arithmetic that takes as long as moving one byte: 312 TFLOP/s over 2.04 TB/s (A100 80 GB, bf16, data sheet). It only
weighs operations against each other."""

MOST_STATES = 50_000
"""Sets that the solver remembers at once; see `cheapest`."""

Key = tuple[str, int]
"""An operation by its name and its number among the operations of that name in the block."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation in the forward of a block.

    Attributes:
        key: its name and its number among those of that name.
        nbytes: of its results, if they are kept; 0 for what is a view of something else.
        flops: to run it again.
        moved_bytes: read and written to run it again.
        again: whether it runs again if nothing is kept; False after the last result that backward needs.
        keepable: False where keeping its results would be wrong (they are overwritten later) or would keep nothing.
    """

    key: Key
    nbytes: int
    flops: float
    moved_bytes: int
    again: bool = True
    keepable: bool = True

    @property
    def work(self) -> float:
        """What it costs to run again, in FLOPs."""
        return self.flops + FLOPS_PER_BYTE * self.moved_bytes if self.again else 0.0


@dataclass(frozen=True, slots=True)
class BlockActivations:
    """What one block saves for its backward.

    Attributes:
        operations: of its forward, in the order of execution.
        input_bytes: its inputs, kept in any case; 0 where they rest elsewhere.
        plain_bytes: all that autograd saves without recomputation, inputs included.
    """

    operations: tuple[Operation, ...]
    input_bytes: int
    plain_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What a block keeps between forward and backward.

    Attributes:
        kept: operations whose results are kept; None where the block runs without recomputation.
        nbytes: kept per block, its inputs included.
        work, flops: executed again per block.
    """

    kept: frozenset[Key] | None
    nbytes: int
    work: float
    flops: float


def choice(block: BlockActivations, kept: Collection[Key]) -> Choice:
    """What it means to keep the results of these operations."""
    again = [operation for operation in block.operations if operation.again and operation.key not in kept]
    return Choice(
        kept=frozenset(kept),
        nbytes=block.input_bytes + sum(op.nbytes for op in block.operations if op.key in kept),
        work=sum(operation.work for operation in again),
        flops=sum(operation.flops for operation in again),
    )


def cheapest(block: BlockActivations, budget_bytes: int) -> Choice:
    """The set of results under `budget_bytes` per block that leaves the least work to do again.

    Sets are extended operation by operation, and of two sets the one that is larger and saves less is forgotten
    (Nemhauser and Ullmann 1969, "Discrete Dynamic Programming and Capital Allocation"). That is exact as long as no
    more than `MOST_STATES` sets are left; beyond, every second one is dropped, and the answer is only a good one.

    Raises:
        ValueError: the inputs alone are larger; the message names the least budget.
    """
    if block.plain_bytes <= budget_bytes:
        return Choice(kept=None, nbytes=block.plain_bytes, work=0.0, flops=0.0)
    room = budget_bytes - block.input_bytes
    if room < 0:
        raise ValueError(f"{budget_bytes} bytes per block; allowed: at least {block.input_bytes}, its inputs")
    front: list[tuple[int, float, tuple[Key, ...]]] = [(0, 0.0, ())]
    for operation in block.operations:
        if not operation.keepable or operation.work == 0.0 or operation.nbytes > room:
            continue
        added = [
            (nbytes + operation.nbytes, saved + operation.work, (*kept, operation.key))
            for nbytes, saved, kept in front
            if nbytes + operation.nbytes <= room
        ]
        front = _undominated(front + added)
    return choice(block, front[-1][2])


def _undominated(states: Iterable[tuple[int, float, tuple[Key, ...]]]) -> list[tuple[int, float, tuple[Key, ...]]]:
    """Those to which no other saves at least as much in as few bytes, by bytes ascending."""
    left: list[tuple[int, float, tuple[Key, ...]]] = []
    for state in sorted(states, key=lambda state: (state[0], -state[1])):
        if not left or state[1] > left[-1][1]:
            left.append(state)
    return left if len(left) <= MOST_STATES else [*left[:-1:2], left[-1]]


def segment_length(every: int | Literal["auto"], blocks: int) -> int:
    """Blocks that are computed again together; "auto" is sqrt(blocks), rounded.

    Chen et al. 2016 ("Training Deep Nets with Sublinear Memory Cost"), section 4.1: L / k inputs and the activations of
    k blocks are kept at once, least for k near sqrt(L) where an input and a block's activations weigh the same.
    """
    return max(1, round(blocks**0.5)) if every == "auto" else every


# Closed forms #


def activation_bytes(
    policy: Literal["none", "selective", "full"],
    *,
    seq: int,
    batch: int,
    hidden: int,
    heads: int,
    tensor: int = 1,
    sequence_parallel: bool = False,
) -> float:
    """Bytes that one GPT layer keeps for its backward with 16-bit activations, one-byte dropout masks, 4 h wide MLP.

    Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models"), equations 1, 2, 4 and
    table 2; s b h (34 + 5 a s / h) without parallelism. There "selective" computes the core of attention again (scores,
    softmax, dropout), and what is kept does not have the s x s terms. Not the policy of the same name of
    engine/recompute.py, which keeps the results of matrix products and attention and computes all else again.

    Args:
        seq, batch, hidden, heads: s, b, h and a of the paper.
        tensor: ranks of tensor parallelism, t.
        sequence_parallel: whether what tensor parallelism leaves whole is divided along the sequence.
    """
    unit = seq * batch * hidden
    if policy == "full":
        return 2.0 * unit
    outside = 10.0 / tensor if sequence_parallel else 10.0
    core = 0.0 if policy == "selective" else 5.0 * heads * seq / (hidden * tensor)
    return unit * (outside + 24.0 / tensor + core)
