"""Full weights in safetensors files, as plain PyTorch and Hugging Face read them.

    python -m windtunnel.engine.export CHECKPOINT OUT [--tag TAG] [--dtype bf16] [--max-file-bytes N]

From a living engine all ranks take part and rank 0 writes; from a checkpoint's folder one process without ranks does.
Rank 0 holds one file's tensors and one unit at a time, put together from shards, parts and stages. A tied parameter is
written under each of its names, so that `load_state_dict` finds all of them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import assembly, run_state
from . import checkpoint_files as files
from .agreement import DisagreementError, all_or_none
from .checkpoint_files import CheckpointError, Manifest
from .checkpoint_plan import BUFFERS, PARAMETERS, Stock
from .durable import write_whole

if TYPE_CHECKING:
    from .engine import Engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MAX_FILE_BYTES = 5 * 10**9
"""Hugging Face's own limit: files that most tools can hold."""

STEM = "model"


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor to come: its names in the files, its elements, and its dtype there."""

    names: tuple[str, ...]
    elements: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """In the files, under all names."""
        return self.elements * self.dtype.itemsize * len(self.names)

    def content(self, value: Tensor) -> dict[str, Tensor]:
        """The tensors of the file: copies, because `value` may be a view of memory that is about to be freed."""
        return {name: value.detach().to("cpu", self.dtype, copy=True).contiguous() for name in self.names}


Values = Iterator[tuple[Weight, Tensor]]


def divide(weights: Iterable[Weight], max_file_bytes: int) -> list[list[Weight]]:
    """The weights of each file: in order, no file larger than the limit unless a single weight is."""
    divided: list[list[Weight]] = [[]]
    filled = 0
    for weight in weights:
        if divided[-1] and filled + weight.nbytes > max_file_bytes:
            divided.append([])
            filled = 0
        divided[-1].append(weight)
        filled += weight.nbytes
    return divided


def write_weights(folder: Path, weights: list[Weight], values: Values, max_file_bytes: int) -> list[Path]:
    """Write values, which come in the order of `weights`, into files named as Hugging Face reads them.

    Returns:
        The files: one, or several and the index that says which tensor is where.
    """
    folder.mkdir(parents=True, exist_ok=True)
    divided = divide(weights, max_file_bytes)
    written: list[Path] = []
    where: dict[str, str] = {}
    for number, part in enumerate(divided, 1):
        many = f"-{number:05d}-of-{len(divided):05d}" if len(divided) > 1 else ""
        content: dict[str, Tensor] = {}
        for expected, (weight, value) in zip(part, values, strict=False):
            assert weight == expected
            content |= weight.content(value)
        written.append(_write_whole_tensors(folder / f"{STEM}{many}.safetensors", content))
        where |= dict.fromkeys(content, written[-1].name)
    if len(divided) > 1:
        index = {"metadata": {"total_size": sum(weight.nbytes for weight in weights)}, "weight_map": where}
        written.append(write_whole(folder / f"{STEM}.safetensors.index.json", json.dumps(index, indent=2)))
    for stale in set(folder.glob(f"{STEM}*.safetensors*")) - set(written):
        stale.unlink()  # of an earlier export into another number of files: readers would mix them
    return written


def _write_whole_tensors(path: Path, content: Mapping[str, Tensor]) -> Path:
    """A file that is whole or absent: safetensors, or torch's own if the name ends with .bin or .pt."""
    beside = path.with_name(f".{path.name}.partial")
    if path.suffix == ".safetensors":
        save_file(dict(content), beside, metadata={"format": "pt"})
    else:
        torch.save(dict(content), beside)
    beside.chmod(0o644)
    beside.replace(path)
    return path


def _target(dtype: str | None, own: torch.dtype) -> torch.dtype:
    """What a tensor is written as, whose dtype in the model is `own`."""
    return DTYPES[dtype] if dtype is not None and own.is_floating_point else own


def _check(dtype: str | None, max_file_bytes: int) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}; allowed: {', '.join(DTYPES)}, or None for the model's own")
    if max_file_bytes < 1:
        raise ValueError(f"max_file_bytes = {max_file_bytes}; allowed: at least 1")


# From a living engine #


def export(
    engine: "Engine", folder: str | Path, *, dtype: str | None = None, max_file_bytes: int = MAX_FILE_BYTES
) -> list[Path]:
    """Write the model's full weights and persistent buffers; all ranks must call it.

    A Hugging Face model's config is written beside, so that `from_pretrained(folder)` finds all it needs.

    Args:
        dtype: "fp32" (then of the masters), "bf16" or "fp16" of floating-point tensors; by default the model's own.
        max_file_bytes: a larger model comes in several files with an index.

    Returns:
        The files.

    Raises:
        ValueError: an unknown dtype, or a limit below one byte.
        CheckpointError: rank 0 could not write.
    """
    _check(dtype, max_file_bytes)

    def write(weights: list[Weight], values: Values) -> list[Path]:
        written = write_weights(Path(folder), weights, values, max_file_bytes)
        config: Any = getattr(engine.module, "config", None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)
        return written

    return _on_rank_0(engine, dtype, write)


