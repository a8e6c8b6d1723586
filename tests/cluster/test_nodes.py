"""Which nodes a cluster may have, read from launcher files and KubeRay manifests."""

from pathlib import Path

import pytest
import yaml

from itune_ray.config.shared import RayConfig
from itune_ray.errors import ClusterError
from itune_ray.nodes import NodeKind, node_kinds, quantity

ROOT = Path(__file__).parents[2]


def test_the_projects_own_cluster_file():
    kinds = {kind.name: kind for kind in node_kinds(RayConfig(cluster_file=str(ROOT / "cluster.yaml")))}
    assert kinds["head"].resources["CPU"] == 0
    assert kinds["head"].most == 1
    for role in ("cpu-data", "gpu-infer", "gpu-train"):
        assert kinds[role].resources[role] > 0
        assert kinds[role].most > 0
    assert kinds["gpu-train"].resources["GPU"] == 8


def group(limits, **given):
    return {"rayStartParams": given, "template": {"spec": {"containers": [{"resources": {"limits": limits}}]}}}


@pytest.mark.parametrize("wrapped", [False, True], ids=["RayCluster", "RayJob"])
def test_a_kuberay_manifest(tmp_path, wrapped):
    infer = group({"cpu": "7500m", "nvidia.com/gpu": 1}, resources='"{\\"gpu-infer\\": 1}"')
    spec = {
        "headGroupSpec": group({"cpu": 4}, **{"num-cpus": "0"}),
        "workerGroupSpecs": [{"groupName": "gpu-infer", "minReplicas": 0, "maxReplicas": 5, **infer}],
    }
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"kind": "RayCluster", "spec": {"rayClusterSpec": spec} if wrapped else spec}))
    assert node_kinds(RayConfig(cluster_file=str(file))) == [
        NodeKind("head", {"CPU": 0.0, "GPU": 0.0}, 1),
        NodeKind("gpu-infer", {"CPU": 7.5, "GPU": 1.0, "gpu-infer": 1.0}, 5),
    ]


@pytest.mark.parametrize("text", [None, "- a list", "spec: {}", "available_node_types: 3", "{", "a: b"])
def test_what_is_no_cluster_file_is_one_line(tmp_path, text):
    file = tmp_path / "cluster.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ClusterError, match=r"^not a cluster file: [^\n]*run.ray.cluster_file"):
        node_kinds(RayConfig(cluster_file=str(file)))


def test_quantities_of_kubernetes():
    assert [quantity(q) for q in ("500m", 2, "2Gi", "1.5", "3k")] == [0.5, 2.0, 2 * 2**30, 1.5, 3000.0]
