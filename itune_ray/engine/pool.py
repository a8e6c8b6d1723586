"""[Ray] Replicas of engines for a whole job: started once per base model, shared by stages, rounds and adapters.

A replica is a plain Ray actor that belongs to the driver, so it dies with the job, however the job dies. Ray starts a
crashed replica again; senders route around it meanwhile and send its requests anew under the same ids.
"""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from itune_ray import room
from itune_ray.config.base import digest
from itune_ray.config.shared import ModelRef, Placement, PoolConfig, ServedModel, VllmEngineConfig
from itune_ray.data.fingerprint import content_identity, named
from itune_ray.engine.base import Completion, EngineDiedError, Request, Sampling
from itune_ray.engine.llm import EngineLlm
from itune_ray.engine.replica import Replica, ReplicaInfo
from itune_ray.engine.routing import Router
from itune_ray.errors import ClusterError, GenerationError, ITuneError
from itune_ray.observe import metrics
from itune_ray.observe.ray_sink import RAY_SINK

ActorHandle = Any
"""Ray's handle of a `Replica`; its methods exist only at run time."""
STATUS_TIMEOUT_S = 2.0
RETRY_PAUSE_S = 0.2
CLOSE_TIMEOUT_S = 3.0
"""A replica that still loads its engine, or hangs, is killed as it is."""
CONTROL_CALLS = 16
"""Calls about a replica's state that it answers at once, beside the requests it works on."""


