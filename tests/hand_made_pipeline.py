"""A pipelined job of hand-made flights: a forward takes 2 s, a backward 3 s, the update 1 s, a message 1 s."""

from hand_made import gather, kernel
from windtunnel.collectives.job_file import Job
from windtunnel.collectives.pipeline import phase_name
from windtunnel.collectives.pipeline_schedules import SCHEDULES
from windtunnel.collectives.trace import Alloc, Call, Free, Op, Phase, Ref, Trace, Wait

PARAMETERS, ACTIVATIONS, MESSAGE = 100, 8, 1


def flight(ranks: int, micro_batches: int) -> Trace:
    """Of any rank. Every forward gathers beside its first kernel and needs it for the second one."""
    plan = SCHEDULES["1f1b"].plan(ranks, micro_batches, 1)
    names = dict.fromkeys(phase_name(action, micro_batches) for action in plan.actions(0))
    segments: dict[str, tuple[Op, ...]] = {"initialize": (Alloc(PARAMETERS, "parameters"),)}
    for name in sorted(names, key=lambda name: (name.split()[1], name.startswith("backward"))):
        if name.startswith("forward"):
            awaits = Wait(Ref(name, 0, True, 0, 1))
            segments[name] = (Alloc(ACTIVATIONS, "activations"), gather(1), kernel(1, "a"), awaits, kernel(1, "b"))
        else:
            made = Ref(name.replace("backward", "forward"), 0, True, 0, 0)
            segments[name] = (kernel(3, "c"), Free(made))
    segments["update"] = (kernel(1, "update"),)
    calls = {name: (Call(number, name, -1),) for number, name in enumerate(segments)}
    phases = [Phase("initialize", 0, calls.pop("initialize"))]
    phases += [Phase(name, step, called) for step in (1, 2) for name, called in calls.items()]
    return Trace({"data": 2, "pipeline": ranks}, 0, tuple(segments.values()), tuple(phases))


def pipelined(ranks: int, micro_batches: int) -> Job:
    return Job(
        layout={"model": "m", "cluster": "c", "gpus": 2 * ranks, "pp": ranks, "schedule": "1f1b",
                "accumulation": micro_batches, "interleave": 1},
        precision="fp32",
        tokens_per_step=1,
        message_bytes=MESSAGE,
        traces=(flight(ranks, micro_batches),),
        stages=(0,) * ranks,
    )  # fmt: skip
