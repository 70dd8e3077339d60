"""What the chunks of a pipeline hand to each other: shapes and dtypes, found once and the same from then on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..collectives.pipeline import Plan
from .communicator import DTYPE_NAMES, Communicator
from .evaluation import evaluating
from .stages import Chunk

Format = tuple[tuple[torch.Size, torch.dtype], ...]
"""Shape and dtype of each tensor that a chunk hands to the next one."""

NUMBERS = 256
"""int64 numbers of the message that tells a chunk what it will receive."""

DTYPES = tuple(DTYPE_NAMES)


def learn_formats(
    chunks: Sequence[Chunk], plan: Plan, pipeline: Communicator, inputs: tuple[Any, ...], device: torch.device
) -> tuple[list[Format], list[Format]]:
    """What each chunk of this rank takes and gives, by a forward from chunk to chunk; all of the pipeline call it.

    In evaluation mode, on zeros but for the first chunk: nothing is drawn, and no running statistics change.

    Args:
        inputs: of the first chunk, where it is on this rank.

    Raises:
        ValueError: a chunk that returns something else than tensors, or tensors that no message can describe.
    """
    rank, passed = pipeline.rank, Format()
    enters: list[Format] = []
    leaves: list[Format] = []
    for chunk in chunks:
        if not chunk.first and (before := plan.place(chunk.number - 1).rank) != rank:
            passed = _told(pipeline, before, device)
        enters.append(() if chunk.first else passed)
        if chunk.last:
            leaves.append(())
            continue
        zeros = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in passed)
        with evaluating(chunk):
            passed = format_of(in_format(chunk(inputs if chunk.first else zeros), None, chunk.number))
        leaves.append(passed)
        if (after := plan.place(chunk.number + 1).rank) != rank:
            _tell(pipeline, passed, after, device)
    return enters, leaves


def _tell(pipeline: Communicator, form: Format, peer: int, device: torch.device) -> None:
    numbers = [len(form)]
    for shape, dtype in form:
        if dtype not in DTYPES:
            raise ValueError(f"a chunk returned a tensor of {dtype}; allowed: {', '.join(map(str, DTYPES))}")
        numbers += [DTYPES.index(dtype), len(shape), *shape]
    if len(numbers) > NUMBERS:
        raise ValueError(f"a chunk returned {len(form)} tensors; allowed: fewer than {NUMBERS // 8}")
    message = torch.zeros(NUMBERS, dtype=torch.int64)
    message[: len(numbers)] = torch.tensor(numbers)
    pipeline.send(message.to(device), peer, "shapes of an activation").wait()


def _told(pipeline: Communicator, peer: int, device: torch.device) -> Format:
    message = torch.zeros(NUMBERS, dtype=torch.int64, device=device)
    pipeline.recv(message, peer, "shapes of an activation").wait()
    count, *numbers = message.tolist()
    form = []
    for _ in range(count):
        dtype, dims, *numbers = numbers
        form.append((torch.Size(numbers[:dims]), DTYPES[dtype]))
        numbers = numbers[dims:]
    return tuple(form)


def in_format(output: Any, wanted: Format | None, stage: int) -> tuple[Tensor, ...]:
    """What a chunk returned as tensors, of the shapes and dtypes that they had at first.

    Raises:
        ValueError: something else than tensors, or other shapes or dtypes than `wanted`.
    """
    outputs = output if isinstance(output, tuple) else (output,)
    for tensor in outputs:
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"chunk {stage} of the pipeline returned a {type(tensor).__name__}; allowed between layers: a tensor or"
                " a tuple of tensors"
            )
    found = format_of(outputs)
    if wanted is not None and found != wanted:
        raise ValueError(
            f"chunk {stage} of the pipeline returned {_described(found)}, but {_described(wanted)} for the first"
            " micro-batch; allowed: micro-batches of one shape (pad or drop those that differ)"
        )
    return outputs


def format_of(tensors: Sequence[Tensor]) -> Format:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


def _described(form: Format) -> str:
    return ", ".join(f"{tuple(shape)} {dtype}".replace("torch.", "") for shape, dtype in form)
