"""The generate stage on real Ray and Ray Data with a pool of fake engines; vLLM is in tests/pipeline."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from drivers import generate

from itune_ray.config.generate import GenerateJob
from itune_ray.engine.host import EngineHost
from itune_ray.errors import ClusterError, GenerationError

pytestmark = pytest.mark.real

ROWS = 300


@pytest.fixture(scope="module")
def ray_session():
    import ray

    path = [str(Path(__file__).parent), *sys.path]  # workers find the recipes of these tests
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(path)}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def host(ray_session):
    engines = EngineHost()
    yield engines
    engines.close()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Prompts of which one asks nothing, one is too long, and one line is no JSON."""
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    lines = [json.dumps({"prompt": f"question {i}"}) for i in range(ROWS)]
    lines[10] = json.dumps({"prompt": "word " * 600})
    lines[20] = "{broken"
    file.write_text("\n".join(lines) + "\n")
    return file


def job_tree(prompts: Path, name: str = "run", engine: dict | None = None, **fields) -> dict:
    teacher = {"model": {"path": "any"}, "engine": {"type": "fake", **(engine or {})}, "pool": {"cpus_each": 0.5}}
    return {
        "name": name,
        "seed": 5,
        "prompts": [{"type": "file", "path": str(prompts), "format": "prompt"}],
        "teacher": teacher,
        "recipe": {"type": "respond", "samples": 2},
        "commit": {"rows": 32, "seconds": 1.0},
        **fields,
    }


def make(host: EngineHost, root: Path, *args, **fields):
    return generate(GenerateJob(**job_tree(*args, **fields)), str(root), host)


def tables(artifact) -> dict[str, list[dict]]:
    """The published rows; the score, NaN throughout, as text, since NaN equals nothing."""
    return {
        name: [{**row, "score": str(row["score"])} for row in pq.read_table(artifact.path(name)).to_pylist()]
        for name in ("accepted", "rejected", "failed")
    }


def test_every_prompt_ends_in_one_table_and_a_second_run_does_nothing(host, prompts, tmp_path):
    artifact = make(host, tmp_path, prompts)
    facts = artifact.manifest
    assert facts["funnel"]["in"] == 2 * (ROWS - 1) + 1
    assert facts["funnel"]["accepted"] == facts["rows"] == 2 * (ROWS - 2)
    assert facts["funnel"]["rejected"].pop("prompt_too_long") == 2
    assert sum(facts["funnel"]["rejected"].values()) == 1, "the broken line"
    assert facts["requests"] == ROWS - 1
    assert facts["engine_starts"] == 1
    assert facts["tokens"]["generated"] == sum(row["num_tokens"] for row in tables(artifact)["accepted"])

    pool = host.pool(GenerateJob(**job_tree(prompts)).teacher)
    before = pool.requests
    again = make(EngineHost(), tmp_path, prompts)
    assert (again.id, again.complete, pool.requests) == (artifact.id, True, before)


def test_workers_and_blocks_do_not_change_the_table(host, prompts, tmp_path):
    one = {"num": 1, "rows_per_block": 300, "blocks_in_flight": 1}
    many = {"num": 3, "rows_per_block": 7, "blocks_in_flight": 4}
    first = make(host, tmp_path / "one", prompts, engine={"latency_s": 0.01}, workers=one)
    second = make(host, tmp_path / "many", prompts, engine={"latency_s": 0.02}, workers=many)
    assert first.id == second.id
    assert tables(first) == tables(second)


def test_a_changed_prompt_template_generates_again_and_the_old_one_nothing(host, prompts, tmp_path):
    template, log = tmp_path / "user.jinja", tmp_path / "requests"
    fields = {"engine": {"request_log": str(log)}, "recipe": {"type": "respond", "template": str(template)}}
    made = []
    for text in ("{{ prompt }} ", "{{ prompt }} ", "{{ prompt }}", "{{ prompt }} "):
        template.write_text(text)
        made.append((make(host, tmp_path, prompts, **fields).id, len(log.read_text().split())))
    (first, asked), again, (changed, both), restored = made
    assert again == (first, asked)
    assert changed != first
    assert both == 2 * asked > 0
    assert restored == (first, both)


def test_failed_rows_are_driven_again_and_then_kept_as_failed(host, prompts, tmp_path):
    artifact = make(host, tmp_path, prompts, engine={"fail_rate": 0.05, "flaky_rate": 0.2}, max_attempts=3)
    rows = tables(artifact)
    assert {(row["cause"], row["attempts"]) for row in rows["failed"]} == {("injected failure", 3)}
    assert {row["attempts"] for row in rows["accepted"]} == {1, 2}
    funnel = artifact.manifest["funnel"]
    assert funnel["in"] == funnel["accepted"] + sum(funnel["rejected"].values()) + sum(funnel["failed"].values())


