"""What a job runs on: a cluster of processors and its network, read from TOML, each figure with its source.

The catalogue lies in catalogue/gpus, catalogue/clusters and catalogue/fabrics, one file per entry, named like it. A
user's cluster file gives what differs from a `base`; a user's processor file (a calibrated profile) is complete.
Bandwidths are per direction. Achievable shares and latencies come from measurements of collectives, never from training
steps.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from ..collectives.tiers import Tier
from ..reading import STRICT, nearest, read_into, read_toml
from .entries import CATALOGUE, beside, entries, find, in_catalogue, unknown, where
from .fabrics import INTER_NODE, INTRA_NODE, Fabric, FabricProfile, FabricTable, build_fabric, profile_sources
from .host import Host
from .prices import Price
from .processor import FIGURES, KernelCurve, MatmulPoint, Processor, check_sources, require, require_positive
from .unlike import NodesLike, Pace, check_apart

__all__ = [
    "CATALOGUE",
    "FIGURES",
    "Cluster",
    "Fabric",
    "FabricProfile",
    "KernelCurve",
    "MatmulPoint",
    "Price",
    "Processor",
    "Wiring",
    "cluster_names",
    "fabric_names",
    "load_cluster",
    "load_fabric",
    "load_processor",
    "processor_names",
]

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
        paced_by: paces of the ranks that compute together and so wait for each other (sim/rank_classes.py); empty: all
            have the processor's own.
        price: of one node; None: not known.
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
    paced_by: tuple[Pace, ...] = ()
    price: Price | None = None

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
        return self.paced_by or (Pace(self.processor),)

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
    intra_node: FabricTable | None = None
    inter_node: FabricTable | None = None
    fabric: Wiring | None = None
    host: Host | None = None
    nodes_like: tuple[_NodesLikeFile, ...] | None = None
    price: Price | None = None
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_positive(self, ("gpus_per_node", "nodes"))
        if self.intra_node is not None and self.intra_node.nics is not None:
            raise ValueError("intra_node has no 'nics': give them in [inter_node]")
        if self.inter_node is not None and self.inter_node.links is not None:
            raise ValueError("inter_node has no 'links': give 'nics'")

    def figures(self) -> tuple[str, ...]:
        """Names of the figures that the file gives, as in the sources of a Cluster."""
        plain = [name for name in ("gpus_per_node", "nodes") if getattr(self, name) is not None]
        tables = (("intra_node", self.intra_node), ("inter_node", self.inter_node))
        levels = (f"{name}.{key}" for name, table in tables if table is not None for key in table.given())
        host = [f"host.{key}" for key in asdict(self.host)] if self.host is not None else []
        whole = [name for name in ("fabric", "price") if getattr(self, name) is not None]
        return (*plain, *levels, *host, *whole)


def processor_names() -> tuple[str, ...]:
    """Names of the processors in the catalogue."""
    return entries("gpus")


def cluster_names() -> tuple[str, ...]:
    """Names of the clusters in the catalogue."""
    return entries("clusters")


def fabric_names() -> tuple[str, ...]:
    """Names of the fabrics in the catalogue."""
    return entries("fabrics")


def load_fabric(name_or_path: str | Path) -> FabricProfile:
    """A fabric of the catalogue, or of a TOML file with the fields of a FabricProfile (the name may be left out).

    Raises:
        ValueError: one line: an unknown name, a file that cannot be read, or a field that is wrong or has no source.
    """
    path = find(name_or_path, "fabrics", "fabric")
    return read_into(FabricProfile, {"name": path.stem, **read_toml(path)}, where(path))


def load_processor(name_or_path: str | Path) -> Processor:
    """A processor of the catalogue, or of a TOML file with every field of a Processor (the name may be left out).

    Raises:
        ValueError: one line: an unknown name, a file that cannot be read, or a field that is wrong or has no source.
    """
    path = find(name_or_path, "gpus", "processor")
    return read_into(Processor, {"name": path.stem, **read_toml(path)}, where(path))


def load_cluster(name_or_path: str | Path) -> Cluster:
    """A cluster of the catalogue, or of a TOML file.

    A file may start from a `base` of the catalogue; each key that it gives overrides the base. Its keys are `gpu` (a
    catalogue name or a processor file, relative to the cluster file), `gpus_per_node`, `nodes`, the tables
    [intra_node] and [inter_node] with the fields of Fabric, [fabric] with those of Wiring and [host] with those of Host
    (all of them: it replaces the base's), [price] with those of Price, and any number of [[nodes_like]] with `first`,
    `count`, `gpu` and `inter_node_share`, the fields of NodesLike (they replace the base's). A network table may name a
    `fabric` (a catalogue name or a file) and count its `links` or `nics` instead of giving its figures. A file that
    changes the GPUs of its base does not have the base's price.

    Raises:
        ValueError: one line: an unknown name, a file that cannot be read, or a key that is unknown, wrong or missing.
    """
    path = find(name_or_path, "clusters", "cluster")
    return _catalogue_cluster(path) if in_catalogue(path) else _read_cluster(path)


@cache
def _catalogue_cluster(path: Path) -> Cluster:
    return _read_cluster(path)


def _read_cluster(path: Path) -> Cluster:
    file = read_into(_ClusterFile, read_toml(path), where(path))
    try:
        if in_catalogue(path):
            check_sources(file.sources, required=file.figures(), known=file.figures())
        return _build_cluster(file, path)
    except ValueError as error:
        raise ValueError(f"{where(path)}: {error}") from None


def _build_cluster(file: _ClusterFile, path: Path) -> Cluster:
    if file.base is not None and file.base not in cluster_names():
        raise ValueError(f"base = {file.base!r}: {unknown('cluster', file.base, cluster_names())}")
    base = load_cluster(file.base) if file.base is not None else None
    gpus_per_node = file.gpus_per_node or (base.gpus_per_node if base else None)
    intra_node, intra_sources = _level(INTRA_NODE, path, file, base)
    inter_node, inter_sources = _level(INTER_NODE, path, file, base)
    processor = load_processor(beside(path, file.gpu)) if file.gpu is not None else (base.processor if base else None)
    if processor is None:
        raise ValueError("'gpu' is missing: give it, or a base")
    if gpus_per_node is None:
        raise ValueError("'gpus_per_node' is missing: give it, or a base")
    if intra_node is None:
        raise ValueError("'intra_node' is missing: give it, or a base")
    same_gpus = base is not None and file.gpu is None and file.gpus_per_node is None
    price = file.price or (base.price if base is not None and same_gpus else None)
    sources = {
        **(_inherited_sources(base, file) if base else {}),
        **intra_sources,
        **inter_sources,
        **{name: f"given in {path.name}" for name in file.figures()},
        **file.sources,
    }
    known = {*sources} - {f"{INTRA_NODE}.links"} - (set() if price else {"price"})
    return Cluster(
        name=path.stem,
        processor=processor,
        gpus_per_node=gpus_per_node,
        nodes=file.nodes or (base.nodes if base else None),
        intra_node=intra_node,
        inter_node=inter_node,
        fabric=file.fabric or (base.fabric if base else None),
        host=file.host or (base.host if base else None),
        price=price,
        nodes_like=_nodes_like(file, path) if file.nodes_like is not None else (base.nodes_like if base else ()),
        sources={name: source for name, source in sources.items() if name in known},
    )


def _nodes_like(file: _ClusterFile, path: Path) -> tuple[NodesLike, ...]:
    return tuple(
        NodesLike(
            first=table.first,
            count=table.count,
            processor=None if table.gpu is None else load_processor(beside(path, table.gpu)),
            inter_node_share=table.inter_node_share,
        )
        for table in file.nodes_like or ()
    )


def _inherited_sources(base: Cluster, file: _ClusterFile) -> dict[str, str]:
    """The base's sources, without those of figures that a fabric of the file replaces."""
    replaced = tuple(
        f"{level}."
        for level in (INTRA_NODE, INTER_NODE)
        if (table := getattr(file, level)) is not None and table.fabric
    )
    kept = f"{INTER_NODE}.nics"
    return {name: source for name, source in base.sources.items() if name == kept or not name.startswith(replaced)}


def _level(name: str, path: Path, file: _ClusterFile, base: Cluster | None) -> tuple[Fabric | None, dict[str, str]]:
    """A level of the network, and where the figures are from that it has from a profile."""
    inherited: Fabric | None = getattr(base, name, None)
    table: FabricTable | None = getattr(file, name)
    if table is None:
        return inherited, {}
    if table.fabric is None:
        return build_fabric(name, table, inherited, None), {}
    try:
        profile = load_fabric(beside(path, table.fabric))
    except ValueError as error:
        raise ValueError(f"{name}.fabric = {table.fabric!r}: {error}") from None
    return build_fabric(name, table, inherited, profile), profile_sources(name, table, profile, file.sources)
