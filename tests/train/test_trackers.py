"""Trackers: event files read back, the calls that W&B and MLflow get (their modules stand in), and what is refused."""

import contextlib
import json
import logging
import os
import sys
import threading
import types
from typing import Any

import pytest
import tiny
from pydantic import TypeAdapter
from runs import scalars

from itune_ray.config.base import validate
from itune_ray.config.trackers import TrackerConfig
from itune_ray.config.train import TrainJob
from itune_ray.errors import ConfigError
from itune_ray.train import board
from itune_ray.train.trackers import Tracked, check_trackers, numbers, open_trackers, without_keys

ROW = {"step": 1, "loss": 2.5, "units": {"nll": 40}, "note": "text", "flag": True}


def parsed(**settings) -> Any:
    return TypeAdapter(TrackerConfig).validate_python(settings)


def opened(tmp_path, config, said=None) -> Tracked:
    said = [] if said is None else said
    return open_trackers(
        [config], folder=str(tmp_path), name="run/train-1", run_id="run-train-1", settings={"seed": 0}, say=said.append
    )


@pytest.fixture
def wandb(monkeypatch):
    """What the package offers and this project calls; `calls` is what it was asked."""
    module: Any = types.ModuleType("wandb")
    module.calls = []
    module.Settings = lambda **settings: settings

    class Run:
        step = 0

        def log(self, values, step):
            module.calls.append((step, values))

        def finish(self, exit_code):
            module.calls.append(f"finish {exit_code}")

    module.init = lambda **arguments: module.calls.append(arguments) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return module


def test_tensorboard_event_files_hold_every_number(tmp_path):
    tracked = opened(tmp_path, parsed(type="tensorboard"))
    for step in (1, 2):
        tracked.log({**ROW, "step": step, "loss": 2.5 - step})
    tracked.close()
    assert scalars(tmp_path / "tensorboard") == [
        (1, "loss", 1.5),
        (1, "units/nll", 40.0),
        (2, "loss", 0.5),
        (2, "units/nll", 40.0),
    ]


