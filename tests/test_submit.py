"""The same job on a free-standing cluster: `ray job submit`, `itune submit`, resubmission, a stop that leaves nothing.

The cluster asks for a token, has its own ports and folder, and is stopped by its own pid.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).parent / "ray"
SEARCH_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
"""As in an activated environment: the `python` of an entrypoint is the cluster's."""


TOKEN = secrets.token_hex(32)


def joining(token: str | None) -> dict[str, str]:
    """The environment of whoever talks to the cluster, with a token or without any."""
    environment = {**os.environ, "PATH": SEARCH_PATH, "RAY_AUTH_MODE": "token" if token else "disabled"}
    environment.pop("RAY_ADDRESS", None)
    return {**environment, "RAY_AUTH_TOKEN": token} if token else environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """A head on ports of its own; yields the address of its job server and its process."""
    folder = tempfile.mkdtemp(prefix="ir", dir="/tmp")
    dashboard = free_port()
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        "--num-cpus=8",
        f"--port={free_port()}",
        f"--temp-dir={folder}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--dashboard-agent-grpc-port={free_port()}",
        f"--metrics-export-port={free_port()}",
        f"--ray-client-server-port={free_port()}",
        f"--runtime-env-agent-port={free_port()}",
    ]
    environment = {**joining(TOKEN), "OMP_NUM_THREADS": "1"}
    head = subprocess.Popen(
        [str(word) for word in command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{dashboard}"
    yield address, head.pid
    children = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    for child in psutil.wait_procs(children, timeout=3)[1]:  # the head itself gives them half a minute
        child.kill()
    head.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ready(cluster, tmp_path_factory):
    """The job server's address once it answers, and an output root."""
    import time

    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(f"{cluster[0]}/api/version", timeout=2):
                break
        except urllib.error.HTTPError:  # it answers, and wants a token
            break
        except OSError:
            assert time.monotonic() < deadline, "the cluster did not come up"
            time.sleep(0.25)
    return cluster[0], tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """What travels: the package and a small pipeline, as in a clone."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "itune_ray", folder / "itune_ray", ignore=shutil.ignore_patterns("__pycache__"))
    served = {"model": {"path": "playground://base"}, "engine": {"type": "vllm", "max_adapters": 1}}
    job = {
        "name": "submitted",
        "steps": {
            "distill": {
                "job": "generate",
                "prompts": [{"type": "playground", "split": "prompts", "rows": 64}],
                "teacher": {"model": {"path": "playground://teacher"}},
                "sampling": {"max_tokens": 32},
            },
            "sft": {
                "job": "train",
                "model": {"path": "playground://base", "attention": "eager", "peft": {"type": "lora", "rank": 4}},
                "data": [{"source": {"type": "file", "path": "step://distill/accepted"}}],
                "steps": 3,
                "batch": 8,
                "max_length": 128,
                "workers": {"num": 2},
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


def shell(command: list[str], cwd: Path, timeout: float = 240, token: str | None = TOKEN) -> tuple[int, str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=joining(token),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout


def itune(address: str, project: Path, *words: str, token: str | None = TOKEN) -> tuple[int, str]:
    """One of the commands that talk to the job server."""
    return shell([sys.executable, "-m", "itune_ray", *words, "--address", address], project, token=token)


def test_ray_job_submit_and_itune_submit_do_the_same(ready, project):
    address, output = ready
    entry = ["python", "-m", "itune_ray", "pipeline", "loop.yaml", f"output={output}"]
    status, seen = shell(["ray", "job", "submit", f"--address={address}", "--working-dir", ".", "--", *entry], project)
    assert status == 0, seen
    assert "succeeded" in seen
    summary = json.loads((output / "submitted" / "summary.json").read_text())
    assert {facts["status"] for facts in summary["stages"].values()} == {"run"}

    command = [sys.executable, "-m", "itune_ray", "submit", "pipeline", "loop.yaml", f"output={output}"]
    status, seen = shell([*command, "--address", address], project)
    assert status == 0, seen
    assert "SUCCEEDED" in seen
    again = json.loads((output / "submitted" / "summary.json").read_text())
    assert {facts["status"] for facts in again["stages"].values()} == {"skipped"}, "a resubmission resumes"
    assert again["scores"] == summary["scores"]

    status, seen = itune(address, project, "status", "submitted")
    assert status == 0, seen
    first, *stages = seen.strip().splitlines()
    assert "submitted  SUCCEEDED" in first
    assert "config " in first
    assert [line.split(":")[0].strip().rpartition("-")[0] for line in stages] == ["distill", "score", "sft"]
    assert all("complete" in line for line in stages)
    status, seen = itune(address, project, "logs", "submitted")
    assert status == 0
    assert "skipped (finished before)" in seen


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["none", "another"])
def test_without_the_clusters_token_every_command_is_one_line(ready, project, token):
    address, output = ready
    for words in (["status"], ["submit", "pipeline", "loop.yaml", f"output={output}"]):
        status, seen = itune(address, project, *words, token=token)
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
    address, _ = ready
    status, seen = shell([sys.executable, "-m", "itune_ray", "submit", "pipeline", "loop.yaml"], project)
    assert status == 2
    assert "output root that outlives it" in seen
    entry = ["python", "-m", "itune_ray", "pipeline", "loop.yaml"]
    status, seen = shell(["ray", "job", "submit", f"--address={address}", "--working-dir", ".", "--", *entry], project)
    assert status != 0
    assert "output root that outlives it" in seen


def test_no_job_server_at_the_address_is_one_line(project):
    command = [sys.executable, "-m", "itune_ray", "submit", "pipeline", "loop.yaml", "output=/tmp/x"]
    status, seen = shell([*command, "--address", f"http://127.0.0.1:{free_port()}"], project)
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


def test_a_stopped_job_leaves_no_engine_behind(ready, cluster, project, wait_until):
    address, output = ready
    assert not engines(cluster[1]), "those of finished jobs are gone"
    command = [sys.executable, "-m", "itune_ray", "submit", "generate", "long.yaml", f"output={output}", "--no-wait"]
    status, seen = shell([*command, "--address", address], project)
    assert status == 0, seen
    ledger = output / "long"
    wait_until(lambda: any(ledger.glob("generate-*/ledger/commit-*.parquet")), "generation is under way", every=0.2)
    running = engines(cluster[1])
    assert running, "an engine runs while the job does"
    status, seen = itune(address, project, "stop", "long")
    assert status == 0, seen
    assert "STOPPED; submitted again, it goes on from here" in seen
    wait_until(lambda: not any(map(psutil.pid_exists, running)), "the engines are gone", timeout=60, every=0.2)
    assert not engines(cluster[1])
