"""[Ray] Replicas of engines for a whole job: started once per base model, shared by stages, rounds and adapters.

A replica is a plain Ray actor that belongs to the driver, so it dies with the job, however the job dies. Ray starts a
crashed replica again; senders route around it meanwhile and send its requests anew under the same ids.
"""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from itune_ray import room
from itune_ray.config.base import digest
from itune_ray.config.shared import Placement, ServedModel, VllmEngineConfig
from itune_ray.data.fingerprint import content_identity
from itune_ray.engine.client import STATUS_TIMEOUT_S, PoolClient, cause_of
from itune_ray.engine.line import ActorHandle, one_line
from itune_ray.engine.replica import Replica, ReplicaInfo
from itune_ray.engine.timeshare import check_counts, check_shares
from itune_ray.engine.usage import TokenCount
from itune_ray.errors import ClusterError, GenerationError, ITuneError
from itune_ray.observe import metrics
from itune_ray.observe.ray_sink import RAY_SINK

MAX_SENDERS = 1000
"""Senders that may wait for answers at one replica; how many requests it works on is `pool.max_outstanding`."""
CLOSE_TIMEOUT_S = 3.0
"""A replica that still loads its engine, or hangs, is killed as it is."""
CONTROL_CALLS = 16
"""Calls about a replica's state that it answers at once, beside the requests it works on."""


POLL_S = 0.5
"""How often the wait for replicas looks whether it should end."""
Say = Callable[[str], None]


def _silent(line: str) -> None:
    """Where nobody listens."""


