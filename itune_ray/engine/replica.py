"""One replica of a pool: an engine, what it was asked, and how it ends. `pool` makes it a Ray actor."""

import asyncio
import importlib
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from itune_ray.config.shared import EngineConfig, ModelRef
from itune_ray.engine import ENGINES
from itune_ray.engine.base import Completion, EngineDiedError, Request
from itune_ray.engine.mailbox import Answer, Mailbox
from itune_ray.engine.usage import Usage
from itune_ray.errors import GenerationError, ITuneError
from itune_ray.imports import uncollected
from itune_ray.observe import metrics
from itune_ray.observe.metrics import Sink

LINGER_S, LONGEST_LINGER_S = 0.0005, 0.1
"""An answer waits for others to travel with it: so long for each of its sender's requests that are in work, and at most
that. A call costs the engine's process 1 to 2 ms beside its steps."""
LAST_WORDS_S = 1.0
"""A dying replica lives on for this long, so that all its callers get the reason and not just a broken connection."""


@dataclass
class _Work:
    """A request at the engine, and how many wait for its answer."""

    request: Request
    task: asyncio.Task[Completion]
    waiting: int = 0


@dataclass(frozen=True)
class ReplicaInfo:
    """What a replica says when it is ready."""

    model: str
    """`path@revision` of what it loaded."""
    pid: int
    load_s: float


