"""Fabrics: the profile of a kind of link, and the links of one level of a cluster's network.

A profile (catalogue/fabrics) is of one link or one NIC's port: clusters say how many of them a GPU or a node has, so
that a figure of NVLink or InfiniBand is written once. Bandwidths are per direction.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..reading import STRICT
from .processor import check_sources, require, require_positive

INTRA_NODE = "intra_node"
INTER_NODE = "inter_node"


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
        _check(self)

    @property
    def achieved_bytes_per_s(self) -> float:
        return self.bytes_per_s * self.efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricProfile:
    """One kind of link, whatever node it is in.

    Attributes:
        name: of the catalogue entry or file.
        bytes_per_s: of one link or one NIC's port, nominal, per direction.
        latency_s, efficiency, start_s, local_bytes_per_s: as in Fabric.
        sources: where each figure is from, by field name.
    """

    __pydantic_config__ = STRICT

    name: str
    bytes_per_s: float
    latency_s: float
    efficiency: float
    start_s: float | None = None
    local_bytes_per_s: float | None = None
    sources: dict[str, str] = field(hash=False)

    def __post_init__(self) -> None:
        _check(self)
        check_sources(self.sources, required=self.figures(), known=(*_FIGURES, *_OF_A_COLLECTIVE))

    def figures(self) -> dict[str, float]:
        """Its figures by name, without those that it leaves out."""
        values = {name: getattr(self, name) for name in (*_FIGURES, *_OF_A_COLLECTIVE)}
        return {name: value for name, value in values.items() if value is not None}


_FIGURES = ("bytes_per_s", "latency_s", "efficiency")
_OF_A_COLLECTIVE = ("start_s", "local_bytes_per_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricTable:
    """Table [intra_node] or [inter_node] of a cluster file; what is left out comes from the profile, else the base.

    Attributes:
        fabric: a profile; the table then says how many links a GPU (`links`) or NICs a node (`nics`) has, and may
            override figures other than bytes_per_s.
    """

    __pydantic_config__ = STRICT

    fabric: str | None = None
    links: int | None = None
    bytes_per_s: float | None = None
    latency_s: float | None = None
    efficiency: float | None = None
    nics: int | None = None
    start_s: float | None = None
    local_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        _check(self)
        require_positive(self, ("links",))
        if self.fabric is None and self.links is not None:
            raise ValueError("'links' counts the links of a 'fabric': give it, or bytes_per_s instead of links")
        if self.fabric is not None and self.bytes_per_s is not None:
            raise ValueError("'fabric' and 'bytes_per_s' both say how fast the links are: give one of them")

    def given(self) -> dict[str, Any]:
        """The fields that the file gives. A bandwidth that comes without an efficiency is an achieved one."""
        changes = {key: value for key, value in asdict(self).items() if value is not None and key != "fabric"}
        return {"efficiency": 1.0, **changes} if "bytes_per_s" in changes else changes


def build_fabric(level: str, table: FabricTable, base: Fabric | None, profile: FabricProfile | None) -> Fabric:
    """The links of a level: the table's figures over the profile's that it names, else over the base's.

    Raises:
        ValueError: a figure or the number of links is missing.
    """
    given = table.given()
    links = given.pop("links", None)
    if profile is not None:
        count = "links" if level == INTRA_NODE else "nics"
        number = links if level == INTRA_NODE else given.setdefault("nics", base.nics if base else None)
        if number is None:
            raise ValueError(f"'{level}.{count}' is missing: fabric {profile.name!r} is the profile of one of them")
        return Fabric(**{**profile.figures(), "bytes_per_s": number * profile.bytes_per_s, **given})
    if base is not None:
        if table.bytes_per_s is not None:  # what a user says of the links says it of the collective, memory included
            base = replace(base, local_bytes_per_s=None)
        return replace(base, **given)
    for key in ("bytes_per_s", "latency_s"):
        if key not in given:
            raise ValueError(f"'{level}.{key}' is missing: give it, a fabric, or a base")
    return Fabric(**given)


def profile_sources(level: str, table: FabricTable, profile: FabricProfile, own: Mapping[str, str]) -> dict[str, str]:
    """Where the figures are from that a level has from its profile, as in the sources of a Cluster."""
    sources = {f"{level}.{key}": f"{source} (fabric {profile.name})" for key, source in profile.sources.items()}
    key = f"{level}.bytes_per_s"
    count = "links" if level == INTRA_NODE else "nics"
    sources[key] = f"{own.get(f'{level}.{count}', count)}, each: {sources[key]}"
    return sources


def _check(fabric: Fabric | FabricProfile | FabricTable) -> None:
    require_positive(fabric, ("bytes_per_s", "local_bytes_per_s"))
    for name in ("latency_s", "start_s"):
        seconds = getattr(fabric, name)
        if seconds is not None:
            require(0 <= seconds < math.inf, name, seconds, ">= 0 and finite")
    if fabric.efficiency is not None:
        require(0 < fabric.efficiency <= 1, "efficiency", fabric.efficiency, "> 0 and <= 1")
    if not isinstance(fabric, FabricProfile):
        require_positive(fabric, ("nics",))
