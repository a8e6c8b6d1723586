"""Submitted jobs in number, and a driver that is killed: none is lost, and nothing of them is left over."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from clusters import JobServer, job_server
from runs import commits

pytestmark = [pytest.mark.real, pytest.mark.soak]

JOBS, AT_ONCE = 200, 8
TEACHER = {"model": {"path": "playground://teacher"}}


@pytest.fixture(scope="module")
def server():
    with job_server() as started:
        yield started


SERVICES = ("IDLE", "DashboardAgent", "RuntimeEnvAgent", "_StatsActor", "_AutoscalingCoordinatorActor")
"""Ray's own processes, which belong to the cluster: workers without work, and what Ray Data starts once."""


def descendants(server: JobServer) -> dict[int, str]:
    """Processes below the head that work for a job, by what they are."""
    found: dict[int, str] = {}
    for process in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process.pid] = " ".join(process.cmdline() or [process.name()]).strip()
    ours = {pid: line for pid, line in found.items() if "-m itune_ray" in line or line.startswith("ray::")}
    return {pid: line for pid, line in ours.items() if line.removeprefix("ray::").split()[0] not in SERVICES}


def submit(server: JobServer, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "itune_ray", "submit", *words, "--address", server.address]
    return subprocess.run(command, cwd=folder, env=server.environment, capture_output=True, text=True, timeout=600)


def test_two_hundred_jobs_eight_at_a_time(server, tmp_path):
    """Each has rows of its own; every tenth has nothing that it could keep, and must fail with one line."""
    from concurrent.futures import ThreadPoolExecutor

    rows = [json.dumps({"instruction": f"say {i}", "output": f"{i} is said"}) for i in range(20)]
    for number in range(JOBS):
        name = f"job-{number:03d}"
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows[: 1 + number % 20]) + "\n")
        tree = {
            "name": name,
            "inputs": [{"source": {"type": "file", "path": str(tmp_path / f"{name}.jsonl")}}],
            "filters": [{"type": "length", "min_response": 1}, {"type": "exact_dedup"}],
            "min_rows": 10**6 if number % 10 == 9 else 1,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    began = time.monotonic()

    def one(number: int) -> tuple[int, str]:
        done = submit(server, tmp_path, "curate", f"job-{number:03d}.yaml", f"output={tmp_path / 'runs'}")
        return done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(AT_ONCE) as pool:
        ended = list(pool.map(one, range(JOBS)))
    print(f"{JOBS} jobs in {time.monotonic() - began:.0f} s")
    for number, (status, seen) in enumerate(ended):
        summary = tmp_path / "runs" / f"job-{number:03d}" / "summary.json"
        if number % 10 == 9:
            assert (status, "FAILED" in seen) == (1, True), seen
        else:
            assert status == 0, seen
            assert json.loads(summary.read_text())["funnel"]["curate"]["in"] == 1 + number % 20
    listed = subprocess.run(
        [sys.executable, "-m", "itune_ray", "status", "--address", server.address],
        env=server.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len({line.split()[0] for line in listed if line.startswith("job-")}) == JOBS
    assert not any(line.split()[1] in ("PENDING", "RUNNING") for line in listed)
    deadline = time.monotonic() + 60
    while left := list(descendants(server).values()):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_a_killed_driver_is_submitted_again_and_the_run_finishes(server, tmp_path):
    log = tmp_path / "requests"
    tree = {
        "name": "killed",
        "run": {"output": str(tmp_path)},
        "prompts": [{"type": "playground", "split": "prompts", "rows": 4000}],
        "teacher": {**TEACHER, "engine": {"type": "vllm", "request_log": str(log)}},
        "sampling": {"temperature": 0.7, "max_tokens": 48},
        "commit": {"rows": 64, "seconds": 1.0},
    }
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(tree))
    assert submit(server, tmp_path, "generate", "killed.yaml", "--no-wait").returncode == 0
    stages = tmp_path / "killed"
    deadline = time.monotonic() + 120
    while len(commits(stages.glob("generate-*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    drivers = [
        pid for pid, line in descendants(server).items() if "-m itune_ray generate" in line and "sh -c" not in line
    ]
    assert drivers
    for pid in drivers:
        os.kill(pid, signal.SIGKILL)
    while any("Replica" in line for line in descendants(server).values()):
        assert time.monotonic() < deadline + 60, "the engines outlive their driver"
        time.sleep(0.2)
    asked = log.read_text().split()
    assert len(asked) < 4000, "the kill must land in the middle"

    done = submit(server, tmp_path, "generate", "killed.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    funnel = json.loads((stages / "summary.json").read_text())["funnel"]["generate"]
    assert (
        funnel["in"] == 4000 == funnel["accepted"] + sum(funnel["rejected"].values()) + sum(funnel["failed"].values())
    )
    again = len(log.read_text().split()) - 4000
    print(f"{len(asked)} of 4000 rows were asked when the driver died, {again} of them again")
    assert again < 1000