class Replica:
    """Serves one engine.

    A model that cannot be loaded does not fail the constructor, where Ray would bury the reason in a traceback, but
    every call after it.
    """

    def __init__(
        self, config: EngineConfig, model: ModelRef, threads: int, can_sleep: bool = False, max_outstanding: int = 512
    ):
        self._arguments = config, model, threads, can_sleep
        self._room = asyncio.Semaphore(max_outstanding)
        self._boxes: dict[str, Mailbox] = {}
        self._failure: ITuneError | None = None
        self._requests = 0
        self._life, self._prompt_tokens, self._tokens = uuid.uuid4().hex, 0, 0
        self._running: dict[str, _Work] = {}
        self._engine: Any = None
        log = config.request_log
        self._log = None if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._load_s = self._load()

    def _load(self) -> float:
        """Build the engine, or keep why it cannot be built; returns the seconds."""
        started = time.monotonic()
        config, model, threads, can_sleep = self._arguments
        try:
            with uncollected():  # of the 9.1 s in which vLLM is imported and loads, 1.2 s are collections
                module, _, name = ENGINES[config.type].partition(":")
                self._engine = getattr(importlib.import_module(module), name)(config, model, threads, can_sleep)
        except ITuneError as error:
            self._failure = error
        return time.monotonic() - started

    async def observed_by(self, sink: Sink, run: str, number: int) -> None:
        """Record requests and tokens from now on, under the run's name and this replica's number."""
        metrics.in_context(run=run, model=self._arguments[1].path, replica=str(number))
        metrics.send_to(sink)

    async def ready(self) -> ReplicaInfo:
        """Answers once the engine is loaded; raises why it is not."""
        return ReplicaInfo(self._serving().name, os.getpid(), self._load_s)

    async def open(self, sender: str) -> None:
        """Know a sender from now on. Whoever is not known asked an engine that has died since, and must ask anew."""
        self._boxes = {name: box for name, box in self._boxes.items() if not box.abandoned}
        self._boxes[sender] = Mailbox()

    async def submit(self, sender: str, requests: list[tuple[int, Request]]) -> None:
        """Begin work on requests, each under its sender's own number."""
        box = self._box(sender)
        for ticket, request in requests:
            box.tasks[ticket] = asyncio.ensure_future(self._answer(box, ticket, request))

    async def collect(self, sender: str) -> list[tuple[int, Answer]]:
        """Answers that are ready, as soon as there is one; none after a request was dropped."""
        box = self._box(sender)
        with box.visited():
            await box.changed.wait()
            await asyncio.sleep(min(LINGER_S * len(box.tasks), LONGEST_LINGER_S))
        answers = box.empty()
        _record([answer for _, answer in answers], len(self._running))
        return answers

    async def drop(self, sender: str, ticket: int) -> None:
        """Stop work on a request whose sender has given up; an equal one of another sender goes on."""
        if sender in self._boxes:
            self._boxes[sender].drop(ticket)

    async def embed(self, texts: list[str]) -> list[list[float]]:
        """One vector per text."""
        engine = self._serving()
        try:
            vectors = await engine.embed(texts)
        except EngineDiedError as error:
            self._end(error)
            raise
        self._prompt_tokens += engine.take_embedded()
        return vectors

    async def sleep(self) -> None:
        """Give the engine's memory up until `wake`; one that cannot sleep is closed and later built anew."""
        engine = self._serving()
        if not await engine.sleep():
            engine.close()
            self._engine = None

    async def wake(self) -> None:
        """Bring the engine back."""
        if self._engine is None:
            self._load_s = await asyncio.get_running_loop().run_in_executor(None, self._load)
        else:
            await self._engine.wake()
        self._serving()

    async def stop(self) -> None:
        """Close the engine and remove what it wrote to this node; to be killed after."""
        if self._engine is not None:
            self._engine.close()

    async def requests(self) -> int:
        """Requests that reached the engine since it was started."""
        return self._requests

    async def usage(self) -> Usage:
        """Tokens that the engine read and wrote since this process began, whoever asked."""
        return Usage(self._life, self._prompt_tokens, self._tokens)

    async def status(self) -> str:
        """What the engine is doing."""
        if self._engine is None:
            return str(self._failure or "asleep")
        return self._engine.status()

    def _box(self, sender: str) -> Mailbox:
        if sender not in self._boxes:
            raise EngineDiedError("the replica was started again")
        return self._boxes[sender]

    async def _answer(self, box: Mailbox, ticket: int, request: Request) -> None:
        answer: Answer
        try:
            answer = await self._shared(request)
        except ITuneError as error:
            answer = error
        except Exception as error:  # noqa: BLE001  an engine's own bug must reach whoever waits
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            answer = GenerationError(f"the engine failed: {what[:400]}", got=request.id)
        box.put(ticket, answer)

    async def _shared(self, request: Request) -> Completion:
        """Complete one request; one that is in work already is not run again, its answer is shared."""
        engine, work = self._serving(), self._running.get(request.id)
        if work is None or work.request != request:
            work = _Work(request, asyncio.ensure_future(self._complete(engine, request)))
            self._running[request.id] = work
        work.waiting += 1
        try:
            return await asyncio.shield(work.task)
        finally:
            work.waiting -= 1
            if not work.waiting:
                work.task.cancel()  # nothing to one that has ended
                if self._running.get(request.id) is work:
                    del self._running[request.id]

    async def _complete(self, engine: Any, request: Request) -> Completion:
        async with self._room:
            self._requests += 1
            if self._log is not None:
                os.write(self._log, f"{request.id}\n".encode())  # one write: whole lines, also of several replicas
            try:
                completion: Completion = (await engine.generate([request]))[0]
            except EngineDiedError as error:
                self._end(error)
                raise
            self._prompt_tokens += len(completion.prompt_token_ids)
            written = {id(sample): sample for sample in completion.samples}  # n greedy samples are one, given n times
            self._tokens += sum(len(sample.token_ids) for sample in written.values())
            return completion

    def _end(self, error: EngineDiedError) -> None:
        """The process ends with its engine, so that Ray starts both again."""
        self._failure = error
        asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 1)

    def _serving(self) -> Any:
        if self._failure is not None:
            raise self._failure
        if self._engine is None:
            raise GenerationError("the engine is asleep", knob="run.placement")
        return self._engine


def _record(answers: Sequence[Answer], running: int) -> None:
    completions = [answer for answer in answers if isinstance(answer, Completion)]
    written = sum(len(sample.token_ids) for completion in completions for sample in completion.samples)
    metrics.count("itune_engine_requests_total", len(answers))
    metrics.count("itune_engine_failures_total", len(answers) - sum(c.error is None for c in completions))
    metrics.count("itune_engine_tokens_total", sum(len(c.prompt_token_ids) for c in completions), kind="prompt")
    metrics.count("itune_engine_tokens_total", sum(c.num_cached_tokens for c in completions), kind="cached")
    metrics.count("itune_engine_tokens_total", written, kind="generated")
    metrics.gauge("itune_engine_running", running)
