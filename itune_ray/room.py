"""[Ray] Room on a cluster: what it can hold at its largest, and waiting until it holds it.

A cluster that grows is judged by the nodes it may have, not by those that are up: `may_grow_to` says which.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from itune_ray.errors import ClusterError
from itune_ray.nodes import NodeKind

EPSILON = 1e-9
PATIENCE_S = 5.0
"""Waits shorter than this are not worth a line."""
_growth: list[NodeKind] = []


def may_grow_to(kinds: Iterable[NodeKind]) -> None:
    """Say which nodes the cluster that this process has joined may have; none: those that are up."""
    _growth[:] = kinds


def require(
    needed: Mapping[str, float], what: str, knob: str, each: Mapping[str, float] | None = None, count: int = 1
) -> None:
    """Refuse at once what would otherwise wait for ever.

    Args:
        needed: Resources that must be held at the same time, e.g. {"CPU": 3.0}.
        what: Who asks, for the message.
        knob: The config path that makes the ask smaller.
        each: What one process takes, all of it on one node.
        count: Processes that must run at the same time.

    Raises:
        ClusterError: The whole cluster, with every node that its autoscaler may add, has less than that.
    """
    grown = "and can grow to " if _growth else ""
    limits = capacity()
    for name, amount in needed.items():
        have = limits.get(name, 0.0)
        if amount > have + EPSILON:
            raise ClusterError(
                f"{what} needs {amount:g} {name}, and the cluster has {grown}{have:g}",
                allowed=f"at most {have:g} {name}, or a larger cluster",
                knob=knob,
            )
    if each and (places := _places(each)) < count:
        has = sorted({_told(node, each) for node, _ in _nodes()})
        raise ClusterError(
            f"{what} needs {count} times {_told(each, each)}, each on one node, and the nodes of the cluster "
            f"{'can grow to' if _growth else 'have'} room for {places}",
            allowed=f"nodes have {'; '.join(has) or 'nothing'}",
            knob=knob,
        )


def fits(needed: Mapping[str, float]) -> bool:
    """Whether the cluster at its largest could hold so much at once."""
    limits = capacity()
    return all(amount <= limits.get(name, 0.0) + EPSILON for name, amount in needed.items())


def most(each: Mapping[str, float], at_most: int, held: Mapping[str, float]) -> int:
    """How many such processes the cluster at its largest has room for beside what is held; at most so many."""
    if not each:
        return at_most
    limits = capacity()
    left = {name: limits.get(name, 0.0) - held.get(name, 0.0) for name in each}
    return max(0, min(at_most, _places(each), _places_on(left, each)))


def free(each: Mapping[str, float], at_most: int) -> int:
    """How many such processes find room now, each on one node, beside all that runs; at most so many."""
    from ray._private.state import available_resources_per_node

    nodes: Iterable[Mapping[str, float]] = available_resources_per_node().values()
    return min(at_most, sum(_places_on(node, each) for node in nodes)) if each else at_most


def capacity() -> dict[str, float]:
    """All resources of the cluster at its largest, busy ones included."""
    total: Counter[str] = Counter()
    for node, number in _nodes():
        total.update({name: amount * number for name, amount in node.items()})
    return dict(total)


def _nodes() -> list[tuple[Mapping[str, float], int]]:
    """Resources of each node, or of each kind with the most there may be of it."""
    import ray

    if _growth:
        return [(kind.resources, kind.most) for kind in _growth]
    return [(node["Resources"], 1) for node in ray.nodes() if node["Alive"]]


def _places(bundle: Mapping[str, float]) -> int:
    """How many such bundles empty nodes hold."""
    return sum(number * _places_on(node, bundle) for node, number in _nodes())


def _places_on(node: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    return int(min(node.get(name, 0.0) / amount + EPSILON for name, amount in bundle.items()))


def _told(amounts: Mapping[str, float], names: Iterable[str]) -> str:
    return ", ".join(f"{amounts.get(name, 0.0):g} {name}" for name in names)


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


def _total(bundles: Sequence[Mapping[str, float]]) -> str:
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    return _told(total, total) or "nothing"


def _free(bundles: Sequence[Mapping[str, float]]) -> str:
    import ray

    return _told(ray.available_resources(), dict.fromkeys(itertools.chain.from_iterable(bundles)))
