"""Machines that go while they work, one in every stage: the run ends with the results of one that nothing disturbed."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml
from clusters import RAY, machines
from runs import commits, losses, table_hash

pytestmark = [pytest.mark.real, pytest.mark.soak]

ROWS = 4000
LORA = {"type": "lora", "rank": 4, "train_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}
GREEDY = {"temperature": 0, "top_p": 1.0, "max_tokens": 48}
TRAIN = {
    "model": {"path": "playground://base", "attention": "eager", "peft": LORA},
    "data": [{"source": {"type": "file", "path": "step://curate/kept"}}],
    "optimizer": {"type": "adamw", "lr": 6e-3},
    "batch": 16,
    "max_length": 128,
}
ROLES = ("data", "infer", "train")


def job(name: str, root: Path) -> dict:
    """Every kind of stage that works on the cluster; the kill must land in the middle of each."""
    seen = str(root / f"{name}.filtered")
    slow = {"type": "custom", "import_path": "slow_filter:Slow", "args": {"log": seen, "seconds": 0.003}}
    engine = {"type": "vllm", "request_log": str(root / f"{name}.requests")}
    scored = {"type": "vllm", "max_adapters": 2}
    return {
        "name": name,
        "run": {"output": str(root), "ray": {"roles": {role: role for role in ROLES}}},
        "steps": {
            "distill": {
                "job": "generate",
                "prompts": [{"type": "playground", "split": "prompts", "rows": ROWS, "seed": 3}],
                "teacher": {"model": {"path": "playground://teacher"}, "engine": engine},
                "sampling": {"temperature": 0.7, "max_tokens": 48},
                "commit": {"rows": 64, "seconds": 1.0},
            },
            "curate": {
                "job": "curate",
                "inputs": [{"source": {"type": "file", "path": "step://distill/accepted"}}],
                "filters": [{"type": "finish_reason"}, slow, {"type": "exact_dedup"}, {"type": "grader"}],
            },
            "sft": {
                "job": "train",
                **TRAIN,
                "steps": 60,
                "workers": {"num": 2},
                "checkpoint": {"every_steps": 10, "keep": 2},
            },
            "score": {
                "job": "evaluate",
                "models": [
                    {
                        "name": "sft",
                        "model": {"path": "playground://base", "adapter": "step://sft/adapter"},
                        "engine": scored,
                    }
                ],
                "benchmarks": [{"type": "playground", "rows": 2000}],
                "sampling": GREEDY,
                "commit": {"rows": 64, "seconds": 1.0},
            },
            "sweep": {
                "job": "sweep",
                "axes": {"train.model.peft.rank": [2, 4]},
                "train": {**TRAIN, "steps": 40, "checkpoint": {"every_steps": 5}},
                "evaluate": {
                    "benchmarks": [{"type": "playground", "rows": 60}],
                    "sampling": GREEDY,
                    "engine": scored,
                },
                "scheduler": {"type": "fifo"},
                "max_concurrent": 1,
            },
        },
    }


class Driver:
    """A pipeline on the head, and what it says."""

    def __init__(self, cluster, tree: dict, root: Path):
        file = root / f"{tree['name']}.yaml"
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
        command = [sys.executable, "-m", "itune_ray", "pipeline", str(file)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.began = time.monotonic()
        self._process = subprocess.Popen(command, env=environment, **pipes)
        self.said: list[str] = []
        self._reader = threading.Thread(target=lambda: self.said.extend(self._process.stdout), daemon=True)
        self._reader.start()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, timeout: float) -> float:
        """Seconds that it took; it must have succeeded."""
        self._process.wait(timeout)
        self._reader.join()
        assert self._process.returncode == 0, "".join(self.said)[-6000:]
        return time.monotonic() - self.began

    def until(self, condition, what: str, timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert not self.ended, f"it ended before {what}:\n{''.join(self.said)[-6000:]}"
            assert time.monotonic() < deadline, f"timed out waiting until {what}:\n{''.join(self.said)[-6000:]}"
            time.sleep(0.02)


@dataclass
class Ended:
    """A run that has ended."""

    folder: Path
    seconds: float
    asked: Counter = field(default_factory=Counter)
    filtered: Counter = field(default_factory=Counter)

    def stage(self, name: str) -> Path:
        (folder,) = (p for p in self.folder.glob(f"{name}-*") if (p / "manifest.json").exists())
        return folder

    def seconds_of(self, stage: str) -> float:
        return json.loads((self.stage(stage) / "manifest.json").read_text())["seconds"]


def _ended(driver: Driver, name: str, root: Path) -> Ended:
    seconds = driver.wait(600)
    logs = [Counter((root / f"{name}.{kind}").read_text().split()) for kind in ("requests", "filtered")]
    return Ended(root / name, seconds, *logs)


@pytest.fixture(scope="module")
def cluster():
    """A head and a node for each role."""
    with machines(env={"PYTHONPATH": str(Path(__file__).parent)}) as started:
        for role in ROLES:
            started.add(f"{role}-0", {role: 1})
            started.await_nodes()  # Ray's nodes of one machine must not start at the same time
        yield started


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory):
    """(undisturbed, disturbed), the second with a machine lost in every stage."""
    root = tmp_path_factory.mktemp("lost")
    calm = _ended(Driver(cluster, job("calm", root), root), "calm", root)
    driver = Driver(cluster, job("lost", root), root)
    run = root / "lost"

    def lines(pattern: str) -> int:
        return max((len(losses(file.parent)) for file in run.glob(pattern)), default=0)

    def replace(role: str, number: int) -> None:
        cluster.nodes[f"{role}-{number}"].kill()
        cluster.add(f"{role}-{number + 1}", {role: 1})

    filtered = root / "lost.filtered"
    driver.until(lambda: len(commits(run.glob("distill-*"))) >= 3, "three commits of rows")
    replace("infer", 0)
    driver.until(lambda: filtered.exists() and len(filtered.read_text().split()) >= 300, "300 rows are filtered")
    replace("data", 0)
    driver.until(lambda: lines("sft-*/metrics.jsonl") >= 15, "15 steps")
    replace("train", 0)
    driver.until(lambda: len(commits(run.glob("score-*"))) >= 3, "three commits of answers")
    replace("data", 1)
    driver.until(lambda: lines("trial-*/metrics.jsonl") >= 8, "8 steps of a trial")
    replace("train", 1)
    return calm, _ended(driver, "lost", root)


def test_tables_are_those_of_the_undisturbed_run(runs):
    calm, lost = runs
    for stage, tables in {"distill": ("accepted", "rejected", "failed"), "curate": ("kept", "rejected")}.items():
        for table in tables:
            assert table_hash(lost.stage(stage) / table) == table_hash(calm.stage(stage) / table), (stage, table)


def test_every_step_has_the_loss_of_the_undisturbed_run(runs):
    calm, lost = runs
    assert losses(lost.stage("sft")) == losses(calm.stage("sft"))


def test_scores_and_sweep_are_those_of_the_undisturbed_run(runs):
    calm, lost = runs
    for run in runs:
        assert json.loads((run.stage("score") / "manifest.json").read_text())["funnel"]["in"] == 2000
    assert (lost.stage("score") / "scores.json").read_text() == (calm.stage("score") / "scores.json").read_text()

    def scored(run: Ended) -> list:
        sweep = json.loads((run.stage("sweep") / "sweep.json").read_text())
        return [(trial["axes"], trial["rungs"], trial["ended"]) for trial in sweep["trials"]]

    assert scored(lost) == scored(calm)


def test_only_work_in_flight_was_done_again(runs, record_property):
    """What docs/benchmarks.md says of it."""
    calm, lost = runs
    redone = sum(count - 1 for count in lost.asked.values())
    filtered = sum(count - 1 for count in lost.filtered.values())
    figures = {"rows asked again": redone, "rows filtered again": filtered}
    figures |= {f"seconds of {s}": (calm.seconds_of(s), lost.seconds_of(s)) for s in job("any", Path())["steps"]}
    figures["seconds in all"] = round(calm.seconds, 1), round(lost.seconds, 1)
    for name, value in figures.items():
        record_property(name, value)
    print(json.dumps(figures, indent=1))
    assert sum(calm.asked.values()) == len(calm.asked)
    assert redone < ROWS / 2
    assert filtered <= ROWS


NODE_ID = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print([node["NodeID"] for node in ray.nodes() if node["Alive"] and sys.argv[2] in node["Resources"]][0])
"""


