"""What a job runs on: a cluster of processors and its network, read from TOML, each figure with its source.

The catalogue lies in catalogue/gpus and catalogue/clusters, one file per entry, named like the entry. A user's cluster
file gives what differs from a `base`; a user's processor file (a calibrated profile) is complete. Bandwidths are per
direction. Achievable shares and latencies come from measurements of collectives, never from training steps.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..collectives.tiers import Tier
from ..reading import STRICT, nearest, read_into, read_toml
from .host import Host
from .processor import FIGURES, KernelCurve, MatmulPoint, Processor, check_sources, require, require_positive
from .unlike import NodesLike, Pace, check_apart

__all__ = [
    "CATALOGUE",
    "FIGURES",
    "Cluster",
    "Fabric",
    "KernelCurve",
    "MatmulPoint",
    "Processor",
    "Wiring",
    "cluster_names",
    "load_cluster",
    "load_processor",
    "processor_names",
]

CATALOGUE = Path(__file__).parent / "catalogue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """Links of one level of the network.

    Attributes:
        bytes_per_s: nominal, per direction; of one GPU inside a node, of all NICs of a node together between nodes.
        latency_s: of one hop of a ring.
        efficiency: share of bytes_per_s that a large ring collective reaches.
        nics: of a node; None inside a node.
        start_s, local_bytes_per_s: of a whole collective, see Tier; None: no start, and local memory costs nothing.
    """

    bytes_per_s: float
    latency_s: float
    efficiency: float = 1.0
    nics: int | None = None
    start_s: float | None = None
    local_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        _check_fabric(self)

    @property
    def achieved_bytes_per_s(self) -> float:
        return self.bytes_per_s * self.efficiency


WIRINGS = ("flat", "leaf_spine", "rail")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """Table [fabric] of a cluster file: the switches between the nodes' NICs, for collectives played as messages.

    Attributes:
        kind: "flat": one switch that never blocks. "leaf_spine": all NICs of `nodes_per_leaf` nodes on one leaf, the
            leaves on a spine. "rail": NIC i of every node of a pod of `nodes_per_leaf` nodes on leaf i of that pod.
        nodes_per_leaf: None for "flat".
        oversubscription: bandwidth of a leaf's NICs over that of its links to the spine.
    """

    __pydantic_config__ = STRICT

    kind: str
    nodes_per_leaf: int | None = None
    oversubscription: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in WIRINGS:
            raise ValueError(f"kind = {self.kind!r}; allowed: {', '.join(WIRINGS)}{nearest(self.kind, WIRINGS)}")
        require_positive(self, ("nodes_per_leaf",))
        require(1 <= self.oversubscription < math.inf, "oversubscription", self.oversubscription, ">= 1 and finite")
        if self.kind == "flat" and (self.nodes_per_leaf is not None or self.oversubscription != 1):
            raise ValueError("kind = 'flat' has no leaves: leave out 'nodes_per_leaf' and 'oversubscription'")
        if self.kind != "flat" and self.nodes_per_leaf is None:
            raise ValueError(f"'nodes_per_leaf' is missing: kind = {self.kind!r} needs it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of equal processors.

    Attributes:
        nodes: how many there are; None: as many as the job needs.
        inter_node: None where there is only one node.
        sources: where each figure is from, e.g. "inter_node.latency_s".
        fabric: how the nodes are wired; None: as if each node had one link, whatever its NICs, to a switch that never
            blocks.
        host: what lies below the GPUs' memory on a node; None: not known, so nothing can be offloaded there.
        nodes_like: nodes that differ from the others.
        beside: paces of the ranks that compute together and so wait for each other (sim/rank_classes.py); empty: all
            have the processor's own.
    """

    name: str
    processor: Processor
    gpus_per_node: int
    nodes: int | None
    intra_node: Fabric
    inter_node: Fabric | None
    sources: dict[str, str] = field(hash=False)
    fabric: Wiring | None = None
    host: Host | None = None
    nodes_like: tuple[NodesLike, ...] = ()
    beside: tuple[Pace, ...] = ()

    def __post_init__(self) -> None:
        check_apart(self.nodes_like)
        require_positive(self, ("gpus_per_node", "nodes"))
        if self.inter_node is None and self.nodes != 1:
            raise ValueError("'inter_node' is missing: give it, or nodes = 1")
        if self.fabric is not None and self.inter_node is None:
            raise ValueError("'fabric' wires nodes, but 'inter_node' is missing: give it, or leave out [fabric]")

    @property
    def paces(self) -> tuple[Pace, ...]:
        """How fast those compute who wait for each other: of each run of kernels the slowest one counts."""
        return self.beside or (Pace(self.processor),)

    @property
    def gpus(self) -> int | None:
        """How many GPUs there are; None: as many as the job needs."""
        return None if self.nodes is None else self.nodes * self.gpus_per_node

    def narrowed(self, share: float) -> "Cluster":
        """The cluster with so much of the bandwidth between nodes."""
        if self.inter_node is None or share == 1.0:
            return self
        return replace(self, inter_node=replace(self.inter_node, bytes_per_s=self.inter_node.bytes_per_s * share))

    def check_gpus(self, gpus: int) -> None:
        """Raises ValueError when a job on `gpus` GPUs does not fit in the cluster."""
        if gpus < 1:
            raise ValueError(f"gpus must be >= 1, got {gpus}")
        if self.gpus is not None and gpus > self.gpus:
            raise ValueError(
                f"gpus = {gpus}, but cluster {self.name!r} has {self.gpus} "
                f"({self.nodes} nodes of {self.gpus_per_node}): ask for fewer, or give more nodes"
            )

    def tiers(self, gpus: int) -> tuple[Tier, ...]:
        """The network under a job of `gpus` ranks, node by node, innermost tier first.

        Raises:
            ValueError: the job does not fit in the cluster.
        """
        self.check_gpus(gpus)
        levels = [("intra_node", self.gpus_per_node, self.intra_node)]
        if self.inter_node is not None:
            whole_nodes = math.ceil(gpus / self.gpus_per_node) * self.gpus_per_node
            levels.append(("inter_node", whole_nodes, self.inter_node))
        return tuple(
            Tier(
                name=name,
                ranks=ranks,
                latency_s=fabric.latency_s,
                bytes_per_s=fabric.achieved_bytes_per_s,
                start_s=fabric.start_s or 0.0,
                local_bytes_per_s=fabric.local_bytes_per_s or math.inf,
            )
            for name, ranks, fabric in levels
        )


