"""Dashboards and alerts against the table of metrics, and every expression against a Prometheus that watched a run."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from clusters import free_port, running

from itune_ray.dashboard import DISCOVERY, prometheus
from itune_ray.observe.names import METRICS

ROOT = Path(__file__).parents[2]
BOARDS = sorted((ROOT / "dashboards").glob("*.json"))
PANELS = [
    (board.stem, panel["title"], target["expr"])
    for board in BOARDS
    for panel in json.loads(board.read_text())["panels"]
    for target in panel["targets"]
]
ALERTS = [
    (rule["alert"], rule["expr"])
    for group in yaml.safe_load((ROOT / "dashboards" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
NEEDS_PROMETHEUS = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")


def names_in(expressions):
    return {name for expression in expressions for name in re.findall(r"\bray_\w+", expression)}


def test_dashboards_and_the_table_name_the_same_metrics():
    exported = {metric.exported for metric in METRICS.values()}
    assert names_in(expression for *_, expression in PANELS) == exported
    assert names_in(expression for _, expression in ALERTS) <= exported


def test_labels_are_tags_of_their_metrics():
    known = {metric.exported: {"run", *metric.tags} for metric in METRICS.values()}
    for *_, expression in [*PANELS, *ALERTS]:
        for name, selectors in re.findall(r"(ray_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)[=!]~?", selectors)) <= known[name], expression


def test_boards_have_distinct_names_and_panels_that_do_not_overlap():
    boards = [json.loads(board.read_text()) for board in BOARDS]
    assert len({board["uid"] for board in boards}) == len(boards) == 5
    for board in boards:
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
        assert len(set(places)) == len(places)


PLAYGROUND = {"type": "playground", "split": "chat", "rows": 96, "seed": 6}
TEACHER = {"model": {"path": "playground://teacher"}, "engine": {"type": "vllm", "max_model_len": 31}}
"""So short that some of the prompts are refused."""
TRAIN = {
    "model": {"path": "playground://teacher", "attention": "eager", "peft": {"type": "lora", "rank": 4}},
    "data": [{"source": PLAYGROUND}],
    "batch": 8,
    "max_length": 128,
    "log_every": 1,
    "checkpoint": {"every_steps": 2},
}
RUN = {
    "name": "watched",
    "run": {"prices": {"CPU": 0.05}},
    "steps": {
        "distill": {
            "job": "generate",
            "prompts": [{**PLAYGROUND, "split": "prompts", "rows": 300}],
            "teacher": TEACHER,
            "sampling": {"max_tokens": 32},
        },
        "sft": {
            **TRAIN,
            "job": "train",
            "steps": 6,
            "packing": True,
            "validation": {"data": [{"source": {**PLAYGROUND, "rows": 8}}]},
            "workers": {"peak_tflops": 0.4},
        },
        "score": {
            "job": "evaluate",
            "models": [{"name": "teacher", **TEACHER}],
            "benchmarks": [{"type": "playground", "rows": 40}],
            "sampling": {"temperature": 0, "max_tokens": 32},
        },
        "sweep": {
            "job": "sweep",
            "axes": {"train.model.peft.rank": [2, 4]},
            "train": {**TRAIN, "steps": 2},
            "evaluate": {
                "benchmarks": [{"type": "playground", "rows": 20}],
                "sampling": {"temperature": 0, "max_tokens": 32},
            },
            "scheduler": {"type": "fifo"},
        },
    },
}


def ask(url, path, **parameters):
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as reply:
        return json.loads(reply.read())["data"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """(Prometheus, start, end) of a run on a Ray of its own."""
    output = tmp_path_factory.mktemp("watched")
    file = output / "job.yaml"
    file.write_text(yaml.safe_dump(RUN, sort_keys=False))
    folder = Path(tempfile.mkdtemp(prefix="ir", dir="/tmp"))
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_metrics_report_interval_ms": "1000"}
    environment.pop("RAY_ADDRESS", None)
    port = free_port()
    ports = ("dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    ports += ("ray-client-server-port", "runtime-env-agent-port")
    command = ["start", "--head", "--block", "--num-cpus=8", f"--port={port}", f"--temp-dir={folder}"]
    command += [f"--{name}={free_port()}" for name in ports]
    with running(command, environment, folder):
        deadline = time.monotonic() + 60
        while not (folder / DISCOVERY).is_file():
            assert time.monotonic() < deadline, "Ray does not say where its metrics are"
            time.sleep(0.2)
        with prometheus(folder, free_port(), interval_s=1.0) as scraping:
            began = time.time()
            done = subprocess.run(
                [sys.executable, "-m", "itune_ray", "pipeline", str(file), f"output={output}"],
                env={**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"},
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            time.sleep(3)  # the driver's last words: one report of Ray's, and one scrape
            yield scraping.url, began, time.time()


@pytest.mark.real
@NEEDS_PROMETHEUS
def test_every_panel_shows_something_of_a_run(watched):
    url, began, ended = watched
    empty = []
    for board, title, expression in PANELS:
        asked = expression.replace("$run", "watched").replace("[1m]", "[15s]")
        if not ask(url, "query_range", query=asked, start=began, end=ended, step=1)["result"]:
            empty.append(f"{board}: {title}: {asked}")
    assert not empty, "\n".join(empty)


@pytest.mark.real
@NEEDS_PROMETHEUS
def test_alerts_are_loaded_and_none_fires_on_a_healthy_run(watched):
    url, _, ended = watched
    rules = [rule for group in ask(url, "rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {name for name, _ in ALERTS}
    assert {rule["health"] for rule in rules} == {"ok"}
    assert {rule["state"] for rule in rules} == {"inactive"}
    for _, expression in ALERTS:
        assert ask(url, "query", query=expression, time=ended)["result"] == []


@pytest.mark.real
@NEEDS_PROMETHEUS
def test_counts_are_those_of_the_run(watched):
    url, began, ended = watched
    query = 'sum(last_over_time(ray_itune_rows_total{run="watched",stage="distill"}[10m]))'
    assert float(ask(url, "query", query=query, time=ended)["result"][0]["value"][1]) == 300
    query = f'sum(last_over_time(ray_itune_engine_requests_total{{run="watched"}}[{int(ended - began) + 5}s]))'
    assert float(ask(url, "query", query=query, time=ended)["result"][0]["value"][1]) >= 300 + 40 + 2 * 20
