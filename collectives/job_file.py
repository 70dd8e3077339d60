"""A whole job as a JSON file, and back: its layout and the traces of its distinct ranks.

Whoever has such a file can price the job on any cluster: the traces name what is done and not how long it takes, and
the plan of a pipeline follows from the layout's schedule, stages, micro-batches and chunks.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .pipeline import Plan
from .pipeline_messages import prefetch, with_communication
from .pipeline_schedules import schedule
from .trace import Trace
from .trace_file import from_plain, to_plain

FORMAT, VERSION = "windtunnel job", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a training job does in a step.

    Attributes:
        layout: every option as resolved, by name; "pp", "schedule", "accumulation" and "interleave" make the plan.
        precision: data type whose peak the utilisation is measured against.
        tokens_per_step: of the whole job.
        message_bytes: what a pipeline rank hands to the next one of a micro-batch; 0 without stages.
        traces: of the distinct pipeline ranks; one without stages.
        stages: by pipeline rank, the number of its trace.
    """

    layout: Mapping[str, Any]
    precision: str
    tokens_per_step: int
    message_bytes: int
    traces: tuple[Trace, ...]
    stages: tuple[int, ...]

    def __post_init__(self) -> None:
        unused = set(range(len(self.traces))) ^ set(self.stages)
        if unused or len(self.stages) != self.layout["pp"]:
            raise ValueError(
                f"stages = {list(self.stages)} of {len(self.traces)} traces and pp = {self.layout['pp']}; allowed: for"
                " each of the pp pipeline ranks the number of its trace, and each trace used"
            )

    def plan(self) -> Plan:
        """Who computes what in a step, with messages that are posted ahead."""
        layout = self.layout
        made = schedule(layout["schedule"]).plan(layout["pp"], layout["accumulation"], layout["interleave"])
        return prefetch(with_communication(made))


def dumps(job: Job) -> str:
    """The job as one JSON object."""
    return json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "layout": dict(job.layout),
            "precision": job.precision,
            "tokens_per_step": job.tokens_per_step,
            "message_bytes": job.message_bytes,
            "stages": job.stages,
            "traces": [to_plain(trace) for trace in job.traces],
        }
    )


def loads(text: str) -> Job:
    """The job that `dumps` wrote.

    Raises:
        ValueError: not a job, or one of a version that this program does not know.
    """
    try:
        data = json.loads(text)
        if data.get("format") != FORMAT:
            raise ValueError(
                f"format = {data.get('format')!r}; allowed: {FORMAT!r}, as simulate --save-trace writes it"
            )
        if data["version"] != VERSION:
            raise ValueError(
                f"version = {data['version']!r} of the job; this program reads version {VERSION}: a newer one reads"
                " newer jobs"
            )
        return Job(
            layout=data["layout"],
            precision=data["precision"],
            tokens_per_step=data["tokens_per_step"],
            message_bytes=data["message_bytes"],
            traces=tuple(map(from_plain, data["traces"])),
            stages=tuple(data["stages"]),
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a job: {error!r}") from None