def test_nothing_but_failures_is_an_error_that_says_why(host, prompts, tmp_path):
    with pytest.raises(GenerationError, match=r"3 rejected, 596 failed, 596 of them for `injected failure`"):
        make(host, tmp_path, prompts, engine={"fail_rate": 1.0}, max_attempts=1)


def test_prompts_that_ask_nothing_are_an_error_that_says_why(host, prompts, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": " "}) + "\n")
    with pytest.raises(GenerationError, match=r"no row was made: 1 rejected, 0 failed"):
        make(host, tmp_path, empty)


def test_a_crashed_worker_loses_no_row(host, prompts, tmp_path):
    recipe = {"type": "custom", "import_path": "drivers:CrashOnce", "args": {"flag": str(tmp_path / "crashed")}}
    artifact = make(host, tmp_path, prompts, recipe=recipe)
    assert (tmp_path / "crashed").exists()
    calm = make(host, tmp_path, prompts, recipe={"type": "respond", "samples": 1})
    assert tables(artifact) == tables(calm)


def test_a_crashed_worker_asks_for_no_settled_row_again(host, prompts, tmp_path):
    """Row 50's block is half committed when its worker dies: Ray gives the new one the whole block again."""
    crash = {"flag": str(tmp_path / "crashed"), "after": 3.0}
    log = tmp_path / "requests"
    make(
        host,
        tmp_path,
        prompts,
        engine={"request_log": str(log)},
        recipe={"type": "custom", "import_path": "drivers:CrashOnce", "args": crash},
        workers={"num": 1, "blocks_in_flight": 1, "rows_per_block": 64},
        commit={"rows": 16, "seconds": 0.2},
    )
    asked = Counter(int(line.split(":")[1]) for line in log.read_text().split())
    again = {position for position, times in asked.items() if times > 1}
    assert asked.keys() == set(range(ROWS)) - {20}
    assert len(again) < 16, "at most what was on its way, less than a parcel"


def test_too_few_cpus_are_told_before_anything_starts(host, prompts, tmp_path):
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"1 engine replicas and 16 recipe workers .*needs 8.5 CPU, .*has 8"):
        make(host, tmp_path, prompts, workers={"num": 16, "cpus_each": 0.5})
    assert host.starts == 0
    assert time.monotonic() - started < 5


def test_workers_that_fit_exactly_do_not_hang(host, prompts, tmp_path):
    artifact = make(host, tmp_path, prompts, workers={"num": 5, "cpus_each": 1.5})
    assert artifact.complete


def start_driver(job: dict, folder: Path) -> subprocess.Popen:
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    command = [sys.executable, str(here / "drivers.py"), str(file), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.soak  # tests/pipeline kills drivers with real vLLM
def test_a_killed_driver_loses_only_what_was_under_way(host, prompts, tmp_path, wait_until):
    calm = make(host, tmp_path / "calm", prompts)
    log = tmp_path / "requests"
    slow = job_tree(prompts, engine={"latency_s": 0.4, "request_log": str(log)}, workers={"rows_per_block": 16})
    killed = start_driver(slow, tmp_path)
    commits = list[Path]()

    def committed() -> bool:
        commits[:] = sorted(tmp_path.glob("run/generate-*/ledger/commit-*.parquet"))
        return len(commits) >= 3 or killed.poll() is not None

    wait_until(committed, "three commits are durable")
    children = psutil.Process(killed.pid).children(recursive=True)
    engines = [process for process in children if "ray::Replica" in " ".join(process.cmdline())]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    committed()
    settled = {key for part in commits for key in pq.read_table(part)["input_key"].to_pylist()}
    assert 0 < len(settled) < ROWS, "the kill must land in the middle"
    assert len(engines) == 1
    assert not psutil.wait_procs(engines, timeout=30)[1], "no engine outlives its driver"

    asked = Counter(log.read_text().split())
    resumed = make(host, tmp_path, prompts, engine={"request_log": str(log)})
    again = Counter(log.read_text().split()) - asked
    keys = {request.split("/")[1] for request in again}
    assert not keys & settled, "a settled row reached the engine again"
    assert keys == {f"questions:{i}:0" for i in range(ROWS) if i != 20} - settled
    assert tables(resumed) == tables(calm)
