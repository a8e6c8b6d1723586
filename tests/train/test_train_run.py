"""Real Ray: tokenising on Ray Data, training under Ray Train, failures of workers."""

import itertools
import os
import signal
from types import SimpleNamespace

import psutil
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from itune_ray.config.strategies import TrainWorkers
from itune_ray.data.order import PackedTable
from itune_ray.errors import ClusterError, TrainError
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import prepare_locally


@pytest.fixture(scope="module")
def local_ray():
    import ray

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def losses(stage):
    return [(row["step"], row["loss"]) for row in read_metrics(str(stage))]


def two_workers(folder, **overrides):
    settings = {
        "steps": 6,
        "batch": 8,
        "packing": True,
        "strategy": {"type": "fsdp2"},
        "workers": {"num": 2},
        "checkpoint": {"every_steps": 2},
        "model.peft": {"type": "lora", "rank": 4},
    }
    return tiny.job(folder, **{**settings, **overrides})


@pytest.mark.real
def test_a_cluster_tokenises_into_the_same_order(local_ray, folder, tmp_path, monkeypatch):
    from itune_ray.train import run

    monkeypatch.setattr(run, "IN_PROCESS_ROWS", 10)
    monkeypatch.setattr(run, "ROWS_PER_BLOCK", 16)
    records = [*tiny.chats(40), tiny.chat("apple?", "", position=40)]
    here = prepare_locally(two_workers(folder), records, str(tmp_path / "here"))
    there = run.prepare(two_workers(folder), records, str(tmp_path / "there"))
    assert there.plan == here.plan
    assert (there.accepted, there.rejected) == (40, {"no_answer": 1})
    for step in range(here.plan.steps):
        a, b = ([row.keys for row in PackedTable(p.folder).rows(step)] for p in (here, there))
        assert sorted(k for row in a for k in row) == sorted(k for row in b for k in row)


def signal_a_worker(number):
    """Only below this process: other Rays may run on the machine."""
    workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    os.kill(workers[0].pid, number)


@pytest.mark.parametrize(
    "kill_at",
    [
        pytest.param(None, marks=pytest.mark.real),
        pytest.param(3, marks=pytest.mark.soak),
    ],
)
def test_two_workers_train_what_one_process_trains(local_ray, folder, tmp_path, kill_at):
    from itune_ray.train.run import prepare
    from itune_ray.train.workers import fit

    records, stage, steps = tiny.chats(40), str(tmp_path / "two"), 150 if kill_at else 20
    seen = []

    def on_progress(step, total, row):
        seen.append(step)
        if len(seen) == kill_at:
            signal_a_worker(signal.SIGKILL)

    job = two_workers(folder, steps=steps, checkpoint={"every_steps": 70 if kill_at else 5})
    train_local(job, records, str(tmp_path / "one"))
    prepared, environment = prepare(job, records, stage), dict(os.environ)
    interrupted = signal.getsignal(signal.SIGINT)
    outcome = fit(job, prepared, stage, on_progress)
    assert dict(os.environ) == environment, "Ray Train's settings would be its user's for what this process starts"
    assert signal.getsignal(signal.SIGINT) == interrupted
    assert outcome.steps == steps
    assert [step for step, _ in losses(stage)] == list(range(1, steps + 1))
    assert (len(seen) > steps) == bool(kill_at)  # steps since the last checkpoint were taken twice
    torch.testing.assert_close(losses(stage), losses(tmp_path / "one"), rtol=1e-4, atol=0)
    assert AutoModelForCausalLM.from_pretrained(outcome.model_path).config.model_type == "llama"
    assert outcome.parameters.trainable == sum(m.trainable for m in outcome.parameters.matrices)
    assert fit(job, prepare(job, [], stage), stage) == outcome  # finished: nothing starts again


@pytest.mark.soak
def test_an_error_of_the_users_is_raised_once_and_not_retried(local_ray, folder, tmp_path):
    from itune_ray.train.run import prepare
    from itune_ray.train.workers import fit

    diverging = {"optimizer": {"type": "adamw", "lr": 1e30}, "clip_norm": None, "model.peft": {"type": "full"}}
    job = two_workers(folder, **diverging)
    stage = str(tmp_path)
    with pytest.raises(TrainError, match=r"not finite at step 2.*optimizer\.lr"):
        fit(job, prepare(job, tiny.chats(40), stage), stage)


DIES_WHILE_IT_STARTS = """
import os, pathlib, signal, sys, threading, time

def wait_for_torch():
    while not hasattr(sys.modules.get("torch.distributed"), "init_process_group"):
        time.sleep(0.001)
    joined = sys.modules["torch.distributed"].init_process_group

    def join(*args, **settings):  # when Ray Train holds the workers' places
        try:
            (pathlib.Path(__file__).parent / "died").touch(exist_ok=False)
        except FileExistsError:
            return joined(*args, **settings)
        os.kill(os.getpid(), signal.SIGKILL)

    sys.modules["torch.distributed"].init_process_group = join

threading.Thread(target=wait_for_torch, daemon=True).start()
"""


