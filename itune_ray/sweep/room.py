"""[Ray] What a sweep holds of a cluster: engines, eval actors and trials, all at the same time."""

from collections import defaultdict
from typing import Any

from ray import tune

from itune_ray.config.strategies import TrainWorkers
from itune_ray.config.sweep import SweepJob
from itune_ray.engine.host import EngineHost
from itune_ray.engine.pool import resources_of
from itune_ray.observe.progress import Progress
from itune_ray.sweep.shapes import Shapes

WAITING_CPUS = 0.1
"""Of a trial whose training runs on workers of its own. Ray Train under Tune hangs where CPUs are counted exactly."""


def trial_resources(workers: TrainWorkers) -> Any:
    """What a trial's own process holds: a worker's share where it trains itself, little where it only waits."""
    each = {"CPU": WAITING_CPUS} if workers.most > 1 else workers.each
    return tune.PlacementGroupFactory([each or {"CPU": WAITING_CPUS}])


def make_room(job: SweepJob, shapes: Shapes, engines: EngineHost, progress: Progress) -> None:
    """Refuse what the cluster can never hold together; give back engines of earlier stages that are in the way.

    Raises:
        ClusterError: Not even an empty cluster has room.
    """
    engines.make_room(
        _held(job, shapes),
        job.train.workers.each,
        job.train.workers.most * job.max_concurrent,
        f"a sweep of {len(shapes.served)} engine pools, {job.evaluate.workers.num} eval actors and "
        f"{job.max_concurrent} trials at once",
        "max_concurrent, train.workers.cpus_each, evaluate.pool.cpus_each or run.ray.num_cpus",
        progress.say,
    )
    engines.leave(_own(job), shapes.served.values())


def _own(job: SweepJob) -> dict[str, float]:
    """What is no engine's."""
    workers, scorers = job.train.workers, job.evaluate.workers
    held: dict[str, float] = defaultdict(float)
    held["CPU"] = WAITING_CPUS * job.max_concurrent if workers.most > 1 else 0.0
    for name, amount in scorers.each.items():
        held[name] += amount * scorers.num
    for name, amount in workers.each.items():
        held[name] += amount * workers.most * job.max_concurrent
    return held


def _held(job: SweepJob, shapes: Shapes) -> dict[str, float]:
    held: dict[str, float] = defaultdict(float, _own(job))
    for served in shapes.served.values():
        for name, amount in resources_of(served).items():
            held[name] += amount
    return held
