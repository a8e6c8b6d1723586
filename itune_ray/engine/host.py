"""[Ray] All pools of one driver: engines start when a stage has work, make way for trainers, and end with the job."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from itune_ray import room
from itune_ray.config.shared import Placement, ServedModel
from itune_ray.engine.pool import Pool, Say, pool_key, resources_of, shards_of, silent
from itune_ray.engine.timeshare import check_counts, check_shares
from itune_ray.observe import metrics


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
        say: Say = silent,
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
        say: Say = silent,
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
