"""Stopping and starting again continues the same run: bit for bit on the same ranks, to rounding on others."""

import json
import shutil

import pytest
import tiny
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from stores import disk

from itune_ray.errors import ITuneError, StorageError, TrainError
from itune_ray.train import loop as loop_module
from itune_ray.train.loop import train_local, train_rank
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def stop_after(step):
    def on_progress(done, total, row):
        if done == step:
            raise Killed

    return on_progress


def job_of(folder, **overrides):
    return tiny.job(folder, **{"steps": 6, "batch": 8, "checkpoint": {"every_steps": 3}, "packing": True, **overrides})


def figures(stage):
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in read_metrics(str(stage))]


def weights(stage, payload="model/model.safetensors"):
    return load_file(stage / payload)


CASES = {
    "full ddp": {},
    "full fsdp2": {"strategy": {"type": "fsdp2"}},
    "muon": {"optimizer": {"type": "muon"}},
    "bf16 cosine": {"precision": "bf16", "schedule": {"type": "cosine"}},
    "lora with dropout": {"model.peft": {"type": "lora", "rank": 4, "dropout": 0.2}},
    "lora fsdp2, trained tokens": {
        "model.peft": {"type": "lora", "rank": 4, "train_tokens": ["<|im_start|>"]},
        "strategy": {"type": "fsdp2"},
    },
    "dpo, lora": {"objective": {"type": "dpo"}, "model.peft": {"type": "lora", "rank": 4}, "pack_length": 256},
    "kd fsdp2": {"objective": {"type": "kd", "k": 4}, "strategy": {"type": "fsdp2"}},
}
ROWS = {"dpo, lora": tiny.pairs, "kd fsdp2": tiny.distributions}
"""Case -> its rows, where they are no chats."""


@pytest.mark.parametrize("case", CASES)
def test_three_steps_and_three_more_are_six_bit_for_bit(folder, tmp_path, case):
    job, records = job_of(folder, **CASES[case]), ROWS.get(case, tiny.chats)(40)
    train_local(job, records, str(tmp_path / "whole"))
    with pytest.raises(Killed):
        train_local(job, records, str(tmp_path / "parts"), stop_after(5))  # two steps past the checkpoint are lost
    train_local(job, records, str(tmp_path / "parts"))
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_twice_in_a_row(folder, tmp_path):
    job, records = job_of(folder, checkpoint={"every_steps": 2}), tiny.chats(40)
    train_local(job, records, str(tmp_path / "whole"))
    for step in (3, 5):
        with pytest.raises(Killed):
            train_local(job, records, str(tmp_path / "parts"), stop_after(step))
    train_local(job, records, str(tmp_path / "parts"))
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def finish(job, stage):
    train_rank(job, prepare_locally(job, [], stage), stage)


@pytest.mark.real
@pytest.mark.parametrize(("first", "then"), [("fsdp2", "fsdp2"), ("ddp", "fsdp2"), ("fsdp2", "ddp")])
def test_another_number_of_ranks_and_another_strategy_continue_the_run(folder, tmp_path, first, then):
    job, records = job_of(folder, strategy={"type": first}), tiny.chats(40)
    train_local(job, records, str(tmp_path / "whole"))
    with pytest.raises(Killed):
        train_local(job, records, str(tmp_path / "parts"), stop_after(4))
    run_ranks(2, finish, job_of(folder, strategy={"type": then}), str(tmp_path / "parts"))
    torch.testing.assert_close(figures(tmp_path / "parts"), figures(tmp_path / "whole"), rtol=1e-6, atol=1e-7)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5


