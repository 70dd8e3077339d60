"""What `simulate --out` writes of a step: its numbers, three pictures, a timeline."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..collectives.chakra_file import dumps
from ..collectives.job_file import Job
from ..sim.chakra import export
from ..sim.hardware import Cluster, load_cluster
from ..sim.job import JobRecord, record_job
from ..sim.result import StepResult
from ..sim.timeline import to_json
from .files import write_whole
from .layout import Layout, as_slowest_sees


def write_step(
    job: Job,
    cluster: str | Cluster,
    results: Sequence[StepResult],
    answers: Sequence[Mapping[str, Any]],
    folder: Path,
) -> dict[str, str]:
    """Write the files and name them by what they show.

    Args:
        job: of the last result, whose memory, pipeline and timeline are drawn.
        results: a bar of the breakdown for each.
        answers: the same as JSON objects.
    """
    from .plots_step import plot_breakdown, plot_memory, plot_pipeline

    last = results[-1]
    machine = cluster if isinstance(cluster, Cluster) else load_cluster(cluster)
    machine = as_slowest_sees(Layout(**last.layout), machine)
    record = record_job(job, machine, fidelity=last.layout["fidelity"])
    answer = answers[0] if len(answers) == 1 else {"results": list(answers)}
    title = f"{last.layout['model']} on {last.layout['gpus']:,} GPUs of {last.layout['cluster']}"
    files = {
        "json": write_whole(folder / "result.json", json.dumps(answer, indent=2)),
        "breakdown": plot_breakdown(results, folder / "breakdown.png"),
        "memory": plot_memory(_memory_picture(record, last, machine, title), folder / "memory.png"),
    }
    if record.plan is not None and record.step is not None:
        named = f"{title}: {last.layout['schedule']}, {last.layout['accumulation']} micro-batches"
        files["pipeline"] = plot_pipeline(record.plan, record.step, named, folder / "pipeline.png")
    files["timeline"] = write_whole(folder / "timeline.json", to_json(record.timeline))
    return {name: str(path) for name, path in files.items()}


def _memory_picture(record: JobRecord, result: StepResult, machine: Cluster, title: str) -> Any:
    from .plots_step import MemoryPicture

    processor = machine.processor
    rank = f", pipeline rank {record.rank}" if record.plan is not None else ""
    return MemoryPicture(
        title=f"{title}{rank}: memory through a step",
        track=record.memory,
        begin_s=record.begin_s,
        end_s=record.end_s,
        capacity_bytes=processor.memory_bytes - processor.framework_bytes,
        reserved_bytes=result.peak_memory_bytes["reserved"],
        note=f" ({record.skipped} further micro-steps repeat the last but one)" if record.skipped else "",
    )


def write_chakra(job: Job, cluster: str | Cluster, folder: Path, fidelity: str) -> Path:
    """A Chakra trace of every rank, "step.RANK.et", and the groups of ranks, as ASTRA-sim takes them."""
    machine = cluster if isinstance(cluster, Cluster) else load_cluster(cluster)
    graphs = export(job, machine, fidelity=fidelity)
    for rank in range(graphs.mesh.world):
        write_whole(folder / f"step.{rank}.et", dumps(graphs.nodes(rank), graphs.about()))
    return write_whole(folder / "groups.json", graphs.group_file()).parent