class PoolClient:
    """Sends requests to the replicas of one pool; picklable, so any actor can have one. Also an `Engine`.

    Args:
        replicas: Handles of the replicas.
        config: The pool's bounds and deadlines.
        model: What they serve, as `path@revision`.
        ref: The model itself.
    """

    def __init__(self, replicas: Sequence[ActorHandle], config: PoolConfig, model: str, ref: ModelRef | None = None):
        self._replicas, self._config, self.model, self._ref = list(replicas), config, model, ref
        self._routes: tuple[asyncio.AbstractEventLoop, Router] | None = None
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
        """One vector per text, from one replica."""
        async with self._router().slot() as index:
            return await self._replicas[index].embed.remote(list(texts))

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
        router, deaths = self._router(), 0
        while True:
            async with router.slot() as index:
                answer = await self._ask(index, request)
            if isinstance(answer, Completion):
                return answer
            deaths += 1
            self._route_around(router, index, answer)
            if deaths > self._config.max_restarts:
                raise GenerationError(
                    f"{deaths} replicas died under the same request: {answer}",
                    got=request.id,
                    knob="pool.max_restarts",
                )

    async def _ask(self, index: int, request: Request) -> Completion | str:
        """The completion, or why the replica is dead."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        reference = self._replicas[index].generate.remote(request)
        try:
            return await asyncio.wait_for(_result(reference), self._config.request_timeout_s)
        except TimeoutError:
            ray.cancel(reference)
            limit = f"no answer within {self._config.request_timeout_s:g} s (pool.request_timeout_s)"
            return Completion(id=request.id, error=f"{limit}; {await self._status(index)}", retryable=True)
        except RayActorError as error:
            return _one_line(error)
        except RayTaskError as error:
            if isinstance(error, EngineDiedError):
                return str(error.cause)
            raise _cause(error) from None

    async def _status(self, index: int) -> str:
        from ray.exceptions import RayError

        control = self._replicas[index].status.options(concurrency_group="control")
        try:
            return await asyncio.wait_for(_result(control.remote()), STATUS_TIMEOUT_S)
        except (TimeoutError, RayError) as error:
            return f"the replica does not say what it is doing: {_one_line(error) or 'no answer'}"

    def _router(self) -> Router:
        loop = asyncio.get_running_loop()
        if self._routes is None or self._routes[0] is not loop:
            self._routes = (loop, Router(len(self._replicas), self._config.max_outstanding))
            self._reviving, self._dead = {}, set()
        return self._routes[1]

    def _route_around(self, router: Router, index: int, reason: str) -> None:
        router.mark(index, up=False)
        if index not in self._reviving:
            self._reviving[index] = asyncio.ensure_future(self._revive(router, index, reason))

    async def _revive(self, router: Router, index: int, reason: str) -> None:
        """Bring a replica back into the routes once Ray has started it again, or give it up."""
        try:
            await asyncio.wait_for(self._until_ready(index), self._config.start_timeout_s)
        except (TimeoutError, ITuneError) as error:
            self._dead.add(index)
            if len(self._dead) == len(self._replicas):
                last = f"; then: {error}" if str(error) else ""
                what = f"every replica of the pool is dead: {reason}{last}"
                router.close(GenerationError(what, got=self.model, knob="pool.max_restarts"))
            return
        del self._reviving[index]
        router.mark(index, up=True)

    async def _until_ready(self, index: int) -> None:
        from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

        while True:
            try:
                await _result(self._replicas[index].ready.options(concurrency_group="control").remote())
                return
            except ActorDiedError as error:
                raise GenerationError(_one_line(error)) from None
            except RayActorError:
                pass  # being started again
            except RayTaskError as error:
                if not isinstance(error, EngineDiedError):  # a dying replica still gives its last words
                    raise _cause(error) from None
            await asyncio.sleep(RETRY_PAUSE_S)


@dataclass
class Pool:
    """The replicas of one base model."""

    served: ServedModel
    replicas: list[ActorHandle]
    infos: list[ReplicaInfo]
    groups: list[Any] = field(default_factory=list[Any])
    """Placement groups, one per replica that spans several devices."""
    asleep: bool = False

    @property
    def model(self) -> str:
        """What the replicas loaded, as `path@revision`."""
        return self.infos[0].model

    @property
    def client(self) -> PoolClient:
        """A sender of its own for each who asks."""
        return PoolClient(self.replicas, self.served.pool, self.model, self.served.model)

    @property
    def requests(self) -> int:
        """Requests that reached the engines, counted there; a crashed replica begins again at 0."""
        import ray
        from ray.exceptions import RayError

        total = 0
        for replica in self.replicas:
            try:
                count: Any = ray.get(replica.requests.options(concurrency_group="control").remote(), timeout=30)
                total += count
            except RayError:
                continue
        return total

    def describe(self) -> list[str]:
        """A line per replica: what its engine is doing, or that it does not answer."""
        import ray
        from ray.exceptions import RayError

        lines: list[str] = []
        for number, (replica, info) in enumerate(zip(self.replicas, self.infos, strict=False)):
            asked: Any = replica.status.options(concurrency_group="control").remote()
            try:
                told: Any = ray.get(asked, timeout=STATUS_TIMEOUT_S)
            except RayError as error:
                told = f"does not answer within {STATUS_TIMEOUT_S:g} s ({type(error).__name__})"
            lines.append(f"engine {number} of {info.model} (pid {info.pid}): {told}")
        return lines

    def sleep(self) -> None:
        """Let every engine give its memory up; the replicas keep their resources."""
        if not self.asleep:
            self._all("sleep")
            self.asleep = True

    def wake(self) -> None:
        """Bring the engines back."""
        if self.asleep:
            self._all("wake")
            self.asleep = False

    def _all(self, verb: str) -> None:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        calls = [getattr(replica, verb).options(concurrency_group="control").remote() for replica in self.replicas]
        try:
            ray.get(calls, timeout=self.served.pool.start_timeout_s)
        except RayTaskError as error:
            raise _cause(error) from None
        except (RayActorError, TimeoutError) as error:
            raise GenerationError(
                f"an engine did not {verb}: {_one_line(error)}", got=self.model, knob="run.placement"
            ) from None

    def close(self) -> None:
        """Let the engines close, then kill the replicas, and give their resources back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        closing = [replica.stop.options(concurrency_group="control").remote() for replica in self.replicas]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for replica in self.replicas:
            ray.kill(replica, no_restart=True)
        for group in self.groups:
            remove_placement_group(group)


