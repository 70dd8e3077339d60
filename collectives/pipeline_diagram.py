"""A pipeline plan as the textbook picture of it, in text.

Reading it: time runs to the right, a line is a rank and a column is a slot of time. `3` is the forward of micro-batch
3, `b3` its backward, `i3` and `w3` the parts of a backward for the input and for the weights; `3.1` is in chunk 1; `=`
goes on with the action to its left, `.` is idle.
"""

from .pipeline import FORWARD, Action, Plan
from .pipeline_clock import Costs, play

IDLE, GOES_ON = ".", "="


def diagram(plan: Plan, costs: Costs | None = None) -> str:
    """A line per rank and a column per unit of time, with free messages.

    Args:
        costs: whole numbers; left out: a backward takes two slots, each other action one.

    Raises:
        ValueError: costs that are not whole numbers above 0, or ranks that wait for each other.
    """
    costs = costs or Costs()
    for name, cost in (("forward", costs.forward), ("input", costs.input), ("weight", costs.weight)):
        if not isinstance(cost, int) or cost < 1:
            raise ValueError(f"{name} = {cost} in a diagram of slots; allowed: whole numbers from 1 on")
    timetable = play(plan, lambda rank, action: costs.of(action))
    length = max(int(slots[-1].end) for slots in timetable)
    lines = []
    for slots in timetable:
        line = [IDLE] * length
        for action, start, end in slots:
            line[int(start) : int(end)] = [_cell(action), *[GOES_ON] * (int(end) - int(start) - 1)]
        lines.append(line)
    width = max(len(cell) for line in lines for cell in line)
    heads = [f"rank {rank}" for rank in range(plan.ranks)]
    table = [
        " ".join([head.ljust(len(heads[-1])) + " |", *(cell.ljust(width) for cell in line)]).rstrip()
        for head, line in zip(heads, lines, strict=True)
    ]
    return "\n".join([_title(plan), *table])


def _cell(action: Action) -> str:
    return str(action).removeprefix(FORWARD).lower()


def _title(plan: Plan) -> str:
    chunks = f", {plan.chunks} chunks each" if plan.chunks > 1 else ""
    steps = "" if plan.flushes else f" of {plan.micro_batches // plan.micro_batches_per_step} steps"
    return f"{plan.schedule} on {plan.ranks} ranks{chunks}, {plan.micro_batches} micro-batches{steps}"
