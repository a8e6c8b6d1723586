"""[Ray] The connection to Ray."""

import logging
import os
import socket
from collections.abc import Callable, Sequence

from itune_ray import room
from itune_ray.config.shared import RayConfig
from itune_ray.errors import ClusterError
from itune_ray.imports import importing
from itune_ray.nodes import node_kinds
from itune_ray.observe import metrics
from itune_ray.observe.logs import QUIET_ENVIRONMENT, quiet_environment
from itune_ray.observe.ray_sink import RAY_SINK

MIN_LOGICAL_CPUS = 8
"""Of a fresh local Ray: engines, recipe workers and eval actors mostly wait, so they may share two real cores."""


def connect(
    config: RayConfig, say: Callable[[str], None] = lambda line: None, *, meanwhile: Sequence[str] = ()
) -> None:
    """Join the cluster, or start a local Ray, and say where its dashboard is; does nothing when connected already.

    Every stage calls this first thing after finding that it has work to do: a run whose stages are all finished never
    starts Ray.

    Args:
        meanwhile: Modules, none of Ray's, that are imported while Ray's own processes start.
    """
    quiet_environment()
    import ray

    if ray.is_initialized():
        return
    kinds = node_kinds(config)
    address = config.address or os.environ.get("RAY_ADDRESS")
    with importing(*meanwhile):
        if in_submitted_job():
            link = _link(ray.init(log_to_driver=False, logging_level=logging.WARNING))
        else:
            link = _join(address) if address else _start_local(config)
    room.may_grow_to(kinds if address or in_submitted_job() else ())
    metrics.send_to(RAY_SINK)
    if link:
        say(f"Ray dashboard: {link}")


def _join(address: str) -> str | None:
    import ray

    try:
        return _link(
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": dict(QUIET_ENVIRONMENT)},
            )
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ClusterError(
            f"cannot join the Ray cluster: {reason}",
            got=address,
            allowed="auto, host:port or ray://host:port",
            knob="run.ray.address or RAY_ADDRESS",
        ) from None


def _start_local(config: RayConfig) -> str | None:
    import ray

    if config.dashboard_port is not None and port_in_use(config.dashboard_port):
        raise ClusterError(
            "the dashboard's port is in use",
            got=config.dashboard_port,
            allowed="a free port, or none to take any",
            knob="run.ray.dashboard_port",
        )
    num_cpus = config.num_cpus or max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)
    return _link(
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=config.dashboard,
            dashboard_port=config.dashboard_port,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    )


def _link(context: object) -> str | None:
    url = getattr(context, "dashboard_url", None)
    return f"http://{url}" if url and "://" not in url else url


def in_submitted_job() -> bool:
    """Whether this driver was started by Ray's job submission, whose working directory is thrown away afterwards."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def port_in_use(port: int) -> bool:
    """Whether something listens on the port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
