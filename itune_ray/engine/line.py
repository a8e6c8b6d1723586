"""[Ray] A line from one sender to one replica: requests go out, and answers come back, as many at a time as there are.

A call per request costs the sender, the replica and Ray a millisecond or two each. Here a request waits for company for
at most `LINGER_S` on its way out, an answer on its way back for at most `LONGEST_LINGER_S` of `engine.replica`, and no
answer ever waits for another request to end.
"""

import asyncio
import uuid
from typing import Any

from itune_ray.engine.base import Completion, Request
from itune_ray.engine.mailbox import Answer
from itune_ray.errors import ITuneError

LINGER_S = 0.01
ActorHandle = Any
"""Ray's handle of a `Replica`; its methods exist only at run time."""


class LineDownError(Exception):
    """The replica is gone, or another has taken its place, with all it was asked over this line; says why."""


class Line:
    """Requests of one sender that a replica is working on. Belongs to the event loop that it was made in.

    Args:
        replica: Handle of the replica.
    """

    def __init__(self, replica: ActorHandle):
        self._replica = replica
        self._sender = uuid.uuid4().hex
        self._waiting: dict[int, asyncio.Future[Completion]] = {}
        self._outbox: list[tuple[int, Request]] = []
        self._tickets = 0
        self._pump: asyncio.Task[None] | None = None
        self._open = False

    async def ask(self, request: Request, timeout_s: float) -> Completion:
        """The answer to one request.

        Raises:
            LineDownError: The replica died or restarted; the request may be sent to another.
            TimeoutError: No answer within the time; the replica is told to drop the request.
            ITuneError: As the replica raised it.
        """
        loop = asyncio.get_running_loop()
        self._tickets += 1
        ticket, answer = self._tickets, loop.create_future()
        self._waiting[ticket] = answer
        if not self._outbox:
            loop.call_later(LINGER_S if len(self._waiting) > 1 else 0, self._send)
        self._outbox.append((ticket, request))
        if self._pump is None:
            self._pump = asyncio.ensure_future(self._receive())
        try:
            return await asyncio.wait_for(answer, timeout_s)
        finally:
            if self._waiting.pop(ticket, None) is not None:
                self._drop(ticket)

    def _send(self) -> None:
        if not self._open:
            return  # the pump sends, once the replica knows this sender
        requests, self._outbox = self._outbox, []
        if requests:
            self._replica.submit.remote(self._sender, requests)

    def _drop(self, ticket: int) -> None:
        """The sender has given up on a request, sent or not."""
        unsent = [kept for kept in self._outbox if kept[0] != ticket]
        if len(unsent) == len(self._outbox):
            self._replica.drop.options(concurrency_group="control").remote(self._sender, ticket)
        self._outbox = unsent

    async def _receive(self) -> None:
        """Fetch answers until none is awaited."""
        from ray.exceptions import RayError

        try:
            if not self._open:
                await result(self._replica.open.remote(self._sender))
                self._open = True
                self._send()
            while self._waiting:
                for ticket, answer in await result(self._replica.collect.remote(self._sender)):
                    self._settle(ticket, answer)
        except RayError as error:
            self._break(one_line(getattr(error, "cause", None) or error))
        finally:
            self._pump = None

    def _settle(self, ticket: int, answer: Answer) -> None:
        waiting = self._waiting.pop(ticket, None)
        if waiting is None or waiting.done():
            return
        if isinstance(answer, ITuneError):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)

    def _break(self, reason: str) -> None:
        """All that was asked must be asked elsewhere; what comes next begins anew with whoever answers then."""
        waiting, self._waiting, self._outbox = self._waiting, {}, []
        self._sender, self._open = uuid.uuid4().hex, False
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(LineDownError(reason))


async def result(reference: Any) -> Any:
    """What a reference stands for, as a coroutine."""
    return await reference


def one_line(error: BaseException) -> str:
    """What Ray says, short."""
    return " ".join(str(error).split())[:400]
