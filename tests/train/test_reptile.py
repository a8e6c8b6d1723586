"""Meta-tuning by Reptile: tasks by turns, the outer step, and exact resume in the middle of a block."""

from itertools import groupby
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from itune_ray.config.train import TrainJob
from itune_ray.data.order import Order, PackedTable
from itune_ray.data.records import Record
from itune_ray.data.tasks import TaskOrder
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally
from itune_ray.train.validation import LOG


def rows(tasks: int = 3, count: int = 24) -> list[Record]:
    return [
        tiny.chat(f"{tiny.WORDS[i % 12]}?", tiny.WORDS[-1 - i % 7], position=i, meta={"task": f"t{i % tasks}"})
        for i in range(count)
    ]


def job(folder, steps: int = 6, lr: float = 1e-2, **reptile: Any) -> TrainJob:
    more = {"reptile": reptile} if reptile else {}
    return tiny.job(folder, **{"steps": steps, "batch": 4, "optimizer.lr": lr, **more})


def weights(outcome) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(outcome.model_path).state_dict()


def test_tasks_take_turns_in_blocks_and_every_document_is_used(folder, tmp_path):
    made = job(folder, steps=18, inner_steps=2, rate=0.5)
    prepared = prepare_locally(made, rows(), str(tmp_path))
    table = PackedTable(prepared.folder)
    steps = [[key for row in table.rows(t) for key in row.keys] for t in range(18)]
    tasks = [{int(key.split(":")[1]) % 3 for key in step} for step in steps]
    assert all(len(held) == 1 for held in tasks)
    turns = [next(iter(held)) for held in tasks[::2]]
    assert [t for held in tasks for t in held] == [t for t in turns for _ in range(2)]
    assert all(sorted(turns[i : i + 3]) == [0, 1, 2] for i in (0, 3, 6))
    assert {key for step in steps for key in step} == {row.key for row in rows()}
    assert made.identity()["reptile"]["rate"] == 0.5
    assert "reptile" not in job(folder).identity()


def test_one_task_is_the_plain_order():
    keys = [f"d:{i}:0" for i in range(20)]
    plain = [step for _, step in Order(keys, [1.0] * 20, 1, 4).steps(None, 9)]
    tasks = TaskOrder(keys, [1.0] * 20, 1, 4, ["a"] * 20, block=2)
    assert [step for _, step in tasks.steps(None, 9)] == plain
    assert len(list(tasks.steps(2.0, None))) == 10
    mixed = TaskOrder(keys, [1.0] * 20, 1, 4, ["a", "b"] * 10, block=3)
    assert [len(list(block)) for _, block in groupby(i[0] % 2 for _, i in mixed.steps(None, 6))] == [3, 3]


def test_one_inner_step_is_the_inner_optimizer_at_the_outer_rate(folder, tmp_path):
    outer = weights(train_local(job(folder, inner_steps=1, rate=0.25), rows(tasks=1), str(tmp_path / "a")))
    plain = weights(train_local(job(folder, lr=0.25e-2), rows(tasks=1), str(tmp_path / "b")))
    for name, value in plain.items():
        torch.testing.assert_close(outer[name], value, rtol=0, atol=2e-6)


def test_the_outer_step_goes_part_of_the_way(folder, tmp_path):
    """Against θ0 + ε (θ_k - θ0) of a run of k plain steps."""
    start = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    inner = weights(train_local(job(folder, steps=3, inner_steps=3, rate=1.0), rows(tasks=1), str(tmp_path / "a")))
    plain = weights(train_local(job(folder, steps=3), rows(tasks=1), str(tmp_path / "b")))
    outer = weights(train_local(job(folder, steps=3, inner_steps=3, rate=0.3), rows(tasks=1), str(tmp_path / "c")))
    for name, first in start.items():
        torch.testing.assert_close(inner[name], plain[name], rtol=0, atol=1e-7)
        torch.testing.assert_close(outer[name], first + 0.3 * (plain[name] - first), rtol=0, atol=1e-6)
    assert not torch.equal(outer["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("stop", [2, 3])
def test_a_stop_within_a_block_or_between_blocks_changes_nothing(folder, tmp_path, strategy, stop):
    made = job(folder, inner_steps=3, rate=0.5).model_copy(
        update={"strategy": tiny.job(folder, **{"strategy.type": strategy}).strategy}
    )
    whole = weights(train_local(made, rows(), str(tmp_path / "whole")))
    train_local(made, rows(), str(tmp_path / "parts"), stop_at=stop)
    parts = weights(train_local(made, rows(), str(tmp_path / "parts")))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_rows_without_a_task_are_rejected(folder, tmp_path):
    mixed = [*rows(count=6), tiny.chat("apple?", "river", position=99)]
    prepared = prepare_locally(job(folder, inner_steps=2), mixed, str(tmp_path))
    assert (prepared.accepted, prepared.rejected) == (6, {"no_task": 1})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"curriculum": {}}, "leave one out"),
        ({"strategy": {"type": "deepspeed"}}, "ddp or fsdp2"),
        ({"model.peft": {"type": "adalora"}}, "no adalora"),
    ],
)
def test_what_cannot_go_together_is_refused(folder, more, message):
    with pytest.raises(ValueError, match=message):
        tiny.job(folder, reptile={}, **more)


def shifted(by: int, start: int) -> list[Record]:
    """A task: every word is answered by the one so many places on. No question says which task it is of."""
    words = tiny.WORDS
    answers = [words[(i + by) % len(words)] for i in range(len(words))]
    return [tiny.chat(words[i], a, position=start + i, meta={"task": f"by {by}"}) for i, a in enumerate(answers)]


@pytest.mark.soak
def test_few_steps_on_a_held_out_task_reach_further_than_after_joint_training(folder, tmp_path):
    """The acceptance of methods T18, where tasks contradict each other: nine shifts are trained, by turns or mixed,
    with equal steps and learning rate; then five steps on each of the other three, all twelve pairs in each. `-s`
    prints the losses of those pairs before and after them."""
    held = (3, 7, 10)
    seen = [row for by in range(12) if by not in held for row in shifted(by, 100 * by)]
    after: dict[str, list[float]] = {}
    for name, more in {"joint": {}, "reptile": {"reptile": {"inner_steps": 5, "rate": 0.5}}}.items():
        shape: dict[str, Any] = {"batch": 12, "optimizer.lr": 2e-3, "log_every": 100, "checkpoint.every_steps": 5000}
        start = train_local(tiny.job(folder, steps=3000, **shape, **more), seen, str(tmp_path / name))
        losses = []
        for by in held:
            asked = {"data": [{"source": {"type": "playground", "split": "chat", "rows": 1}}]}  # its rows are given
            few = tiny.job(start.model_path, steps=5, validation=asked, **shape)
            out = str(tmp_path / f"{name}-{by}")
            train_local(few, shifted(by, 5000), out, held_out=shifted(by, 9000))
            losses.append([row["loss"] for row in read_metrics(out, LOG)])
        print(name, [[round(loss, 3) for loss in pair] for pair in losses])
        after[name] = [pair[-1] for pair in losses]
    assert all(r < j for r, j in zip(after["reptile"], after["joint"], strict=True))
