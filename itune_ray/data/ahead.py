"""Reading ahead: what the next step needs is read while this one is computed, so that a slow storage costs no time."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """`read(0)`, `read(1)`, ... in any order asked for, the one after the last asked for already under way.

    One thread at a time, which dies with the process; an error of `read` is raised by the call that asks for it.

    Args:
        read: What is to be had at an index.
        end: The first index that there is nothing at.
    """

    def __init__(self, read: Callable[[int], T], end: int):
        self._read, self._end = read, end
        self._running: _Running[T] | None = None

    def __call__(self, index: int) -> T:
        """What is at an index, waited for where it is not there yet."""
        running, self._running = self._running, None
        if running is None or running.index != index:
            if running is not None:
                running.join()  # `read` need not bear being called twice at once
            running = _Running(self._read, index)
        value = running.result()
        if index + 1 < self._end:
            self._running = _Running(self._read, index + 1)
        return value


class _Running(Generic[T]):
    def __init__(self, read: Callable[[int], T], index: int):
        self.index = index
        self._values: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(read,), daemon=True, name="ahead")
        self._thread.start()

    def _run(self, read: Callable[[int], T]) -> None:
        try:
            self._values.append(read(self.index))
        except BaseException as error:  # noqa: BLE001  raised by whoever asks for it
            self._error = error

    def join(self) -> None:
        self._thread.join()

    def result(self) -> T:
        self.join()
        if self._error is not None:
            raise self._error
        return self._values[0]