@dataclass
class Pool:
    """The replicas of one base model, by number: those that are ready, and those that may still join."""

    served: ServedModel
    replicas: dict[int, ActorHandle] = field(default_factory=dict[int, ActorHandle])
    infos: dict[int, ReplicaInfo] = field(default_factory=dict[int, ReplicaInfo])
    """Of the replicas that are ready."""
    groups: dict[int, Any] = field(default_factory=dict[int, Any])
    """Placement groups, one per replica that spans several devices."""
    asleep: bool = False
    say: Say = _silent
    arrived: Callable[[], None] = lambda: None
    """Called for each replica that becomes ready."""
    tokens: TokenCount = field(default_factory=TokenCount)
    _awaited: dict[Any, int] = field(default_factory=dict[Any, int])
    _lock: Any = field(default_factory=threading.RLock)
    _joiner: threading.Thread | None = None

    @property
    def model(self) -> str:
        """What the replicas loaded, as `path@revision`."""
        return next(iter(self.infos.values())).model

    @property
    def client(self) -> PoolClient:
        """A sender of its own for each who asks."""
        with self._lock:
            numbers = list(self.replicas)
            joining = [place for place, number in enumerate(numbers) if number not in self.infos]
            replicas = [self.replicas[number] for number in numbers]
        return PoolClient(replicas, self.served.pool, self.model, self.served.model, joining)

    @property
    def size(self) -> int:
        """Replicas that hold resources, or ask for them."""
        return len(self.replicas)

    def start(self, count: int, run: str, can_sleep: bool) -> None:
        """Ask for so many replicas at once; return when the least that the config asks for are ready."""
        for number in range(count):
            _add_replica(self, number, run, can_sleep)
        deadline = time.monotonic() + self.served.pool.start_timeout_s
        self._awaited = {
            replica.ready.options(concurrency_group="control").remote(): number
            for number, replica in self.replicas.items()
        }
        while len(self.infos) < self.served.pool.least:
            try:
                self._arrive(min(1.0, deadline - time.monotonic()))
            except GenerationError as error:
                if self.size < self.served.pool.least:
                    raise
                self._tell_lost(error)
            missing = self.served.pool.least - len(self.infos)
            if missing > 0 and time.monotonic() >= deadline:
                raise _not_placed(self, missing, self.served.pool.least)
        if self._awaited:
            self._joiner = threading.Thread(target=self._join, args=(deadline,), daemon=True)
            self._joiner.start()

    def shrink(self, size: int, why: str) -> None:
        """Give up replicas above that size: first those that are not ready, then those of the highest numbers."""
        with self._lock:
            surplus = max(0, self.size - size)
            self._give_up(sorted(self.replicas, key=lambda n: (n in self.infos, -n))[:surplus], why)

    def _join(self, deadline: float) -> None:
        """Take in the other replicas as they come, until the deadline."""
        import ray

        while self._awaited and ray.is_initialized():
            late = time.monotonic() >= deadline
            try:
                self._arrive(0.0 if late else POLL_S)
            except ITuneError as error:
                self._tell_lost(error)
            if late:
                with self._lock:
                    missing = sorted(self._awaited.values())
                    self._give_up(missing, str(_not_placed(self, len(missing), self.size)) if missing else "")

    def _arrive(self, wait_s: float) -> None:
        """Note one replica that has become ready, if there is one within the time.

        Raises:
            ITuneError: It could not load its model, or died; it is given up.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        references = list(self._awaited)
        done = ray.wait(references, timeout=max(0.0, wait_s))[0] if references else []
        with self._lock:
            for reference in done:
                number = self._awaited.pop(reference, None)
                if number is None:
                    continue
                try:
                    info: Any = ray.get(reference)
                    self.infos[number] = info
                    self.arrived()
                except (RayTaskError, RayActorError) as error:
                    self._discard(number)
                    raise self._why_not(error) from None

    def _tell_lost(self, error: ITuneError) -> None:
        self.say(f"engines: a replica of {self.served.model.path} was given up: {error}")

    def _why_not(self, error: Any) -> BaseException:
        from ray.exceptions import RayTaskError

        if isinstance(error, RayTaskError):
            return cause_of(error)
        what = f"an engine's process died while it loaded the model: {one_line(error)}"
        return GenerationError(what, got=self.served.model.path)

    def _give_up(self, numbers: Collection[int], why: str) -> None:
        before = self.size
        self.tokens.ask(self.replicas[number] for number in numbers if number in self.infos)
        for number in numbers:
            self._discard(number)
        if numbers:
            kept = f"{self.size} of {before} replicas of {self.served.model.path} are kept"
            self.say(f"engines: {kept}: {why}")

    def _discard(self, number: int) -> None:
        """Kill a replica, or take back the ask for one, so that nothing is held for it."""
        import ray
        from ray.util.placement_group import remove_placement_group

        self._awaited = {reference: awaited for reference, awaited in self._awaited.items() if awaited != number}
        self.infos.pop(number, None)
        ray.kill(self.replicas.pop(number), no_restart=True)
        if number in self.groups:
            remove_placement_group(self.groups.pop(number))

    def _ready(self) -> dict[int, ActorHandle]:
        with self._lock:
            return {number: self.replicas[number] for number in self.infos}

    def count(self) -> None:
        """Record what the replicas read and wrote since this was called last."""
        self.tokens.ask(self._ready().values())

    @property
    def requests(self) -> int:
        """Requests that reached the engines, counted there; a crashed replica begins again at 0."""
        import ray
        from ray.exceptions import RayError

        total = 0
        for replica in self._ready().values():
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
        with self._lock:
            ready = [(number, self.replicas[number], info) for number, info in self.infos.items()]
            joining = [number for number in self.replicas if number not in self.infos]
        for number, replica, info in ready:
            asked: Any = replica.status.options(concurrency_group="control").remote()
            try:
                told: Any = ray.get(asked, timeout=STATUS_TIMEOUT_S)
            except RayError as error:
                told = f"does not answer within {STATUS_TIMEOUT_S:g} s ({type(error).__name__})"
            lines.append(f"engine {number} of {info.model} (pid {info.pid}): {told}")
        return lines + [f"engine {number} of {self.served.model.path}: not ready yet" for number in joining]

    def sleep(self) -> None:
        """Let every engine give its memory up; the replicas keep their resources. Those not ready are given up."""
        if not self.asleep:
            self.shrink(len(self.infos), "the others were not ready when engines were put to sleep")
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

        calls = [
            getattr(replica, verb).options(concurrency_group="control").remote() for replica in self._ready().values()
        ]
        try:
            ray.get(calls, timeout=self.served.pool.start_timeout_s)
        except RayTaskError as error:
            raise cause_of(error) from None
        except (RayActorError, TimeoutError) as error:
            raise GenerationError(
                f"an engine did not {verb}: {one_line(error)}", got=self.model, knob="run.placement"
            ) from None

    def close(self) -> None:
        """Let the engines close, then kill the replicas, and give their resources back."""
        import ray

        self.count()
        with self._lock:
            self._awaited = {}
            closing = [replica.stop.options(concurrency_group="control").remote() for replica in self._ready().values()]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
            for number in list(self.replicas):
                self._discard(number)
        if self._joiner is not None:
            self._joiner.join(4 * POLL_S)


class EngineHost:
    """All pools of one driver. Stages ask it for a pool when they have work; it starts each at most once.

    Args:
        placement: What becomes of engines while something else needs the cluster, see `RunSettings.placement`.
        run: Name of the run, for actors' names and metrics.
        allow: Asked before engines or anything else is started on the cluster; raises where it may not be.
        say: Told of replicas that are not asked for, given up or given back.
    """

    def __init__(
        self,
        placement: Placement = "auto",
        run: str = "",
        allow: Callable[[], None] = lambda: None,
        say: Say = _silent,
    ) -> None:
        self._pools: dict[str, Pool] = {}
        self._placement: Placement = placement
        self._run, self._allow, self._say = run, allow, say
        self._lock = threading.Lock()
        self._taken: dict[str, dict[str, float]] = {}
        """What pools that are being started ask for."""
        self._left: Mapping[str, float] = {}
        self._expected: dict[str, ServedModel] = {}
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
            self._allow()
            self._require_room(served)
            self._pools[key] = self._started(key, served)
        self._pools[key].wake()
        return self._pools[key]

    def leave(self, own: Mapping[str, float], models: Iterable[ServedModel] = ()) -> None:
        """Keep room for a stage's own workers from now on, and for the least of each model that it will ask.

        Pools with a range of replicas take no more than the rest, and running ones give back what is above it.
        """
        self._left, self._expected = dict(own), {pool_key(model): model for model in models}
        if self._pools:
            new = (model for key, model in self._expected.items() if key not in self._pools)
            needed = Counter(own)
            for model in new:
                needed.update(resources_of(model))
            self._shrink_beside(needed, "the rest is room for the stage's workers")

    def _started(self, key: str, served: ServedModel) -> Pool:
        pool = Pool(served, say=self._say, arrived=lambda: self._count(served))
        with self._lock:
            self._shrink_beside(resources_of(served), f"the rest is room for {served.model.path}")
            size = self._size(key, served)
            self._taken[key] = resources_of(served, size)
        try:
            pool.start(size, self._run, can_sleep=self._placement == "timeshare")
        except BaseException:
            pool.close()
            raise
        finally:
            del self._taken[key]
        return pool

    def _size(self, key: str, served: ServedModel) -> int:
        """Replicas to ask for: as many as the cluster at its largest has room for beside all else it must hold."""
        least, most, shards = served.pool.least, served.pool.most, shards_of(served)
        if least == most:
            return most
        held = self._held_now
        held.update(self._left)
        for other, model in self._expected.items():
            if other != key and other not in self._pools and other not in self._taken:
                held.update(resources_of(model))
        size = max(least, room.most(served.pool.each, most * shards, held) // shards)
        if size < most:
            beside = "beside what else it must hold"
            self._say(f"engines: {size} of {most} replicas of {served.model.path}: no room for more {beside}")
        return size

    def _shrink_beside(self, needed: Mapping[str, float], why: str) -> None:
        """Let pools give back replicas above their least until the rest has room for what is needed."""
        together = self._held_now
        together.update(needed)
        for pool in list(self._pools.values()):
            size, one = pool.size, resources_of(pool.served, 1)
            while size > pool.served.pool.least and not room.fits(together):
                size -= 1
                together.subtract(one)
            pool.shrink(size, why)

    def _count(self, served: ServedModel) -> None:
        self.starts += 1
        metrics.count("itune_engine_starts_total", 1, model=served.model.path)

    def make_room(
        self,
        needed: Mapping[str, float],
        each: Mapping[str, float],
        count: int,
        what: str,
        knob: str,
        say: Say = _silent,
    ) -> None:
        """Let something other than engines hold resources: the engines stay, sleep or go, as the placement says.

        Args:
            needed: What it holds in all.
            each: What one of its processes holds, and `count` how many there are at once.
            what: Who asks, for messages.
            knob: The config path that makes the ask smaller.

        Raises:
            BudgetError: The run may start nothing more.
            ClusterError: The cluster can never hold it, or not together with engines that stay.
            ConfigError: It would share devices with engines otherwise than one to one, see `timeshare`.
        """
        self._allow()
        room.require(needed, what, knob, each, count)
        if not self._pools:
            return
        together = Counter(needed)
        together.update(self.held)
        if self._placement == "timeshare":
            for pool in self._pools.values():
                pool.sleep()
            self._check_timeshare(each.get("GPU", 0.0), count)
        if self._placement in ("timeshare", "separate"):
            room.require(together, f"{what} beside the engines", f"{knob}, pool.gpus_each or run.placement")
        elif self._placement == "restart" or not room.fits(together):
            say(f"engines are given back for {what}, and start again when asked next")
            self.close()
        self._shrink_beside(needed, f"the rest is room for {what}")

    def _check_timeshare(self, share: float, count: int) -> None:
        sharing = [pool for pool in self._pools.values() if pool.served.pool.gpus_each]
        if not share or not sharing:
            return
        for pool in sharing:
            check_shares(pool.served.pool.gpus_each, share)
        engines = sum(pool.size * shards_of(pool.served) for pool in sharing)
        check_counts(engines, count, int(room.capacity().get("GPU", 0.0)))

    def keep(self, served: Iterable[ServedModel]) -> None:
        """Give back the pools of all other models: nothing will ask them again, and their nodes can go."""
        if self._pools:
            wanted = {pool_key(model) for model in served}
            for key in [key for key in self._pools if key not in wanted]:
                self._pools.pop(key).close()

    def count(self) -> None:
        """Record the tokens that all replicas read and wrote since this was called last, under the stage of now."""
        import ray

        if self._pools and ray.is_initialized():
            for pool in list(self._pools.values()):
                pool.count()

    def describe(self) -> list[str]:
        """What each replica is doing, for whoever asks why nothing moves."""
        return [line for pool in list(self._pools.values()) for line in pool.describe()]

    @property
    def held(self) -> dict[str, float]:
        """Cluster resources that the pools hold for good: replicas above the least make way for other work."""
        total: Counter[str] = Counter()
        for pool in self._pools.values():
            total.update(resources_of(pool.served))
        return dict(total)

    @property
    def _held_now(self) -> Counter[str]:
        """What pools hold or ask for, those that are being started included."""
        total: Counter[str] = Counter()
        for pool in self._pools.values():
            total.update(resources_of(pool.served, pool.size))
        for taken in self._taken.values():
            total.update(taken)
        return total

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
            f"{served.pool.least} engine replicas of {served.model.path}{beside}",
            "pool.replicas, pool.cpus_each, pool.gpus_each or run.ray.num_cpus",
            served.pool.each,
            served.pool.least * shards_of(served),
        )


def pool_key(served: ServedModel) -> str:
    """Equal for models that one engine can serve: base model and engine count, adapter and pool size do not."""
    model = served.model.model_dump(mode="json", exclude={"adapter"})
    return digest(content_identity({"model": model, "engine": served.engine.model_dump(mode="json")}), length=16)


def shards_of(served: ServedModel) -> int:
    """Devices that one replica spans: tensor times pipeline parallel."""
    engine = served.engine
    return engine.tensor_parallel * engine.pipeline_parallel if isinstance(engine, VllmEngineConfig) else 1


def resources_of(served: ServedModel, replicas: int | None = None) -> dict[str, float]:
    """Resources of so many replicas; default: of the least that the pool works with."""
    shards = (served.pool.least if replicas is None else replicas) * shards_of(served)
    return {name: amount * shards for name, amount in served.pool.each.items()}


def _add_replica(pool: Pool, number: int, run: str, can_sleep: bool) -> None:
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
        pool.groups[number] = group
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
    # Shown in Ray's dashboard; unique, since the name of a killed actor is not free at once.
    options["name"] = f"{run} engine {number} of {pool.served.model.path} ({uuid.uuid4().hex[:6]})"
    pool.replicas[number] = actor.options(
        **options, max_restarts=config.max_restarts, max_task_retries=0, max_concurrency=MAX_SENDERS
    ).remote(pool.served.engine, pool.served.model, threads, can_sleep, config.max_outstanding)
    pool.replicas[number].observed_by.options(concurrency_group="control").remote(RAY_SINK, run, number)


def scaled(amounts: Mapping[str, float], factor: float) -> dict[str, float]:
    """Each amount times the factor."""
    return {name: amount * factor for name, amount in amounts.items()}


def _not_placed(pool: Pool, missing: int, asked: int) -> ClusterError:
    """Which resource is short, or that loading was slow."""
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    needs = scaled(pool.served.pool.each, shards_of(pool.served))
    figures = ", ".join(
        f"{amount:g} {name} (cluster has {free.get(name, 0):g} free of {total.get(name, 0):g})"
        for name, amount in needs.items()
    )
    return ClusterError(
        f"{missing} of {asked} engine replicas were not ready within "
        f"{pool.served.pool.start_timeout_s:g} s; each needs {figures or 'no resources'}",
        knob="pool.start_timeout_s, pool.replicas or pool.cpus_each",
    )
