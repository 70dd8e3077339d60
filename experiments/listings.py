"""The catalogues as entries and tables."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..reading import nearest
from ..sim.hardware import Cluster, Processor, cluster_names, load_cluster, load_processor, processor_names
from ..sim.processor import MEASURED
from .models import load_model, model_names
from .tables import entry_table, table

MEASURED_TABLES = ("matmul_points", "kernel_curves")


@dataclass(frozen=True, slots=True)
class Listing:
    """What `--json` prints (`entries`), and the same as tables."""

    entries: dict[str, Any]
    name: str | None

    def tables(self) -> Iterator[Any]:
        if self.name is not None:
            yield self._one()
        elif "models" in self.entries:
            yield _models_table(self.entries["models"])
        else:
            yield _gpus_table(self.entries["gpus"])
            yield _clusters_table(self.entries["clusters"])

    def _one(self) -> Any:
        (group,) = [kind for kind, found in self.entries.items() if found]
        (entry,) = self.entries[group]
        figures = {key: value for key, value in entry.items() if key not in ("sources", "source", *MEASURED_TABLES)}
        sources = entry.get("sources", {"name": entry.get("source", "")})
        return entry_table(str(self.name), _flat(figures), sources)


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, the way sources are named."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def list_models(name: str | None) -> Listing:
    """All models, or one.

    Raises:
        ValueError: an unknown name.
    """
    names = [name] if name else model_names()
    specs = [load_model(each) for each in names]
    counted = [{**asdict(spec), "parameters": spec.parameters} for spec in specs]
    return Listing({"models": counted}, name)


def list_hardware(name: str | None) -> Listing:
    """All GPUs and clusters, or the one of that name.

    Raises:
        ValueError: an unknown name.
    """
    known = [*processor_names(), *cluster_names()]
    if name is not None and name not in known:
        raise ValueError(f"name = {name}; allowed: {', '.join(known)}{nearest(name, known)}")
    gpus = [_processor(load_processor(each)) for each in processor_names() if name in (None, each)]
    clusters = [_cluster(load_cluster(each)) for each in cluster_names() if name in (None, each)]
    return Listing({"gpus": gpus, "clusters": clusters}, name)


def _processor(processor: Processor) -> dict[str, Any]:
    entry = asdict(processor)
    return {key: value for key, value in entry.items() if key not in MEASURED or value != MEASURED[key]}


def _cluster(cluster: Cluster) -> dict[str, Any]:
    return {**asdict(cluster), "processor": cluster.processor.name}


def _models_table(models: list[dict[str, Any]]) -> Any:
    rows = [
        (
            model["name"],
            f"{model['parameters'] / 1e9:,.3g} B" if model["parameters"] else "-",
            *(f"{model[key]:,}" for key in ("layers", "hidden", "heads", "ffn", "vocab", "seq")),
        )
        for model in models
    ]
    columns = ("model", "parameters", "layers", "hidden", "heads", "ffn", "vocab", "seq")
    return table("models", columns, rows, note="windtunnel models NAME shows an entry with its source")


def _gpus_table(gpus: list[dict[str, Any]]) -> Any:
    rows = [
        (
            gpu["name"],
            f"{gpu['memory_bytes'] / 2**30:.0f} GiB",
            f"{gpu['memory_bytes_per_s'] / 1e12:.2f} TB/s",
            *(
                f"{gpu['peak_flops'][kind] / 1e12:,.0f}" if kind in gpu["peak_flops"] else "-"
                for kind in ("bf16", "fp16", "fp32")
            ),
        )
        for gpu in gpus
    ]
    columns = ("GPU", "memory", "bandwidth", "bf16 TFLOP/s", "fp16", "fp32")
    return table("GPUs (dense peaks)", columns, rows)


def _clusters_table(clusters: list[dict[str, Any]]) -> Any:
    rows = []
    for cluster in clusters:
        between = cluster["inter_node"]
        rows.append(
            (
                cluster["name"],
                cluster["processor"],
                str(cluster["gpus_per_node"]),
                f"{cluster['intra_node']['bytes_per_s'] / 1e9:.0f} GB/s",
                f"{between['bytes_per_s'] / 1e9:.0f} GB/s" if between else "-",
            )
        )
    columns = ("cluster", "GPU", "per node", "inside a node, per GPU", "between nodes, per node")
    return table("clusters", columns, rows, note="windtunnel hardware NAME shows an entry with each figure's source")
