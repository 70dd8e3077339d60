"""Pipeline schedules beside their closed forms: the idle share of a step and the activations kept, by micro-batches."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from ..collectives.pipeline import Plan, peak_in_flight
from ..collectives.pipeline_messages import prefetch, with_communication
from ..collectives.pipeline_schedules import schedule
from ..sim.pipeline import ActionPrice, StagePrice, compose
from .files import write_csv
from .reproduce import Item, Say

RANKS = 8
MICRO_BATCHES = (8, 16, 32, 64, 128, 256)
SHOWN = 64
"""Micro-batches of which the sentence speaks."""

CASES = (
    ("sequential", 1),
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 4),
    ("zb-h1", 1),
    ("zb-v", 2),
    ("pipedream-2bw", 1),
)
"""(schedule, chunks per rank)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A schedule with a number of micro-batches.

    Attributes:
        bubble: share of the step in which a rank is idle, simulated, in the mean over the ranks.
        closed_form: of the same, or None where there is none for so few micro-batches.
        most_in_flight: micro-batches whose activations (of all of its layers) the worst rank keeps.
    """

    schedule: str
    chunks: int
    ranks: int
    micro_batches: int
    bubble: float
    closed_form: float | None
    most_in_flight: float
    performed: bool

    @property
    def name(self) -> str:
        return f"{self.schedule}, {self.chunks} chunks" if self.schedule == "interleaved" else self.schedule


def stage_prices(plan: Plan) -> list[StagePrice]:
    """Equal stages: a forward of all layers of a rank takes a second, a backward two, each part of it one."""
    seconds = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
    actions = {
        (kind, chunk): ActionPrice(seconds=taken / plan.chunks)
        for kind, taken in seconds.items()
        for chunk in range(plan.chunks)
    }
    return [StagePrice(actions=actions)] * plan.ranks


def study(ranks: int = RANKS, micro_batches: Sequence[int] = MICRO_BATCHES) -> list[Row]:
    """All schedules, simulated with free messages."""
    rows = []
    for name, chunks in CASES:
        one = schedule(name)
        for number in micro_batches:
            plan = one.plan(ranks, number, chunks)
            step = compose(prefetch(with_communication(plan)), stage_prices(plan))
            exact: Fraction | None = one.bubble(ranks, number, chunks)
            rows.append(
                Row(
                    schedule=name,
                    chunks=chunks,
                    ranks=ranks,
                    micro_batches=number,
                    bubble=sum(rank.bubble_s for rank in step.ranks) / (ranks * step.step_s),
                    closed_form=None if exact is None else float(exact),
                    most_in_flight=max(peak_in_flight(plan)) / chunks,
                    performed=one.performed,
                )
            )
    return rows


def sentence(rows: Sequence[Row], shown: int = SHOWN) -> str:
    """What the study shows, with its figures."""
    off = max(abs(row.bubble - row.closed_form) for row in rows if row.closed_form is not None)
    said = ", ".join(
        f"{row.bubble:.2%} {row.name} ({row.most_in_flight:g} kept{'' if row.performed else '; priced only'})"
        for row in rows
        if row.micro_batches == shown
    )
    return (
        f"of a step of {shown} micro-batches on {rows[0].ranks} pipeline ranks a rank is idle (and keeps the"
        f" activations of so many micro-batches): {said}; simulated and closed form differ by at most {off:.1g}"
    )


def reproduce(folder: Path, say: Say) -> Item:
    """The study as a picture, a table and a sentence."""
    rows = study()
    written = [asdict(row) for row in rows]
    return Item(
        name="pipeline_schedules",
        plot=plot_schedules(rows, folder / "pipeline_schedules.png"),
        csv=write_csv(folder / "pipeline_schedules.csv", written),
        rows=written,
        sentence=sentence(rows),
    )


COLOURS = ("#8d99ae", "#c8553d", "#1f2933", "#e0a458", "#a4632a", "#2b6f8f", "#3f8f5f", "#6d597a")
MARKS = "sovD^P*X"


def plot_schedules(rows: Sequence[Row], path: Path) -> Path:
    """Idle share (points simulated, lines the closed forms) and activations kept, against micro-batches."""
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    from .plots import STYLE, save  # matplotlib loads slowly

    counts = sorted({row.micro_batches for row in rows})
    with pyplot.rc_context(STYLE):
        figure, (idle, kept) = pyplot.subplots(1, 2, figsize=(12.4, 5.0))
        for number, name in enumerate(dict.fromkeys(row.name for row in rows)):
            mine = [row for row in rows if row.name == name]
            # Marks that lie on each other are seen by their size: those drawn later are smaller.
            none = all(row.bubble == 0 for row in mine)
            label = f"{name} (no bubble; priced only)" if none else name
            look = {"color": COLOURS[number], "marker": MARKS[number], "ms": 13 - 1.1 * number, "label": label}
            kept.plot(counts, [row.most_in_flight for row in mine], lw=1.2, **look)
            if none:
                continue  # a logarithm has no place for it
            idle.plot(counts, [row.bubble for row in mine], ls="none", **look)
            line = [(row.micro_batches, row.closed_form) for row in mine if row.closed_form is not None]
            idle.plot(*zip(*line, strict=True), color=COLOURS[number], lw=1.4)
        for axes in (idle, kept):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.minorticks_off()
        idle.yaxis.set_major_formatter(PercentFormatter(1.0))
        idle.set(xlabel="micro-batches", ylabel="idle share of a step")
        idle.set_title(f"Bubble on {rows[0].ranks} ranks: simulated (points), closed form (lines)")
        powers = [1 << power for power in range(max(counts).bit_length())]
        kept.set_yticks(powers, [str(power) for power in powers])
        kept.set(xlabel="micro-batches", ylabel="micro-batches kept on the worst rank", title="Activations in flight")
        kept.legend(frameon=False, fontsize=8)
        return save(figure, path)
