"""Our side of the train bench, the loop without Ray: `python -m itune_ray.bench.train_loop TASK` takes turns, and with
a folder as its second argument trains the whole task into it."""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from itune_ray.bench.turns import Task, Work
from itune_ray.config.base import validate
from itune_ray.config.train import TrainJob
from itune_ray.data.records import Record


def train_job(task: Task, **overrides: Any) -> TrainJob:
    """The job of a task."""
    low_rank = {"type": "lora", "rank": task.rank, "alpha": 2 * task.rank}
    per_row = 2 * task.pack_length if task.method == "dpo" else task.pack_length
    tree = {
        "name": "bench",
        "model": {"path": f"{task.folder}/model", "peft": low_rank if task.method == "lora" else {"type": "full"}},
        "data": [{"source": {"type": "file", "path": f"{task.folder}/records.jsonl"}}],
        "objective": {"type": "dpo" if task.method == "dpo" else "sft"},
        "optimizer": {"type": "adamw", "lr": 1e-4},
        "schedule": {"type": "constant", "warmup": 0.0},
        "strategy": {"type": "ddp"},
        "precision": task.precision,
        "steps": task.steps,
        "batch": task.documents_per_step,
        "max_length": per_row // 2 if task.method == "dpo" else per_row,
        "pack_length": per_row,
        "micro_batch": task.micro_batch,
        "compile": task.compile,
        "workers": {"num": 1, "torch_threads": task.threads},
        "checkpoint": {"every_steps": 1_000_000, "keep": 1},
        **overrides,
    }
    return validate(TrainJob, tree, "bench")


def records(task: Task) -> list[Record]:
    """The task's rows."""
    lines = (Path(task.folder) / "records.jsonl").read_text().splitlines()
    return [Record.from_row({"source": "bench", "position": i, **json.loads(line)}) for i, line in enumerate(lines)]


def take_turns(task: Task) -> None:
    """Until no more are asked for."""
    from itune_ray.train.loop import train_local

    work, began = Work(), False

    def step(_: int, __: int, row: dict[str, Any]) -> None:
        nonlocal began
        if began:
            work.step(int(row["tokens"]), float(row["loss"]))
        else:
            began = True  # the first step allocates
            work.ready()

    with tempfile.TemporaryDirectory() as out, contextlib.suppress(EOFError):
        train_local(train_job(task), records(task), out, step)


def train_whole(task: Task, out: str) -> None:
    """The whole task, from rows to the exported model."""
    from itune_ray.train.loop import train_local

    train_local(train_job(task), records(task), out)


if __name__ == "__main__":
    given, *folder = sys.argv[1:]
    if folder:
        train_whole(Task.read(given), folder[0])
    else:
        take_turns(Task.read(given))
