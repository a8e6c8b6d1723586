"""Whether long steps move: one that does not is told of, with what every process that may be the cause is doing."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self

from itune_ray.observe import metrics
from itune_ray.observe.progress import Progress, Task

Describe = Callable[[], Iterable[str]]
"""One line per process: who it is and what it does. May take seconds, and must not raise."""
_asked: list[Describe] = []


@contextlib.contextmanager
def explained_by(describe: Describe) -> Iterator[None]:
    """Ask it too while the block runs, when a step stands still."""
    _asked.append(describe)
    try:
        yield
    finally:
        _asked.remove(describe)


class Watch:
    """Looks at the running steps from a thread; it speaks and never stops anything.

    Args:
        after_s: Speak when a step has been still for so long, and again each time that doubles.
    """

    def __init__(self, progress: Progress, after_s: float):
        self._progress, self._after_s = progress, after_s
        self._told: dict[Task, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """Once."""
        for task in list(self._progress.running):
            still = task.still_s
            stalled = still >= self._after_s
            metrics.gauge("itune_stalled_seconds", still if stalled else 0, task=task.name)
            if not stalled:
                self._told.pop(task, None)
            elif still >= 2 * self._told.get(task, self._after_s / 2):
                self._told[task] = still
                told = itertools.chain.from_iterable(describe() for describe in list(_asked))
                causes = "; ".join(told) or "nothing that runs can be asked"
                self._progress.say(f"{task.name}: no progress for {still:.0f} s; {causes}")

    def _run(self) -> None:
        while not self._stop.wait(min(5.0, self._after_s / 4)):
            self.look()
