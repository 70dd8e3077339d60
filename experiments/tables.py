"""Results as tables in a terminal. rich is imported when the first one is printed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..sim.result import StepResult

if TYPE_CHECKING:
    from rich.table import Table

    from .demo import Demo
    from .judgement import StageResult
    from .remedies import Remedy
    from .verify import Verification

GIGA = 1e9


def show(table: "Table | str") -> None:
    """Print to stdout, as wide as the terminal, or 120 columns where there is none."""
    import os
    import sys

    from rich.console import Console

    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120"))
    Console(width=width, highlight=False).print(table)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str | None = None) -> "Table":
    """A plain table; the first column is a name, the others are right-aligned."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption=note, caption_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        made.add_row(*row)
    return made


def seconds(value: float) -> str:
    """Three significant figures with a unit: "1.24 s", "83.1 ms"."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1 or unit == "us":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError


def count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def step_table(results: Sequence[StepResult]) -> "Table":
    """One line per number of GPUs."""
    layout = results[0].layout
    title = (
        f"{layout['model']} on {layout['cluster']}: ZeRO {layout['zero']}, micro-batch {layout['micro_batch']},"
        f" sequence {layout['seq']:,}, {layout['precision']}, recompute {layout['recompute']}"
    )
    rows = [
        (
            f"{result.layout['gpus']:,}",
            f"{result.layout['global_batch']:,}",
            seconds(result.step_time_s),
            f"{result.tflops_per_gpu:.1f}",
            f"{result.mfu:.1%}",
            count(result.tokens_per_s),
            *(
                f"{result.breakdown_s[cause] / result.step_time_s:.1%}"
                for cause in ("compute", "exposed_communication")
            ),
            f"{result.peak_memory_bytes['total'] / GIGA:.1f}",
            "yes" if result.fits else "NO",
        )
        for result in results
    ]
    columns = (
        "GPUs",
        "batch",
        "step",
        "TFLOP/s",
        "MFU",
        f"{layout['counts']}/s",
        "compute",
        "exposed comm.",
        "peak GB",
        "fits",
    )
    return table(title, columns, rows)


def memory_table(result: StepResult) -> "Table":
    """Peak memory by category."""
    rows = [(name, f"{nbytes / GIGA:.2f}") for name, nbytes in result.peak_memory_bytes.items()]
    return table("memory of the fullest GPU at its peak", ("category", "GB"), rows)


def overflow(result: StepResult, remedies: Sequence["Remedy"], *, searched: bool) -> list[str]:
    """What does not fit, and what would help, in lines.

    Args:
        searched: whether remedies were looked for.
    """
    excess = result.first_to_exceed
    assert excess is not None
    place = [excess.phase]
    place += [f"micro-batch {excess.micro_batch}"] if excess.micro_batch is not None else []
    place += [f"block {excess.block}"] if excess.block is not None else []
    live = ", ".join(f"{name} {nbytes / GIGA:.1f}" for name, nbytes in excess.live_bytes.items() if nbytes)
    lines = [
        f"does not fit: {excess.op} asks for {excess.requested_bytes / GIGA:.2f} GB ({excess.category}) in"
        f" {', '.join(place)}, where {excess.reserved_bytes / GIGA:.1f} of {excess.limit_bytes / GIGA:.1f} GB are held",
        f"in use then, in GB: {live}",
    ]
    lines += [
        f"it fits with {remedy.change}: {seconds(remedy.step_time_s)} per step ({remedy.relative_step_time:.2f} times"
        f" this one), {remedy.reserved_bytes / GIGA:.1f} GB held"
        for remedy in remedies
    ]
    return lines if remedies or not searched else [*lines, "no remedy was found that fits: use more or larger GPUs"]


def verification_table(verification: "Verification") -> "Table":
    rows = [
        (
            f"ZeRO {result.zero}",
            f"{result.max_rel_loss_diff:.1e}",
            f"{result.rel_gradient_diff:.1e}",
            f"{result.rel_state_diff:.1e}",
            f"{result.global_rel_param_diff:.1e}",
            *map(count, (result.expected_bytes, result.predicted_bytes, result.measured_bytes)),
            *map(
                count,
                (
                    result.expected_model_state_bytes,
                    result.predicted_model_state_bytes,
                    result.measured_model_state_bytes,
                ),
            ),
            "ok" if result.ok else "OFF",
        )
        for result in verification.results
    ]
    columns = (
        "",
        "loss",
        "gradients",
        "state",
        "parameters",
        "expected",
        "predicted",
        "measured",
        "expected",
        "predicted",
        "measured",
        "",
    )
    note = (
        "loss, gradients, optimizer state, parameters: relative distance from one process. Then bytes that each rank"
        " sends per step, and bytes of model state that it keeps, by three witnesses each."
    )
    title = (
        f"{verification.world} ranks against one process, {verification.precision},"
        f" accumulation {verification.accumulation}"
    )
    return table(title, columns, rows, note)


def plain_verification(verification: "Verification") -> str:
    """As `verification_table`, in plain lines: what an assertion says."""
    lines = [
        f"training on {verification.world} ranks is not what one process does"
        f" ({verification.precision}, accumulation {verification.accumulation}; relative distances):",
        f"{'':8}{'loss':>10}{'gradients':>11}{'state':>10}{'parameters':>12}",
    ]
    for result in verification.results:
        ratios = (result.max_rel_loss_diff, result.rel_gradient_diff, result.rel_state_diff)
        loss, gradient, state = (f"{ratio:.1e}" for ratio in ratios)
        verdict = "ok" if result.ok else "OFF"
        lines.append(
            f"ZeRO {result.zero:<3}{loss:>10}{gradient:>11}{state:>10}{result.global_rel_param_diff:>12.1e}  {verdict}"
        )
    return "\n".join([*lines, *failures(verification)])


def failures(verification: "Verification") -> list[str]:
    """A line for each stage that is off: what is, and where it was first."""
    return [f"ZeRO {result.zero} is OFF: {reason(result)}" for result in verification.results if not result.ok]


def reason(result: "StageResult") -> str:
    place = result.first_difference
    if place is None:
        return (
            f"training is right, but each rank sends {count(result.measured_bytes)} bytes per step"
            f" (expected {count(result.expected_bytes)}, predicted {count(result.predicted_bytes)}) and keeps"
            f" {count(result.measured_model_state_bytes)} (expected {count(result.expected_model_state_bytes)},"
            f" predicted {count(result.predicted_model_state_bytes)})"
        )
    if place["what"] == "loss":
        return f"first in step {place['step']}: the loss, where no tensor is off"
    return f"first in step {place['step']}, on rank {place['rank']}: {place['what']} of {place['parameter']}"


def demo_table(demo: "Demo") -> "Table":
    rows = [
        (
            f"ZeRO {run.zero}",
            seconds(run.measured_step_s),
            seconds(run.predicted_step_s),
            f"{run.step_error:+.1%}",
        )
        for run in demo.runs
    ]
    return table("a training step on this machine", ("", "measured", "predicted", "error"), rows)


def entry_table(title: str, entry: Mapping[str, Any], sources: Mapping[str, str]) -> "Table":
    """One catalogue entry: each figure with its source; one for a whole group ("peak_flops") serves its members."""
    from rich.table import Table

    made = table(title, ("figure", "value"), [])
    assert isinstance(made, Table)
    made.columns[1].justify = "left"
    made.add_column("source", overflow="fold")
    for name, value in entry.items():
        source = sources.get(name) or sources.get(name.partition(".")[0], "")
        made.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value), source)
    return made
