"""The connection to Ray, and the check that a cluster can hold what a stage is about to ask for."""

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from itune_ray.config.shared import RayConfig
from itune_ray.errors import ClusterError
from itune_ray.observe.logs import QUIET_ENVIRONMENT, quiet_environment

MIN_LOGICAL_CPUS = 8
"""Of a fresh local Ray: engines, recipe workers and eval actors mostly wait, so they may share two real cores."""


def connect(config: RayConfig, say: Callable[[str], None] = lambda line: None) -> None:
    """Join the cluster, or start a local Ray, and say where its dashboard is; does nothing when connected already.

    Every stage calls this first thing after finding that it has work to do: a run whose stages are all finished never
    starts Ray.
    """
    quiet_environment()
    import ray

    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if in_submitted_job():
        link = _link(ray.init(log_to_driver=False, logging_level=logging.WARNING))
    else:
        link = _join(address) if address else _start_local(config)
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


def require(needed: Mapping[str, float], what: str, knob: str, each: Mapping[str, float] | None = None) -> None:
    """Refuse at once what would otherwise wait for ever.

    Args:
        needed: Resources that must be held at the same time, e.g. {"CPU": 3.0}.
        what: Who asks, for the message.
        knob: The config path that makes the ask smaller.
        each: What one process takes: some node must be able to hold it.

    Raises:
        ClusterError: The whole cluster, with every node that its autoscaler may add, has less than that.
    """
    shapes = node_shapes()
    grown = "and can grow to " if any(shape.can_be_added for shape in shapes) else ""
    limits = capacity()
    for name, amount in needed.items():
        have = limits.get(name, 0.0)
        if amount > have + EPSILON:
            raise ClusterError(
                f"{what} needs {amount:g} {name}, and the cluster has {grown}{have:g}",
                allowed=f"at most {have:g} {name}, or a larger cluster",
                knob=knob,
            )
    if each and not any(shape.holds(each) for shape in shapes):
        told = ", ".join(f"{amount:g} {name}" for name, amount in each.items())
        largest = "; ".join(sorted({shape.told(each) for shape in shapes}))
        raise ClusterError(
            f"{what} needs nodes that hold {told} together, and no node of the cluster does",
            allowed=f"what a node has: {largest or 'there is no node'}",
            knob=knob,
        )


def fits(needed: Mapping[str, float]) -> bool:
    """Whether the cluster at its largest could hold so much at once."""
    limits = capacity()
    return all(amount <= limits.get(name, 0.0) + EPSILON for name, amount in needed.items())


EPSILON = 1e-9


@dataclass(frozen=True)
class NodeShape:
    """A node, or a kind of node that the autoscaler may add."""

    resources: Mapping[str, float]
    can_be_added: bool

    def holds(self, bundle: Mapping[str, float]) -> bool:
        """Whether an empty node of this shape has room for the bundle."""
        return all(self.resources.get(name, 0.0) + EPSILON >= amount for name, amount in bundle.items())

    def told(self, bundle: Mapping[str, float]) -> str:
        """What it has of the bundle's resources."""
        return ", ".join(f"{self.resources.get(name, 0.0):g} {name}" for name in bundle)


def node_shapes() -> list[NodeShape]:
    """The living nodes, and the kinds of node that an autoscaler has announced."""
    import ray

    alive = [NodeShape(node["Resources"], False) for node in ray.nodes() if node["Alive"]]
    return alive + [NodeShape(dict(group.resources), True) for group in _announced() if group.max_count != 0]


def capacity() -> dict[str, float]:
    """All resources of the cluster at its largest, busy ones included."""
    import ray
    from ray._private.state import state

    now = dict(ray.cluster_resources())
    most = state.get_max_resources_from_cluster_config() if _announced() else None
    return {name: max(now.get(name, 0.0), float((most or {}).get(name, 0.0))) for name in {*now, *(most or {})}}


def _announced() -> list[Any]:
    """Node groups of the autoscaler's configuration; none on a cluster of fixed size and under Ray Client."""
    from ray._private.state import state

    try:
        config = state.get_cluster_config()
    except Exception:  # noqa: BLE001  there is no public call, and without the answer the living nodes decide
        return []
    return list(config.node_group_configs) if config is not None else []


def await_room(
    bundles: Sequence[Mapping[str, float]],
    timeout_s: float,
    what: str,
    knob: str,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Ask for all bundles at once and return when the cluster can hold them together, having grown where it must.

    The room is free again on return, for whoever asked; nodes stay for the autoscaler's idle time.

    Raises:
        ClusterError: Not within the deadline; names what was free and what was asked for.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")
    try:
        patience = min(PATIENCE_S, timeout_s)
        if group.wait(patience):
            return
        say(f"waiting for room: {what} ask for {_total(bundles)}")
        if not group.wait(max(0.0, timeout_s - patience)):
            raise ClusterError(
                f"{what} were not placed within {timeout_s:g} s; together they need {_total(bundles)} "
                f"(free: {_free(bundles)})",
                knob=knob,
            )
    finally:
        remove_placement_group(group)


def beside_driver() -> Any:
    """Scheduling strategy of small actors that must live as long as the driver: on its own node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


PATIENCE_S = 5.0
"""Waits shorter than this are not worth a line."""


def _total(bundles: Sequence[Mapping[str, float]]) -> str:
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    return ", ".join(f"{amount:g} {name}" for name, amount in total.items()) or "nothing"


def _free(bundles: Sequence[Mapping[str, float]]) -> str:
    import ray

    free = ray.available_resources()
    names = dict.fromkeys(name for bundle in bundles for name in bundle)
    return ", ".join(f"{free.get(name, 0.0):g} {name}" for name in names)


def port_in_use(port: int) -> bool:
    """Whether something listens on the port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
