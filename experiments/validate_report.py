"""`validate` in a terminal and as a picture: predicted against published."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .tables import table
from .validate import Case, Validation

if TYPE_CHECKING:
    from rich.table import Table


def summary_table(result: Validation) -> "Table":
    """One line for each source and kind."""
    rows = [
        (
            f"{one.source}, {one.kind}",
            str(one.cases),
            f"{one.mean_abs_error:.1%}",
            f"{one.mean_error:+.1%}",
            "-" if one.threshold is None else f"{one.threshold:.0%}",
            "ok" if one.ok else "BEYOND",
        )
        for one in result.summaries
    ]
    note = None
    if result.left_out:
        note = f"a sample: {result.left_out} figures are left out; --all takes them too"
    return table(
        "predicted beside published", ("source", "cases", "mean |error|", "mean error", "allowed", ""), rows, note
    )


def case_table(cases: Sequence[Case]) -> "Table":
    """One line for each case."""
    rows = [
        (
            f"{case.source}: {case.name}",
            f"{case.published:.4g}",
            f"{case.predicted:.4g}",
            case.unit,
            f"{case.error:+.1%}",
        )
        for case in cases
    ]
    return table("cases", ("case", "published", "predicted", "unit", "error"), rows)


def excluded_table(result: Validation) -> "Table":
    """Rows without a prediction, by source and reason."""
    counts: dict[tuple[str, str], int] = {}
    for row in result.excluded:
        counts[row.source, row.reason] = counts.get((row.source, row.reason), 0) + 1
    rows = [(source, str(count), reason) for (source, reason), count in counts.items()]
    made = table(f"{len(result.excluded)} rows are excluded", ("source", "rows", "because"), rows)
    made.columns[2].justify = "left"
    return made


def plot_cases(cases: Sequence[Case], path: Path) -> Path:
    """Predicted against published, a panel for each kind, a colour for each source, with the diagonal."""
    from matplotlib import pyplot

    from .plots import INK, STYLE, save

    kinds = list(dict.fromkeys(case.kind for case in cases))
    sources = list(dict.fromkeys(case.source for case in cases))
    colours = pyplot.get_cmap("tab20")
    with pyplot.rc_context(STYLE):
        figure, grid = pyplot.subplots(1, len(kinds), figsize=(4.6 * len(kinds), 5.4), squeeze=False)
        for axes, kind in zip(grid[0], kinds, strict=True):
            mine = [case for case in cases if case.kind == kind]
            ends = [min(min(c.published, c.predicted) for c in mine), max(max(c.published, c.predicted) for c in mine)]
            axes.plot(ends, ends, color=INK, lw=0.8)
            for number, source in enumerate(sources):
                points = [(case.published, case.predicted) for case in mine if case.source == source]
                if points:
                    colour = colours(number % 20)
                    axes.plot(*zip(*points, strict=True), ls="none", marker="o", ms=4, color=colour, label=source)
            units = ", ".join(dict.fromkeys(case.unit for case in mine))
            axes.set(xscale="log", yscale="log", title=kind, xlabel=f"published ({units})", ylabel="predicted")
            axes.legend(frameon=False, fontsize=7)
        return save(figure, path)
