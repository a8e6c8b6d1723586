"""Which replica gets a request: power of two choices on the sender's own outstanding requests, with a bound.

The sender counts only what it sent itself, so choosing costs no message; two random candidates are enough to keep the
longest queue within a constant of the mean (Mitzenmacher 2001).
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Router:
    """Outstanding requests per replica.

    Args:
        num_replicas: Replicas, numbered from 0.
        max_outstanding: Requests this sender keeps at one replica; more wait here, which is the backpressure.
    """

    def __init__(self, num_replicas: int, max_outstanding: int):
        self.outstanding = [0] * num_replicas
        self._max, self._down = max_outstanding, set[int]()
        self._closed: Exception | None = None
        self._changed = asyncio.Event()
        # Which of two equal replicas gets a request changes no result: seeds travel with the requests.
        self._random = random.Random(0)

    @property
    def up(self) -> list[int]:
        """Replicas that take requests."""
        return [i for i in range(len(self.outstanding)) if i not in self._down]

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """A replica with room, for the time of one request; waits while none has."""
        index = await self._acquire()
        try:
            yield index
        finally:
            self.outstanding[index] -= 1
            self._changed.set()

    def mark(self, index: int, *, up: bool) -> None:
        """Take a replica out, or back in."""
        (self._down.discard if up else self._down.add)(index)
        self._changed.set()

    def close(self, error: Exception) -> None:
        """No replica is left: raise this to all who wait or come."""
        self._closed = error
        self._changed.set()

    async def _acquire(self) -> int:
        while True:
            if self._closed is not None:
                raise self._closed
            room = [i for i in self.up if self.outstanding[i] < self._max]
            if room:
                candidates = room if len(room) <= 2 else self._random.sample(room, 2)
                index = min(candidates, key=lambda i: self.outstanding[i])
                self.outstanding[index] += 1
                return index
            self._changed.clear()
            await self._changed.wait()
