"""[Ray] Replicas of engines for a whole job: started once per base model, shared by stages, rounds and adapters.

A replica is a plain Ray actor that belongs to the driver, so it dies with the job, however the job dies. Ray starts a
crashed replica again; senders route around it meanwhile and send its requests anew under the same ids.
"""

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from itune_ray import room
from itune_ray.config.base import digest
from itune_ray.config.shared import Placement, ServedModel, VllmEngineConfig
from itune_ray.data.fingerprint import content_identity
from itune_ray.engine.client import STATUS_TIMEOUT_S, PoolClient, cause_of
from itune_ray.engine.line import ActorHandle, one_line
from itune_ray.engine.replica import Replica, ReplicaInfo
from itune_ray.errors import ClusterError, GenerationError
from itune_ray.observe import metrics
from itune_ray.observe.ray_sink import RAY_SINK

MAX_SENDERS = 1000
"""Senders that may wait for answers at one replica; how many requests it works on is `pool.max_outstanding`."""
CLOSE_TIMEOUT_S = 3.0
"""A replica that still loads its engine, or hangs, is killed as it is."""
CONTROL_CALLS = 16
"""Calls about a replica's state that it answers at once, beside the requests it works on."""


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
            raise cause_of(error) from None
        except (RayActorError, TimeoutError) as error:
            raise GenerationError(
                f"an engine did not {verb}: {one_line(error)}", got=self.model, knob="run.placement"
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
        allow: Asked before engines or anything else is started on the cluster; raises where it may not be.
    """

    def __init__(self, placement: Placement = "auto", run: str = "", allow: Callable[[], None] = lambda: None) -> None:
        self._pools: dict[str, Pool] = {}
        self._placement: Placement = placement
        self._run, self._allow = run, allow
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
            BudgetError: The run may start nothing more.
            ClusterError: The cluster can never hold it, or not together with engines that stay.
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
            **options, max_restarts=config.max_restarts, max_task_retries=0, max_concurrency=MAX_SENDERS
        ).remote(pool.served.engine, pool.served.model, threads, can_sleep, config.max_outstanding)
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
            raise cause_of(error) from None
        except RayActorError as error:
            raise GenerationError(
                f"an engine's process died while it loaded the model: {one_line(error)}", got=pool.served.model.path
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
