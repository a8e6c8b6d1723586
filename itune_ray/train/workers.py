"""[Ray] Ray Train runs the one loop on every worker of a stage, through failures and changes of their number.

Workers share nothing with the driver but the stage directory and a small actor (`train.board`): whatever kills a worker
or the driver, the stage directory says how far the run is. Torch is imported inside functions: Ray Train's controller
unpickles what is defined here, and would otherwise spend ten seconds on imports that only workers need.
"""

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import ray

from itune_ray import room
from itune_ray.config.strategies import TrainWorkers
from itune_ray.config.train import TrainJob
from itune_ray.data.storage import Folder
from itune_ray.errors import ClusterError, ITuneError, TrainError, UnreachableError
from itune_ray.imports import uncollected
from itune_ray.observe.watch import explained_by
from itune_ray.train.board import Board, OnProgress, ranks_of, relayed

if TYPE_CHECKING:
    import ray.train

    from itune_ray.train.outcome import TrainOutcome
    from itune_ray.train.prepare import PreparedData

_RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # 2 s by default, longer than a small run's last steps
    # Ray counts a node up to 20 s after it went: workers that find no room are to be asked for anew, and may be fewer.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a job file mean the job's working directory
}
Say = Callable[[str], None]


def fit(
    job: TrainJob,
    prepared: "PreparedData",
    stage_dir: str,
    on_progress: OnProgress | None = None,
    *,
    stop_at: int | None = None,
    say: Say = lambda line: None,
) -> "TrainOutcome":
    """Train under Ray Train to the end, through worker failures, and export; continues where an earlier call stopped.

    Args:
        say: Told when workers wait for room.
        stop_at: Pause once so many steps are done (`itune_ray.train.loop.train_rank`); a pause that was reached
            before is found again.

    Raises:
        ITuneError: What a worker raised on purpose, unchanged.
        TrainError: The workers failed more often than `workers.max_failures` allows.
        ClusterError: There was no room for them again within `workers.start_timeout_s`.
    """
    from itune_ray.train.outcome import pause_folder, read_outcome, references_beside

    stage = Folder.at(stage_dir)
    out = stage_dir if stop_at is None else pause_folder(stage_dir, stop_at)
    if (finished := read_outcome(out)) is not None:
        return finished
    board: Any = ray.remote(Board).options(num_cpus=0, scheduling_strategy=room.beside_driver()).remote()
    config = {
        "job": job.model_dump_json(),
        "prepared": prepared,
        "stage_dir": stage.uri,
        "stop_at": stop_at,
        "out": out,
        "references": references_beside(stage_dir),
        "board": board,
    }
    try:
        with _settings(), relayed(board, on_progress), explained_by(lambda: ranks_of(board)):
            _fit(job.workers, config, say)
        error: Any = ray.get(board.failure.remote())
        if error is not None:
            raise error
    finally:
        ray.kill(board)
    (stage / "ray-train").delete()
    outcome = read_outcome(out)
    if outcome is None:
        raise TrainError("the workers ended without an outcome", got=out)
    return outcome


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """The environment variables that Ray Train reads, except those that the user set; gone afterwards, since whatever
    this process starts later would take them for its user's."""
    ours = {name: value for name, value in _RAY_TRAIN_SETTINGS.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _fit(workers: TrainWorkers, config: dict[str, Any], say: Say) -> None:
    """Under one controller after another, each until a start of its workers fails: one controller would try again for
    ever, and say nothing."""
    from itune_ray.train.controller import StartError
    from itune_ray.train.outcome import read_outcome

    board, failures, begun, since = config["board"], 0, 0, time.monotonic()
    while True:
        try:
            return _controlled(workers, workers.max_failures - failures, config)
        except StartError as failed:
            ended, cause = failed, _last_line(failed.cause)
        if read_outcome(config["out"]) is not None:
            return None
        failures += ended.failures
        begun_now: Any = ray.get(board.begun.remote())
        if begun_now > begun:
            begun, since = begun_now, time.monotonic()
        if not ended.without_room:
            failures += 1
            if failures > workers.max_failures:
                raise TrainError(f"the training workers failed too often; last to start: {cause}", knob=_FAILURES)
        what, knob = f"{workers.fewest} training workers", "workers.start_timeout_s"
        left = workers.start_timeout_s - (time.monotonic() - since)
        if left <= 0:
            raise ClusterError(f"{what} did not start within {workers.start_timeout_s:g} s: {cause}", knob=knob)
        room.await_room([workers.each] * workers.fewest, left, what, knob, say)


_FAILURES = "workers.max_failures"


def _controlled(workers: TrainWorkers, max_failures: int, config: dict[str, Any]) -> None:
    """Train to the end under one controller; raises `StartError` where its workers could not start."""
    import ray.train

    board, trainer = config["board"], _trainer(workers, max_failures, config)
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as failed:
        told_first: Any = ray.get(board.failure.remote())  # what one rank raised on purpose, and the others fell over
        if told_first is not None:
            raise told_first from failed
        rank, cause = min(failed.worker_failures.items())
        reason = _last_line(cause)
        places = "; ".join(ranks_of(board))
        told = f" ({places})" if places and _TIMED_OUT.search(reason) else ""
        raise TrainError(
            f"training failed too often; last on rank {rank}: {reason}{told}",
            knob="workers.collective_timeout_s" if told else _FAILURES,
        ) from failed


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _trainer(workers: TrainWorkers, max_failures: int, config: dict[str, Any]) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from itune_ray.train.controller import run_controller

    class Trainer(TorchTrainer):
        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            return run_controller(arguments)

    return Trainer(
        _worker,
        train_loop_config=config,
        scaling_config=_scaling(workers),
        torch_config=TorchConfig(backend=_backend(workers), timeout_s=workers.collective_timeout_s),
        run_config=ray.train.RunConfig(
            name="ray-train",
            storage_path=config["stage_dir"],
            failure_config=ray.train.FailureConfig(max_failures=max_failures, controller_failure_limit=0),
            worker_runtime_env={"env_vars": workers.env} if workers.env else None,
        ),
    )


_TIMED_OUT = re.compile(r"tim(ed|e) ?out|Connection closed by peer|Connection reset", re.IGNORECASE)
"""What gloo and NCCL say when another rank did not come, or gave up first."""


def _backend(workers: TrainWorkers) -> str:
    if workers.backend == "auto":
        return "nccl" if workers.gpus_each else "gloo"
    return workers.backend


def _scaling(workers: TrainWorkers) -> "ray.train.ScalingConfig":
    """Fixed, or between two numbers: Ray Train then starts anew with as many as there is room for, after a loss at
    once and for more room every `resize_every_s`, and each start continues from the last checkpoint."""
    import ray.train

    return ray.train.ScalingConfig(
        num_workers=workers.most if workers.fewest == workers.most else (workers.fewest, workers.most),
        use_gpu=workers.gpus_each > 0,
        resources_per_worker=workers.each,
        elastic_resize_monitor_interval_s=workers.resize_every_s,
    )


def _worker(config: dict[str, Any]) -> None:
    """One Ray Train worker. An error that is the user's to mend goes to the board and ends the run without retries;
    leaving the process group wakes the ranks that wait for this one."""
    with uncollected():
        import ray.train
        import torch
        import torch.distributed as dist

        from itune_ray.train.loop import train_rank
        from itune_ray.train.outcome import read_outcome, write_outcome

    job = TrainJob.model_validate_json(config["job"])
    board = config["board"]
    if ray.get(board.failure.remote()) is not None or read_outcome(config["out"]) is not None:
        return
    if not job.workers.gpus_each:
        torch.set_num_threads(job.workers.torch_threads or 1)
    rank, host = ray.train.get_context().get_world_rank(), socket.gethostname()
    if rank == 0:
        board.begin.remote()
    try:
        outcome = train_rank(
            job,
            config["prepared"],
            config["stage_dir"],
            on_progress=lambda step, total, row: board.put.remote(step, total, row),
            on_place=lambda step, place: board.at.remote(rank, host, step, place),
            leaving=_noticed,
            stop_at=config["stop_at"],
            references=config["references"],
        )
    except UnreachableError:
        raise  # another attempt may find the storage well again
    except ITuneError as error:
        ray.get(board.fail.remote(error))
        dist.destroy_process_group()
        return
    if rank == 0:
        write_outcome(outcome, config["out"])


def _noticed() -> bool:
    """Whether Ray is draining a node of this worker group: what `ray.train.get_preemption_info` says, without its
    barrier over all workers, which would cost every step a round of messages; the loop's own sum agrees instead."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
