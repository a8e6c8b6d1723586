"""A run that has spent its budget stops as after an interrupt, keeps what it made, and goes on with a larger one."""

import json
import time

import pytest

from itune_ray.config.generate import GenerateJob
from itune_ray.config.shared import Budget, RunSettings
from itune_ray.data.storage import Folder
from itune_ray.errors import BudgetError
from itune_ray.observe import metrics
from itune_ray.pipeline.budget import Purse
from itune_ray.pipeline.meter import Meter
from itune_ray.pipeline.output import receivers

ROWS = 600


def job(name: str) -> dict:
    """Rows whose tokens are counted by an engine that only pretends."""
    return {
        "name": name,
        "prompts": [{"type": "playground", "split": "prompts", "rows": ROWS}],
        "teacher": {"model": {"path": "any"}, "engine": {"type": "fake", "latency_s": 0.2}},
        "workers": {"num": 1, "rows_per_block": 16, "blocks_in_flight": 2},
        "commit": {"rows": 32, "seconds": 0.5},
    }


@pytest.mark.real
@pytest.mark.soak
def test_a_token_budget_stops_the_run_which_goes_on_with_a_larger_one(itune):
    file = itune.write(job("capped"))
    status, seen = itune.run("generate", file, "run.budget.tokens=3000")
    assert status == 2, seen
    assert "the run's budget is spent; what it made is kept" in seen
    assert "set by `run.budget.tokens`" in seen
    spent = json.loads((itune.root / "capped" / "spent.json").read_text())["tokens"]
    assert 3000 <= spent < 9000, "the cap, and what was in flight"
    (stage,) = (itune.root / "capped").glob("generate-*")
    assert list((stage / "ledger").iterdir())

    began = time.monotonic()
    status, seen = itune.run("generate", file, "run.budget.tokens=3000")
    assert (status, "budget is spent" in seen) == (2, True), seen
    assert time.monotonic() - began < 30

    status, seen = itune.run("generate", file, "run.budget.tokens=1000000")
    assert status == 0, seen
    funnel = itune.summary("capped")["funnel"]["generate"]
    assert funnel["in"] == ROWS == funnel["accepted"]


def test_money_is_counted_over_attempts(tmp_path, monkeypatch):
    monkeypatch.setattr("itune_ray.pipeline.meter.SAMPLE_S", 0.02)
    monkeypatch.setattr(Meter, "_per_hour", lambda self: 3600.0)  # one a second
    for _ in range(2):
        purse = Purse(Folder.at(tmp_path), Budget())
        with Meter({"CPU": 1.0}, purse):
            time.sleep(0.3)
    assert 0.3 < json.loads((tmp_path / "spent.json").read_text())["cost"] < 2
    with pytest.raises(BudgetError, match=r"allowed: less than 0.1; set by `run.budget.cost`"):
        Purse(Folder.at(tmp_path), Budget(cost=0.1)).check()


def test_a_cap_that_is_crossed_interrupts_once(tmp_path, monkeypatch):
    signals = []
    monkeypatch.setattr("os.kill", lambda pid, number: signals.append(number))
    purse = Purse(Folder.at(tmp_path), Budget(tokens=100))
    with metrics.sent_to(purse):
        metrics.count("itune_tokens_total", 60, kind="prompt")
        assert not signals
        metrics.count("itune_tokens_total", 60, kind="generated")
        metrics.count("itune_tokens_total", 60, kind="generated")
    metrics.count("itune_tokens_total", 60, kind="generated")
    assert len(signals) == 1
    assert purse.tokens == 180


def test_a_cap_on_money_needs_prices():
    with pytest.raises(ValueError, match=r"budget\.cost needs prices"):
        RunSettings(budget=Budget(cost=1.0))


def job_of(run: dict) -> GenerateJob:
    return GenerateJob(**job("any"), run=run)


def test_every_host_that_receives_rows_is_named(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "RAY_ADDRESS", "ITUNE_OUTPUT"):
        monkeypatch.delenv(name, raising=False)
    assert receivers(job_of({"output": "/data/runs"})) == []
    assert receivers(job_of({"output": "/d", "ray": {"address": "127.0.0.1:6379"}})) == []
    assert receivers(job_of({"output": "s3://bucket/runs"})) == ["rows go to s3.amazonaws.com (run.output)"]
    assert receivers(job_of({"output": "gs://bucket/runs"})) == ["rows go to storage.googleapis.com (run.output)"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio.example:9000/")
    assert receivers(job_of({"output": "s3://bucket/runs"})) == ["rows go to minio.example:9000 (run.output)"]
    remote = job_of({"output": "/d", "ray": {"address": "ray://head.example:10001"}})
    assert receivers(remote) == ["rows go to the Ray cluster at head.example (run.ray.address or RAY_ADDRESS)"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert receivers(remote) == [], "a submitted driver is there already"
