"""Planners for torch.distributed.checkpoint (DCP) by parameter: what a rank writes and reads of each tensor.

A checkpoint shows every parameter, and every tensor of an optimizer's state that goes with its elements, as one tensor
of the whole parameter's shape. A rank writes the boxes that it holds (engine/chunks.py), wherever the model, its units
and shards are cut, and reads the boxes that it needs; so ranks, axes, stage and units of the run that loads may differ
from those of the run that saved.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

PARAMETERS, OPTIMIZER, BUFFERS, RANKS, RUN = "parameters/", "optimizer/", "buffers/", "ranks/", "run"
"""Keys in a checkpoint: parameters/NAME, optimizer/STATE/NAME, buffers/NAME, ranks/NUMBER, run."""


@dataclass(frozen=True, slots=True)
class Region:
    """A box of the tensor that a checkpoint shows under `key`.

    Attributes:
        offset, shape: of the box.
        whole: shape of the tensor.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]

    @classmethod
    def all_of(cls, key: str, shape: Iterable[int]) -> "Region":
        shape = tuple(shape)
        return cls(key, (0,) * len(shape), shape, shape)

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, self.offset)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offset), torch.Size(self.shape))


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor to be written: its dtype for the plan, and where to get it when its turn comes."""

    dtype: torch.dtype
    fetch: Callable[[], Tensor]


class RegionSavePlanner(DefaultSavePlanner):
    """Writes regions of tensors, and objects that are bytes already.

    Regions that several ranks have are written by one of them, DCP choosing so that all write about the same.
    """

    def __init__(self, tensors: Mapping[Region, Source], objects: Mapping[str, bytes]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._objects = tensors, objects
        self._sources = {region.index: source.fetch for region, source in tensors.items()}
        self._staged: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(region, source.dtype) for region, source in self._tensors.items()]
        items += [
            WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(len(data)))
            for key, data in self._objects.items()
        ]
        self.plan = SavePlan(items)
        return self.plan

    def stage(self) -> None:
        """Copy to host memory what the finished plan has this rank write: from here on, the run may change it."""
        for item in self.plan.items:
            if item.type is not WriteItemType.BYTE_IO:
                self._staged[item.index] = self._sources[item.index]().detach().to("cpu", copy=True)
        self._sources.clear()

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        staged = self._staged.get(write_item.index)
        return self._sources[write_item.index]().detach() if staged is None else staged


def _write_item(region: Region, dtype: torch.dtype) -> WriteItem:
    kind = WriteItemType.TENSOR if region.shape == region.whole else WriteItemType.SHARD
    data = TensorWriteData(region.chunk, TensorProperties(dtype=dtype), torch.Size(region.whole))
    return WriteItem(region.index, kind, tensor_data=data)


class RegionLoadPlanner(LoadPlanner):
    """Reads regions into tensors, converting dtypes, and objects as bytes."""

    def __init__(self, tensors: Mapping[Region, Tensor], keys: Iterable[str] = ()) -> None:
        self._targets = {region.index: tensor for region, tensor in tensors.items()}
        self._regions, self._keys = list(tensors), list(keys)
        self.objects: dict[str, bytes] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items = [item for region in self._regions for item in self._reads(region)]
        nothing = torch.Size([0])
        items += [
            ReadItem(LoadItemType.BYTE_IO, MetadataIndex(key), nothing, MetadataIndex(key), nothing, nothing)
            for key in self._keys
        ]
        return LoadPlan(items)

    def _reads(self, region: Region) -> list[ReadItem]:
        """The overlaps of a region with the chunks that were written."""
        saved = self.metadata.state_dict_metadata.get(region.key)
        if not isinstance(saved, TensorStorageMetadata) or tuple(saved.size) != region.whole:
            found = "nothing" if saved is None else f"shape {tuple(getattr(saved, 'size', ()))}"
            raise ValueError(f"{region.key}: the run has shape {region.whole}, the checkpoint {found}")
        return create_read_items_for_chunk_list(region.key, saved, [region.chunk])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.objects[read_item.dest_index.fqn] = value.getvalue()

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a target that one chunk fills."""
        part = self._targets[MetadataIndex(read_item.dest_index.fqn, read_item.dest_index.offset)]
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dimension, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """DCP has copied into the view that `resolve_tensor` gave."""


class Stock:
    """A checkpoint on disk, opened for reading by one process.

    Attributes:
        sizes: shape of each tensor by key.
        dtypes: its dtype.
        objects: keys of what is no tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        saved = self._metadata.state_dict_metadata
        tensors = {key: item for key, item in saved.items() if isinstance(item, TensorStorageMetadata)}
        self.sizes = {key: tuple(item.size) for key, item in tensors.items()}
        self.dtypes = {key: item.properties.dtype for key, item in tensors.items()}
        self.objects = {key for key, item in saved.items() if isinstance(item, BytesStorageMetadata)}

    def read(self, tensors: Mapping[Region, Tensor], keys: Iterable[str] = ()) -> dict[str, bytes]:
        """Fill the tensors, and return the objects.

        Raises:
            ValueError: a tensor that the checkpoint does not have, or has in another shape.
        """
        planner = RegionLoadPlanner(tensors, keys)
        planner.set_up_planner({}, self._metadata, is_coordinator=True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = self._reader.prepare_global_plan(planner.create_global_plan([plan]))
        self._reader.read_data(planner.finish_plan(plan), planner).wait()
        return planner.objects

    def whole(self, key: str) -> Tensor:
        """One tensor in full, on the host, as it was saved."""
        tensor = torch.empty(self.sizes[key], dtype=self.dtypes[key])
        self.read({Region.all_of(key, tensor.shape): tensor})
        return tensor