def _check_fabric(fabric: "Fabric | _FabricFile") -> None:
    require_positive(fabric, ("bytes_per_s", "nics", "local_bytes_per_s"))
    for name in ("latency_s", "start_s"):
        seconds = getattr(fabric, name)
        if seconds is not None:
            require(0 <= seconds < math.inf, name, seconds, ">= 0 and finite")
    if fabric.efficiency is not None:
        require(0 < fabric.efficiency <= 1, "efficiency", fabric.efficiency, "> 0 and <= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class _FabricFile:
    """Table [intra_node] or [inter_node] of a cluster file; what is left out comes from the base."""

    __pydantic_config__ = STRICT

    bytes_per_s: float | None = None
    latency_s: float | None = None
    efficiency: float | None = None
    nics: int | None = None
    start_s: float | None = None
    local_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        _check_fabric(self)

    def given(self) -> dict[str, Any]:
        """The fields that the file gives. A bandwidth that comes without an efficiency is an achieved one."""
        changes = {key: value for key, value in asdict(self).items() if value is not None}
        return {"efficiency": 1.0, **changes} if "bytes_per_s" in changes else changes


@dataclass(frozen=True, slots=True, kw_only=True)
class _NodesLikeFile:
    """A table [[nodes_like]] of a cluster file as written; see NodesLike."""

    __pydantic_config__ = STRICT

    first: int = 0
    count: int = 1
    gpu: str | None = None
    inter_node_share: float = 1.0

    def __post_init__(self) -> None:
        NodesLike(first=self.first, count=self.count, inter_node_share=self.inter_node_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ClusterFile:
    """A cluster file as written."""

    __pydantic_config__ = STRICT

    base: str | None = None
    gpu: str | None = None
    gpus_per_node: int | None = None
    nodes: int | None = None
    intra_node: _FabricFile | None = None
    inter_node: _FabricFile | None = None
    fabric: Wiring | None = None
    host: Host | None = None
    nodes_like: tuple[_NodesLikeFile, ...] | None = None
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_positive(self, ("gpus_per_node", "nodes"))
        if self.intra_node is not None and self.intra_node.nics is not None:
            raise ValueError("intra_node has no 'nics': give them in [inter_node]")

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that the file gives, as in the sources of a Cluster."""
        plain = [name for name in ("gpus_per_node", "nodes") if getattr(self, name) is not None]
        tables = (("intra_node", self.intra_node), ("inter_node", self.inter_node))
        levels = (f"{name}.{key}" for name, table in tables if table is not None for key in table.given())
        host = [f"host.{key}" for key in asdict(self.host)] if self.host is not None else []
        return (*plain, *levels, *host, *(["fabric"] if self.fabric is not None else []))


def processor_names() -> tuple[str, ...]:
    """Names of the processors in the catalogue."""
    return _entries("gpus")


def cluster_names() -> tuple[str, ...]:
    """Names of the clusters in the catalogue."""
    return _entries("clusters")


def load_processor(name_or_path: str | Path) -> Processor:
    """A processor of the catalogue, or of a TOML file with every field of a Processor (the name may be left out).

    Raises:
        ValueError: one line: an unknown name, a file that cannot be read, or a field that is wrong or has no source.
    """
    path = _find(name_or_path, "gpus", "processor")
    return read_into(Processor, {"name": path.stem, **read_toml(path)}, _where(path))


def load_cluster(name_or_path: str | Path) -> Cluster:
    """A cluster of the catalogue, or of a TOML file.

    A file may start from a `base` of the catalogue; each key that it gives overrides the base. Its keys are `gpu` (a
    catalogue name or a processor file, relative to the cluster file), `gpus_per_node`, `nodes`, the tables
    [intra_node] and [inter_node] with the fields of Fabric, [fabric] with those of Wiring, [host] with those of Host
    (all of them: it replaces the base's), and any number of [[nodes_like]] with `first`, `count`, `gpu` and
    `inter_node_share`, the fields of NodesLike (they replace the base's).

    Raises:
        ValueError: one line: an unknown name, a file that cannot be read, or a key that is unknown, wrong or missing.
    """
    path = _find(name_or_path, "clusters", "cluster")
    return _catalogue_cluster(path) if path.parent == CATALOGUE / "clusters" else _read_cluster(path)


@cache
def _catalogue_cluster(path: Path) -> Cluster:
    return _read_cluster(path)


def _read_cluster(path: Path) -> Cluster:
    file = read_into(_ClusterFile, read_toml(path), _where(path))
    try:
        if path.parent == CATALOGUE / "clusters":
            check_sources(file.sources, required=file.figures(), known=file.figures())
        return _build_cluster(file, path)
    except ValueError as error:
        raise ValueError(f"{_where(path)}: {error}") from None


def _build_cluster(file: _ClusterFile, path: Path) -> Cluster:
    if file.base is not None and file.base not in cluster_names():
        raise ValueError(f"base = {file.base!r}: {_unknown('cluster', file.base, cluster_names())}")
    base = load_cluster(file.base) if file.base is not None else None
    gpus_per_node = file.gpus_per_node or (base.gpus_per_node if base else None)
    nodes = file.nodes or (base.nodes if base else None)
    intra_node = _overlay("intra_node", base.intra_node if base else None, file.intra_node)
    inter_node = _overlay("inter_node", base.inter_node if base else None, file.inter_node)
    processor = _processor_beside(path, file.gpu) if file.gpu is not None else (base.processor if base else None)
    if processor is None:
        raise ValueError("'gpu' is missing: give it, or a base")
    if gpus_per_node is None:
        raise ValueError("'gpus_per_node' is missing: give it, or a base")
    if intra_node is None:
        raise ValueError("'intra_node' is missing: give it, or a base")
    return Cluster(
        name=path.stem,
        processor=processor,
        gpus_per_node=gpus_per_node,
        nodes=nodes,
        intra_node=intra_node,
        inter_node=inter_node,
        fabric=file.fabric or (base.fabric if base else None),
        host=file.host or (base.host if base else None),
        nodes_like=_nodes_like(file, path) if file.nodes_like is not None else (base.nodes_like if base else ()),
        sources={
            **(base.sources if base else {}),
            **{name: f"given in {path.name}" for name in file.figures()},
            **file.sources,
        },
    )


def _nodes_like(file: _ClusterFile, path: Path) -> tuple[NodesLike, ...]:
    return tuple(
        NodesLike(
            first=table.first,
            count=table.count,
            processor=None if table.gpu is None else _processor_beside(path, table.gpu),
            inter_node_share=table.inter_node_share,
        )
        for table in file.nodes_like or ()
    )


def _processor_beside(path: Path, gpu: str) -> Processor:
    return load_processor(path.parent / gpu if _looks_like_path(gpu) else gpu)


def _overlay(name: str, base: Fabric | None, table: _FabricFile | None) -> Fabric | None:
    if table is None:
        return base
    given = table.given()
    if base is not None:
        if table.bytes_per_s is not None:  # what a user says of the links says it of the collective, memory included
            base = replace(base, local_bytes_per_s=None)
        return replace(base, **given)
    for key in ("bytes_per_s", "latency_s"):
        if key not in given:
            raise ValueError(f"'{name}.{key}' is missing: give it, or a base")
    return Fabric(**given)


@cache
def _entries(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (CATALOGUE / folder).glob("*.toml")))


def _find(name_or_path: str | Path, folder: str, what: str) -> Path:
    """The file of a catalogue entry, or the user's."""
    name = str(name_or_path)
    if name in _entries(folder):
        return CATALOGUE / folder / f"{name}.toml"
    if isinstance(name_or_path, Path) or _looks_like_path(name):
        return Path(name_or_path)
    raise ValueError(f"{_unknown(what, name, _entries(folder))}; a TOML file is given by its path")


def _looks_like_path(name: str) -> bool:
    return name.endswith(".toml") or "/" in name


def _unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    return f"unknown {what} {name!r}; the catalogue has {', '.join(known)}{nearest(name, known)}"


def _where(path: Path) -> str:
    return path.name if CATALOGUE in path.parents else str(path)
