"""The evaluate stage on real Ray with fake engines: resume, failures, sharing, skipping."""

import itertools
import json
import os
import signal
import threading
import time

import psutil
import pytest

from itune_ray.config.base import validate
from itune_ray.config.evaluate import EvaluateJob
from itune_ray.data.artifact import RunStore
from itune_ray.engine.host import EngineHost
from itune_ray.errors import ClusterError, EvalError
from itune_ray.evaluate import run as stage
from itune_ray.evaluate.actor import SHARD, EvalActors
from itune_ray.observe.progress import Progress

pytestmark = pytest.mark.real
ROWS = 100


@pytest.fixture(scope="module")
def ray_session():
    import ray

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def engines(ray_session):
    host = EngineHost()
    yield host
    host.close()


def job(engine=None, adapters=(None,), **config):
    models = [
        {
            "name": f"m{i}",
            "model": {"path": "any", "adapter": adapter},
            "pool": {"cpus_each": 0.1},
            "engine": {"type": "fake", **(engine or {})},
        }
        for i, adapter in enumerate(adapters)
    ]
    tree = {
        "name": "r",
        "models": models,
        "benchmarks": [{"type": "playground", "rows": ROWS, "name": "world"}],
        "workers": {"num": 2, "cpus_each": 0.1},
        "commit": {"rows": 16, "seconds": 0.5},
        "bootstrap": {"samples": 100},
    }
    return validate(EvaluateJob, {**tree, **config}, "test")


def evaluate(made, root, engines):
    with Progress(quiet=True) as progress:
        return stage.run(made, RunStore(str(root), "r"), "evaluate", engines, progress)


def requests_at(engines):
    return sum(pool.requests for pool in engines._pools.values())


def answers_of(artifact):
    return artifact.folder.read_table("answers.parquet").to_pylist()


def test_every_item_is_asked_once_of_every_model_and_adapters_share_an_engine(tmp_path, engines):
    artifact = evaluate(job(adapters=(None, "/adapters/a")), tmp_path, engines)
    assert engines.starts == 1
    assert requests_at(engines) == 2 * ROWS
    answers = answers_of(artifact)
    by_model = {name: [a for a in answers if a["model"] == name] for name in ("m0", "m1")}
    assert [a["item"] for a in by_model["m0"]] == [a["item"] for a in by_model["m1"]]
    assert len(by_model["m0"]) == ROWS
    assert all(a["reply"] != b["reply"] for a, b in zip(*by_model.values(), strict=True))  # the adapter answered
    scores = artifact.folder.read_json("scores.json")
    assert scores["m0"]["world"]["value"] == 0.0
    assert scores["m0"]["world"]["high"] > 0.0
    assert sum(part["n"] for part in scores["m0"]["world"]["categories"].values()) == ROWS
    manifest = artifact.manifest
    assert manifest["funnel"] == {"in": 2 * ROWS, "accepted": 2 * ROWS, "rejected": {}, "failed": {}}
    assert manifest["tokens"] == sum(a["prompt_tokens"] + a["tokens"] for a in answers) > 0
    assert manifest["scores"]["m1"]["world"]["n"] == ROWS


def test_a_finished_artifact_needs_no_engine(tmp_path, engines):
    first = evaluate(job(), tmp_path, engines)
    assert evaluate(job(), tmp_path, None).path() == first.path()
    moved = job(workers={"num": 1, "cpus_each": 0.2}, commit={"rows": 3})
    assert evaluate(moved, tmp_path, None).path() == first.path()


def test_resuming_asks_only_what_was_not_committed_and_ends_alike(tmp_path, engines, monkeypatch):
    undisturbed = answers_of(evaluate(job(), tmp_path / "whole", engines))
    asked_before = requests_at(engines)

    class Dying(EvalActors):
        def stream(self, shards):
            yield from itertools.islice(super().stream(shards), 2)
            raise KeyboardInterrupt

    monkeypatch.setattr(stage, "EvalActors", Dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(job(), tmp_path / "killed", engines)
    (folder,) = [p for p in (tmp_path / "killed" / "r").iterdir() if p.name.startswith("evaluate-")]
    assert json.loads((folder / "manifest.json").read_text())["status"] == "running"
    asked: list[str] = []

    class Watching(EvalActors):
        def stream(self, shards):
            asked.extend(question.key for shard in shards for question in shard)
            return super().stream(shards)

    monkeypatch.setattr(stage, "EvalActors", Watching)
    before = requests_at(engines)
    artifact = evaluate(job(), tmp_path / "killed", engines)
    assert 0 < len(asked) <= ROWS - SHARD  # at least one shard was committed before the end
    assert requests_at(engines) - before == len(asked) == len(set(asked))
    assert requests_at(engines) - asked_before <= 2 * ROWS
    assert answers_of(artifact) == undisturbed


def kill_an_eval_actor(killed):
    """SIGKILL one of the eval actors that this process's own Ray started."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in psutil.Process().children(recursive=True):
            if "EvalActor" in " ".join(child.cmdline()[:1]):
                os.kill(child.pid, signal.SIGKILL)
                killed.append(child.pid)
                return
        time.sleep(0.05)


def test_a_killed_eval_actor_costs_no_answer(tmp_path, engines, monkeypatch):
    killers, killed = [], []

    class Sabotaged(EvalActors):
        def stream(self, shards):
            for answers in super().stream(shards):
                if not killers:
                    killers.append(threading.Thread(target=kill_an_eval_actor, args=(killed,)))
                    killers[0].start()
                yield answers

    monkeypatch.setattr(stage, "EvalActors", Sabotaged)
    benchmarks = [{"type": "playground", "rows": 600, "name": "world"}]
    artifact = evaluate(job({"latency_s": 0.4}, benchmarks=benchmarks), tmp_path, engines)
    killers[0].join()
    assert killed
    assert artifact.manifest["funnel"] == {"in": 600, "accepted": 600, "rejected": {}, "failed": {}}


def test_what_fails_once_is_asked_again(tmp_path, engines):
    artifact = evaluate(job({"flaky_rate": 0.3}), tmp_path, engines)
    assert artifact.folder.read_json("scores.json")["m0"]["world"]["failed"] == 0
    assert artifact.manifest["funnel"]["accepted"] == ROWS
    assert requests_at(engines) > ROWS


def test_what_keeps_failing_is_counted_as_wrong_and_stored_with_its_cause(tmp_path, engines):
    artifact = evaluate(job({"fail_rate": 0.3}), tmp_path, engines)
    score = artifact.folder.read_json("scores.json")["m0"]["world"]
    failed = [a for a in answers_of(artifact) if a["failure"]]
    assert 10 < len(failed) < 50
    assert (score["n"], score["failed"]) == (ROWS, len(failed))
    assert artifact.manifest["funnel"]["failed"] == {"injected failure": len(failed)}
    assert artifact.manifest["rows"] == ROWS


def test_too_many_eval_actors_for_the_cluster_are_refused_at_once(tmp_path, engines):
    with pytest.raises(ClusterError, match=r"12 eval actors beside .* needs 12\.1 CPU.*workers\.num"):
        evaluate(job(workers={"num": 12, "cpus_each": 1.0}), tmp_path, engines)


def test_a_model_that_answers_nothing_is_an_error_and_no_score_of_zero(tmp_path, engines):
    with pytest.raises(EvalError, match=r"answered none of the 100 items of world: injected failure"):
        evaluate(job({"fail_rate": 1.0}), tmp_path, engines)
