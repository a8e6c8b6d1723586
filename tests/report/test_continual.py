"""Accuracy, backward transfer and forgetting over stages, by hand and on the page."""

import csv
import io

import numpy as np
import pytest
from invented import Invented
from test_report import make, page_of, text_of

from itune_ray.config.base import validate
from itune_ray.config.report import ReportJob
from itune_ray.errors import ConfigError
from itune_ray.report.continual import transfer

MATRIX = [[0.9, 0.1, 0.2], [0.7, 0.8, 0.3], [0.6, 0.85, 0.7]]
"""R[t][i]: the score on task i after stage t."""


def test_known_answers():
    found = transfer(MATRIX)
    assert found.accuracy == pytest.approx((0.6 + 0.85 + 0.7) / 3)
    assert found.backward == pytest.approx(((0.6 - 0.9) + (0.85 - 0.8)) / 2)
    assert found.forgetting == pytest.approx((0.3, 0.0, 0.0))
    assert transfer(np.eye(3)).backward == -1.0
    assert transfer([[1.0, 0.0], [1.0, 1.0]]).forgetting == (0.0, 0.0)


def score_two_tasks(run):
    tasks = [Invented("task a", 200), Invented("task b", 200)]
    return run.evaluate("score-stages", ["teacher", "sft"], tasks, took=1.0).folder.read_json("scores.json")


CONTINUAL = {"models": ["teacher", "sft"], "tasks": ["task a", "task b"]}


def test_the_page_and_the_table_state_them(run):
    scores = score_two_tasks(run)
    artifact, folder = make(run, continual=CONTINUAL)
    (a, b), (c, d) = ([scores[m][t]["value"] for t in CONTINUAL["tasks"]] for m in CONTINUAL["models"])
    lines = list(csv.DictReader(io.StringIO(artifact.folder.read_bytes("tables.csv").decode())))
    found = {(line["name"], line["benchmark"]): float(line["value"]) for line in lines if line["table"] == "continual"}
    assert found == pytest.approx(
        {
            ("ACC", ""): (c + d) / 2,
            ("BWT", ""): c - a,
            ("forgetting", "task a"): max(a, c) - c,
            ("forgetting", "task b"): max(b, d) - d,
        }
    )
    text = text_of(page_of(folder))
    assert "One task after another" in text
    assert f"{100 * (c + d) / 2:.1f} %" in text


def test_a_report_without_stages_says_nothing_of_them(run):
    assert "One task after another" not in text_of(page_of(make(run)[1]))
    assert "continual" not in validate(ReportJob, {"name": "r", "inputs": ["x"]}, "x").identity()


@pytest.mark.parametrize(
    ("models", "tasks", "message"),
    [
        (["teacher", "sfd"], ["task a", "task b"], "did you mean"),
        (["teacher", "sft"], ["task a", "task c"], "scored this benchmark"),
        (["teacher", "sft"], ["task a"], "each stage has its task|at least 2"),
    ],
)
def test_a_score_that_is_missing_is_named(run, models, tasks, message):
    score_two_tasks(run)
    with pytest.raises((ConfigError, ValueError), match=message):
        make(run, continual={"models": models, "tasks": tasks})
