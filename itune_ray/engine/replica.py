"""One replica of a pool: an engine, what it was asked, and how it ends. `pool` makes it a Ray actor."""

import asyncio
import importlib
import os
import time
from dataclasses import dataclass
from typing import Any

from itune_ray.config.shared import EngineConfig, ModelRef
from itune_ray.engine import ENGINES
from itune_ray.engine.base import Completion, EngineDiedError, Request
from itune_ray.errors import GenerationError, ITuneError
from itune_ray.observe import metrics
from itune_ray.observe.metrics import Sink

LAST_WORDS_S = 1.0
"""A dying replica lives on for this long, so that all its callers get the reason and not just a broken connection."""


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

    def __init__(self, config: EngineConfig, model: ModelRef, threads: int, can_sleep: bool = False):
        self._arguments = config, model, threads, can_sleep
        self._failure: ITuneError | None = None
        self._requests = 0
        self._running: dict[str, tuple[Request, asyncio.Future[Completion]]] = {}
        self._engine: Any = None
        log = config.request_log
        self._log = None if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._load_s = self._load()

    def _load(self) -> float:
        """Build the engine, or keep why it cannot be built; returns the seconds."""
        started = time.monotonic()
        config, model, threads, can_sleep = self._arguments
        try:
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

    async def generate(self, request: Request) -> Completion:
        """Complete one request; one that is running already is not run again, its answer is shared."""
        engine, running = self._serving(), self._running.get(request.id)
        if running is not None and running[0] == request:
            return await asyncio.shield(running[1])
        self._count(request)
        task = asyncio.ensure_future(self._complete(engine, request))
        self._running[request.id] = (request, task)
        metrics.gauge("itune_engine_running", len(self._running))
        try:
            completion = await task
            _record(completion)
            return completion
        finally:
            if self._running.get(request.id, (None, None))[1] is task:
                del self._running[request.id]
            metrics.gauge("itune_engine_running", len(self._running))

    async def embed(self, texts: list[str]) -> list[list[float]]:
        """One vector per text."""
        return await self._serving().embed(texts)

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

    async def status(self) -> str:
        """What the engine is doing."""
        if self._engine is None:
            return str(self._failure or "asleep")
        return self._engine.status()

    async def _complete(self, engine: Any, request: Request) -> Completion:
        try:
            return (await engine.generate([request]))[0]
        except EngineDiedError as error:
            self._failure = error
            asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 1)
            raise

    def _count(self, request: Request) -> None:
        self._requests += 1
        metrics.count("itune_engine_requests_total")
        if self._log is not None:
            os.write(self._log, f"{request.id}\n".encode())  # one write: whole lines, also of several replicas

    def _serving(self) -> Any:
        if self._failure is not None:
            raise self._failure
        if self._engine is None:
            raise GenerationError("the engine is asleep", knob="run.placement")
        return self._engine


def _record(completion: Completion) -> None:
    if completion.error is not None:
        metrics.count("itune_engine_failures_total")
    metrics.count("itune_engine_tokens_total", len(completion.prompt_token_ids), kind="prompt")
    written = sum(len(sample.token_ids) for sample in completion.samples)
    metrics.count("itune_engine_tokens_total", written, kind="generated")
