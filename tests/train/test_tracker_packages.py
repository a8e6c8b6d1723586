"""W&B offline and an MLflow store by the packages themselves, read back by the packages' own readers.

    pip install wandb mlflow-skinny

A run is opened, killed (left without a word), opened again and ended: what is there must be metrics.jsonl, and one run.
"""

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from itune_ray.config.trackers import TrackerConfig
from itune_ray.data.storage import Folder
from itune_ray.train.trackers import Tracked, numbers, open_trackers
from itune_ray.train.wandb_file import has_end, records, wait_for_end

STEPS = 7
KILLED, CHECKPOINT, TOLD = 5, 3, 4
"""Steps done when the driver is killed, in its last checkpoint, and told to the trackers before it is killed."""


def rows_of(first: int, last: int) -> list[dict[str, Any]]:
    """Rows as the loop writes them; the loss is no round number."""
    return [
        {
            "step": step,
            "loss": 3.0 * math.exp(-step / 3),
            "grad_norm": 1.0 / step,
            "tokens": 100 + step,
            "units": {"nll": 40 + step},
        }
        for step in range(first, last + 1)
    ]


def write_metrics(stage: Folder, last: int) -> None:
    stage.write_bytes("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows_of(1, last)).encode())


def opened(stage: Folder, said: list[str], **config: Any) -> Tracked:
    parsed: Any = TypeAdapter(TrackerConfig).validate_python(config)
    settings = {"seed": 0, "model": {"path": "m"}}
    return open_trackers(
        [parsed], folder=stage.uri, name="run/train-1", run_id="run-train-1", settings=settings, say=said.append
    )


def killed(uri: str, config: dict[str, Any]) -> None:
    """In a process of its own: some steps are told, then it dies."""
    tracked = opened(Folder.at(uri), [], **config)
    for row in rows_of(1, TOLD):
        tracked.log(row)
    time.sleep(3)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_and_finished(stage: Folder, **config: Any) -> None:
    """A run that is killed after `KILLED` steps, of which the tracker was told `TOLD`, and goes on to its end."""
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(stage.uri, config))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    write_metrics(stage, KILLED)
    said: list[str] = []
    again = opened(stage, said, **config)
    for row in rows_of(CHECKPOINT + 1, STEPS):
        again.log(row)
    again.close()
    write_metrics(stage, STEPS)
    assert said == []


WANTED = {row["step"]: numbers(row) for row in rows_of(1, STEPS)}


@pytest.fixture
def wandb(monkeypatch):
    package = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield package
    package.teardown()


def read_wandb(file: Path) -> tuple[str, dict[str, Any], dict[int, dict[str, float]], bool]:
    """(run id, its settings, numbers by step, whether it ended) of an offline run's file, by the package's messages."""
    from wandb.proto import wandb_internal_pb2

    ended, run, config, found = False, "", dict[str, Any](), dict[int, dict[str, float]]()
    whole = file.read_bytes()
    assert whole[:4] == b":W&B"
    for data in records(whole):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run.run_id
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            assert record.history.step.num not in found
            found[record.history.step.num] = {k: v for k, v in items.items() if not k.startswith("_")}
        elif kind == "exit":
            ended = True
    return run, config, found, ended


def test_wandb_offline_has_the_whole_run_in_its_newest_folder(tmp_path, wandb):
    stage = Folder.at(tmp_path)
    killed_and_finished(stage, type="wandb", project="p")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == ["run-run-train-1.wandb"] * 2  # the killed one's may hold nothing
    # by the time in the folder's name: the service of a killed run can write its file after the new run has ended
    run, config, found, ended = read_wandb(files[-1])
    assert (run, ended) == ("run-train-1", True)
    assert config["seed"] == 0
    assert config["model"] == {"path": "m"}
    assert found == WANTED


def test_an_offline_file_is_waited_for_until_the_end_is_in_it(tmp_path, wandb):
    tracked = opened(Folder.at(tmp_path), [], type="wandb", project="p")
    for row in rows_of(1, STEPS):
        tracked.log(row)
    tracked.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    data = file.read_bytes()
    end = next(size for size in range(len(data) + 1) if has_end(data[:size]))
    assert end > 0.9 * len(data)
    late = tmp_path / "late.wandb"
    with pytest.raises(TimeoutError, match=r"late\.wandb in 0 s"):
        wait_for_end(late, 0.1)
    late.write_bytes(data[: end - 1])
    with pytest.raises(TimeoutError, match="end of the run"):
        wait_for_end(late, 0.1)
    writer = threading.Timer(0.3, late.write_bytes, [data])
    writer.start()
    wait_for_end(late, 30.0)
    assert not writer.is_alive() or late.read_bytes() == data
    writer.join()


def test_wandb_files_of_a_stage_on_an_object_store_are_copied_there(tmp_path, wandb):
    from stores import s3

    with s3():
        stage = Folder.at("s3://bucket/runs/train-1")
        tracked = opened(stage, [], type="wandb", project="p")
        for row in rows_of(1, STEPS):
            tracked.log(row)
        tracked.close()
        (run,) = (name for name in (stage / "wandb").names() if name.startswith("offline-run-"))
        (tmp_path / "copy.wandb").write_bytes((stage / "wandb" / run).read_bytes("run-run-train-1.wandb"))
    assert read_wandb(tmp_path / "copy.wandb")[2:] == (WANTED, True)


def test_an_mlflow_store_holds_the_run_once(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    killed_and_finished(Folder.at(tmp_path / "stage"), type="mlflow", uri=uri, experiment="e")
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run/train-1"
    assert run.data.params == {"seed": "0", "model": "{'path': 'm'}"}
    names = {name for values in WANTED.values() for name in values}
    assert run.data.metrics.keys() == names
    for name in names:
        history = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value) for m in history] == [(step, values[name]) for step, values in WANTED.items()]
