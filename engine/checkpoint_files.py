"""The folder of checkpoints: tags that are complete or absent, `latest`, checksums, leftovers.

    save_dir/latest                  the tag of the newest complete checkpoint
    save_dir/TAG/manifest.json       what it holds, and each file's size and SHA-256
    save_dir/TAG/.metadata, *.distcp torch.distributed.checkpoint's files
    save_dir/.TAG.partial-TOKEN/     being written
    save_dir/.TAG.replaced/          the former TAG, while a new one takes its name

[Note: a kill at any moment]
Everything is written and synced under the partial name. One rename makes it TAG, another one `latest`; what was there
before is deleted after that. Only where TAG existed already, its name is free for an instant between two renames: then
the former one is read from its place aside, and is put back by the next save.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem

from .durable import sync_folder, write_whole

FORMAT = 2
"""Of what is saved: 1 had every parameter flat, 2 has it in its shape, so that it may be cut along any dimension."""

MANIFEST, LATEST = "manifest.json", "latest"
PARTIAL, REPLACED = ".partial-", ".replaced"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, is not there, or is damaged. The message names tag and file."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A file as it was written."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        format: of the tensors.
        optimizer: class name of the optimizer.
        parameters: shape by name, a tied one under its first name.
        dtypes: of the model's parameters, by name; the masters may be wider.
        aliases: the first name by each further name of a tied parameter.
        buffers: names of the model's persistent buffers.
        files: by name inside the folder.
    """

    format: int
    tag: str
    world: int
    stage: int
    global_steps: int
    optimizer: str
    parameters: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    aliases: dict[str, str]
    buffers: tuple[str, ...]
    files: dict[str, Stored]

    @classmethod
    def joined(cls, everyones: "Sequence[Manifest]") -> "Manifest":
        """That of all ranks, of which each may have other parameters and buffers."""
        parameters: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        aliases: dict[str, str] = {}
        buffers: dict[str, None] = {}
        for each in everyones:
            parameters |= each.parameters
            dtypes |= each.dtypes
            aliases |= each.aliases
            buffers |= dict.fromkeys(each.buffers)
        return replace(everyones[0], parameters=parameters, dtypes=dtypes, aliases=aliases, buffers=tuple(buffers))

    def to_json(self) -> str:
        """With its own SHA-256, because no other file has it."""
        text = json.dumps(asdict(self), indent=1)
        return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": json.loads(text)}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """From a checkpoint's folder.

        Raises:
            CheckpointError: it is missing, or not as it was written.
        """
        path = folder / MANIFEST
        try:
            outer = json.loads(path.read_bytes())
            fields = outer["manifest"]
            if hashlib.sha256(json.dumps(fields, indent=1).encode()).hexdigest() != outer["sha256"]:
                raise ValueError("its checksum differs")
            if (written := fields.get("format", 1)) != FORMAT:
                raise ValueError(f"it has format {written}, and this version reads {FORMAT}: load it with its own")
            fields["files"] = {name: Stored(**stored) for name, stored in fields["files"].items()}
            fields["parameters"] = {name: tuple(shape) for name, shape in fields["parameters"].items()}
            fields["buffers"] = tuple(fields["buffers"])
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {folder.name!r}: cannot use {path}: {_reason(error)}") from None


# Writing #


class DigestingFiles(FileSystem):
    """DCP's files, with the digest of each taken from what is written, not from what a disk gives back.

    Attributes:
        stored: by name, of the files written so far.
        failure: the last error of the disk; torch.save replaces it by one that says nothing of the cause.
    """

    def __init__(self) -> None:
        self.stored: dict[str, Stored] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        try:
            with super().create_stream(path, mode) as stream:
                if mode != "wb":
                    yield stream
                    return
                digesting = _Digesting(stream, self)
                yield cast(io.IOBase, digesting)
                self.stored[Path(path).name] = Stored(digesting.nbytes, digesting.sha256.hexdigest())
        except OSError as error:
            self.failure = error
            raise

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.stored[Path(new_path).name] = self.stored.pop(Path(path).name)


class _Digesting:
    """A binary file that is being written."""

    def __init__(self, stream: io.IOBase, files: DigestingFiles) -> None:
        self.stream, self.files = cast(Any, stream), files
        self.sha256, self.nbytes = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        try:
            written: int = self.stream.write(data)
        except OSError as error:
            self.files.failure = error
            raise
        self.sha256.update(data)
        self.nbytes += written
        return written

    def tell(self) -> int:
        return self.nbytes

    def fileno(self) -> int:
        return cast(int, self.stream.fileno())

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


def check_tag(tag: str) -> None:
    """A tag is the name of a folder.

    Raises:
        ValueError: it is not one, or is a name of ours.
    """
    if not tag or tag.startswith(".") or tag == LATEST or Path(tag).name != tag:
        raise ValueError(
            f"tag = {tag!r}; allowed: a plain folder name that does not begin with a dot and is not {LATEST!r}"
        )


def begin(save_dir: Path, tag: str, token: str) -> Path:
    """An empty folder to write into; leftovers of saves that were killed are put right first."""
    save_dir.mkdir(parents=True, exist_ok=True)
    clean(save_dir)
    partial = save_dir / f".{tag}{PARTIAL}{token}"
    partial.mkdir()
    return partial


def clean(save_dir: Path) -> None:
    """Remove what killed saves left behind, and put back a checkpoint that was being replaced."""
    for partial in save_dir.glob(f".*{PARTIAL}*"):
        shutil.rmtree(partial)
    for beside in save_dir.glob(f".{LATEST}-*"):
        beside.unlink()
    for aside in save_dir.glob(f".*{REPLACED}"):
        folder = _in_place(aside)
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)


def commit(partial: Path, folder: Path, manifest: Manifest) -> None:
    """Make a written checkpoint the one of its tag: see [Note: a kill at any moment]."""
    write_whole(partial / MANIFEST, manifest.to_json())
    aside = _aside(folder)
    if folder.exists():
        folder.rename(aside)
    partial.rename(folder)
    sync_folder(folder.parent)


def point_latest(save_dir: Path, tag: str) -> None:
    write_whole(save_dir / LATEST, tag)


def prune(save_dir: Path, keep_last: int, tag: str) -> None:
    """Delete all complete checkpoints but the last ones; never `tag`, nor the one that `latest` names."""
    others = [each for each in complete_tags(save_dir) if each not in (tag, latest_tag(save_dir))]
    for old in others[: max(0, len(others) - keep_last + 1)]:
        # A name that no reader looks at, so that a kill leaves no half of a checkpoint under a tag.
        going = save_dir / f".{old}{PARTIAL}removed"
        (save_dir / old).rename(going)
        shutil.rmtree(going)


def forget_replaced(folder: Path) -> None:
    """Delete the checkpoint that a new one replaced."""
    shutil.rmtree(_aside(folder), ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{REPLACED}")


def _in_place(aside: Path) -> Path:
    return aside.with_name(aside.name.removesuffix(REPLACED)[1:])


# Reading #


def latest_tag(save_dir: Path) -> str | None:
    """The tag that `latest` names; None where there is no such file."""
    try:
        return (save_dir / LATEST).read_text().strip()
    except FileNotFoundError:
        return None


def folder_of(save_dir: Path, tag: str) -> Path:
    """Where a tag's checkpoint is: aside, in the instant of its replacement.

    Raises:
        CheckpointError: nowhere.
    """
    for folder in (save_dir / tag, _aside(save_dir / tag)):
        if folder.is_dir():
            return folder
    raise CheckpointError(f"checkpoint {tag!r} is not in {save_dir}; {_advice(save_dir, tag)}")


def complete_tags(save_dir: Path) -> list[str]:
    """Tags whose manifest can be read and whose files have their sizes, the one with the fewest steps first."""
    found = []
    for path in save_dir.glob(f"*/{MANIFEST}"):
        try:
            manifest = Manifest.read(path.parent)
            sizes = {name: (path.parent / name).stat().st_size for name in manifest.files}
        except (CheckpointError, OSError):
            continue  # a damaged one is not complete
        if all(sizes[name] == stored.nbytes for name, stored in manifest.files.items()):
            found.append((manifest.global_steps, path.stat().st_mtime_ns, path.parent.name))
    return [tag for *_, tag in sorted(found)]


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare files with the manifest.

    Raises:
        CheckpointError: naming the first that is missing, has another size, or other content.
    """
    for name in names:
        path, stored = folder / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != stored.nbytes:
                raise ValueError(f"it has {size} bytes and was written with {stored.nbytes}")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != stored.sha256:
                    raise ValueError("its content is not what was written (SHA-256 differs)")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {manifest.tag!r}: {path}: {_reason(error)}") from None


def others_than(save_dir: Path, tag: str) -> list[str]:
    """Complete tags besides one, newest first."""
    return [other for other in reversed(complete_tags(save_dir)) if other != tag]


def _advice(save_dir: Path, tag: str) -> str:
    others = others_than(save_dir, tag)
    return f"complete tags there: {', '.join(others)}" if others else "no complete checkpoint is there"


def with_advice(error: CheckpointError, save_dir: Path, tag: str) -> CheckpointError:
    """The same error, and what could be loaded instead."""
    return CheckpointError(f"{error}; {_advice(save_dir, tag)}")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    return f"{type(error).__name__}: {error}" if isinstance(error, OSError | KeyError) else str(error)
