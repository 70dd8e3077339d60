"""The catalogues as entries and tables."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..kernels.dispatch import Choice, choices
from ..reading import nearest
from ..sim.failures import Failures, failure_names, load_failures
from ..sim.hardware import (
    Cluster,
    Processor,
    cluster_names,
    fabric_names,
    load_cluster,
    load_fabric,
    load_processor,
    processor_names,
)
from ..sim.processor import MEASURED
from .models import load_model, model_names
from .tables import entry_table, table
from .units import with_unit

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
            yield _kernels_table(self.entries["kernels"])
            yield _fabrics_table(self.entries["fabrics"])
            yield _failures_table(self.entries["failures"])

    def _one(self) -> Any:
        (group,) = [kind for kind, found in self.entries.items() if found]
        (entry,) = self.entries[group]
        figures = {key: value for key, value in entry.items() if key not in ("sources", "source", *MEASURED_TABLES)}
        sources = entry.get("sources", {"name": entry.get("source", "")})
        parts = {f"components.{each['name']}": each["source"] for each in entry.get("components", ())}
        flat = {name: with_unit(name, value) for name, value in _flat(figures).items() if value is not None}
        return entry_table(str(self.name), flat, {**sources, **parts})


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, the way sources are named."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif isinstance(value, tuple | list) and value and isinstance(value[0], dict):
            flat |= {f"{key}.{inner['name']}": _row(inner) for inner in value}
        else:
            flat[key] = value
    return flat


def _row(row: dict[str, Any]) -> str:
    """A row of a table within an entry, its name apart."""
    return ", ".join(
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key not in ("name", "source")
    )


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
    """All GPUs, clusters, fabrics and failure profiles, or the one of that name.

    Raises:
        ValueError: an unknown name.
    """
    groups: dict[str, tuple[tuple[str, ...], Callable[[str], dict[str, Any]]]] = {
        "gpus": (processor_names(), lambda each: _processor(load_processor(each))),
        "clusters": (cluster_names(), lambda each: _cluster(load_cluster(each))),
        "fabrics": (fabric_names(), lambda each: asdict(load_fabric(each))),
        "failures": (failure_names(), lambda each: _failures(load_failures(each))),
    }
    known = [entry for names, _ in groups.values() for entry in names]
    if name is not None and name not in known:
        raise ValueError(f"name = {name}; allowed: {', '.join(known)}{nearest(name, known)}")
    entries = {group: [load(each) for each in names if name in (None, each)] for group, (names, load) in groups.items()}
    if name is None:
        entries["kernels"] = [_kernel(each) for each in choices()]
    return Listing(entries, name)


def _processor(processor: Processor) -> dict[str, Any]:
    entry = asdict(processor)
    return {key: value for key, value in entry.items() if key not in MEASURED or value != MEASURED[key]}


def _cluster(cluster: Cluster) -> dict[str, Any]:
    return {**asdict(cluster), "processor": cluster.processor.name}


def _failures(profile: Failures) -> dict[str, Any]:
    """A profile, each component with the hours between failures that its count comes to."""
    hours = profile.mtbf_hours()
    entry = asdict(profile)
    return {**entry, "components": [{**each, "mtbf_hours": hours[each["name"]]} for each in entry["components"]]}


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


def _kernel(choice: Choice) -> dict[str, Any]:
    sources = {"implementation": choice.why}
    return {"name": choice.kernel, "device": choice.device, "implementation": choice.implementation, "sources": sources}


def _kernels_table(kernels: list[dict[str, Any]]) -> Any:
    """What runs each kernel of kernels/ on this machine's CPU, and would on CUDA."""
    ways: dict[str, dict[str, str]] = {}
    for each in kernels:
        ways.setdefault(each["name"], {})[each["device"]] = each["implementation"]
    rows = [(name, way["cpu"], way["cuda"]) for name, way in ways.items()]
    return table("fused kernels", ("kernel", "on the CPU", "on CUDA"), rows, note='taken where "kernels.fused" says so')


def _clusters_table(clusters: list[dict[str, Any]]) -> Any:
    rows = []
    for cluster in clusters:
        between, price = cluster["inter_node"], cluster["price"]
        rows.append(
            (
                cluster["name"],
                cluster["processor"],
                str(cluster["gpus_per_node"]),
                f"{cluster['intra_node']['bytes_per_s'] / 1e9:.0f} GB/s",
                f"{between['bytes_per_s'] / 1e9:.4g} GB/s" if between else "-",
                f"{price['per_hour_usd']:.2f}" if price else "-",
            )
        )
    columns = ("cluster", "GPU", "per node", "inside a node, per GPU", "between nodes, per node", "USD per hour")
    return table("clusters", columns, rows)


def _fabrics_table(fabrics: list[dict[str, Any]]) -> Any:
    rows = [
        (
            fabric["name"],
            f"{fabric['bytes_per_s'] / 1e9:.4g} GB/s",
            f"{fabric['efficiency']:.1%}",
            f"{fabric['latency_s'] * 1e6:.1f} us",
        )
        for fabric in fabrics
    ]
    return table("fabrics", ("fabric", "link or port", "reached by a ring", "hop"), rows)


def _failures_table(profiles: list[dict[str, Any]]) -> Any:
    rows = [
        (
            profile["name"],
            f"{profile['observed']['gpus']:,}",
            f"{profile['observed']['days']:g}",
            f"{sum(each['interruptions'] for each in profile['components']):g}",
        )
        for profile in profiles
    ]
    note = "windtunnel hardware NAME shows an entry with each figure's source"
    return table("failures", ("profile", "GPUs", "days", "interruptions"), rows, note=note)
