"""How fast training goes and when it will be done: an estimate from what has passed, and a bar on stderr."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

WINDOW = 50
"""Steps that an estimate looks back on: long enough to be steady, short enough to see a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How far training was at one instant, counted from its start."""

    at_s: float
    steps: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Rates, and how long the rest will take at them; inf before anything has been done."""

    samples_per_s: float
    tokens_per_s: float
    remaining_s: float


def pace(first: Mark, last: Mark, total_steps: int) -> Pace:
    """The pace between two marks, for a run of `total_steps`."""
    passed_s, steps = last.at_s - first.at_s, last.steps - first.steps
    left = max(0, total_steps - last.steps)
    if passed_s <= 0 or steps <= 0:
        return Pace(samples_per_s=0.0, tokens_per_s=0.0, remaining_s=float("inf") if left else 0.0)
    return Pace(
        samples_per_s=(last.samples - first.samples) / passed_s,
        tokens_per_s=(last.tokens - first.tokens) / passed_s,
        remaining_s=left * passed_s / steps,
    )


class Throughput:
    """The pace over the last WINDOW steps; the first step is left out, because it warms up."""

    def __init__(self, total_steps: int, now_s: float, done_steps: int = 0) -> None:
        self.total_steps = total_steps
        self.last = Mark(at_s=now_s, steps=done_steps)
        self._marks: deque[Mark] = deque([self.last], maxlen=WINDOW + 1)
        self._warm = False

    def advance(self, now_s: float, samples: int = 0, tokens: int = 0) -> Pace:
        """A step is done."""
        last = self.last
        self.last = Mark(at_s=now_s, steps=last.steps + 1, samples=last.samples + samples, tokens=last.tokens + tokens)
        if self.last.steps > 1 and not self._warm and len(self._marks) == 2:
            self._marks.popleft()
            self._warm = True
        self._marks.append(self.last)
        return pace(self._marks[0], self.last, self.total_steps)


def described(now: Pace, clock_s: float) -> str:
    """ "120 samples/s, 3.1k tokens/s, done at 14:05:09" """
    parts = [f"{_short(now.samples_per_s)} samples/s"]
    if now.tokens_per_s:
        parts.append(f"{_short(now.tokens_per_s)} tokens/s")
    if now.remaining_s != float("inf"):
        day = "%H:%M:%S" if now.remaining_s < 86400 else "%Y-%m-%d %H:%M"
        parts.append(f"done at {time.strftime(day, time.localtime(clock_s + now.remaining_s))}")
    return ", ".join(parts)


def _short(rate: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g}{unit}"
    return f"{rate:.3g}"


@contextmanager
def progress(
    title: str, total_steps: int, *, done_steps: int = 0, show: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with throughput and predicted finish; yields `advance(samples, tokens)`, to be called each step.

    Args:
        done_steps: where a resumed run begins.
        show: False where nothing shall be drawn, as on ranks other than 0.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    throughput = Throughput(total_steps, time.perf_counter(), done_steps)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(title, total=total_steps, completed=done_steps, pace="")

        def advance(samples: int = 0, tokens: int = 0) -> None:
            now = throughput.advance(time.perf_counter(), samples, tokens)
            bar.update(task, advance=1, pace=described(now, time.time()))

        yield advance
