"""What a checkpoint promises: complete or not there, told from a damaged one, written while training goes on."""

import errno
import json
import time

import pyarrow.fs as pafs
import pytest
import tiny
import torch
from ranks import STRATEGIES, run_ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from itune_ray.data import storage
from itune_ray.errors import TrainError, UnreachableError
from itune_ray.train.checkpoint import Checkpoints
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally


class StoppedRun(BaseException):
    """Stands for a kill."""


def job_of(folder, steps=6, **overrides):
    settings = {"steps": steps, "batch": 8, "packing": True, "checkpoint": {"every_steps": 2, "keep": 3}}
    return tiny.job(folder, **{**settings, **overrides})


def figures(stage):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(str(stage))]


def saved(stage):
    return sorted(int(f.parent.name.rpartition("-")[2]) for f in stage.glob("checkpoint/step-*/complete.json"))


def stop_at_step(step):
    def on_place(at, place):
        if at == step:
            raise StoppedRun

    return on_place


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    stage = tmp_path_factory.mktemp("whole")
    train_local(job_of(folder), tiny.chats(40), str(stage))
    return stage


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "__0_0.distcp"),
    "a file cut short": lambda folder: (folder / "__0_0.distcp").write_bytes(
        (folder / "__0_0.distcp").read_bytes()[:9]
    ),
    "a lost file": lambda folder: (folder / ".metadata").unlink(),
    "a marker of noise": lambda folder: (folder / "complete.json").write_bytes(b"\x00{"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(folder, whole, tmp_path, caplog, kind):
    job = job_of(folder)
    prepared = prepare_locally(job, tiny.chats(40), str(tmp_path))
    with pytest.raises(StoppedRun):
        train_rank(job, prepared, str(tmp_path), on_place=stop_at_step(6))
    assert saved(tmp_path) == [2, 4]
    DAMAGE[kind](tmp_path / "checkpoint" / "step-000004")
    train_rank(job, prepared, str(tmp_path))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "step 4 is damaged" in warning
    assert figures(tmp_path) == figures(whole)
    assert saved(tmp_path) == [2, 4, 6]  # step 4 was written anew


def test_without_a_whole_checkpoint_it_starts_again(folder, whole, tmp_path):
    job = job_of(folder)
    train_local(job, tiny.chats(40), str(tmp_path))
    for step in saved(tmp_path):
        flip(tmp_path / "checkpoint" / f"step-{step:06d}" / ".metadata")
    train_local(job, tiny.chats(40), str(tmp_path))
    assert figures(tmp_path) == figures(whole)


def unreadable(monkeypatch, name):
    """Reading files of this name fails, as on a network disk that is away."""

    class Disk(pafs.LocalFileSystem):
        def open_input_stream(self, path, **settings):
            if path.endswith(name):
                raise OSError(errno.ETIMEDOUT, "Connection timed out")
            return super().open_input_stream(path, **settings)

    monkeypatch.setattr(pafs, "LocalFileSystem", Disk)
    monkeypatch.setattr(storage, "PAUSES_S", (0.0,))


@pytest.mark.parametrize("what", ["checkpoint/step-000004/complete.json", "__0_0.distcp", ".metadata"])
def test_a_checkpoint_that_cannot_be_read_now_is_kept_and_not_passed_over(folder, whole, tmp_path, monkeypatch, what):
    job = job_of(folder)
    prepared = prepare_locally(job, tiny.chats(40), str(tmp_path))
    with pytest.raises(StoppedRun):
        train_rank(job, prepared, str(tmp_path), on_place=stop_at_step(6))
    with monkeypatch.context() as patched:
        unreadable(patched, what)
        with pytest.raises(UnreachableError, match="timed out"):
            train_rank(job, prepared, str(tmp_path))
    assert saved(tmp_path) == [2, 4]
    train_rank(job, prepared, str(tmp_path))
    assert figures(tmp_path) == figures(whole)


def test_the_newest_are_kept(folder, tmp_path):
    train_local(job_of(folder, checkpoint={"every_steps": 1, "keep": 2}), tiny.chats(40), str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-000005", "step-000006"]


def test_every_file_has_its_checksum(whole):
    folder = whole / "checkpoint" / "step-000006"
    listed = json.loads((folder / "complete.json").read_text())["files"]
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != "complete.json"}
    assert {name: size for name, (size, _) in listed.items()} == sizes


def test_a_run_that_left_out_steps_is_no_success(folder, tmp_path, monkeypatch):
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *rest: step == 6 or save(self, step, *rest))
    with pytest.raises(TrainError, match=r"another number of steps than planned.*4.*6"):
        train_local(job_of(folder), tiny.chats(40), str(tmp_path))