class EngineHost:
    """All pools of one driver. Stages ask it for a pool when they have work; it starts each at most once.

    Args:
        placement: What becomes of engines while something else needs the cluster, see `RunSettings.placement`.
        run: Name of the run, for actors' names and metrics.
    """

    def __init__(self, placement: Placement = "auto", run: str = "") -> None:
        self._pools: dict[str, Pool] = {}
        self._placement: Placement = placement
        self._run = run
        self.starts = 0
        """Engines started so far."""

    def pool(self, served: ServedModel) -> Pool:
        """The pool of a base model; models that differ only in the adapter share one.

        Raises:
            ClusterError: The cluster cannot hold the replicas, or did not within `start_timeout_s`.
            ModelError: The engine cannot load the model.
        """
        key = pool_key(served)
        if key not in self._pools:
            self._require_room(served)
            self._pools[key] = _start(served, self._run, can_sleep=self._placement == "timeshare")
            self.starts += served.pool.replicas
            metrics.count("itune_engine_starts_total", served.pool.replicas, model=served.model.path)
        self._pools[key].wake()
        return self._pools[key]

    def make_room(
        self,
        needed: Mapping[str, float],
        each: Mapping[str, float],
        count: int,
        what: str,
        knob: str,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Let something other than engines hold resources: the engines stay, sleep or go, as the placement says.

        Args:
            needed: What it holds in all.
            each: What one of its processes holds, and `count` how many there are at once.
            what: Who asks, for messages.
            knob: The config path that makes the ask smaller.

        Raises:
            ClusterError: The cluster can never hold it, or not together with engines that stay.
        """
        room.require(needed, what, knob, each, count)
        if not self._pools:
            return
        together = Counter(needed)
        together.update(self.held)
        if self._placement == "timeshare":
            for pool in self._pools.values():
                pool.sleep()
        if self._placement in ("timeshare", "separate"):
            room.require(together, f"{what} beside the engines", f"{knob}, pool.gpus_each or run.placement")
        elif self._placement == "restart" or not room.fits(together):
            say(f"engines are given back for {what}, and start again when asked next")
            self.close()

    def keep(self, served: Iterable[ServedModel]) -> None:
        """Give back the pools of all other models: nothing will ask them again, and their nodes can go."""
        if self._pools:
            wanted = {pool_key(model) for model in served}
            for key in [key for key in self._pools if key not in wanted]:
                self._pools.pop(key).close()

    def describe(self) -> list[str]:
        """What each replica is doing, for whoever asks why nothing moves."""
        return [line for pool in list(self._pools.values()) for line in pool.describe()]

    @property
    def held(self) -> dict[str, float]:
        """Cluster resources that the pools hold."""
        total: Counter[str] = Counter()
        for pool in self._pools.values():
            total.update(resources_of(pool.served))
        return dict(total)

    def held_with(self, served: ServedModel) -> dict[str, float]:
        """The same, as if the pool of this model were running too."""
        total = Counter(self.held)
        if pool_key(served) not in self._pools:
            total.update(resources_of(served))
        return dict(total)

    def release(self, served: ServedModel) -> None:
        """Give one pool's resources back, e.g. before training on the same devices."""
        pool = self._pools.pop(pool_key(served), None)
        if pool is not None:
            pool.close()

    def close(self) -> None:
        """Kill all replicas."""
        import ray

        pools, self._pools = self._pools, {}
        if ray.is_initialized():
            for pool in pools.values():
                pool.close()

    def _require_room(self, served: ServedModel) -> None:
        beside = f" beside {len(self._pools)} running pools" if self._pools else ""
        room.require(
            self.held_with(served),
            f"{served.pool.replicas} engine replicas of {served.model.path}{beside}",
            "pool.replicas, pool.cpus_each, pool.gpus_each or run.ray.num_cpus",
            served.pool.each,
            served.pool.replicas * shards_of(served),
        )


def pool_key(served: ServedModel) -> str:
    """Equal for models that one engine can serve: base model and engine count, adapter and pool size do not."""
    model = served.model.model_dump(mode="json", exclude={"adapter"})
    return digest(content_identity({"model": model, "engine": served.engine.model_dump(mode="json")}), length=16)


def shards_of(served: ServedModel) -> int:
    """Devices that one replica spans: tensor times pipeline parallel."""
    engine = served.engine
    return engine.tensor_parallel * engine.pipeline_parallel if isinstance(engine, VllmEngineConfig) else 1


def resources_of(served: ServedModel) -> dict[str, float]:
    """Resources of a whole pool."""
    shards = served.pool.replicas * shards_of(served)
    return {name: amount * shards for name, amount in served.pool.each.items()}


def _start(served: ServedModel, run: str, can_sleep: bool) -> Pool:
    """Ask for all replicas at once and wait until each has loaded its engine."""
    started = Pool(served, [], [])
    try:
        for _ in range(served.pool.replicas):
            _add_replica(started, run, can_sleep)
        started.infos = _wait_ready(started)
    except BaseException:
        started.close()
        raise
    return started


def _add_replica(pool: Pool, run: str, can_sleep: bool) -> None:
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    config, shards = pool.served.pool, shards_of(pool.served)
    resources = scaled(config.resources_each, shards)
    options: dict[str, Any] = {"num_cpus": config.cpus_each * shards, "resources": resources}
    if shards == 1:
        options["num_gpus"] = config.gpus_each
    elif config.gpus_each:
        # vLLM's Ray executor places one worker per bundle; the replica itself sits in the first and takes no device.
        group = placement_group([config.each] * shards, strategy="PACK")
        pool.groups.append(group)
        options = {
            "num_cpus": config.cpus_each,
            "num_gpus": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
            ),
        }
    if config.env:
        options["runtime_env"] = {"env_vars": config.env}
    as_actor: Any = ray.remote
    actor = as_actor(concurrency_groups={"control": CONTROL_CALLS})(Replica)
    threads = max(1, int(config.cpus_each))
    number = len(pool.replicas)
    # Shown in Ray's dashboard; unique, since the name of a killed actor is not free at once.
    options["name"] = f"{run} engine {number} of {pool.served.model.path} ({uuid.uuid4().hex[:6]})"
    pool.replicas.append(
        actor.options(
            **options, max_restarts=config.max_restarts, max_task_retries=0, max_concurrency=config.max_outstanding
        ).remote(pool.served.engine, pool.served.model, threads, can_sleep)
    )
    pool.replicas[-1].observed_by.options(concurrency_group="control").remote(RAY_SINK, run, number)


