"""A trial on its own: a training that no retry mends is an end with its reason, and its sweep goes on without it."""

import csv
import io
import math
from types import SimpleNamespace

import pytest
import tiny

from itune_ray.data.storage import Folder
from itune_ray.errors import TrainError
from itune_ray.sweep.ledger import Entry, SweepLedger
from itune_ray.sweep.results import sweep_result, trial_result, trials_csv
from itune_ray.sweep.scorer import Scoring
from itune_ray.sweep.trial import Trial, TrialPlan
from itune_ray.train.prepare import prepare_locally


@pytest.fixture(scope="module")
def diverging(tmp_path_factory):
    """A trial whose loss is not finite after the first step."""
    root = tmp_path_factory.mktemp("trial")
    lora = {"type": "lora", "rank": 2}
    job = tiny.job(tiny.llama(root / "model"), **{"model.peft": lora, "optimizer.lr": 1e30, "clip_norm": None})
    prepared = prepare_locally(job, tiny.chats(40), str(root / "data"))
    scoring = Scoring("a", "shape", job.model.reference(), evaluate=None, folder=str(root / "scores"))
    return TrialPlan(job, prepared, str(root / "stage"), (2, 3), scoring, "exact match")


def test_a_loss_that_is_not_finite_ends_the_trial_with_its_reason(diverging):
    trial = Trial.__new__(Trial)
    trial.setup({"trial": "a"}, plans={"a": diverging}, scorers=[])
    result = trial.step()
    assert math.isnan(result["score"])
    assert result["steps"] == 2
    assert "not finite at step" in result["failed"]


def test_a_failed_trial_stands_last_in_the_table_and_never_in_the_pareto_set(diverging, tmp_path):
    ledger = SweepLedger(Folder.at(tmp_path))
    ledger.add(Entry(trial="a", steps=2, score=None, ended="failed", cause="not finite"))
    point = SimpleNamespace(key="a", axes={"train.optimizer.lr": 1e30})
    planned = SimpleNamespace(point=point, plan=diverging, artifact=SimpleNamespace(path=lambda: "trial-a"))
    failed = trial_result(planned, ledger, 100.0)
    assert (failed["ended"], failed["cause"], failed["score"]["value"]) == ("failed", "not finite", None)
    score = {"value": 0.1, "low": 0.0, "high": 0.2, "n": 9}
    good = {**failed, "key": "b", "score": score, "ended": "completed", "parameters": 5, "trainable": 1}
    result = sweep_result("exact match", True, ["train.optimizer.lr"], [failed, good], [{}], 1)
    assert result["pareto"] == [result["best"]] == ["b"]
    assert [row["trial"] for row in csv.DictReader(io.StringIO(trials_csv(result)))] == ["b", "a"]
    with pytest.raises(TrainError, match="every trial failed; the first: not finite"):
        sweep_result("exact match", True, [], [failed], [{}], 1)