def slow(monkeypatch, seconds):
    write = FileSystemWriter.write_data

    def write_late(self, plan, planner):
        time.sleep(seconds)
        return write(self, plan, planner)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_late)


def test_training_goes_on_while_a_checkpoint_is_written(folder, whole, tmp_path, monkeypatch):
    """Nothing counts before it is complete, and what was saved is the state of its own step."""
    slow(monkeypatch, 1.0)
    seen = []

    def on_progress(step, total, row):
        seen.append((step, saved(tmp_path), row.get("checkpoint_seconds", 0.0)))

    job = job_of(folder, checkpoint={"every_steps": 3, "background": True})
    train_local(job, tiny.chats(40), str(tmp_path), on_progress)
    assert [there for step, there, _ in seen if step == 4] == [[]]
    assert max(seconds for *_, seconds in seen) < 0.9
    assert figures(tmp_path) == figures(whole)
    assert saved(tmp_path) == [3, 6]


def test_killed_while_a_checkpoint_is_written_it_resumes_from_the_one_before(folder, whole, tmp_path, monkeypatch):
    job = job_of(folder, checkpoint={"every_steps": 2, "background": True})
    prepared = prepare_locally(job, tiny.chats(40), str(tmp_path))
    write = Checkpoints._write
    monkeypatch.setattr(Checkpoints, "_write", lambda self, step, *rest: step == 4 or write(self, step, *rest))
    with pytest.raises(StoppedRun):
        train_rank(job, prepared, str(tmp_path), on_place=stop_at_step(6))
    monkeypatch.undo()
    torn = tmp_path / "checkpoint" / "step-000004"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"torn")
    train_rank(job, prepared, str(tmp_path))
    assert figures(tmp_path) == figures(whole)
    assert saved(tmp_path) == [4, 6]


def test_an_error_in_the_background_ends_the_run(folder, tmp_path, monkeypatch):
    def broken(self, plan, planner):
        raise ValueError("no such codec")

    monkeypatch.setattr(FileSystemWriter, "write_data", broken)
    job = job_of(folder, checkpoint={"every_steps": 2, "background": True})
    with pytest.raises(CheckpointException, match="no such codec"):
        train_local(job, tiny.chats(40), str(tmp_path))
    assert saved(tmp_path) == []


def through_halves(runs):
    for job, stage in runs:
        prepared = prepare_locally(job, [], stage)
        train_rank(job, prepared, stage, stop_at=3)
        train_rank(job, prepared, stage)


@pytest.mark.real
def test_in_the_background_every_strategy_saves_what_it_saves_otherwise(folder, tmp_path):
    runs = {
        (strategy, background): job_of(
            folder, strategy=STRATEGIES[strategy], checkpoint={"every_steps": 2, "background": background}
        )
        for strategy in ("ddp", "fsdp2", "zero2", "zero3")
        for background in (False, True)
    }
    stages = {key: tmp_path / f"{key[0]}-{key[1]}" for key in runs}
    for key, job in runs.items():
        prepare_locally(job, tiny.chats(40), str(stages[key]))
    run_ranks(2, through_halves, [(job, str(stages[key])) for key, job in runs.items()])
    for strategy, _ in runs:
        assert figures(stages[strategy, True]) == figures(stages[strategy, False])
        assert len(figures(stages[strategy, True])) == 6
        torch.testing.assert_close(figures(stages[strategy, True]), figures(stages["ddp", False]), rtol=1e-5, atol=0)
