"""Cluster files and manifests, offline: by Ray's own schema where there is one, and by what jobs ask for."""

from pathlib import Path

import pytest
import yaml

from itune_ray.config.shared import RayConfig
from itune_ray.nodes import node_kinds

ROOT = Path(__file__).parents[2]
ROLES = ("cpu-data", "gpu-infer", "gpu-train")
CLOUDS = ["cluster.yaml", "deploy/cluster-gcp.yaml", "deploy/cluster-azure.yaml"]
LAUNCHED = [*CLOUDS, "deploy/cluster-onprem.yaml"]
MANIFESTS = ["deploy/kuberay-cluster.yaml", "deploy/kuberay-job.yaml"]


def read(file):
    return yaml.safe_load((ROOT / file).read_text())


@pytest.mark.parametrize("file", LAUNCHED)
def test_rays_own_schema_accepts_it(file):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(file)))


@pytest.mark.parametrize("file", [*CLOUDS, *MANIFESTS])
def test_each_role_has_its_nodes_from_zero_and_the_head_does_no_work(file):
    kinds = {kind.name: kind for kind in node_kinds(RayConfig(cluster_file=str(ROOT / file)))}
    assert set(kinds) == {"head", *ROLES}
    assert kinds["head"].resources["CPU"] == 0
    for role in ROLES:
        assert kinds[role].most > 0
        assert set(kinds[role].resources) <= {"CPU", "GPU", "memory", role}, "a misspelt resource is never asked for"
        assert kinds[role].resources[role] >= 1
        assert (kinds[role].resources.get("GPU", 0) > 0) == role.startswith("gpu")


@pytest.mark.parametrize("file", CLOUDS)
def test_nodes_go_when_idle_and_spot_nodes_have_their_agent(file):
    config = read(file)
    types = config["available_node_types"]
    assert all(types[role]["min_workers"] == 0 for role in ROLES)
    assert {types[role]["labels"]["itune-role"] for role in ROLES} == set(ROLES)
    assert {role for role in ROLES if types[role]["labels"]["market-type"] == "spot"} == {"cpu-data", "gpu-infer"}
    assert 0 < config["idle_timeout_minutes"] <= 30
    cloud = config["provider"]["type"]
    assert any(f"itune_ray.spot --cloud {cloud}" in line for line in config["worker_start_ray_commands"])


@pytest.mark.parametrize("file", LAUNCHED)
def test_every_node_wants_the_token_and_the_dashboard_stays_inside(file):
    config = read(file)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = (line for line in config[key] if "ray start" in line)
        assert "RAY_AUTH_MODE=token" in start
    (head,) = (line for line in config["head_start_ray_commands"] if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in head
    assert any(target.endswith(".ray/auth_token") for target in config["file_mounts"])


@pytest.mark.parametrize("file", MANIFESTS)
def test_manifests_have_what_kuberay_requires(file):
    manifest = read(file)
    assert manifest["apiVersion"] == "ray.io/v1"
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert spec["enableInTreeAutoscaling"] is True
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"], "the autoscaler reads limits"
        assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= {variable["name"] for variable in container["env"]}
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in spec["workerGroupSpecs"])
    assert manifest["kind"] == ("RayJob" if "entrypoint" in manifest["spec"] else "RayCluster")


def test_the_job_of_the_manifest_is_a_job(tmp_path):
    import shlex

    from itune_ray.cli import main

    words = shlex.split(read("deploy/kuberay-job.yaml")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "itune_ray"]
    assert main([*words[3:], "--dry-run"]) == 0