@pytest.mark.soak
def test_workers_of_which_one_dies_while_they_start_are_started_anew(local_ray, folder, tmp_path):
    from itune_ray.train.run import prepare
    from itune_ray.train.workers import fit

    (tmp_path / "sitecustomize.py").write_text(DIES_WHILE_IT_STARTS)
    workers = {"num": 2, "max_failures": 1, "cpus_each": 4, "env": {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}}
    job, stage = two_workers(folder, steps=3, workers=workers), str(tmp_path / "stage")
    assert fit(job, prepare(job, tiny.chats(40), stage), stage).steps == 3
    assert (tmp_path / "died").exists()


@pytest.mark.soak
@pytest.mark.parametrize("num", [2, (2, 3)])
def test_workers_for_which_there_is_no_room_again_end_with_what_is_missing(
    local_ray, folder, tmp_path, monkeypatch, num
):
    from itune_ray.train.run import prepare
    from itune_ray.train.workers import fit

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    job, said = two_workers(folder, workers={"num": num, "cpus_each": 5, "start_timeout_s": 12}), []
    prepared = prepare(job, tiny.chats(40), str(tmp_path))
    with pytest.raises(ClusterError, match=r"2 training workers were not placed.*10 CPU.*free: 8 CPU.*start_timeout_s"):
        fit(job, prepared, str(tmp_path), say=said.append)
    assert said == ["waiting for room: 2 training workers ask for 10 CPU"]


@pytest.mark.soak
def test_elastic_workers_take_what_others_leave_them_and_more_when_there_is_more(local_ray, folder, tmp_path):
    from itune_ray.train.run import prepare
    from itune_ray.train.workers import fit

    holder = local_ray.util.placement_group([{"CPU": 3}])
    assert holder.wait(30)

    def on_progress(step, total, row):
        if step == 5:
            local_ray.util.remove_placement_group(holder)

    elastic = {"num": (1, 3), "cpus_each": 2, "resize_every_s": 1}
    job = two_workers(folder, steps=4000, workers=elastic, checkpoint={"every_steps": 5})
    fit(job, prepare(job, tiny.chats(40), str(tmp_path)), str(tmp_path), on_progress, stop_at=300)
    ranks = [row["ranks"] for row in read_metrics(str(tmp_path))]
    assert [count for count, _ in itertools.groupby(ranks)] == [2, 3]


def test_failures_are_counted_over_all_controllers(monkeypatch, tmp_path):
    """Three are allowed: two under the first controller, and two starts of workers that died meanwhile."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

    from itune_ray.train import workers as module
    from itune_ray.train.controller import StartError

    causes = [WorkerGroupStartupTimeoutError(2), *[WorkerGroupStartupFailedError("died")] * 2]
    ends, allowed = iter(zip(causes, (2, 0, 0), strict=True)), []

    def controlled(workers, max_failures, config):
        allowed.append(max_failures)
        raise StartError(*next(ends))

    monkeypatch.setattr(module, "_controlled", controlled)
    monkeypatch.setattr(module.room, "await_room", lambda *_: None)
    monkeypatch.setattr(module.ray, "get", lambda value: value)
    board = SimpleNamespace(begun=SimpleNamespace(remote=lambda: len(allowed)))
    config = {"board": board, "out": str(tmp_path)}
    with pytest.raises(TrainError, match=r"failed too often; last to start: died"):
        module._fit(TrainWorkers(num=2, max_failures=3), config, lambda line: None)
    assert allowed == [3, 1, 0]


@pytest.mark.soak
def test_workers_that_cannot_start_are_one_line(local_ray, folder, tmp_path):
    from itune_ray.train.run import prepare
    from itune_ray.train.workers import fit

    workers = {"num": 2, "max_failures": 0, "env": {"GLOO_SOCKET_IFNAME": "no-such-interface"}}
    job, stage = two_workers(folder, workers=workers), str(tmp_path)
    with pytest.raises(TrainError, match=r"failed too often; last to start: .*interface.*workers\.max_failures"):
        fit(job, prepare(job, tiny.chats(40), stage), stage)


def test_ranks_behind_the_others_are_told_first():
    from itune_ray.train.board import RANKS_TOLD, Board

    board = Board()
    for rank in range(7):
        board.at(rank, "node-a", 12, "computes")
    board.at(5, "node-b", 12, "prepares")
    first, *_, last = board.ranks()
    assert first.startswith("rank 5 on node-b prepares step 12 for ")
    assert last == f"{7 - RANKS_TOLD} ranks more"


@pytest.mark.real
@pytest.mark.soak
def test_a_rank_that_hangs_ends_in_one_line_that_names_ranks(local_ray, folder, tmp_path):
    from itune_ray.train.run import prepare
    from itune_ray.train.workers import fit

    stopped = []

    def on_progress(step, total, row):
        if not stopped:
            stopped.append(step)
            signal_a_worker(signal.SIGSTOP)

    workers = {"num": 2, "max_failures": 0, "collective_timeout_s": 5}
    job = two_workers(folder, steps=400, workers=workers, log_every=1)
    prepared = prepare(job, tiny.chats(40), str(tmp_path))
    with pytest.raises(TrainError, match=r"training failed too often; last on rank \d: .*rank \d on .* step \d+ for"):
        fit(job, prepared, str(tmp_path), on_progress)
    assert stopped