def test_a_half_written_checkpoint_is_not_read_and_goes_away(folder, tmp_path):
    job, records = job_of(folder), tiny.chats(40)
    with pytest.raises(Killed):
        train_local(job, records, str(tmp_path), stop_after(4))
    torn = tmp_path / "checkpoint" / "step-000005"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"torn")
    train_local(job, records, str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["step-000003", "step-000006"]
    assert json.loads((tmp_path / "checkpoint" / "step-000006" / "complete.json").read_text())["step"] == 6


def test_a_finished_run_trains_nothing_again(folder, tmp_path, monkeypatch):
    job, records = job_of(folder), tiny.chats(40)
    first = train_local(job, records, str(tmp_path))
    monkeypatch.setattr(loop_module.Loop, "_step", lambda *_: pytest.fail("stepped again"))
    assert train_local(job, records, str(tmp_path)).metrics == first.metrics


def test_a_checkpoint_of_another_shape_is_one_clear_line(folder, tmp_path):
    records = tiny.chats(40)
    train_local(job_of(folder, steps=3, **{"model.peft": {"type": "lora", "rank": 4}}), records, str(tmp_path))
    with pytest.raises(TrainError, match="checkpoint cannot be resumed"):
        train_local(job_of(folder, **{"model.peft": {"type": "lora", "rank": 8}}), records, str(tmp_path))


@pytest.mark.parametrize("peft", [{"type": "full"}, {"type": "lora", "rank": 4}])
def test_a_checkpoint_of_another_model_of_the_same_shape_is_one_clear_line(folder, tmp_path, peft):
    records, stage = tiny.chats(40), str(tmp_path / "stage")
    train_local(job_of(folder, steps=3, **{"model.peft": peft}), records, stage)
    other = tiny.llama(tmp_path / "other", seed=7)
    with pytest.raises(TrainError, match=r"began with another model.*`model\.path`"):
        train_local(job_of(other, **{"model.peft": peft}), records, stage)


def leave_at_load(job, stage):
    """Rank 1 goes when the checkpoint is read; what rank 0 then sees."""
    if torch.distributed.get_rank() == 1:

        def go(*_):
            torch.distributed.destroy_process_group()
            raise Killed

        loop_module.Checkpoints.load = go
    try:
        train_rank(job, prepare_locally(job, [], stage), stage)
    except (Exception, Killed) as error:  # noqa: BLE001  whatever it is, its kind is what is asked for
        return type(error)


@pytest.mark.real
def test_a_rank_lost_while_a_checkpoint_is_read_is_no_fault_of_the_checkpoint(folder, tmp_path):
    """An error of the project's own would end the run for good, instead of another attempt."""
    job = job_of(folder, strategy={"type": "fsdp2"})
    with pytest.raises(Killed):
        train_local(job, tiny.chats(40), str(tmp_path), stop_after(4))
    kinds = run_ranks(2, leave_at_load, job, str(tmp_path))
    assert kinds[1] is Killed
    assert not issubclass(kinds[0], ITuneError)


def test_storage_that_is_no_local_disk(folder, tmp_path, monkeypatch):
    """The same run through the code path of object stores."""
    from itune_ray.data.storage import Folder

    job, records = job_of(folder), tiny.chats(40)
    train_local(job, records, str(tmp_path / "local"))
    monkeypatch.setattr(Folder, "is_local", property(lambda self: False))
    with pytest.raises(Killed):
        train_local(job, records, str(tmp_path / "remote"), stop_after(5))
    train_local(job, records, str(tmp_path / "remote"))
    assert figures(tmp_path / "remote") == figures(tmp_path / "local")
    one, other = weights(tmp_path / "local"), weights(tmp_path / "remote")
    assert all(torch.equal(one[name], other[name]) for name in one)


def leave_after(job, stage, rank, steps):
    """Rank `rank` hears that its machine goes once so many steps are done; the run pauses after four."""
    asked = []

    def leaving():
        asked.append(None)
        return torch.distributed.get_rank() == rank and len(asked) >= steps

    train_rank(job, prepare_locally(job, [], stage), stage, leaving=leaving, stop_at=4)
    return len(asked)


def test_the_first_notice_to_any_rank_makes_all_save_once(folder, tmp_path):
    job = job_of(folder, checkpoint={"every_steps": 100, "keep": 10}, strategy={"type": "fsdp2"})
    prepare_locally(job, tiny.chats(40), str(tmp_path))
    assert run_ranks(2, leave_after, job, str(tmp_path), 1, 2) == [4, 4]
    saved = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert [int(name.rpartition("-")[2]) for name in saved] == [2, 4]


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_from_what_was_saved(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("itune_ray.train.checkpoint.PAUSES_S", (0.01,))
    job, records = job_of(folder, checkpoint={"every_steps": 2}), tiny.chats(40)
    train_local(job, records, str(tmp_path / "whole"))
    whole = sum(file.stat().st_size for file in (tmp_path / "whole" / "checkpoint" / "step-000006").iterdir())
    with disk(tmp_path / "disk", kilobytes=whole // 1024 + 400) as small:
        with pytest.raises(StorageError, match=r"checkpoint of step 4 cannot be written: .*(No space left|disk full)"):
            train_local(job, records, str(small / "run"))
        shutil.copytree(small / "run", tmp_path / "larger")
    train_local(job, records, str(tmp_path / "larger"))
    assert figures(tmp_path / "larger") == figures(tmp_path / "whole")
