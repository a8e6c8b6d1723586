"""Tracker runs of trials: one each, grouped by the sweep, with all steps and the scores of rungs."""

import json
import sys
import types
from typing import Any

import pytest
import tiny
from runs import scalars
from sweeps import tree

from itune_ray.config.base import validate
from itune_ray.config.sweep import SweepJob
from itune_ray.data.artifact import RunStore
from itune_ray.data.storage import Folder
from itune_ray.engine.host import EngineHost
from itune_ray.errors import ConfigError
from itune_ray.observe.progress import Progress
from itune_ray.sweep.ledger import Entry
from itune_ray.sweep.run import run
from itune_ray.sweep.tracking import shown_rows, track_trial

METRICS = [{"step": step, "loss": 3.0 - step} for step in (1, 2, 3, 4)]
ENTRIES = [Entry(trial="a", steps=2, score=0.25), Entry(trial="a", steps=3, score=0.5, ended="stopped")]


def track(folder, kind: str, axes: dict[str, Any], said: list[str]) -> None:
    job = tiny.job("m", trackers=[{"type": kind}])
    rows = shown_rows(METRICS, ENTRIES, "exact match")
    run_id = f"s-{next(iter(axes.values()))}"
    track_trial(job, axes, rows, sweep="s", run_id=run_id, folder=Folder.at(str(folder)), say=said.append)


@pytest.fixture
def wandb(monkeypatch):
    """What the package offers and is called here; `runs` holds (arguments, [(step, values)], ended) of each run."""
    module: Any = types.ModuleType("wandb")
    module.runs = []
    module.Settings = lambda **settings: settings

    def init(**arguments):
        made: dict[str, Any] = {"asked": arguments, "steps": [], "ended": False}
        module.runs.append(made)
        return types.SimpleNamespace(
            step=0,
            offline=False,
            log=lambda values, step: made["steps"].append((step, values)),
            finish=lambda exit_code: made.update(ended=True),
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "no key of anyone")
    return module


def test_steps_end_at_the_last_rung_and_rungs_have_scores():
    assert shown_rows(METRICS, ENTRIES, "m") == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0, "score": {"m": 0.25}},
        {"step": 3, "loss": 0.0, "score": {"m": 0.5}},
    ]
    sparse = [row for row in METRICS if row["step"] != 3]  # log_every 2
    assert shown_rows(sparse, ENTRIES, "m")[-1] == {"step": 3, "score": {"m": 0.5}}
    failed = [*ENTRIES[:1], Entry(trial="a", steps=3, score=None, ended="failed")]
    assert [row.get("score") for row in shown_rows(METRICS, failed, "m")] == [None, {"m": 0.25}, None]


def test_trials_are_runs_of_their_own_in_one_group(tmp_path, wandb):
    for rank in (2, 8):
        track(tmp_path / str(rank), "wandb", {"train.model.peft.rank": rank}, [])
    asked = [made["asked"] for made in wandb.runs]
    assert [a["name"] for a in asked] == ["s/train.model.peft.rank=2", "s/train.model.peft.rank=8"]
    assert [a["id"] for a in asked] == ["s-2", "s-8"]
    assert [(a["config"]["sweep"], a["config"]["train.model.peft.rank"]) for a in asked] == [("s", 2), ("s", 8)]
    for made in wandb.runs:
        assert made["steps"][1] == (2, {"loss": 1.0, "score/exact match": 0.25})
        assert [step for step, _ in made["steps"]] == [1, 2, 3]
        assert made["ended"]


def test_a_trial_is_shown_once_and_a_name_is_as_long_as_it_may_be(tmp_path, wandb):
    for _ in range(2):
        track(tmp_path, "wandb", {"train.model.peft.target": ["q_proj"] * 40}, [])
    (made,) = wandb.runs
    assert len(made["asked"]["name"]) == 128


def test_event_files_are_in_the_trials_folder(tmp_path):
    track(tmp_path, "tensorboard", {"train.seed": 1}, [])
    assert [found for found in scalars(tmp_path / "tensorboard") if found[1] != "loss"] == [
        (2, "score/exact_match", 0.25),  # the package's own spelling
        (3, "score/exact_match", 0.5),
    ]


def test_a_tracker_that_does_not_open_is_told_and_tried_again(tmp_path, wandb):
    said: list[str] = []
    opens = wandb.init

    def refuse(**_):
        raise OSError("no route to the server")

    wandb.init = refuse
    track(tmp_path, "wandb", {"train.seed": 1}, said)
    assert len(said) == 1
    assert "train.seed=1 is not shown: tracker wandb cannot be opened: no route to the server" in said[0]
    wandb.init = opens
    track(tmp_path, "wandb", {"train.seed": 1}, said)
    assert len(wandb.runs) == len(said) == 1
    assert json.loads((tmp_path / "tracked.json").read_text()) == {"run": "s-1"}


def test_a_missing_package_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    job = validate(SweepJob, tree(train__trackers=[{"type": "wandb"}]), "sweep.yaml")
    with pytest.raises(ConfigError, match="tracker wandb needs a package that is not installed"):
        run(job, RunStore(str(tmp_path), "s"), "sweep", EngineHost(), Progress(quiet=True))
