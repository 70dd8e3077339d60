"""Full weights in safetensors files, as plain PyTorch and Hugging Face read them.

    python -m windtunnel.engine.export CHECKPOINT OUT [--tag TAG] [--dtype bf16] [--max-file-bytes N]

From a living engine all ranks take part and rank 0 writes; from a checkpoint's folder one process without ranks does.
Rank 0 holds one file's tensors and one unit at a time. A tied parameter is written under each of its names, so that
`load_state_dict` finds all of them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import checkpoint_files as files
from . import run_state
from .agreement import all_or_none
from .checkpoint import BUFFERS, PARAMETERS
from .checkpoint_files import CheckpointError, Manifest
from .checkpoint_plan import Stock
from .compressed import uncompressed
from .durable import write_whole

if TYPE_CHECKING:
    from .engine import Engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MAX_FILE_BYTES = 5 * 10**9
"""Hugging Face's own limit: files that most tools can hold."""

STEM = "model"


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor to come: its names in the files, and its bytes there."""

    names: tuple[str, ...]
    nbytes: int


def divide(weights: Iterable[Weight], max_file_bytes: int) -> list[list[str]]:
    """First names of the weights of each file: in order, no file larger than the limit unless one weight is."""
    divided: list[list[str]] = [[]]
    filled = 0
    for weight in weights:
        nbytes = weight.nbytes * len(weight.names)
        if divided[-1] and filled + nbytes > max_file_bytes:
            divided.append([])
            filled = 0
        divided[-1].append(weight.names[0])
        filled += nbytes
    return divided


def write_weights(
    folder: Path, weights: list[Weight], values: Iterable[tuple[str, Tensor]], max_file_bytes: int
) -> list[Path]:
    """Write values, which come in the order of `weights` under their first names, as Hugging Face names its files.

    Returns:
        The files: one, or several and the index that says which tensor is where.
    """
    if max_file_bytes < 1:
        raise ValueError(f"max_file_bytes = {max_file_bytes}; allowed: at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    names = {weight.names[0]: weight.names for weight in weights}
    divided = divide(weights, max_file_bytes)
    coming = iter(values)
    written, where = [], {}
    for number, firsts in enumerate(divided, 1):
        many = f"-{number:05d}-of-{len(divided):05d}" if len(divided) > 1 else ""
        path = folder / f"{STEM}{many}.safetensors"
        content: dict[str, Tensor] = {}
        for first in firsts:
            arrived, value = next(coming)
            assert arrived == first, f"{arrived} came where {first} was planned"
            for name in names[first]:
                content[name] = value if name == first else value.clone()
                where[name] = path.name
        beside = path.with_name(f".{path.name}.partial")
        save_file(content, beside, metadata={"format": "pt"})
        beside.replace(path)
        written.append(path)
    if len(divided) > 1:
        total = sum(weight.nbytes * len(weight.names) for weight in weights)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        written.append(write_whole(folder / f"{STEM}.safetensors.index.json", json.dumps(index, indent=2)))
    for stale in set(folder.glob(f"{STEM}*.safetensors*")) - set(written):
        stale.unlink()  # of an earlier export in more files or fewer: readers would mix them
    return written


# From a living engine #


def export(
    engine: "Engine", folder: str | Path, *, dtype: str | None = None, max_file_bytes: int = MAX_FILE_BYTES
) -> list[Path]:
    """Write the model's full weights and persistent buffers; all ranks must call it.

    A Hugging Face model's config is written beside, so that `from_pretrained(folder)` finds all it needs.

    Args:
        dtype: "fp32", "bf16" or "fp16" of floating-point tensors; by default each keeps the model's.

    Returns:
        The files.

    Raises:
        ValueError: an unknown dtype.
        Disagreement: rank 0 could not write.
    """
    convert = _converter(dtype)
    weights, values = _living(engine, convert)
    folder = Path(folder)

    def write() -> list[Path]:
        with uncompressed(engine.communicator):
            if engine.communicator.rank == 0:
                written = write_weights(folder, weights, values, max_file_bytes)
                config = getattr(engine.module, "config", None)
                if hasattr(config, "save_pretrained"):
                    config.save_pretrained(folder)
                return written
            for _ in values:  # takes part in the gathers
                pass
            return []

    with engine.checkpoints.meeting("export") as host:
        try:
            (written, *_) = all_or_none(host, write, "export")
        finally:
            for _ in values:  # rank 0 could not write: the others' gathers must end all the same
                pass
    return written


def full_weights(engine: "Engine", *, dtype: str | None = None) -> dict[str, Tensor]:
    """The same as a state dict on the host, on every rank."""
    weights, values = _living(engine, _converter(dtype))
    names = {weight.names[0]: weight.names for weight in weights}
    with uncompressed(engine.communicator):
        return {name: value for first, value in values for name in names[first]}


Convert = Callable[[Tensor, torch.dtype], Tensor]


def _converter(dtype: str | None) -> Convert:
    """What makes a tensor, whose parameter in the model has a dtype, into what is written.

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}; allowed: {', '.join(DTYPES)}, or None for the model's own")

    def convert(tensor: Tensor, own: torch.dtype) -> Tensor:
        target = DTYPES[dtype] if dtype is not None and tensor.is_floating_point() else own
        # A copy always: the unit that it is a view of is about to be freed.
        return tensor.detach().to("cpu", target, copy=True).contiguous()

    return convert


