"""Answers of a replica that wait for one sender to fetch them, many at a time."""

import asyncio
import contextlib
import time
from collections.abc import Iterator

from itune_ray.engine.base import Completion
from itune_ray.errors import ITuneError

Answer = Completion | ITuneError
ABANDONED_S = 600.0
"""A sender always has a call here while it waits for answers; without one for so long, it has died."""


class Mailbox:
    """One sender's requests, under its own numbers: those in work, and the answers that are ready."""

    def __init__(self) -> None:
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.changed = asyncio.Event()
        self._ready: list[tuple[int, Answer]] = []
        self._visitors = 0
        self._left = time.monotonic()

    def put(self, ticket: int, answer: Answer) -> None:
        """An answer is ready."""
        self.tasks.pop(ticket, None)
        self._ready.append((ticket, answer))
        self.changed.set()

    def empty(self) -> list[tuple[int, Answer]]:
        """Take what is ready."""
        taken, self._ready = self._ready, []
        self.changed.clear()
        return taken

    def drop(self, ticket: int) -> None:
        """Stop work on a request; whoever fetches is told to look whether it still waits for any."""
        if (task := self.tasks.pop(ticket, None)) is not None:
            task.cancel()
            self.changed.set()

    @contextlib.contextmanager
    def visited(self) -> Iterator[None]:
        """While the sender waits here."""
        self._visitors += 1
        try:
            yield
        finally:
            self._visitors -= 1
            self._left = time.monotonic()

    @property
    def abandoned(self) -> bool:
        """Whether its sender has died."""
        return not self._visitors and time.monotonic() - self._left > ABANDONED_S
