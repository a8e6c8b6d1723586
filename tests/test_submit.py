"""The same job on a free-standing cluster: `ray job submit`, `itune submit`, resubmission, a stop that leaves nothing.

The cluster asks for a token, has its own ports and folder, and is stopped by its own pid.
"""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import yaml
from clusters import JobServer, free_port, job_server, joining

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[1]


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
    """What travels: the package and a small pipeline, as in a clone."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "itune_ray", folder / "itune_ray", ignore=shutil.ignore_patterns("__pycache__"))
    # One model and one engine for all steps: each engine's start takes as long as all else of its stage.
    served = {"model": {"path": "playground://teacher"}, "engine": {"type": "vllm", "max_adapters": 1}}
    job = {
        "name": "submitted",
        "steps": {
            "distill": {
                "job": "generate",
                "prompts": [{"type": "playground", "split": "prompts", "rows": 64}],
                "teacher": served,
                "sampling": {"max_tokens": 32},
            },
            "sft": {
                "job": "train",
                "model": {"path": "playground://teacher", "attention": "eager", "peft": {"type": "lora", "rank": 4}},
                "data": [{"source": {"type": "file", "path": "step://distill/accepted"}}],
                "steps": 3,
                "batch": 8,
                "max_length": 128,
            },
            "score": {
                "job": "evaluate",
                "models": [{"name": "sft", **served, "model": {**served["model"], "adapter": "step://sft/adapter"}}],
                "benchmarks": [{"type": "playground", "rows": 16}],
                "sampling": {"temperature": 0, "max_tokens": 32},
            },
        },
    }
    (folder / "loop.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    long = {
        "name": "long",
        "prompts": [{"type": "playground", "split": "prompts", "rows": 20_000}],
        "teacher": {"model": {"path": "playground://teacher"}},
        "recipe": {"type": "respond", "samples": 8},
    }
    (folder / "long.yaml").write_text(yaml.safe_dump(long))
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


def test_ray_job_submit_and_itune_submit_do_the_same(ready, project):
    server, output = ready
    entry = ["python", "-m", "itune_ray", "pipeline", "loop.yaml", f"output={output}"]
    ray_submit = ["ray", "job", "submit", f"--address={server.address}", "--working-dir", ".", "--", *entry]
    status, seen = shell(ray_submit, project, server.environment)
    assert status == 0, seen
    assert "succeeded" in seen
    summary = json.loads((output / "submitted" / "summary.json").read_text())
    assert {facts["status"] for facts in summary["stages"].values()} == {"run"}

    status, seen = itune(server, project, "submit", "pipeline", "loop.yaml", f"output={output}")
    assert status == 0, seen
    assert "SUCCEEDED" in seen
    again = json.loads((output / "submitted" / "summary.json").read_text())
    assert {facts["status"] for facts in again["stages"].values()} == {"skipped"}, "a resubmission resumes"
    assert again["scores"] == summary["scores"]

    status, seen = itune(server, project, "status", "submitted")
    assert status == 0, seen
    first, *stages = seen.strip().splitlines()
    assert "submitted  SUCCEEDED" in first
    assert "config " in first
    assert [line.split(":")[0].strip().rpartition("-")[0] for line in stages] == ["distill", "score", "sft"]
    assert all("complete" in line for line in stages)
    status, seen = itune(server, project, "logs", "submitted")
    assert status == 0
    assert "skipped (finished before)" in seen


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["none", "another"])
def test_without_the_clusters_token_every_command_is_one_line(ready, project, token):
    server, output = ready
    for words in (["status"], ["submit", "pipeline", "loop.yaml", f"output={output}"]):
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
    status, seen = itune(server, project, "submit", "pipeline", "loop.yaml")
    assert status == 2
    assert "output root that outlives it" in seen
    entry = ["python", "-m", "itune_ray", "pipeline", "loop.yaml"]
    ray_submit = ["ray", "job", "submit", f"--address={server.address}", "--working-dir", ".", "--", *entry]
    status, seen = shell(ray_submit, project, server.environment)
    assert status != 0
    assert "output root that outlives it" in seen


def test_no_job_server_at_the_address_is_one_line(project):
    command = [sys.executable, "-m", "itune_ray", "submit", "pipeline", "loop.yaml", "output=/tmp/x"]
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
