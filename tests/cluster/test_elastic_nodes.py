"""A training node goes and another comes: two workers, one, two again, on the loss curve of one that nothing moved."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from clusters import machines

from itune_ray.config.base import load_job
from itune_ray.config.train import TrainJob
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics
from itune_ray.train.rows import read_mixture

pytestmark = [pytest.mark.real, pytest.mark.soak]
STEPS, STRICT, AFTER = 400, 50, 10


def tree(root: Path) -> dict:
    return {
        "name": "elastic",
        "run": {"output": str(root), "ray": {"roles": {"train": "train"}}},
        "model": {
            "path": "playground://base",
            "attention": "eager",
            "peft": {"type": "lora", "rank": 4, "dropout": 0.05},
        },
        "data": [{"source": {"type": "playground", "split": "chat", "rows": 600}, "weight": 1.5}],
        "optimizer": {"type": "adamw", "lr": 1e-4},
        "precision": "fp32",
        "steps": STEPS,
        "batch": 128,
        "max_length": 128,
        "workers": {"num": [1, 2], "resize_every_s": 5},
        "checkpoint": {"every_steps": 5, "background": True},
    }


def rows_of(root: Path) -> list[tuple[int, int]]:
    """(step, ranks) of what is logged so far."""
    found = [read_metrics(str(file.parent)) for file in root.glob("elastic/train-*/metrics.jsonl")]
    return [(row["step"], row["ranks"]) for row in (found[0] if found else [])]


def test_two_workers_one_and_two_again_train_what_one_process_trains(tmp_path, record_property):
    file = tmp_path / "elastic.yaml"
    file.write_text(yaml.safe_dump(tree(tmp_path), sort_keys=False))
    with machines() as cluster:
        for name in ("train-0", "train-1"):
            cluster.add(name, {"train": 1}, cpus=1)
            cluster.await_nodes(180)
        environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
        log = open(tmp_path / "log", "w")  # noqa: SIM115  the process's own
        command = [sys.executable, "-m", "itune_ray", "train", str(file)]
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

        def until(condition, what):
            deadline = time.monotonic() + 300
            while not condition():
                assert driver.poll() is None, f"ended before {what}:\n{(tmp_path / 'log').read_text()[-4000:]}"
                assert time.monotonic() < deadline, f"no {what}:\n{(tmp_path / 'log').read_text()[-4000:]}"
                time.sleep(0.1)

        try:
            until(lambda: [n for _, n in rows_of(tmp_path)].count(2) >= 8, "8 steps of two workers")
            lost = time.monotonic()
            cluster.nodes["train-1"].kill()
            until(lambda: [n for _, n in rows_of(tmp_path)].count(1) >= 5, "5 steps of one worker")
            record_property("seconds from the loss to step 5 of one", round(time.monotonic() - lost, 1))
            added = time.monotonic()
            cluster.add("train-2", {"train": 1}, cpus=1)
            until(lambda: rows_of(tmp_path)[-1][1] == 2, "two workers again")
            record_property("seconds from the new node to a step of two", round(time.monotonic() - added, 1))
            until(lambda: [n for _, n in rows_of(tmp_path)][-AFTER:] == [2] * AFTER, f"{AFTER} steps of two")
        finally:
            driver.kill()
            driver.wait()
            log.close()
    (stage,) = tmp_path.glob("elastic/train-*")
    moved = read_metrics(str(stage))
    assert [row["step"] for row in moved] == list(range(1, len(moved) + 1))
    assert [ranks for ranks, _ in itertools.groupby(row["ranks"] for row in moved)] == [2, 1, 2]
    job = load_job(TrainJob, file)
    train_local(job, read_mixture(job.data)[0], str(tmp_path / "fixed"), stop_at=len(moved))
    found, fixed = ([row["loss"] for row in rows] for rows in (moved, read_metrics(str(tmp_path / "fixed"))))
    worst = max(abs(a / b - 1) for a, b in zip(found, fixed, strict=True))
    record_property("largest relative difference of a step's loss", worst)
    torch.testing.assert_close(found[:STRICT], fixed[:STRICT], rtol=1e-6, atol=0)
    torch.testing.assert_close(found, fixed, rtol=1e-5, atol=0)
