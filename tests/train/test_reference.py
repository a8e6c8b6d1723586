"""DPO in the loop: log 2 at the start, a reference that survives, held-out pairs, and TRL's loss."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from oracle import trl_pairs, trl_steps
from ranks import run_ranks

from itune_ray.data.records import Record
from itune_ray.errors import TrainError
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally
from itune_ray.train.rows import VALIDATION, validation_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("model"))


def pairs(count: int, first: int = 0) -> list[Record]:
    """Short chosen answers, longer rejected ones."""
    made = []
    for record in tiny.chats(count + first)[first:]:
        words = (record.response or "").split()
        made.append(Record(**{**as_fields(record), "rejected": " ".join([*words[::-1], "piano", "piano"])}))
    return made


def as_fields(record: Record) -> dict[str, Any]:
    return {"source": record.source, "position": record.position, "messages": record.messages}


def dpo_job(folder: Path, **overrides: Any):
    settings = {"objective": {"type": "dpo", "beta": 0.3}, "batch": 8, "steps": 4, "micro_batch": 3, "packing": True}
    return tiny.job(folder, **{**settings, **overrides})


HELD_OUT = {"validation": {"data": [{"source": {"type": "playground", "split": "chat", "rows": 1}}], "every_steps": 2}}


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(str(out))]


@pytest.mark.parametrize(
    "overrides",
    [{}, {"model.peft": {"type": "lora", "rank": 4}}, {"strategy": {"type": "fsdp2"}}, {"packing": False}],
    ids=["full", "lora", "fsdp2", "unpacked"],
)
def test_the_loss_starts_at_log_2_and_the_margin_rises(folder, tmp_path, overrides):
    lr = {"type": "adamw", "lr": 3e-3}
    train_local(dpo_job(folder, optimizer=lr, **overrides), pairs(24), str(tmp_path))
    rows = read_metrics(str(tmp_path))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["units"] == {"dpo": 8.0}
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["reward_margin"] > 0


def test_packing_and_micro_batches_do_not_move_the_losses(folder, tmp_path):
    found = []
    for name, overrides in {"a": {}, "b": {"packing": False}, "c": {"micro_batch": 1}}.items():
        train_local(dpo_job(folder, **overrides), pairs(24), str(tmp_path / name))
        found.append(losses(tmp_path / name))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_the_reference_is_written_once_and_a_half_written_one_anew(folder, tmp_path):
    job = dpo_job(folder, checkpoint={"every_steps": 1, "keep": 5})
    train_local(job, pairs(24), str(tmp_path / "whole"))
    train_local(job, pairs(24), str(tmp_path / "paused"), stop_at=2)
    part = tmp_path / "paused" / "reference" / "part-00000.parquet"
    written = part.stat().st_mtime_ns
    train_local(job, pairs(24), str(tmp_path / "paused"), stop_at=3)
    assert part.stat().st_mtime_ns == written, "a finished pass is read again"
    (tmp_path / "paused" / "reference" / "complete.json").unlink()
    train_local(job, pairs(24), str(tmp_path / "paused"))
    assert part.stat().st_mtime_ns > written, "an unfinished pass is made anew, by the model before its first step"
    assert losses(tmp_path / "paused") == losses(tmp_path / "whole")


def test_jobs_of_a_run_share_the_reference_of_equal_rows_and_models(folder, tmp_path):
    """Another weight in the loss, another rate and another adapter's rank change nothing before the first step; other
    rows do."""
    run, shared = tmp_path / "run", str(tmp_path / "run" / "references")

    def trained(name, records, **overrides):
        settings = {"model.peft": {"type": "lora", "rank": 4}, **overrides}
        job, stage = dpo_job(folder, steps=2, **settings), str(run / name)
        train_rank(job, prepare_locally(job, records, stage), stage, references=shared)
        return (run / name / "reference").exists(), losses(run / name)

    assert trained("first", pairs(24))[0]
    rank = {"model.peft": {"type": "lora", "rank": 8}}
    other = {"objective": {"type": "dpo", "beta": 0.1}, "optimizer": {"type": "adamw", "lr": 1e-4}, **rank}
    made, found = trained("other", pairs(24), **other)
    assert not made
    shutil.rmtree(run / "first")
    assert trained("alone", pairs(24), **other, seed=tiny.job(folder).seed) == (True, found), "where that is gone"
    assert trained("rows", pairs(25))[0]
    assert trained("full", pairs(24), **{"model.peft": {"type": "full"}})[0]


def test_a_reference_of_another_model_is_not_taken(folder, tmp_path):
    """Same stage, same shape, other weights: the loss starts at log 2 all the same."""
    job = dpo_job(folder, steps=2)
    train_local(job, pairs(24), str(tmp_path / "stage"))
    shutil.rmtree(tmp_path / "stage" / "checkpoint")
    other = tiny.llama(tmp_path / "other", seed=7)
    train_local(dpo_job(other, steps=2), pairs(24), str(tmp_path / "stage"))
    assert losses(tmp_path / "stage")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_held_out_pairs_are_scored_before_along_and_after(folder, tmp_path):
    job = dpo_job(folder, optimizer={"type": "adamw", "lr": 3e-3}, **HELD_OUT)
    train_local(job, pairs(24), str(tmp_path), held_out=pairs(10, first=24))
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {row["n"] for row in rows} == {10}
    assert rows[0]["reward_accuracy"] == 0.5, "all pairs tie"
    assert rows[-1]["low"] <= rows[-1]["reward_accuracy"] <= rows[-1]["high"]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_held_out_scores_of_an_interrupted_run_are_those_of_the_whole(folder, tmp_path):
    """Interrupted before the first checkpoint and again between two, under sharding and bf16."""

    class Killed(BaseException):
        pass

    def killed_after(step):
        def on_progress(done, total, row):
            if done == step:
                assert row["held_out_loss"] > 0
                raise Killed

        return on_progress

    settings = {"strategy": {"type": "fsdp2"}, "precision": "bf16", "checkpoint": {"every_steps": 3}, "steps": 5}
    job = dpo_job(folder, **settings, **HELD_OUT)
    rows, held_out = pairs(24), pairs(10, first=24)
    train_local(job, rows, str(tmp_path / "whole"), held_out=held_out)
    for step in (2, 4):
        with pytest.raises(Killed):
            train_local(job, rows, str(tmp_path / "parts"), killed_after(step), held_out=held_out)
    train_local(job, rows, str(tmp_path / "parts"), held_out=held_out)
    one, other = ((tmp_path / name / "validation.jsonl").read_text() for name in ("whole", "parts"))
    assert one == other
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[0] == pytest.approx(math.log(2), abs=1e-3)


def pause(job, stage, step):
    train_rank(job, prepare_locally(job, [], stage), stage, stop_at=step)


@pytest.mark.real
def test_two_ranks_write_a_reference_that_one_continues_with(folder, tmp_path):
    job = dpo_job(folder, strategy={"type": "fsdp2"}, **HELD_OUT)
    rows, held_out = pairs(24), pairs(10, first=24)
    train_local(job, rows, str(tmp_path / "whole"), held_out=held_out)
    prepare_locally(job, rows, str(tmp_path / "parts"))
    prepare_locally(validation_job(job), held_out, str(tmp_path / "parts" / VALIDATION))
    run_ranks(2, pause, job, str(tmp_path / "parts"), 2)
    reference = tmp_path / "parts" / "reference"
    assert sorted(p.name for p in reference.iterdir()) == ["complete.json", "part-00000.parquet", "part-00001.parquet"]
    written = {part: part.stat().st_mtime_ns for part in reference.iterdir()}
    train_local(job, rows, str(tmp_path / "parts"))
    assert written == {part: part.stat().st_mtime_ns for part in reference.iterdir()}
    for name in ("metrics.jsonl", "validation.jsonl"):
        one, other = (read_metrics(str(tmp_path / run), name) for run in ("whole", "parts"))
        assert [row["step"] for row in one] == [row["step"] for row in other]
        for key in ("loss", "reward_chosen", "reward_rejected"):
            assert [r[key] for r in other] == pytest.approx([r[key] for r in one], rel=1e-5, abs=2e-5), (name, key)


def test_held_out_rows_change_nothing_in_the_training(folder, tmp_path):
    train_local(dpo_job(folder), pairs(24), str(tmp_path / "without"))
    train_local(dpo_job(folder, **HELD_OUT), pairs(24), str(tmp_path / "with"), held_out=pairs(10, first=24))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_sft_has_a_held_out_loss(folder, tmp_path):
    job = tiny.job(folder, batch=8, steps=4, **HELD_OUT)
    train_local(job, tiny.chats(24), str(tmp_path), held_out=tiny.chats(30)[24:])
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_pairs_with_equal_answers_are_one_line(folder, tmp_path):
    equal = [Record(**{**as_fields(record), "rejected": record.response}) for record in tiny.chats(5)]
    with pytest.raises(TrainError, match=r"no row is left to train on.*'equal_answers': 5.*rejected answer"):
        train_local(dpo_job(folder), equal, str(tmp_path))


def test_loss_and_gradient_equal_trls(folder, tmp_path):
    """One step of TRL's DPOTrainer on the same pairs: loss, and the gradient's norm."""
    trl = pytest.importorskip("trl")
    rows, settings = pairs(8), {"beta": 0.3, "processing_class": tiny.tokenizer(None)}
    theirs = trl_steps(trl.DPOTrainer, trl.DPOConfig, folder, tmp_path / "trl", trl_pairs(rows), **settings)
    job = dpo_job(folder, steps=3, packing=False, micro_batch=8, clip_norm=None)
    train_local(job, rows, str(tmp_path / "ours"))
    ours = read_metrics(str(tmp_path / "ours"))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=2e-4)
    assert [row["grad_norm"] for row in ours] == pytest.approx([row["grad_norm"] for row in theirs], rel=2e-4)
