"""A plan rehearsed: what each rank does with a micro-batch, one micro-batch after the other.

A flight performs it (engine/stage_flight.py), and `sim` composes a step of its parts.
"""

from dataclasses import replace

from .pipeline import BACKWARD, FORWARD, INPUT, WEIGHT, Action, Plan


def rehearsal(plan: Plan, micro_batches: int) -> Plan:
    """The chunks of a plan, for so many micro-batches, one at a time: forwards through all, backwards through all."""
    splits = any(action.kind == WEIGHT for action in plan.actions(0))
    backward = (INPUT, WEIGHT) if splits else (BACKWARD,)
    program = tuple(
        action
        for number in range(micro_batches)
        for action in (
            *(Action(FORWARD, chunk, number) for chunk in range(plan.chunks)),
            *(Action(kind, chunk, number) for chunk in reversed(range(plan.chunks)) for kind in backward),
        )
    )
    return replace(
        plan,
        schedule="rehearsal",
        micro_batches=micro_batches,
        micro_batches_per_step=micro_batches,
        most_in_flight=(plan.chunks,) * plan.ranks,
        programs=(program,) * plan.ranks,
    )
