"""The jobs of `make matrix`: each runs, is exported and is scored, in two steps of few rows."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from itune_ray.config.adaptation import SUPPORT
from itune_ray.config.base import load_job
from itune_ray.config.train import TrainJob
from itune_ray.train.objectives import OBJECTIVES

SCRIPT = Path(__file__).parents[2] / "jobs" / "train" / "matrix.py"
spec = importlib.util.spec_from_file_location("matrix", SCRIPT)
assert spec is not None
assert spec.loader is not None
matrix: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)
FILES = matrix.playground_jobs()


def test_every_objective_and_every_method_has_a_job():
    jobs = [load_job(TrainJob, file) for file in FILES]
    assert {job.objective.type for job in jobs} == OBJECTIVES.keys()
    assert {job.model.peft.name for job in jobs} == SUPPORT.keys()


@pytest.mark.real
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_job_runs_and_is_scored(file, tmp_path):
    result = matrix.run_job(file, tmp_path, steps=2)
    assert result == json.loads((tmp_path / "result.json").read_text()) | {
        name: result[name] for name in ("before", "after", "loss")
    }
    assert result["steps"] == 2
    assert result["trainable"] > 0
    for value, low, high in (result["before"], result["after"]):
        assert 0 <= low <= value <= high <= 1


def test_a_base_is_asked_once(tmp_path, monkeypatch):
    """Another base, or other questions, is another answer."""
    asked = []
    monkeypatch.setattr(matrix, "exact_matches", lambda job, *_: asked.append(job.model.path) or len(asked))
    job, kept = load_job(TrainJob, FILES[0]), tmp_path / "bases.json"
    other = job.model_copy(update={"model": job.model.model_copy(update={"path": "playground://teacher"})})
    assert [matrix.base_matches(j, n, kept) for j, n in ((job, 9), (other, 9), (job, 9), (job, 8))] == [1, 2, 1, 3]
    assert asked == [job.model.path, "playground://teacher", job.model.path]
    assert matrix.base_matches(job, 9, None) == 4


def test_intervals_that_meet_are_not_learned_from():
    row = {
        "name": "dpo", "objective": "dpo", "method": "lora", "trainable": 1000, "share": 0.01, "steps": 3,
        "score": "reward_accuracy", "before": (0.5, 0.4, 0.6), "after": (0.7, 0.55, 0.8), "learned": False,
        "loss": (0.7, 0.5), "minutes": 1.0,
    }  # fmt: skip
    line = matrix.table([row]).splitlines()[-1]
    assert "| reward accuracy | 50.0 % (40.0 to 60.0) | 70.0 % (55.0 to 80.0) | no | 0.700 → 0.500 | 1.0 |" in line
