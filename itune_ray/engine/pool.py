"""[Ray] The replicas of one base model: started once, shared by stages, rounds and adapters.

A replica is a plain Ray actor that belongs to the driver, so it dies with the job, however the job dies. Ray starts a
crashed replica again; senders route around it meanwhile and send its requests anew under the same ids.
"""

import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from itune_ray.config.base import digest
from itune_ray.config.shared import ServedModel, VllmEngineConfig
from itune_ray.data.fingerprint import content_identity
from itune_ray.engine.base import PoolDownError
from itune_ray.engine.client import STATUS_TIMEOUT_S, PoolClient, cause_of
from itune_ray.engine.line import ActorHandle, one_line
from itune_ray.engine.replica import Replica, ReplicaInfo
from itune_ray.engine.usage import TokenCount
from itune_ray.errors import ClusterError, GenerationError, ITuneError
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


def silent(line: str) -> None:
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
    say: Say = silent
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
        return PoolDownError(what, got=self.served.model.path)

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
            raise PoolDownError(
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
