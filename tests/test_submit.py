"""The same job on a free-standing cluster: `ray job submit`, watched by Prometheus, `itune submit`, resubmission, a
stop that leaves nothing.

The cluster asks for a token, has its own ports and folder, and is stopped by its own pid.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from boards import ALERTS, PANELS
from clusters import JobServer, free_port, job_server, joining

from itune_ray.dashboard import DISCOVERY, prometheus

pytestmark = [pytest.mark.real, pytest.mark.timeout(480)]

ROOT = Path(__file__).parents[1]


NEEDS_PROMETHEUS = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")

PLAYGROUND = {"type": "playground", "split": "chat", "rows": 96, "seed": 6}
# One model and one engine for all steps: each engine's start takes as long as all else of its stage.
SERVED = {
    "model": {"path": "playground://teacher"},
    "engine": {"type": "vllm", "max_adapters": 1, "max_model_len": 31},
}
"""So short that some of the prompts are refused."""
TRAIN = {
    "model": {"path": "playground://teacher", "attention": "eager", "peft": {"type": "lora", "rank": 4}},
    "batch": 8,
    "max_length": 128,
    "log_every": 1,
    "checkpoint": {"every_steps": 2},
}
SAMPLING = {"temperature": 0, "max_tokens": 32}
LOOP = {
    "name": "submitted",
    "run": {"prices": {"CPU": 0.05}},
    "steps": {
        "distill": {
            "job": "generate",
            "prompts": [{**PLAYGROUND, "split": "prompts", "rows": 300}],
            "teacher": SERVED,
            "sampling": {"max_tokens": 32},
        },
        "sft": {
            **TRAIN,
            "job": "train",
            "data": [{"source": {"type": "file", "path": "step://distill/accepted"}}],
            "steps": 6,
            "packing": True,
            "validation": {"data": [{"source": {**PLAYGROUND, "rows": 8}}]},
            "workers": {"peak_tflops": 0.4},
        },
        "score": {
            "job": "evaluate",
            "models": [{"name": "sft", **SERVED, "model": {**SERVED["model"], "adapter": "step://sft/adapter"}}],
            "benchmarks": [{"type": "playground", "rows": 40}],
            "sampling": SAMPLING,
        },
        "sweep": {
            "job": "sweep",
            "axes": {"train.model.peft.rank": [2, 4]},
            "train": {**TRAIN, "data": [{"source": PLAYGROUND}], "steps": 2},
            "evaluate": {"benchmarks": [{"type": "playground", "rows": 20}], "sampling": SAMPLING},
            "scheduler": {"type": "fifo"},
        },
    },
}
LONG = {
    "name": "long",
    "prompts": [{"type": "playground", "split": "prompts", "rows": 20_000}],
    "teacher": {"model": {"path": "playground://teacher"}},
    "recipe": {"type": "respond", "samples": 8},
}


@pytest.fixture(scope="module")
def cluster():
    """A head on ports of its own."""
    with job_server() as started:
        yield started


@pytest.fixture(scope="module")
def ready(cluster, tmp_path_factory):
    """The job server, and an output root."""
    return cluster, tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """What travels: the package and two job files, as in a clone."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "itune_ray", folder / "itune_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for job in (LOOP, LONG):
        (folder / f"{job['name']}.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return folder


def shell(command: list[str], cwd: Path, environment: Mapping[str, str], timeout: float = 240) -> tuple[int, str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout


def itune(server: JobServer, project: Path, *words: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """One of the commands that talk to the job server, with its token or in another environment."""
    command = [sys.executable, "-m", "itune_ray", *words, "--address", server.address]
    return shell(command, project, env or server.environment)


@dataclass(frozen=True)
class Watched:
    """A run that was submitted, and where the Prometheus is that scraped its cluster."""

    summary: Mapping[str, Any]
    began: float
    ended: float
    prometheus: str | None

    def ask(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(f"{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as reply:
            return json.loads(reply.read())["data"]


@pytest.fixture(scope="module")
def submitted(ready, project, wait_until):
    server, output = ready
    with contextlib.ExitStack() as stack:
        url = None
        if shutil.which("prometheus") is not None:
            wait_until((server.folder / DISCOVERY).is_file, "Ray says where its metrics are", every=0.2)
            url = stack.enter_context(prometheus(server.folder, free_port(), interval_s=1.0)).url
        began = time.time()
        entry = ["python", "-m", "itune_ray", "pipeline", "submitted.yaml", f"output={output}"]
        ray_submit = ["ray", "job", "submit", f"--address={server.address}", "--working-dir", ".", "--", *entry]
        status, seen = shell(ray_submit, project, server.environment)
        assert status == 0, seen
        assert "succeeded" in seen
        time.sleep(3)  # the driver's last words: one report of Ray's, and one scrape
        yield Watched(json.loads((output / "submitted" / "summary.json").read_text()), began, time.time(), url)


def test_ray_job_submit_and_itune_submit_do_the_same(submitted, ready, project):
    server, output = ready
    assert {facts["status"] for facts in submitted.summary["stages"].values()} == {"run"}

    status, seen = itune(server, project, "submit", "pipeline", "submitted.yaml", f"output={output}")
    assert status == 0, seen
    assert "SUCCEEDED" in seen
    again = json.loads((output / "submitted" / "summary.json").read_text())
    assert {facts["status"] for facts in again["stages"].values()} == {"skipped"}, "a resubmission resumes"
    assert again["scores"] == submitted.summary["scores"]

    status, seen = itune(server, project, "status", "submitted")
    assert status == 0, seen
    first, *stages = seen.strip().splitlines()
    assert "submitted  SUCCEEDED" in first
    assert "config " in first
    names = [line.split(":")[0].strip().rpartition("-")[0] for line in stages]
    assert names == ["distill", "score", "sft", "sweep", "trial", "trial"]
    assert all("complete" in line for line in stages)
    status, seen = itune(server, project, "logs", "submitted")
    assert status == 0
    assert "skipped (finished before)" in seen


def test_a_driver_from_outside_joins_by_ray_address(ready, project):
    server, _ = ready
    code = (
        "import ray; from itune_ray import cluster; from itune_ray.config.shared import RayConfig;"
        "cluster.connect(RayConfig()); print(ray.get_runtime_context().gcs_address.rpartition(':')[2])"
    )
    status, seen = shell([sys.executable, "-c", code], project, {**server.environment, "RAY_ADDRESS": server.gcs})
    assert status == 0, seen
    assert seen.split()[-1] == server.gcs.rpartition(":")[2]


@NEEDS_PROMETHEUS
def test_every_panel_shows_something_of_a_run(submitted):
    empty = []
    for board, title, expression in PANELS:
        asked = expression.replace("$run", "submitted").replace("[1m]", "[15s]")
        if not submitted.ask("query_range", query=asked, start=submitted.began, end=submitted.ended, step=1)["result"]:
            empty.append(f"{board}: {title}: {asked}")
    assert not empty, "\n".join(empty)


@NEEDS_PROMETHEUS
def test_alerts_are_loaded_and_none_fires_on_a_healthy_run(submitted):
    rules = [rule for group in submitted.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {name for name, _ in ALERTS}
    assert {rule["health"] for rule in rules} == {"ok"}
    assert {rule["state"] for rule in rules} == {"inactive"}
    for _, expression in ALERTS:
        assert submitted.ask("query", query=expression, time=submitted.ended)["result"] == []


@NEEDS_PROMETHEUS
def test_counts_are_those_of_the_run(submitted):
    def total(metric: str) -> float:
        query = f"sum(last_over_time({metric}[{int(submitted.ended - submitted.began) + 5}s]))"
        return float(submitted.ask("query", query=query, time=submitted.ended)["result"][0]["value"][1])

    assert total('ray_itune_rows_total{run="submitted",stage="distill"}') == 300
    assert total('ray_itune_engine_requests_total{run="submitted"}') >= 300 + 40 + 2 * 20


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["none", "another"])
def test_without_the_clusters_token_every_command_is_one_line(ready, project, token):
    server, output = ready
    for words in (["status"], ["submit", "pipeline", "submitted.yaml", f"output={output}"]):
        status, seen = itune(server, project, *words, env=joining(token))
        assert status == 2, seen
        assert "the cluster asks for another token" in seen
        assert len(seen.strip().splitlines()) == 1, seen


def test_a_name_that_was_never_submitted_is_one_line(ready, project):
    for command in ("status", "logs", "stop"):
        status, seen = itune(ready[0], project, command, "submited")
        assert status == 2
        assert "no run of this name was submitted" in seen
        assert len(seen.strip().splitlines()) == 1, seen


def test_a_job_without_a_lasting_output_root_is_refused(ready, project):
    server, _ = ready
    status, seen = itune(server, project, "submit", "pipeline", "submitted.yaml")
    assert status == 2
    assert "output root that outlives it" in seen
    entry = ["python", "-m", "itune_ray", "pipeline", "submitted.yaml"]
    ray_submit = ["ray", "job", "submit", f"--address={server.address}", "--working-dir", ".", "--", *entry]
    status, seen = shell(ray_submit, project, server.environment)
    assert status != 0
    assert "output root that outlives it" in seen


def test_no_job_server_at_the_address_is_one_line(project):
    command = [sys.executable, "-m", "itune_ray", "submit", "pipeline", "submitted.yaml", "output=/tmp/x"]
    status, seen = shell([*command, "--address", f"http://127.0.0.1:{free_port()}"], project, joining(None))
    assert status == 2
    assert "no job server answers" in seen
    assert len(seen.strip().splitlines()) == 1


def engines(head: int) -> set[int]:
    """Processes of engine replicas below a cluster's head."""
    found: set[int] = set()
    for process in psutil.Process(head).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline() or [process.name()]).startswith("ray::Replica"):
                found.add(process.pid)
    return found


def test_a_stopped_job_leaves_no_engine_behind(ready, project, wait_until):
    server, output = ready
    assert not engines(server.pid), "those of finished jobs are gone"
    status, seen = itune(server, project, "submit", "generate", "long.yaml", f"output={output}", "--no-wait")
    assert status == 0, seen
    ledger = output / "long"
    wait_until(lambda: any(ledger.glob("generate-*/ledger/commit-*.parquet")), "generation is under way", every=0.2)
    running = engines(server.pid)
    assert running, "an engine runs while the job does"
    status, seen = itune(server, project, "stop", "long")
    assert status == 0, seen
    assert "STOPPED; submitted again, it goes on from here" in seen
    wait_until(lambda: not any(map(psutil.pid_exists, running)), "the engines are gone", timeout=60, every=0.2)
    assert not engines(server.pid)
