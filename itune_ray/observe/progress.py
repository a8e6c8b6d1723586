"""Progress of long steps: bars with rows/s, tokens/s and time left on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from itune_ray.observe import metrics

PLAIN_INTERVAL_S = 10.0
"""Seconds between two lines of one task where there is no terminal (job logs)."""


class Task:
    """One bar. `update` takes totals so far, so it can be called from any place that knows them."""

    def __init__(self, progress: "Progress", name: str, total: int | None, unit: str):
        self._progress, self._name, self._total, self._unit = progress, name, total, unit
        self._started = self._spoken = time.monotonic()
        self._first: int | None = None
        self._done = 0
        self._facts = ""
        self._moved = self._started
        self._bar: TaskID | None = progress.add_bar(name, total)

    @property
    def name(self) -> str:
        """What people know it by."""
        return self._name

    @property
    def still_s(self) -> float:
        """Seconds since anything was finished."""
        return time.monotonic() - self._moved

    def __enter__(self) -> Self:
        self._progress.running.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._progress.running.remove(self)
        self._progress.finish(self._bar, self._line(time.monotonic()) if kind is None else f"{self._name}: failed")

    def update(self, done: int, tokens: int | None = None, total: int | None = None, **shown: object) -> None:
        """Show how far the step is.

        Args:
            done: Rows, steps or items finished, those of an earlier attempt included.
            tokens: Tokens this attempt has processed; shown as tokens/s.
            total: Replaces the total where it was unknown.
            shown: Extra figures, e.g. loss=2.31.
        """
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        self._moved = now if done != self._done else self._moved
        self._done, self._total = done, total or self._total
        elapsed = max(now - self._started, 1e-9)
        rates = [f"{(done - self._first) / elapsed:,.1f} {self._unit}/s"]
        self._record(elapsed, tokens)
        if tokens is not None:
            rates.append(f"{tokens / elapsed:,.0f} tokens/s")
        self._facts = "  ".join([*rates, *(f"{name} {_short(value)}" for name, value in shown.items())])
        self._progress.show(self._bar, done, self._total, self._facts)
        if now - self._spoken >= PLAIN_INTERVAL_S:
            self._spoken = now
            self._progress.say_plain(self._line(now))

    def _record(self, elapsed: float, tokens: int | None) -> None:
        metrics.gauge("itune_done", self._done, task=self._name)
        if tokens is not None:
            metrics.gauge("itune_tokens_per_s", tokens / elapsed, task=self._name)
        if self._total is not None:
            metrics.gauge("itune_todo", self._total, task=self._name)
            rate = (self._done - (self._first or 0)) / elapsed
            if rate > 0:
                metrics.gauge("itune_seconds_left", (self._total - self._done) / rate, task=self._name)

    def _line(self, now: float) -> str:
        of = f"/{self._total}" if self._total is not None else ""
        return f"{self._name}: {self._done}{of} {self._unit} in {now - self._started:.1f} s  {self._facts}".rstrip()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Progress:
    """All bars of one command."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None):
        self.console = Console(file=stream or sys.stderr, quiet=quiet, highlight=False)
        self.running: list[Task] = []
        """Steps under way, for whoever watches that they move."""
        self._rich = RichProgress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rich.stop()

    def task(self, name: str, total: int | None = None, unit: str = "rows") -> Task:
        """A new bar, to be used as a context manager."""
        return Task(self, name, total, unit)

    def say(self, line: str) -> None:
        """Print one line above the bars."""
        self.console.print(line, markup=False, soft_wrap=True)

    def add_bar(self, name: str, total: int | None) -> TaskID | None:
        """Start a bar, where there is a terminal."""
        return None if self._rich.disable else self._rich.add_task(name, total=total, facts="")

    def show(self, bar: TaskID | None, done: int, total: int | None, facts: str) -> None:
        """Redraw a bar."""
        if bar is not None:
            self._rich.update(bar, completed=done, total=total, facts=facts)

    def finish(self, bar: TaskID | None, line: str) -> None:
        """Take a bar away and leave its closing line."""
        if bar is not None:
            self._rich.remove_task(bar)
        self.say(line)

    def say_plain(self, line: str) -> None:
        """Print a line only where no bar shows the same."""
        if self._rich.disable:
            self.say(line)