def save_16bit_model(engine: "Engine", folder: Path, name: str) -> Path:
    """One file with the weights in fp16 if the run is in fp16, else in bf16. See Engine.save_16bit_model."""

    def write(weights: list[Weight], values: Values) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        content = {name: tensor for weight, value in values for name, tensor in weight.content(value).items()}
        return [_write_whole_tensors(folder / name, content)]

    return _on_rank_0(engine, "fp16" if engine.settings.precision == "fp16" else "bf16", write)[0]


def _on_rank_0(engine: "Engine", dtype: str | None, write: Callable[[list[Weight], Values], list[Path]]) -> list[Path]:
    """Gather on all ranks, write on rank 0: buffers, then the parameters in the order of the units, of all stages."""
    host = engine.checkpoints.meet("export")
    buffers = _buffers(engine)
    listed = assembly.listing(engine, assembly.MASTERS)
    weights = [
        *(Weight((name,), tensor.numel(), _target(dtype, tensor.dtype)) for name, tensor in buffers.items()),
        *(Weight(each.names, prod(each.shape), _target(dtype, each.dtype)) for each in listed),
    ]
    values = zip(
        weights,
        chain(buffers.values(), assembly.whole_values(engine, assembly.MASTERS, listed)),
        strict=True,
    )

    def part() -> list[Path]:
        try:
            return write(weights, values) if engine.communicator.rank == 0 else []
        finally:
            for _ in values:  # the other ranks, and rank 0 if it failed, take part in all gathers
                pass

    try:
        with engine.groups.uncompressed():
            return all_or_none(host, part, "export")[0]
    except DisagreementError as error:
        raise CheckpointError(f"full weights were not written: {error}") from error


def _buffers(engine: "Engine") -> dict[str, Tensor]:
    """The persistent ones of all stages."""
    mine, _ = run_state.split(run_state.buffers(engine))
    stages = assembly.of_all_stages(engine, {name: value.cpu() for name, value in mine.items()}, "buffers of stages")
    return {name: value for stage in reversed(stages) for name, value in stage.items()}


# From a folder #


def consolidate(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    tag: str | None = None,
    dtype: str | None = "fp32",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[Path]:
    """The same from a checkpoint on disk, in one process: no ranks, no model, no device.

    Args:
        checkpoint: what `save_checkpoint` was given (then `tag`, or `latest`, says which), or the folder of one tag.
        dtype: by default fp32, which the masters are; None is what the model had.

    Raises:
        CheckpointError: it is not there, or is damaged.
    """
    _check(dtype, max_file_bytes)
    place = _place(Path(checkpoint), tag)
    manifest = Manifest.read(place)
    files.check_files(place, manifest, sorted(manifest.files))
    stock = Stock(place)
    names: dict[str, list[str]] = {name: [name] for name in manifest.parameters}
    for alias, first in manifest.aliases.items():
        names[first].append(alias)
    weights = [
        *(_stored_buffer(stock, name, dtype) for name in manifest.buffers),
        *(
            Weight(tuple(names[name]), torch.Size(shape).numel(), _target(dtype, getattr(torch, manifest.dtypes[name])))
            for name, shape in manifest.parameters.items()
        ),
    ]

    def values() -> Values:
        for weight in weights:
            first = weight.names[0]
            if first not in manifest.parameters:
                yield weight, stock.whole(BUFFERS + first)
            elif weight.elements:
                yield weight, stock.whole(PARAMETERS + first).view(manifest.parameters[first])
            else:
                yield weight, torch.empty(manifest.parameters[first])

    return write_weights(Path(folder), weights, values(), max_file_bytes)


def _stored_buffer(stock: Stock, name: str, dtype: str | None) -> Weight:
    key = BUFFERS + name
    return Weight((name,), torch.Size(stock.sizes[key]).numel(), _target(dtype, stock.dtypes[key]))


def _place(checkpoint: Path, tag: str | None) -> Path:
    if tag is None and (checkpoint / files.MANIFEST).exists():
        return checkpoint
    tag = tag or files.latest_tag(checkpoint)
    if tag is None:
        raise CheckpointError(f"{checkpoint} is no checkpoint, and no folder with a file 'latest'")
    return files.folder_of(checkpoint, tag)


def main(arguments: list[str] | None = None) -> int:
    """The command: prints the files; 2 and one line if the checkpoint cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m windtunnel.engine.export",
        description="Write the full weights of a checkpoint to safetensors files for PyTorch and Hugging Face.",
    )
    parser.add_argument("checkpoint", help="what save_checkpoint was given, or the folder of one tag")
    parser.add_argument("out", help="folder for the files")
    parser.add_argument("--tag", help="which checkpoint; by default the one that 'latest' names")
    parser.add_argument("--dtype", choices=[*DTYPES, "own"], default="fp32", help="own: what the model had")
    parser.add_argument("--max-file-bytes", type=int, default=MAX_FILE_BYTES)
    given = parser.parse_args(arguments)
    dtype = None if given.dtype == "own" else given.dtype
    try:
        written = consolidate(
            given.checkpoint, given.out, tag=given.tag, dtype=dtype, max_file_bytes=given.max_file_bytes
        )
    except (CheckpointError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