def test_a_tracker_that_joins_later_is_shown_the_steps_before(tmp_path):
    rows = [{"step": step, "loss": 2.5 - step} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    tracked = opened(tmp_path, parsed(type="tensorboard"))
    for row in rows[1:]:  # the second is taken again
        tracked.log(row)
    tracked.close()
    assert scalars(tmp_path / "tensorboard") == [(1, "loss", 1.5), (2, "loss", 0.5), (3, "loss", -0.5)]


def test_the_log_says_when_the_last_steps_are_not_all_shown(monkeypatch, caplog):
    """One step that takes for ever to show; the end waits for it, and then says that it goes on without."""
    shown, release = threading.Event(), threading.Event()

    def show(*_):
        shown.set()
        release.wait(30)

    rows: Any = [[(1, 2, {"step": 1})], []]
    asked: Any = types.SimpleNamespace(drain=types.SimpleNamespace(remote=lambda: rows.pop(0)))
    monkeypatch.setattr(board.ray, "get", lambda answer: answer)
    monkeypatch.setattr(board, "POLL_S", 0.01)
    monkeypatch.setattr(board, "LAST_S", 0.05)
    with caplog.at_level(logging.WARNING), board.relayed(asked, show):
        assert shown.wait(30)
    release.set()
    assert [r.getMessage() for r in caplog.records if r.name == board.__name__] == [
        "the last steps are not all shown: what shows them took over 0 s (a slow tracker?)"
    ]


def test_wandb_goes_on_with_its_run_and_sees_each_step_once(tmp_path, wandb):
    tracked = opened(tmp_path, parsed(type="wandb", project="p", entity="team"))
    for step in (1, 2, 1, 2, 3):  # a worker was lost after the second step
        tracked.log({**ROW, "step": step})
    tracked.close()
    first, *steps, last = wandb.calls
    asked = {"project": "p", "entity": "team", "name": "run/train-1", "id": "run-train-1", "resume": "allow"}
    assert asked.items() <= first.items()
    assert first["config"] == {"seed": 0}
    assert steps == [(step, {"loss": 2.5, "units/nll": 40.0}) for step in (1, 2, 3)]
    assert last == "finish 0"


def test_mlflow_finds_its_run_again(tmp_path, monkeypatch):
    calls: list[Any] = []
    runs: list[Any] = []

    class Client:
        def __init__(self, tracking_uri):
            calls.append(tracking_uri)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return "7"

        def search_runs(self, experiments, filter_string, max_results):
            calls.append(filter_string)
            return runs

        def update_run(self, run, status):
            calls.append((status, run))

        def get_metric_history(self, run, key):
            return [types.SimpleNamespace(step=c[3]) for c in calls if c[:2] == (run, key)]

        def create_run(self, experiment, tags, run_name):
            runs.append(types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1")))
            return runs[0]

        def log_param(self, run, key, value):
            calls.append((key, value))

        def log_batch(self, run, metrics):
            calls.extend((run, key, value, step) for key, value, _, step in metrics)

        def set_terminated(self, run, status):
            calls.append((status, run))

    module: Any = types.ModuleType("mlflow")
    module.MlflowClient = Client
    monkeypatch.setitem(sys.modules, "mlflow", module)
    entities: Any = types.ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: (key, value, timestamp, step)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for interrupted in (True, False):
        with (
            contextlib.suppress(KeyboardInterrupt),
            opened(tmp_path, parsed(type="mlflow", uri="http://tracking:5000")) as tracked,
        ):
            for step in (4, 5):
                tracked.log({"step": step, "loss": 1.0})
            if interrupted:
                raise KeyboardInterrupt
    assert len(runs) == 1
    assert [call for call in calls if call[1] == "r1"] == [("FAILED", "r1"), ("RUNNING", "r1"), ("FINISHED", "r1")]
    assert calls.count(("seed", "0")) == 1
    assert calls.count(("RUNNING", "r1")) == 1
    assert [calls.count(("r1", "loss", 1.0, step)) for step in (4, 5)] == [1, 1]
    assert calls[0] == "http://tracking:5000"
    assert "run-train-1" in calls[1]


@pytest.mark.parametrize(("kind", "pip"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_is_told_by_its_name_for_pip(monkeypatch, kind, pip):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(
        ConfigError, match=rf"not installed; got '{kind}'; allowed: pip install {pip}; set by `trackers`"
    ):
        check_trackers([parsed(type=kind)])


def test_keys_come_from_the_environment_and_are_not_repeated(tmp_path, monkeypatch, wandb, caplog):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="WANDB_API_KEY in the environment, or WANDB_MODE=offline"):
        check_trackers([parsed(type="wandb")])
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-mine")
    check_trackers([parsed(type="wandb")])

    def refuse(**_):
        raise ValueError("key a-secret-of-mine is unknown")

    wandb.init = refuse
    with pytest.raises(ConfigError, match=r"cannot be opened: key \(WANDB_API_KEY\) is unknown"):
        opened(tmp_path, parsed(type="wandb"))
    assert without_keys("a-secret-of-mine") == "(WANDB_API_KEY)"


def test_mlflow_needs_a_place_and_its_uri_no_key(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI.*trackers\.N\.uri"):
        check_trackers([parsed(type="mlflow")])
    tree = tiny.job("m").model_dump(mode="json")
    tree["trackers"] = [{"type": "mlflow", "uri": "https://me:hidden@tracking"}]
    with pytest.raises(ConfigError, match="in the environment") as told:
        validate(TrainJob, tree, where="job.yaml")
    assert "hidden" not in str(told.value)


def test_a_tracker_that_fails_later_is_left_out_and_the_others_go_on(caplog):
    class Broken:
        shown = 0

        def log(self, step, numbers):
            raise OSError(f"no route to the server with {os.environ['WANDB_API_KEY']}")

        def close(self, failed):
            raise AssertionError("it was left out")

    seen, said = [], []
    kept: Any = types.SimpleNamespace(
        shown=0, log=lambda step, values: seen.append(step), close=lambda failed: seen.append(f"failed {failed}")
    )
    os.environ["WANDB_API_KEY"] = "a-secret-of-mine"
    try:
        tracked = Tracked({"broken": Broken(), "kept": kept}, said.append)
        tracked.log(ROW)
        tracked.log({**ROW, "step": 2})
        tracked.close(failed=True)
    finally:
        del os.environ["WANDB_API_KEY"]
    assert seen == [1, 2, "failed True"]
    assert said == ["tracker broken is left out from now on: OSError; see the log"]
    assert "a-secret-of-mine" not in caplog.text
    assert "no route" in caplog.text


def test_sections_become_names_and_words_are_left_out():
    assert numbers(ROW) == {"loss": 2.5, "units/nll": 40.0}


def test_trackers_do_not_change_what_a_job_is():
    plain, tracked = tiny.job("m"), tiny.job("m", trackers=[{"type": "tensorboard"}])
    assert plain.identity() == tracked.identity()
