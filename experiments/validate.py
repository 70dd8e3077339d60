"""`validate`: every prediction beside its published witness, with errors; and beside Gloo on this machine.

A case's error is predicted / published - 1. Means are over the absolute errors of a source's cases of one kind. A
source that is beyond its threshold fails the check: thresholds lie a little above what was measured when they were set,
so they guard against drift and say nothing of what would be good.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..reading import nearest
from .files import write_csv
from .published_figures import KINDS, Figure, Unusable
from .validate_sources import LIVE, LIVE_THRESHOLDS, SOURCES, Source

SAMPLE = 6
"""Figures of a source and kind that are simulated unless all are asked for."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A published figure and its prediction.

    Attributes:
        error: predicted / published - 1.
    """

    name: str
    source: str
    kind: str
    published: float
    predicted: float
    unit: str

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The cases of one source and kind.

    Attributes:
        mean_abs_error, mean_error: of the errors, without and with their signs.
        threshold: of the mean absolute error; None where there is none.
    """

    source: str
    kind: str
    cases: int
    mean_abs_error: float
    mean_error: float
    threshold: float | None

    @property
    def ok(self) -> bool:
        return self.threshold is None or self.mean_abs_error <= self.threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What `validate` found.

    Attributes:
        excluded: rows that no prediction can be held against.
        left_out: how many figures the sample left out.
        files: what was written, by name.
    """

    cases: tuple[Case, ...]
    excluded: tuple[Unusable, ...]
    left_out: int
    files: dict[str, Path]

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return summarise(self.cases)

    @property
    def ok(self) -> bool:
        return all(summary.ok for summary in self.summaries)


def validate(
    *,
    sources: Sequence[str] = (),
    kinds: Sequence[str] = (),
    everything: bool = False,
    live: bool = False,
    out: str | Path | None = None,
    say: Say = lambda line: None,
) -> Validation:
    """Simulate what published tables measured, and compare.

    Args:
        sources, kinds: which; all that there are.
        everything: all figures of a source; else a sample that is spread over them and always the same.
        live: train on Gloo ranks of this machine too, and compare time, bytes and peak memory.
        out: folder for a CSV of the cases and a picture; None for neither.
        say: called with a line about what is under way.

    Raises:
        ValueError: an unknown source or kind.
    """
    _check("source", sources, (*SOURCES, LIVE))
    _check("kind", kinds, KINDS)
    chosen = [name for name in SOURCES if name in (sources or SOURCES)]
    figures: list[Figure] = []
    excluded: list[Unusable] = []
    left_out = 0
    for name in chosen:
        for kind, found in _by_kind(SOURCES[name], name, excluded).items():
            if kind in (kinds or KINDS):
                taken = found if everything else spread(found, SOURCES[name].sample or SAMPLE)
                left_out += len(found) - len(taken)
                figures += taken
    cases = _predicted(figures, excluded, say)
    if live or LIVE in sources:
        from .validate_live import live_cases

        cases += [case for case in live_cases(say) if case.kind in (kinds or KINDS)]
    if not cases:
        raise ValueError(f"no case has source {', '.join(sources)} and kind {', '.join(kinds)}; allowed: leave one out")
    files = {} if out is None else _write(cases, Path(out))
    return Validation(cases=tuple(cases), excluded=tuple(excluded), left_out=left_out, files=files)


def _check(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{option} = {name!r}; allowed: {', '.join(known)}{nearest(name, known)}")


def _by_kind(source: Source, name: str, excluded: list[Unusable]) -> dict[str, list[Figure]]:
    """A source's figures by kind; what it has of unusable rows goes to `excluded`."""
    found: dict[str, list[Figure]] = {}
    for figure in source.figures(name):
        if isinstance(figure, Unusable):
            excluded.append(figure)
        else:
            found.setdefault(figure.kind, []).append(figure)
    return found


def spread(figures: Sequence[Figure], count: int) -> list[Figure]:
    """At most `count` of them at equal distances, the first and the last among them."""
    if len(figures) <= count:
        return list(figures)
    return [figures[round(place * (len(figures) - 1) / (count - 1))] for place in range(count)]


def _predicted(figures: Sequence[Figure], excluded: list[Unusable], say: Say) -> list[Case]:
    cases = []
    for number, figure in enumerate(figures, 1):
        say(f"{number}/{len(figures)} {figure.source}: {figure.name}")
        try:
            predicted = figure.predict()
        except ValueError as error:  # a layout that the engine or the simulator refuses
            excluded.append(Unusable(name=figure.name, source=figure.source, reason=f"not simulated: {error}"))
            continue
        cases.append(
            Case(
                name=figure.name,
                source=figure.source,
                kind=figure.kind,
                published=figure.published,
                predicted=predicted,
                unit=figure.unit,
            )
        )
    return cases


def summarise(cases: Iterable[Case]) -> tuple[Summary, ...]:
    """One line for each source and kind, in the order in which they come."""
    groups: dict[tuple[str, str], list[float]] = {}
    for case in cases:
        groups.setdefault((case.source, case.kind), []).append(case.error)
    return tuple(
        Summary(
            source=source,
            kind=kind,
            cases=len(errors),
            mean_abs_error=fmean(map(abs, errors)),
            mean_error=fmean(errors),
            threshold=thresholds_of(source).get(kind),
        )
        for (source, kind), errors in groups.items()
    )


def thresholds_of(source: str) -> Mapping[str, float]:
    """The largest mean absolute error allowed of a source, by kind."""
    return LIVE_THRESHOLDS if source == LIVE else SOURCES[source].thresholds


def mean_abs_error(cases: Sequence[Case]) -> dict[str, Any]:
    """Over all cases, by kind, and by source and kind."""

    def mean(some: Iterable[Case]) -> float:
        return fmean(abs(case.error) for case in some)

    kinds = dict.fromkeys(case.kind for case in cases)
    sources = dict.fromkeys(case.source for case in cases)
    return {
        "overall": mean(cases),
        "by_kind": {kind: mean(case for case in cases if case.kind == kind) for kind in kinds},
        "by_source": {
            source: {
                kind: mean(case for case in cases if (case.source, case.kind) == (source, kind))
                for kind in dict.fromkeys(case.kind for case in cases if case.source == source)
            }
            for source in sources
        },
    }


def to_dict(result: Validation) -> dict[str, Any]:
    """The contract's JSON object, and which sources were fitted, what their errors are made of, which are beyond."""
    return {
        "cases": to_rows(result.cases),
        "mean_abs_error": mean_abs_error(result.cases),
        "fitted": {name: source.fitted for name, source in SOURCES.items() if source.fitted},
        "explained": {name: source.because for name, source in SOURCES.items() if source.because},
        "beyond": [f"{one.source}, {one.kind}" for one in result.summaries if not one.ok],
        "excluded": [asdict(row) for row in result.excluded],
        "left_out": result.left_out,
        **{name: str(path) for name, path in result.files.items()},
    }


def to_rows(cases: Sequence[Case]) -> list[dict[str, Any]]:
    return [{**asdict(case), "error": case.error} for case in cases]


def _write(cases: Sequence[Case], folder: Path) -> dict[str, Path]:
    from .validate_report import plot_cases

    return {
        "csv": write_csv(folder / "validate.csv", to_rows(cases)),
        "plot": plot_cases(cases, folder / "validate.png"),
    }
