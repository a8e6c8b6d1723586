"""Which nodes a cluster may have, by the file that made it: the cluster launcher's YAML or a KubeRay manifest."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from itune_ray.config.shared import RayConfig
from itune_ray.errors import ClusterError

LAUNCHED = "~/ray_bootstrap_config.yaml"
"""Where Ray's cluster launcher leaves the cluster's file on the head."""
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
"""Of Kubernetes quantities."""


@dataclass(frozen=True)
class NodeKind:
    """One kind of node: what each has, and how many there may be at most."""

    name: str
    resources: Mapping[str, float]
    most: int


def node_kinds(config: RayConfig) -> list[NodeKind]:
    """The kinds of node that the cluster may have, the head among them; none where no file says so.

    Raises:
        ClusterError: The file that the config names is not there, or is no cluster file.
    """
    path = Path(os.path.expanduser(config.cluster_file or LAUNCHED))
    if config.cluster_file is None and not path.is_file():
        return []
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _launcher_kinds(tree) if "available_node_types" in tree else _kuberay_kinds(tree)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ClusterError(
            f"not a cluster file: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            got=str(path),
            allowed="a cluster launcher's YAML or a RayCluster manifest",
            knob="run.ray.cluster_file",
        ) from None


def _launcher_kinds(tree: Mapping[str, Any]) -> list[NodeKind]:
    whole, head = int(tree.get("max_workers", 2)), tree["head_node_type"]
    kinds: list[NodeKind] = []
    for name, kind in tree["available_node_types"].items():
        resources = {str(k): float(v) for k, v in (kind.get("resources") or {}).items()}
        kinds.append(NodeKind(name, resources, 1 if name == head else min(whole, int(kind.get("max_workers", 0)))))
    return kinds


def _kuberay_kinds(tree: Mapping[str, Any]) -> list[NodeKind]:
    spec = tree["spec"].get("rayClusterSpec", tree["spec"])
    kinds: list[NodeKind] = []
    for group in [{**spec["headGroupSpec"], "groupName": "head", "maxReplicas": 1}, *spec["workerGroupSpecs"]]:
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        given = group.get("rayStartParams", {})
        found = {"CPU": quantity(limits.get("cpu", 0)), "GPU": quantity(limits.get("nvidia.com/gpu", 0))}
        found |= {name: float(given[key]) for key, name in (("num-cpus", "CPU"), ("num-gpus", "GPU")) if key in given}
        custom = yaml.safe_load(str(given.get("resources", "{}")).strip("'\"").replace("\\", "")) or {}
        found |= {str(name): float(amount) for name, amount in custom.items()}
        kinds.append(NodeKind(group["groupName"], found, int(group.get("maxReplicas", group.get("replicas", 0)))))
    return kinds


def quantity(value: object) -> float:
    """A Kubernetes quantity: `500m` is 0.5, `2Gi` is 2 * 2**30."""
    text = str(value)
    number = text.rstrip("mkMGTi")
    return float(number) * UNITS[text[len(number) :]]