def scaled(amounts: Mapping[str, float], factor: float) -> dict[str, float]:
    """Each amount times the factor."""
    return {name: amount * factor for name, amount in amounts.items()}


def _wait_ready(pool: Pool) -> list[ReplicaInfo]:
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    limit = pool.served.pool.start_timeout_s
    deadline = time.monotonic() + limit
    waiting: list[Any] = [replica.ready.options(concurrency_group="control").remote() for replica in pool.replicas]
    infos: list[ReplicaInfo] = []
    while waiting:
        done, waiting = ray.wait(waiting, timeout=max(0.0, min(1.0, deadline - time.monotonic())))
        try:
            infos += list(ray.get(done))
        except RayTaskError as error:
            raise _cause(error) from None
        except RayActorError as error:
            raise GenerationError(
                f"an engine's process died while it loaded the model: {_one_line(error)}", got=pool.served.model.path
            ) from None
        if waiting and time.monotonic() >= deadline:
            raise _not_placed(pool, len(waiting))
    return infos


def _not_placed(pool: Pool, missing: int) -> ClusterError:
    """Which resource is short, or that loading was slow."""
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    needs = scaled(pool.served.pool.each, shards_of(pool.served))
    figures = ", ".join(
        f"{amount:g} {name} (cluster has {free.get(name, 0):g} free of {total.get(name, 0):g})"
        for name, amount in needs.items()
    )
    return ClusterError(
        f"{missing} of {pool.served.pool.replicas} engine replicas were not ready within "
        f"{pool.served.pool.start_timeout_s:g} s; each needs {figures or 'no resources'}",
        knob="pool.start_timeout_s, pool.replicas or pool.cpus_each",
    )


async def _result(reference: Any) -> Any:
    return await reference


def _cause(error: Any) -> BaseException:
    """The error as the replica raised it, without Ray's wrapping."""
    return error.cause if isinstance(error.cause, ITuneError) else GenerationError(_one_line(error.cause or error))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
