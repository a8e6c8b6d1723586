"""[Ray] What training workers tell the driver directly: progress, where each rank is, and an error no retry mends."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from itune_ray.errors import ITuneError

log = logging.getLogger(__name__)
POLL_S = 0.5
LAST_S = 30.0
"""How long the end of a training waits for its last steps to be shown."""
OnProgress = Callable[[int, int, dict[str, Any]], None]
"""See `itune_ray.train.loop.OnProgress`."""
RANKS_TOLD = 4
"""Of many ranks, the ones furthest behind are the ones to look at."""


class Board:
    """The one thing workers tell the driver directly: progress rows, and an error that no retry mends."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, dict[str, Any]]] = []
        self._failure: ITuneError | None = None
        self._places: dict[int, tuple[int, str, str, float]] = {}
        self._begun = 0

    def begin(self) -> None:
        self._begun += 1

    def begun(self) -> int:
        """How often workers have begun to train."""
        return self._begun

    def at(self, rank: int, host: str, step: int, place: str) -> None:
        self._places[rank] = step, place, host, time.monotonic()

    def ranks(self) -> list[str]:
        """Where each rank is, those behind the others first; many that are equal are counted."""
        order = ("prepares", "computes", "saves")
        ranked = sorted(self._places.items(), key=lambda item: (item[1][0], order.index(item[1][1]), item[0]))
        now = time.monotonic()
        lines = [
            f"rank {rank} on {host} {place} step {step} for {now - since:.0f} s"
            for rank, (step, place, host, since) in ranked
        ]
        return lines if len(lines) <= RANKS_TOLD else [*lines[:RANKS_TOLD], f"{len(lines) - RANKS_TOLD} ranks more"]

    def put(self, step: int, total: int, row: dict[str, Any]) -> None:
        self._rows.append((step, total, row))

    def drain(self) -> list[tuple[int, int, dict[str, Any]]]:
        rows, self._rows = self._rows, []
        return rows

    def fail(self, error: ITuneError) -> None:
        self._failure = self._failure or error

    def failure(self) -> ITuneError | None:
        return self._failure


def ranks_of(board: Any) -> list[str]:
    """Where each rank is, or nothing while the board does not answer."""
    from ray.exceptions import RayError

    try:
        lines: Any = ray.get(board.ranks.remote(), timeout=POLL_S * 4)
        return lines
    except RayError:
        return []


@contextlib.contextmanager
def relayed(board: Any, on_progress: OnProgress | None) -> Iterator[None]:
    """Call back on the driver while `fit` blocks; an error of the callback is raised when it ends. Steps that are not
    shown `LAST_S` after the end are left out, which the log says."""
    stop = threading.Event()
    errors: list[Exception] = []

    def relay() -> None:
        try:
            while on_progress is not None:
                finished = stop.wait(POLL_S)
                for step, total, row in ray.get(board.drain.remote()):
                    on_progress(step, total, row)
                if finished:
                    return
        except Exception as error:  # noqa: BLE001  raised below, in the thread that can end the stage
            errors.append(error)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=LAST_S)
        if thread.is_alive():
            log.warning("the last steps are not all shown: what shows them took over %.0f s (a slow tracker?)", LAST_S)
    if errors:
        raise errors[0]
