"""The loop on the real stack: vLLM, Ray Data, Ray Train, a killed driver, a second run that has nothing to do."""

import os
import signal
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from runs import commits, losses, table_hash

pytestmark = pytest.mark.real

LORA = {"type": "lora", "rank": 16, "train_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}
VLLM = {"type": "vllm", "max_adapters": 1}


ROWS = 900


def loop(name: str, root: Path) -> dict:
    """A small pipeline with every kind of step but the report's pictures."""
    engine = {"type": "vllm", "request_log": f"{root}/{name}.requests"}
    teacher = {"model": {"path": "playground://teacher"}, "engine": engine}
    student = {"model": {"path": "playground://base"}, "engine": VLLM}
    tuned = {"model": {"path": "playground://base", "adapter": "step://sft/adapter"}, "engine": VLLM}
    greedy = {"temperature": 0, "top_p": 1.0, "max_tokens": 48}
    return {
        "name": name,
        "steps": {
            "distill": {
                "job": "generate",
                "prompts": [{"type": "playground", "split": "prompts", "rows": ROWS, "seed": 3}],
                "teacher": teacher,
                "sampling": {"temperature": 0.7, "max_tokens": 48},
                "commit": {"rows": 64, "seconds": 1.0},
            },
            "curate": {
                "job": "curate",
                "inputs": [{"source": {"type": "file", "path": "step://distill/accepted"}}],
                "filters": [
                    {"type": "finish_reason"},
                    {"type": "length", "max_response": 300},
                    {"type": "exact_dedup"},
                    {"type": "grader"},
                ],
            },
            "sft": {
                "job": "train",
                "model": {"path": "playground://base", "attention": "eager", "peft": LORA},
                "data": [{"source": {"type": "file", "path": "step://curate/kept"}}],
                "optimizer": {"type": "adamw", "lr": 6e-3},
                "schedule": {"type": "linear", "warmup": 0.05},
                "strategy": {"type": "fsdp2"},
                "steps": 60,
                "batch": 32,
                "max_length": 128,
                "workers": {"num": 2},
                "checkpoint": {"every_steps": 10, "keep": 2},
            },
            "score": {
                "job": "evaluate",
                "models": [{"name": "base", **student}, {"name": "sft", **tuned}],
                "benchmarks": [{"type": "playground", "rows": 80}],
                "sampling": greedy,
            },
            "report": {
                "job": "report",
                "inputs": ["step://distill", "step://curate", "step://sft", "step://score"],
            },
        },
    }


@pytest.fixture(scope="module")
def undisturbed(itune):
    """The loop run once, from nothing to the report."""
    status, seen = itune.run("pipeline", itune.write(loop("calm", itune.root)))
    assert status == 0, seen
    return seen


def test_every_row_is_accounted_for(itune, undisturbed):
    summary = itune.summary("calm")
    assert set(summary) >= {"scores", "funnel", "stages", "artifacts"}
    for stage in ("distill", "curate"):
        funnel = summary["funnel"][stage]
        assert funnel["in"] == funnel["accepted"] + sum(funnel["rejected"].values()) + sum(funnel["failed"].values())
    assert summary["funnel"]["distill"]["in"] == ROWS
    assert summary["funnel"]["curate"]["in"] == summary["funnel"]["distill"]["accepted"]


def test_tuning_moves_the_score(itune, undisturbed):
    scores = itune.summary("calm")["scores"]
    (base,), (sft,) = scores["base"].values(), scores["sft"].values()
    assert base["n"] == sft["n"] == 80
    assert base["low"] <= base["value"] <= base["high"]
    assert sft["low"] > base["high"], "60 steps of LoRA must be visible beyond the intervals"


def test_the_report_is_there_and_loads_nothing(itune, undisturbed):
    html = (itune.root / "calm" / "report.html").read_text()
    assert "<svg" in html
    assert 'src="http' not in html
    assert "<link" not in html


def test_output_for_people_is_quiet(undisturbed):
    lines = undisturbed.strip().splitlines()
    assert len(lines) < 40
    assert not [line for line in lines if "WARNING" in line or "(pid=" in line or "INFO " in line]


def test_the_same_command_again_does_nothing(itune, undisturbed):
    before = {p: p.stat().st_mtime_ns for p in (itune.root / "calm").rglob("part-0.parquet")}
    status, seen = itune.run("pipeline", itune.root / "calm.yaml", timeout=60)
    assert status == 0
    assert {facts["status"] for facts in itune.summary("calm")["stages"].values()} == {"skipped"}
    assert "dashboard" not in seen, "a run with nothing to do starts no Ray"
    assert before == {p: p.stat().st_mtime_ns for p in (itune.root / "calm").rglob("part-0.parquet")}


def test_killed_twice_the_run_ends_as_if_undisturbed(itune, undisturbed, wait_until):
    tree = loop("killed", itune.root)
    del tree["steps"]["score"]  # it comes after all that is compared
    tree["steps"]["report"]["inputs"].remove("step://score")
    file = itune.write(tree)
    run = itune.root / "killed"
    log = Path(f"{itune.root}/killed.requests")

    first = itune.start("pipeline", file)
    wait_until(lambda: len(commits(list(run.glob("distill-*")))) >= 3, "three commits are durable")
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    durable = commits(list(run.glob("distill-*")))
    settled = {key for part in durable for key in pq.read_table(part)["input_key"].to_pylist()}
    assert 0 < len(settled) < ROWS, "the kill must land in the middle"
    asked_before = Counter(log.read_text().split())

    second = itune.start("pipeline", file)
    wait_until(
        lambda: any(len(losses(s)) >= 15 for s in run.glob("sft-*") if (s / "metrics.jsonl").exists()),
        "15 steps are done",
    )
    os.kill(second.pid, signal.SIGKILL)
    second.communicate()

    status, seen = itune.run("pipeline", file)
    assert status == 0, seen

    asked = Counter(log.read_text().split())
    again = {request for request in asked if asked[request] > asked_before[request] > 0}
    assert not {request for request in again if any(request.endswith(key) or key in request for key in settled)}
    assert len(again) <= ROWS - len(settled)
    for stage, tables in {"distill": ("accepted", "rejected", "failed"), "curate": ("kept", "rejected")}.items():
        for table in tables:
            ours, calm = itune.stage("killed", stage) / table, itune.stage("calm", stage) / table
            assert table_hash(ours) == table_hash(calm), f"{stage}/{table} differs after two kills"
    assert losses(itune.stage("killed", "sft")) == losses(itune.stage("calm", "sft"))


def test_a_changed_threshold_generates_nothing_again(itune, undisturbed):
    asked = Path(f"{itune.root}/calm.requests").read_text()
    tree = loop("calm", itune.root)
    tree["steps"] = {name: tree["steps"][name] for name in ("distill", "curate")}
    tree["steps"]["curate"]["filters"][1]["max_response"] = 20
    status, seen = itune.run("pipeline", itune.write(tree))
    assert status == 0, seen
    assert Path(f"{itune.root}/calm.requests").read_text() == asked
    summary = itune.summary("calm")
    assert (summary["stages"]["distill"]["status"], summary["stages"]["curate"]["status"]) == ("skipped", "run")
    assert summary["funnel"]["curate"]["rejected"]["long_response"] > 0