def _living(engine: "Engine", convert: Convert) -> tuple[list[Weight], Iterator[tuple[str, Tensor]]]:
    """What an engine will write, and the values as they are gathered, one unit at a time."""
    aliases: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    own = {name: parameter.dtype for name, parameter in engine.module.named_parameters()}
    buffers, _ = run_state.split(run_state.buffers(engine))
    order = [slot for unit in engine.runtime.units for slot in unit.part.slots]
    weights = [Weight((name,), _nbytes(convert, tensor.dtype, tensor.numel())) for name, tensor in buffers.items()]
    weights += [
        Weight(
            tuple(aliases[slot.parameter]), _nbytes(convert, slot.parameter.dtype, slot.parameter.numel())
        )
        for slot in order
    ]

    def values() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in buffers.items():
            yield name, convert(tensor, tensor.dtype)
        for unit in engine.runtime.units:
            flat = unit.gathered_master()
            for slot in unit.part.slots:
                start, stop = unit.views[slot.parameter]
                yield slot.name, convert(flat[start:stop].view(slot.parameter.shape), own[slot.name])

    return weights, values()


def _nbytes(convert: Convert, dtype: torch.dtype, elements: int) -> int:
    return elements * convert(torch.empty(0, dtype=dtype), dtype).element_size()


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
        dtype: by default fp32, what the masters are; None is what the model had.

    Raises:
        CheckpointError: it is not there, or is damaged.
    """
    place = _place(Path(checkpoint), tag)
    manifest = Manifest.read(place)
    files.check_files(place, manifest, sorted(manifest.files))
    stock, convert = Stock(place), _converter(dtype)
    aliases: dict[str, list[str]] = {name: [name] for name in manifest.parameters}
    for alias, first in manifest.aliases.items():
        aliases[first].append(alias)

    def own(name: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, manifest.dtypes[name])
        return found

    buffers = {name: stock.dtypes[BUFFERS + name] for name in manifest.buffers}
    weights = [
        Weight((name,), _nbytes(convert, kind, _product(stock.sizes[BUFFERS + name]))) for name, kind in buffers.items()
    ]
    weights += [
        Weight(tuple(aliases[name]), _nbytes(convert, own(name), _product(shape)))
        for name, shape in manifest.parameters.items()
    ]

    def values() -> Iterator[tuple[str, Tensor]]:
        for name, kind in buffers.items():
            yield name, convert(stock.whole(BUFFERS + name), kind)
        for name, shape in manifest.parameters.items():
            flat = stock.whole(PARAMETERS + name) if _product(shape) else torch.empty(0, dtype=own(name))
            yield name, convert(flat.view(shape), own(name))

    return write_weights(Path(folder), weights, values(), max_file_bytes)


def _place(checkpoint: Path, tag: str | None) -> Path:
    if tag is None and (checkpoint / files.MANIFEST).exists():
        return checkpoint
    tag = tag or files.latest_tag(checkpoint)
    if tag is None:
        raise CheckpointError(f"{checkpoint} is no checkpoint, and no folder with a file 'latest'")
    return files.folder_of(checkpoint, tag)


def _product(shape: Iterable[int]) -> int:
    return torch.Size(shape).numel()


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
