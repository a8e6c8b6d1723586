"""A pipeline on a cluster that starts with nothing but a head: each stage's nodes come up for it, and leave."""

import json
import subprocess
import sys
import threading
import time

import pytest
import yaml
from clusters import autoscaling

pytestmark = [pytest.mark.real, pytest.mark.soak]

SMALL = {"object_store_memory": 100 * 2**20}
NODE_TYPES = {
    "cpu-data": {"resources": {"CPU": 4, "cpu-data": 1, **SMALL}, "max_workers": 1},
    "gpu-infer": {"resources": {"CPU": 2, "GPU": 1, "gpu-infer": 1, **SMALL}, "max_workers": 2},
    "gpu-train": {"resources": {"CPU": 2, "GPU": 1, "gpu-train": 1, **SMALL}, "max_workers": 2},
}
JOB = {
    "name": "scaled",
    "run": {"ray": {"roles": {"data": "cpu-data", "infer": "gpu-infer", "train": "gpu-train"}}},
    "steps": {
        "distill": {
            "job": "generate",
            "prompts": [{"type": "playground", "split": "prompts", "rows": 200}],
            "teacher": {"model": {"path": "playground://teacher"}, "pool": {"replicas": 2, "gpus_each": 1}},
            "sampling": {"max_tokens": 32},
        },
        "curate": {
            "job": "curate",
            "inputs": [{"source": {"type": "file", "path": "step://distill/accepted"}}],
            "filters": [{"type": "finish_reason"}],
        },
        "sft": {
            "job": "train",
            "model": {"path": "playground://base", "attention": "eager", "peft": {"type": "lora", "rank": 4}},
            "data": [{"source": {"type": "file", "path": "step://curate/kept"}}],
            "steps": 4,
            "batch": 8,
            "max_length": 128,
            "workers": {"num": 2, "gpus_each": 1, "backend": "gloo"},
        },
    },
}

WATCH = """
import json, sys, time, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
while True:
    alive = [n for n in ray.nodes() if n["Alive"]]
    kinds = [k for n in alive for k in ("cpu-data", "gpu-infer", "gpu-train") if k in n["Resources"]]
    print(json.dumps([time.time(), kinds]), flush=True)
    time.sleep(0.5)
"""


def itune(head, file, *overrides):
    """The pipeline as a driver on the head."""
    command = [
        sys.executable,
        "-m",
        "itune_ray",
        "pipeline",
        str(file),
        f"run.ray.cluster_file={head.file}",
        *overrides,
    ]
    environment = {**head.environment, "RAY_ADDRESS": head.address}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


class Watch:
    """How many nodes of each kind were up, twice a second."""

    def __init__(self, head):
        command = [sys.executable, "-c", WATCH, head.address]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self._process = subprocess.Popen(command, env=dict(head.environment), **pipes)
        self.seen = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            if not line.startswith("["):
                continue  # Ray speaks on stdout too
            when, kinds = json.loads(line)
            self.seen.append((when, {kind: kinds.count(kind) for kind in NODE_TYPES}))

    def close(self):
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def first(self, kind, count=1):
        return next(when for when, up in self.seen if up[kind] >= count)

    def last(self, kind):
        return max(when for when, up in self.seen if up[kind])


@pytest.fixture(scope="module")
def head():
    """A cluster with nothing but a head."""
    with autoscaling(NODE_TYPES) as started:
        yield started


@pytest.fixture(scope="module")
def scaled(head, tmp_path_factory):
    """(exit status, what was seen, nodes over time, output root) of the pipeline on an empty cluster."""
    output = tmp_path_factory.mktemp("scaled")
    file = output / "job.yaml"
    file.write_text(yaml.safe_dump(JOB, sort_keys=False))
    watch = Watch(head)
    done = itune(head, file, f"output={output}")
    deadline = time.monotonic() + 40
    while any(watch.seen[-1][1].values()) and time.monotonic() < deadline:
        time.sleep(0.5)
    watch.close()
    return done.returncode, done.stdout + done.stderr, watch, output


def test_the_pipeline_ends_on_nodes_that_were_not_there(scaled):
    status, seen, _, output = scaled
    assert status == 0, seen
    summary = json.loads((output / "scaled" / "summary.json").read_text())
    assert summary["funnel"]["distill"]["in"] == 200
    assert {facts["status"] for facts in summary["stages"].values()} == {"run"}


def test_each_kind_of_node_comes_for_its_stage_and_leaves(scaled):
    watch = scaled[2]
    assert not any(watch.seen[0][1].values()), "nothing but the head at first"
    assert watch.first("gpu-infer") < watch.first("gpu-train"), "no trainer waits while rows are made"
    assert watch.last("gpu-infer") < watch.last("gpu-train"), "engines are given back before training ends"
    assert not any(watch.seen[-1][1].values()), "the cluster is empty again"


def test_replicas_and_workers_are_asked_for_together(scaled):
    watch = scaled[2]
    for kind in ("gpu-infer", "gpu-train"):
        assert max(up[kind] for _, up in watch.seen) == 2
        assert watch.first(kind, 2) - watch.first(kind) < 8, f"{kind}: the second node is not a second wish"


def test_what_the_cluster_can_never_hold_is_refused_at_once(head, tmp_path):
    """Against the nodes that may come, not against those that are there."""
    steps = {"distill": {**JOB["steps"]["distill"], "teacher": {**JOB["steps"]["distill"]["teacher"]}}}
    steps["distill"]["teacher"]["pool"] = {"replicas": 3, "gpus_each": 1}
    tree = {**JOB, "name": "toolarge", "steps": steps}
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    for override, words in (
        ([], "needs 3 times 1 CPU, 1 GPU, 0.001 gpu-infer, each on one node"),
        (
            ["steps.distill.teacher.pool={replicas: 5, gpus_each: 1}"],
            "needs 5 GPU, and the cluster has and can grow to 4",
        ),
        (["run.ray.roles.infer=gpu-inference"], "gpu-inference, and the cluster has and can grow to 0"),
    ):
        done = itune(head, file, f"output={tmp_path}", *override)
        assert done.returncode == 2, done.stdout + done.stderr
        assert words in done.stderr, done.stderr
