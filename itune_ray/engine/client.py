"""[Ray] The sender's side of a pool: which replica is asked, what happens when one dies, and when to give up."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, TypeVar

from itune_ray.config.shared import ModelRef, PoolConfig
from itune_ray.data.fingerprint import named
from itune_ray.engine.base import Completion, EngineDiedError, PoolDownError, Request, Sampling
from itune_ray.engine.line import ActorHandle, Line, LineDownError, one_line, result
from itune_ray.engine.llm import EngineLlm
from itune_ray.engine.routing import Router
from itune_ray.errors import GenerationError, ITuneError

STATUS_TIMEOUT_S = 2.0
RETRY_PAUSE_S = 0.2
T = TypeVar("T")


class PoolClient:
    """Sends requests to the replicas of one pool; picklable, so any actor can have one. Also an `Engine`.

    Args:
        replicas: Handles of the replicas.
        config: The pool's bounds and deadlines.
        model: What they serve, as `path@revision`.
        ref: The model itself.
        joining: Numbers of the replicas that are not ready yet; each takes requests from when it is.
    """

    def __init__(
        self,
        replicas: Sequence[ActorHandle],
        config: PoolConfig,
        model: str,
        ref: ModelRef | None = None,
        joining: Collection[int] = (),
    ):
        self._replicas, self._config, self.model, self._ref = list(replicas), config, model, ref
        self._joining = frozenset(joining)
        self._routes: tuple[asyncio.AbstractEventLoop, Router, list[Line]] | None = None
        self._reviving: dict[int, asyncio.Task[None]] = {}
        self._dead: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Outstanding requests are this sender's own."""
        return {**self.__dict__, "_routes": None, "_reviving": {}, "_dead": set()}

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete each request, in order.

        A request that outlives its deadline becomes a completion with an error; so does one that its engine refuses.

        Raises:
            GenerationError: Replicas kept dying, with the last one's own reason.
        """
        return list(await asyncio.gather(*(self._complete(request) for request in requests)))

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector per text, from one replica; from another where that one dies.

        Raises:
            GenerationError: The engine refused a text, gave no answer within the deadline, or replicas kept dying.
        """
        given = list(texts)
        return await self._on_a_replica(lambda index, _: self._embed(index, given), f"{len(given)} texts to embed")

    async def _embed(self, index: int, texts: list[str]) -> list[list[float]]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        asked = self._replicas[index].embed.remote(texts)
        try:
            return await asyncio.wait_for(result(asked), self._config.request_timeout_s)
        except RayTaskError as error:
            raise cause_of(error) from None
        except RayActorError as error:
            raise LineDownError(one_line(error)) from None
        except TimeoutError:
            ray.cancel(asked)
            raise PoolDownError(await self._too_late(index), got=self.model, knob="pool.request_timeout_s") from None

    def llm(self, sampling: Sampling, seed: int = 0, stage: str = "", adapter: str | None = None) -> EngineLlm:
        """What recipes, judges and benchmarks call.

        Args:
            sampling: Used where a call gives none.
            seed: The run's seed; with the stage and a call's key it decides the call's seed.
            stage: Names the use; part of the seeds and of the request ids.
            adapter: LoRA adapter folder to answer with.
        """
        model = f"{self.model}+{named(adapter)}" if adapter else self.model
        ref = self._ref
        return EngineLlm(self, model=model, sampling=sampling, seed=seed, stage=stage, adapter=adapter, ref=ref)

    async def _complete(self, request: Request) -> Completion:
        async def ask(index: int, line: Line) -> Completion:
            try:
                return await line.ask(request, self._config.request_timeout_s)
            except TimeoutError:
                return Completion(id=request.id, error=await self._too_late(index), retryable=True)

        return await self._on_a_replica(ask, request.id)

    async def _on_a_replica(self, ask: Callable[[int, Line], Awaitable[T]], what: str) -> T:
        """The answer of a replica with room; of another, at most `max_restarts` times, where that one dies."""
        router, lines = self._connected()
        deaths = 0
        while True:
            async with router.slot() as index:
                try:
                    return await ask(index, lines[index])
                except (LineDownError, EngineDiedError) as error:
                    reason = str(error)
            deaths += 1
            self._route_around(router, index, reason)
            if deaths > self._config.max_restarts:
                raise PoolDownError(
                    f"{deaths} replicas died under the same request: {reason}", got=what, knob="pool.max_restarts"
                )

    async def _too_late(self, index: int) -> str:
        limit = f"no answer within {self._config.request_timeout_s:g} s (pool.request_timeout_s)"
        return f"{limit}; {await self._status(index)}"

    async def _status(self, index: int) -> str:
        from ray.exceptions import RayError

        control = self._replicas[index].status.options(concurrency_group="control")
        try:
            return await asyncio.wait_for(result(control.remote()), STATUS_TIMEOUT_S)
        except (TimeoutError, RayError) as error:
            return f"the replica does not say what it is doing: {one_line(error) or 'no answer'}"

    def _connected(self) -> tuple[Router, list[Line]]:
        """Routes and lines of this event loop."""
        loop = asyncio.get_running_loop()
        if self._routes is None or self._routes[0] is not loop:
            router = Router(len(self._replicas), self._config.max_outstanding)
            self._routes = loop, router, [Line(replica) for replica in self._replicas]
            self._reviving, self._dead = {}, set()
            for index in self._joining:
                self._route_around(router, index, "it never became ready")
        return self._routes[1:]

    def _route_around(self, router: Router, index: int, reason: str) -> None:
        router.mark(index, up=False)
        if index not in self._reviving:
            self._reviving[index] = asyncio.ensure_future(self._revive(router, index, reason))

    async def _revive(self, router: Router, index: int, reason: str) -> None:
        """Bring a replica into the routes once Ray has started it, for the first time or again, or give it up."""
        try:
            await asyncio.wait_for(self._until_ready(index), self._config.start_timeout_s)
        except (TimeoutError, ITuneError) as error:
            self._dead.add(index)
            if len(self._dead) == len(self._replicas):
                last = f"; then: {error}" if str(error) else ""
                what = f"every replica of the pool is dead: {reason}{last}"
                router.close(PoolDownError(what, got=self.model, knob="pool.max_restarts"))
            return
        del self._reviving[index]
        router.mark(index, up=True)

    async def _until_ready(self, index: int) -> None:
        from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

        while True:
            try:
                await result(self._replicas[index].ready.options(concurrency_group="control").remote())
                return
            except ActorDiedError as error:
                raise GenerationError(one_line(error)) from None
            except RayActorError:
                pass  # being started again
            except RayTaskError as error:
                if not isinstance(error, EngineDiedError):  # a dying replica still gives its last words
                    raise cause_of(error) from None
            await asyncio.sleep(RETRY_PAUSE_S)


def cause_of(error: Any) -> BaseException:
    """A `RayTaskError`'s own error, as the replica raised it, without Ray's wrapping."""
    return error.cause if isinstance(error.cause, ITuneError) else GenerationError(one_line(error.cause or error))
