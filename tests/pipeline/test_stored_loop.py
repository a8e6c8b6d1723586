"""The loop with its output in an object store: a real S3 protocol, a killed driver, a second driver, nothing local."""

import json
import os
import signal

import pytest
from stores import s3

from itune_ray.data.storage import Folder
from itune_ray.report.summary import Scores

pytestmark = [pytest.mark.real, pytest.mark.soak]

ROOT = "s3://bucket/runs"
TEACHER = {"model": {"path": "playground://teacher"}}
JOB = {
    "name": "stored",
    "run": {"lock_ttl_s": 4, "ray": {"dashboard": False}},
    "steps": {
        "distill": {
            "job": "generate",
            "prompts": [{"type": "playground", "split": "prompts", "rows": 1500}],
            "teacher": TEACHER,
            "sampling": {"temperature": 0.7, "max_tokens": 32},
            "commit": {"rows": 32, "seconds": 0.5},
        },
        "curate": {
            "job": "curate",
            "inputs": [{"source": {"type": "file", "path": "step://distill/accepted"}}],
            "filters": [{"type": "finish_reason"}, {"type": "exact_dedup"}],
        },
        "sft": {
            "job": "train",
            "model": {"path": "playground://base", "attention": "eager", "peft": {"type": "lora", "rank": 4}},
            "data": [{"source": {"type": "file", "path": "step://curate/kept"}}],
            "steps": 4,
            "batch": 8,
            "max_length": 128,
            "checkpoint": {"every_steps": 2},
        },
        "score": {
            "job": "evaluate",
            "models": [
                {
                    "name": "sft",
                    "model": {"path": "playground://base", "adapter": "step://sft/adapter"},
                    "engine": {"type": "vllm", "max_adapters": 1},
                },
                {"name": "whole", "model": {"path": "step://sft/model"}},
            ],
            "benchmarks": [{"type": "playground", "rows": 24}],
            "sampling": {"temperature": 0, "max_tokens": 32},
        },
        "report": {"job": "report", "inputs": ["step://distill", "step://curate", "step://sft", "step://score"]},
    },
}


@pytest.fixture(scope="module")
def store():
    with s3():
        yield Folder.at(ROOT)


def command(itune, *more):
    return ["pipeline", itune.write(JOB), f"output={ROOT}", *more]


def test_killed_and_resumed_with_everything_in_the_store(itune, store, wait_until):
    run = store / "stored"

    def commits() -> int:
        stages = [name for name in run.names() if name.startswith("distill-")]
        return sum(len((run / stage / "ledger").names()) for stage in stages)

    first = itune.start(*command(itune))
    wait_until(lambda: commits() >= 3, "rows are durable", every=0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    durable = commits()
    assert not any(name.startswith("curate-") for name in run.names()), "the kill must land in the middle"

    resumed = itune.start(*command(itune))
    wait_until(lambda: commits() > durable, "it goes on", every=0.2)
    status, told = itune.run(*command(itune))
    assert status == 2, told
    assert "another driver is working on this run" in told
    seen, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, seen
    summary = run.read_json("summary.json")
    funnel = summary["funnel"]["distill"]
    assert (
        funnel["in"] == 1500 == funnel["accepted"] + sum(funnel["rejected"].values()) + sum(funnel["failed"].values())
    )
    scores: Scores = summary["scores"]
    assert scores["sft"].keys() == scores["whole"].keys()
    assert all(path.startswith(ROOT) for path in summary["artifacts"].values())
    assert run.exists("report.html")

    status, seen = itune.run(*command(itune), timeout=60)
    assert status == 0, seen
    again = run.read_json("summary.json")
    assert {stage["status"] for stage in again["stages"].values()} == {"skipped"}
    assert json.dumps(again["scores"]) == json.dumps(scores)
