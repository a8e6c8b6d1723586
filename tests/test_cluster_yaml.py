"""cluster.yaml by Ray's own schema, offline, and what that schema does not see."""

from pathlib import Path

import yaml

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"
NODE_TYPES = {"head", "cpu-data", "gpu-infer", "gpu-train"}


def test_rays_own_schema_accepts_it():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(CLUSTER.read_text())
    validate_config(prepare_config(config))


def test_node_types_and_resources_are_the_ones_jobs_ask_for():
    config = yaml.safe_load(CLUSTER.read_text())
    assert set(config["available_node_types"]) == NODE_TYPES
    for name, node in config["available_node_types"].items():
        assert set(node["resources"]) <= {"CPU", "GPU", "memory"} | NODE_TYPES, f"misspelt resource in {name}"
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0, "no work on the head"
