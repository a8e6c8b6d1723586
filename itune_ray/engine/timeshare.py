"""Shares of a device under `run.placement: timeshare`: each device that is shared holds one engine and one trainer.

Ray Train makes its own placement group and takes none from outside, so nothing but the amounts asked for decides who
meets whom. With e the engine's share and w the worker's, two engines never meet where e > 1/2; an engine and a worker
do where e + w <= 1; a second worker finds no room beside them where e + 2w > 1. On a device without an engine two
workers would have room, so several workers need an engine on every device.
"""

from itune_ray.errors import ConfigError

EPSILON = 1e-9


def check_shares(engine: float, worker: float) -> None:
    """Refuse shares under which a device could hold other than one engine and one worker.

    Args:
        engine: GPUs of one shard of an engine; 0 shares no device.
        worker: GPUs of one training worker; 0 shares no device.

    Raises:
        ConfigError: It names both shares and what is allowed.
    """
    if not engine or not worker:
        return
    if not (engine > 0.5 + EPSILON and engine + worker <= 1 + EPSILON and engine + 2 * worker > 1 + EPSILON):
        raise ConfigError(
            "under run.placement=timeshare a device must hold one engine and one training worker, and nothing else",
            got=f"pool.gpus_each={engine:g}, workers.gpus_each={worker:g}",
            allowed="an engine above 0.5 and a worker with the rest, e.g. 0.55 and 0.45",
            knob="pool.gpus_each, workers.gpus_each or run.placement",
        )


def check_counts(engines: int, workers: int, devices: int) -> None:
    """Refuse counts under which two workers could share a device without an engine.

    Args:
        engines: Shards of engines that hold a share of a device.
        workers: Training workers that do.
        devices: GPUs of the cluster at its largest.

    Raises:
        ConfigError: It names the counts and what is allowed.
    """
    if workers > engines or (workers > 1 and devices > engines):
        raise ConfigError(
            "under run.placement=timeshare each training worker needs an engine on its device, and two workers would "
            "share a device that has none",
            got=f"{workers} workers and {engines} engines on {devices} devices",
            allowed="an engine on every device and at most as many workers, or one worker",
            knob="pool.replicas, workers.num or run.placement",
        )