NOTICED_S = 6
"""Ray Train asks for notices every 5 s."""


def test_a_machine_that_gives_notice_costs_no_step_and_no_failure(cluster, runs, tmp_path):
    """Its spot agent drains it; the ranks save a checkpoint at once, and Ray Train counts no failure."""
    calm, _ = runs
    train = job("noticed", tmp_path)["steps"]["sft"]
    train["data"] = [{"source": {"type": "file", "path": str(calm.stage("curate") / "kept")}}]
    train |= {"checkpoint": {"every_steps": 1000, "keep": 5}, "workers": {"num": 2, "max_failures": 0}}
    settings = {"output": str(tmp_path), "ray": {"roles": {role: role for role in ROLES}}}
    driver = Driver(cluster, {"name": "noticed", "run": settings, "steps": {"sft": train}}, tmp_path)
    stage = tmp_path / "noticed"

    def saved() -> list[int]:
        found = stage.glob("sft-*/checkpoint/step-*/complete.json")
        return sorted(int(file.parent.name.rpartition("-")[2]) for file in found)

    def steps() -> int:
        return max((len(losses(file.parent)) for file in stage.glob("sft-*/metrics.jsonl")), default=0)

    driver.until(lambda: steps() >= 8, "8 steps")
    assert saved() == []
    name = next(name for name, node in cluster.nodes.items() if "train" in name and node.process.poll() is None)
    asked = [sys.executable, "-c", NODE_ID, cluster.address, name]
    told = subprocess.run(asked, env=dict(cluster.environment), capture_output=True, text=True, check=True)
    node = told.stdout.split()[-1]
    below = psutil.Process(cluster.nodes[name].process.pid).children(recursive=True)
    workers = [process for process in below if "RayTrainWorker" in "".join(process.cmdline())]
    for worker in workers:
        worker.suspend()  # sixty steps take fewer seconds than a notice
    drain = ["drain-node", "--address", cluster.address, "--node-id", node, "--deadline-remaining-seconds", "60"]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot interruption notice"]
    subprocess.run([str(RAY), *drain], env=dict(cluster.environment), check=True, capture_output=True)
    time.sleep(NOTICED_S)
    for worker in workers:
        worker.resume()
    driver.until(lambda: saved() != [], "a checkpoint")
    cluster.nodes[name].kill()
    cluster.add("train-9", {"train": 1})
    driver.wait(240)
    (noticed, end) = saved()
    assert 8 <= noticed < end == 60
    assert losses(next(stage.glob("sft-*"))) == losses(calm.stage("sft"))
