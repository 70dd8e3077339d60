"""A hardware profile from measured kernel times: those of a PyTorch profiler trace, beside what was predicted."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..collectives.trace import Kernel
from ..reading import read_toml
from ..sim.hardware import Cluster, cluster_names, load_cluster
from ..sim.kernel import kernel_seconds
from ..sim.processor import Processor
from .calibrate import kernel_curves, matmul_points, to_toml
from .files import write_whole
from .kineto import Measured, Profile, read_profile
from .tables import count, table
from .tables import seconds as time_name

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRow:
    """An operator of the profile; seconds are of all its calls.

    Attributes:
        predicted_s: by the hardware that the profile started from; None where that cannot compute it.
        fitted_s: by the profile that the measurements made.
    """

    name: str
    family: str
    calls: int
    measured_s: float
    predicted_s: float | None
    fitted_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledHardware:
    """What a profiler trace makes of a cluster.

    Attributes:
        cluster: the base with the measured products and curves in its processor.
        rows: by operator, the most time first.
        unknown: by operator that could not be described, (why, seconds).
        written: the cluster file, which every verb takes; its processor lies beside it.
    """

    cluster: Cluster
    device: str
    rows: tuple[OperatorRow, ...]
    unknown: Mapping[str, tuple[str, float]]
    written: Path


def calibrate_from_profile(path: str | Path, base: str | Path, folder: Path) -> ProfiledHardware:
    """Put the kernel times of a trace of torch.profiler into the processor of a cluster, and write it.

    The more sizes the profiled step has, the further the result reaches: beyond the sizes that were measured, products
    are interpolated and other operators keep the rate of the nearest size.

    Args:
        path: a Chrome trace, recorded with `record_shapes=True`.
        base: a cluster of the catalogue or a file, for all that a profile does not tell.
        folder: for "profile.toml" and "profile.processor.toml".

    Raises:
        ValueError: the trace or the base cannot be read, or the trace is of another kind of device.
    """
    cluster = load_cluster(base)
    profile = read_profile(path)
    if profile.device != cluster.processor.kind:
        raise ValueError(
            f"base = {base}: a {cluster.processor.kind} for a profile of a {profile.device};"
            f" allowed: a cluster of {profile.device}s"
        )
    made = replace(cluster, processor=fitted(profile, cluster.processor, Path(path).name))
    written = _write(made.processor, base, folder)
    return ProfiledHardware(
        cluster=load_cluster(written),
        device=profile.device,
        rows=operator_rows(profile, cluster.processor, made.processor),
        unknown=profile.unknown,
        written=written,
    )


def fitted(profile: Profile, processor: Processor, source: str) -> Processor:
    """The processor with the median time of every kernel of the profile."""
    from .timing import KernelTime  # it loads torch

    timed = [KernelTime(one.kernel, median(one.seconds)) for one in profile.measured]
    products = [one for one in timed if one.kernel.family == "matmul" and one.kernel.dtype in processor.peak_flops]
    others = [one for one in timed if one.kernel.family != "matmul" and _moved(one.kernel)]
    points, curves = matmul_points(products), kernel_curves(others)
    said = f"measured kernel times of the torch.profiler trace {source}"
    return replace(
        processor,
        matmul_points=points or processor.matmul_points,
        kernel_curves=curves or processor.kernel_curves,
        sources={
            **processor.sources,
            **({"matmul_points": said} if points else {}),
            **({"kernel_curves": said} if curves else {}),
        },
    )


def _moved(kernel: Kernel) -> bool:
    """Whether it touches memory at all: a curve is over bytes."""
    return bool(kernel.read_bytes + kernel.write_bytes)


def operator_rows(profile: Profile, before: Processor, after: Processor) -> tuple[OperatorRow, ...]:
    """Measured beside predicted, by operator."""
    by_name: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for one in profile.measured:
        by_name[one.kernel.name, one.kernel.family].append(one)
    rows = [
        OperatorRow(
            name=name,
            family=family,
            calls=sum(len(one.seconds) for one in found),
            measured_s=sum(sum(one.seconds) for one in found),
            predicted_s=_predicted(found, before),
            fitted_s=_predicted(found, after),
        )
        for (name, family), found in by_name.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.measured_s))


def _predicted(found: Sequence[Measured], processor: Processor) -> float | None:
    """Seconds of all calls; what a host computes itself costs the issue of each op besides."""
    overhead_s = 0.0 if processor.asynchronous else processor.launch_s
    try:
        return sum(len(one.seconds) * (kernel_seconds(one.kernel, processor) + overhead_s) for one in found)
    except ValueError:  # no arithmetic in that data type
        return None


def _write(processor: Processor, base: str | Path, folder: Path) -> Path:
    """The processor and the cluster that has it, as files."""
    beside = folder / "profile.processor.toml"
    figures = {name: value for name, value in asdict(processor).items() if value is not None and value != ()}
    write_whole(beside, to_toml(figures))
    cluster = {"base": str(base)} if str(base) in cluster_names() else read_toml(Path(base))
    return write_whole(folder / "profile.toml", to_toml({**cluster, "gpu": f"./{beside.name}"}))


def operator_table(hardware: ProfiledHardware) -> "Table":
    """Measured beside predicted, then what was not understood."""

    def ratio(predicted: float | None, measured: float) -> str:
        return "-" if predicted is None else f"{predicted / measured - 1:+.0%}"

    rows = [
        (
            row.name,
            row.family,
            count(row.calls),
            time_name(row.measured_s),
            "-" if row.predicted_s is None else time_name(row.predicted_s),
            ratio(row.predicted_s, row.measured_s),
            ratio(row.fitted_s, row.measured_s),
        )
        for row in hardware.rows
    ]
    rows += [
        (name, "not understood", "", time_name(seconds), "-", "-", "-")
        for name, (_, seconds) in hardware.unknown.items()
    ]
    columns = ("operator", "family", "calls", "measured", "predicted", "error", "error, fitted")
    note = f"predicted by the base's processor; fitted: by {hardware.written}, of the medians by shape"
    return table(f"kernel times on the {hardware.device}", columns, rows, note)


def to_dict(hardware: ProfiledHardware) -> dict[str, Any]:
    """The JSON object of `calibrate --from-profile`: the profile, and the operators that made it."""
    return {
        **asdict(hardware.cluster),
        "operators": [asdict(row) for row in hardware.rows],
        "unknown": [{"name": name, "reason": why, "seconds": s} for name, (why, s) in hardware.unknown.items()],
        "written": str(hardware.written),
    }
