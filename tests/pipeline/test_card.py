"""Self-instruct, preferences, DPO, distributions, KD and pruning in one small run, and once more, killed while the
teacher invents. Tables, losses and weights must come out the same."""

import hashlib
import json
import os
import signal

import pytest
from runs import commits, losses, table_hash

pytestmark = [pytest.mark.real, pytest.mark.soak]

PLAYGROUND = {"type": "playground", "split": "prompts"}
TEACHER = {"model": {"path": "playground://teacher"}}
TUNED = {"path": "playground://teacher", "attention": "eager", "peft": {"type": "lora", "rank": 8}}
TRAINED = {
    "job": "train",
    "optimizer": {"type": "adamw", "lr": 1e-3},
    "batch": 16,
    "max_length": 128,
    "checkpoint": {"every_steps": 2, "keep": 2},
}
ONE_WORKER = {"num": 1}
"""A worker is a process that imports the stack; their number does not change a table."""
TABLES = ("accepted", "rejected", "failed")


def rows_of(path: str, **of) -> list[dict]:
    return [{"source": {"type": "file", "path": path}, **of}]


def card(name: str) -> dict:
    """The steps that the whole card adds to the loop, small."""
    return {
        "name": name,
        "steps": {
            "invent": {
                "job": "generate",
                "prompts": [{**PLAYGROUND, "rows": 60, "seed": 4}],
                "teacher": TEACHER,
                "recipe": {
                    "type": "self_instruct",
                    "style": "single",
                    "template": "jobs/pipeline/templates/invent.jinja",
                    "rounds": 3,
                    "calls": 80,
                    "examples": 1,
                    "machine_examples": 1,
                    "min_words": 2,
                    "blocked": [],
                    "answer": {"temperature": 0.7, "max_tokens": 48},
                },
                "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 48},
                "commit": {"rows": 16, "seconds": 0.5},
                "workers": ONE_WORKER,
            },
            "pairs": {
                "job": "generate",
                "prompts": [{**PLAYGROUND, "rows": 200, "seed": 5}],
                "teacher": TEACHER,
                "recipe": {"type": "preference", "samples": 4, "scorer": {"type": "grader", "grader": "playground"}},
                "sampling": {"temperature": 1.4, "top_p": 1.0, "max_tokens": 48},
                "workers": ONE_WORKER,
            },
            "dpo": {
                **TRAINED,
                "model": TUNED,
                "data": rows_of("step://pairs/accepted"),
                "validation": {"data": rows_of("step://pairs/accepted"), "every_steps": 6},
                "objective": {"type": "dpo"},
                "steps": 12,
            },
            "distributions": {
                "job": "generate",
                "prompts": [{"type": "file", "path": "step://invent/accepted"}],
                "teacher": TEACHER,
                "recipe": {"type": "teacher_topk", "k": 5},
                "workers": ONE_WORKER,
            },
            "kd": {
                **TRAINED,
                "model": TUNED,
                "data": rows_of("step://distributions/accepted"),
                "objective": {"type": "kd", "k": 5},
                "strategy": {"type": "fsdp2"},
                "steps": 6,
            },
            "prune": {
                "job": "compress",
                "model": {"path": "step://kd/model"},
                "method": {"type": "structured", "channels": 0.25, "heads": 0.25},
                "calibration": {
                    "data": [{"type": "file", "path": "step://invent/accepted"}],
                    "rows": 64,
                    "max_length": 128,
                },
            },
        },
    }


@pytest.fixture(scope="module")
def calm(itune):
    """The run without a disturbance."""
    status, seen = itune.run("pipeline", itune.write(card("calm")))
    assert status == 0, seen


def test_every_part_made_something(itune, calm):
    funnel = itune.summary("calm")["funnel"]
    assert all(funnel[stage]["accepted"] > 20 for stage in ("invent", "pairs", "distributions"))
    assert set(funnel["pairs"]["rejected"]) <= {"all_right", "all_wrong", "no_contrast"}
    lines = (itune.stage("calm", "dpo") / "validation.jsonl").read_text().splitlines()
    first, *_, last = map(json.loads, lines)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4), "the policy is its own reference at first"
    assert last["reward_margin"] > first["reward_margin"] == pytest.approx(0, abs=1e-4)


def test_killed_and_done_again_the_tables_losses_and_weights_are_the_same(itune, calm, wait_until):
    file = itune.write(card("killed"))
    run = itune.root / "killed"

    first = itune.start("pipeline", file)
    wait_until(lambda: len(commits(list(run.glob("invent-*")))) >= 3, "the teacher has invented for a while")
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert not list(run.glob("pairs-*")), "the kill must land in the middle"

    status, seen = itune.run("pipeline", file)
    assert status == 0, seen
    for stage in ("invent", "pairs", "distributions"):
        for table in TABLES:
            ours, theirs = (itune.stage(name, stage) / table for name in ("killed", "calm"))
            assert table_hash(ours) == table_hash(theirs), f"{stage}/{table} differs after a kill"
    for stage in ("dpo", "kd"):
        assert losses(itune.stage("killed", stage)) == losses(itune.stage("calm", stage)), stage
    for stage, payload in (("dpo", "adapter/adapter_model"), ("kd", "model/model"), ("prune", "model/model")):
        ours, theirs = (
            hashlib.sha256((itune.stage(name, stage) / f"{payload}.safetensors").read_bytes()).hexdigest()
            for name in ("killed", "calm")
        )
        assert ours == theirs, f"weights of {stage}"
    checks = [(itune.stage(name, "dpo") / "validation.jsonl").read_text() for name in ("killed", "calm")]
    assert checks[0] == checks[1]
