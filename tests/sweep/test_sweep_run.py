"""A sweep on the real stack: two ranks on two sizes of a model, calm, and with its worker and its driver killed."""

import csv
import json
import os
import shutil
import signal
from collections import Counter

import psutil
import pyarrow.parquet as pq
import pytest
from runs import scalars
from sweeps import tree

pytestmark = pytest.mark.real
VARYING = ("tokens_per_s", "artifact")


@pytest.fixture(scope="module")
def calm(itune):
    """The sweep run once without a disturbance."""
    status, seen = itune.run("sweep", itune.write(tree(name="calm")))
    assert status == 0, seen
    return itune.stage("calm", "sweep")


def result_of(stage):
    return json.loads((stage / "sweep.json").read_text())


def settled(result):
    """What must not depend on kills: all but speeds and places."""
    return [{k: v for k, v in trial.items() if k not in VARYING} for trial in result["trials"]]


def ledger_lines(run):
    return [line for file in run.glob("sweep-*/ledger.jsonl") for line in file.read_text().splitlines()]


def test_every_trial_ends_once_with_a_score_and_a_size(calm):
    result = result_of(calm)
    assert (result["metric"], result["higher_is_better"]) == ("exact match", True)
    assert result["axes"] == ["compress.method.sparsity", "train.model.peft.rank"]
    made = [tuple(trial["axes"].values()) for trial in result["trials"]]
    assert made == [(0, 2), (0, 8), (0.5, 2), (0.5, 8)]
    whole, half = result["trials"][:2], result["trials"][2:]
    assert all(trial["ended"] == "completed" and trial["steps"] == 12 for trial in whole)
    assert all(trial["ended"] == "stopped" and trial["steps"] == 4 for trial in half), "half a teacher is far behind"
    assert [rung["step"] for rung in whole[0]["rungs"]] == [4, 8, 12]
    for trial in result["trials"]:
        score = trial["score"]
        assert score["low"] <= score["value"] <= score["high"]
        assert (score["n"], score["value"]) == (100, trial["rungs"][-1]["value"])
        assert trial["tokens_per_s"] > 0
    assert len({trial["parameters"] for trial in whole}) == len({trial["parameters"] for trial in half}) == 1
    assert half[0]["parameters"] < 0.6 * whole[0]["parameters"]
    assert whole[0]["trainable"] * 4 == whole[1]["trainable"]
    assert result["trials"][0]["key"] in result["pareto"]


def test_engines_and_models_are_made_once_per_shape(calm):
    result = result_of(calm)
    assert result["engine_starts"] == result["shapes"] == len(result["models"]) == 2
    assert len(list(calm.parent.glob("compressed-*"))) == 2
    assert len(list((calm / "data").iterdir())) == 1, "equal tokens are prepared once"
    assert not (calm / "tune").exists()


def test_answers_are_stored_per_trial_and_rung(calm):
    for trial in result_of(calm)["trials"]:
        for rung in trial["rungs"]:
            answers = pq.read_table(calm / "trials" / trial["key"] / f"at-{rung['step']:06d}" / "answers.parquet")
            assert sum(answers["score"].to_pylist()) / 100 == pytest.approx(rung["value"])
    with open(calm / "trials.csv") as file:
        assert len(list(csv.DictReader(file))) == 4


def tracked(stage):
    """Trial -> (step, tag, value) of its tracker run."""
    return {
        trial["key"]: scalars(stage / "trials" / trial["key"] / "tensorboard") for trial in result_of(stage)["trials"]
    }


def test_every_trial_is_one_tracker_run_with_its_steps_and_scores(calm):
    runs = tracked(calm)
    for trial in result_of(calm)["trials"]:
        shown = runs[trial["key"]]
        losses = {step: value for step, tag, value in shown if tag == "loss"}
        assert list(losses) == list(range(1, trial["steps"] + 1))
        scores = [(step, value) for step, tag, value in shown if tag == "score/exact_match"]
        assert scores == [(rung["step"], pytest.approx(rung["value"])) for rung in trial["rungs"]]


def test_the_bill_holds_the_tokens_of_training_and_of_scoring(calm):
    spent = json.loads((calm.parent / "spent.json").read_text())["tokens"]
    trained = sum(trial["tokens"] for trial in result_of(calm)["trials"])
    answers = [
        pq.read_table(file, columns=["prompt_tokens", "tokens"]) for file in calm.glob("trials/*/at-*/answers.parquet")
    ]
    answered = sum(sum(table[name].to_pylist()) for table in answers for name in table.column_names)
    assert len(answers) == 2 * 3 + 2
    assert answered > 0
    assert spent > trained + answered, "and speeds are measured"


def kill_trial_worker(driver):
    """SIGKILL the process that runs trials for this driver; Tune's own wrapper names it while it is at work."""
    names = ("ray::Trial", "ray::ResourceTrainable")
    processes = psutil.Process(driver.pid).children(recursive=True)
    (worker,) = [p for p in processes if p.is_running() and "".join(p.cmdline()).startswith(names)]
    worker.kill()


@pytest.mark.soak
def test_killed_at_a_worker_and_at_the_driver_it_ends_as_if_undisturbed(itune, calm, wait_until):
    run = itune.root / "killed"
    for model in calm.parent.glob("compressed-*"):  # compressing is not what is killed here
        shutil.copytree(model, run / model.name)
    file = itune.write(tree(name="killed"))
    first = itune.start("sweep", file)
    wait_until(lambda: ledger_lines(run), "the first rung is decided", every=0.005)
    kill_trial_worker(first)
    wait_until(lambda: len(ledger_lines(run)) >= 4, "the second trial has begun", every=0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    before = ledger_lines(run)
    assert 4 <= len(before) < 8, "the kill must land in the middle"

    status, seen = itune.run("sweep", file)
    assert status == 0, seen
    assert ledger_lines(run)[: len(before)] == before
    assert ledger_lines(run) == ledger_lines(itune.root / "calm")
    result = result_of(itune.stage("killed", "sweep"))
    assert settled(result) == settled(result_of(calm))
    assert set(Counter(trial["key"] for trial in result["trials"]).values()) == {1}
    assert result["engine_starts"] <= 2
    logs = [file.read_text() for file in run.glob("trial-*/metrics.jsonl")]
    steps = [json.loads(line)["step"] for log in logs for line in log.splitlines()]
    assert Counter(steps) == Counter([*range(1, 13)] * 2 + [*range(1, 5)] * 2)
