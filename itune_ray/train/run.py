"""[Ray] Training on a cluster: Ray Data tokenises, Ray Train runs the one loop on every worker.

Tokenising and packing finish before the trainer starts, so that a slow read never sits inside a process group. Workers
share nothing with the driver but the stage directory and a small actor that carries progress one way and an error
message back: whatever kills a worker or the driver, the stage directory says how far the run is.
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from itune_ray.config.train import TrainJob
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.records import Record, records_table
from itune_ray.data.storage import Folder
from itune_ray.errors import ITuneError, TrainError
from itune_ray.model.peft import MatrixCost, ParameterReport
from itune_ray.train.loop import OnProgress, Row, TrainOutcome, train_rank
from itune_ray.train.prepare import (
    TOKENISED_SCHEMA,
    PreparedData,
    finished_preparation,
    renderer_for,
    tokenise,
    write_prepared,
)

OUTCOME = "outcome.json"
ROWS_PER_BLOCK = 2048
POLL_S = 0.5


def prepare(job: TrainJob, records: Iterable[Record] | ray.data.Dataset, stage_dir: str) -> PreparedData:
    """Tokenise on the cluster and write the training order of a stage; finished work is found again.

    Args:
        records: Rows, or a dataset with the columns of `RECORD_SCHEMA`.
        stage_dir: Absolute path or URI that every node can reach.

    Raises:
        TrainError: No row is left to train on.
    """
    renderer = renderer_for(job.model.model_dump_json())
    done = finished_preparation(job, renderer, stage_dir)
    if done is not None:
        return done
    rows = records if isinstance(records, ray.data.Dataset) else _dataset(records)
    return write_prepared(_tokenise_on_cluster(rows, job), job, renderer, stage_dir)


def _dataset(records: Iterable[Record]) -> ray.data.Dataset:
    blocks = [records_table(chunk) for chunk in _chunks(records, ROWS_PER_BLOCK)]
    return ray.data.from_arrow(blocks or [records_table([])])


def _chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _tokenise_on_cluster(rows: ray.data.Dataset, job: TrainJob) -> pa.Table:
    def tokenise_block(table: pa.Table) -> pa.Table:
        renderer: ChatRenderer = renderer_for(job.model.model_dump_json())
        return tokenise((Record.from_row(row) for row in table.to_pylist()), job, renderer)

    tokenised = rows.map_batches(tokenise_block, batch_format="pyarrow", batch_size=ROWS_PER_BLOCK)
    tables = [table for table in ray.get(tokenised.to_arrow_refs()) if table.num_rows]
    return pa.concat_tables([t.cast(TOKENISED_SCHEMA) for t in tables] or [TOKENISED_SCHEMA.empty_table()])


def fit(
    job: TrainJob, prepared: PreparedData, stage_dir: str, on_progress: OnProgress | None = None
) -> TrainOutcome:
    """Train under Ray Train to the end, through worker failures, and export; continues where an earlier call stopped.

    Raises:
        ITuneError: What a worker raised on purpose, unchanged.
        TrainError: The workers failed more often than `workers.max_failures` allows.
    """
    stage = Folder.at(stage_dir)
    if stage.exists(OUTCOME):
        return read_outcome(stage_dir)
    board: Any = ray.remote(_Board).options(num_cpus=0).remote()
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"job": job.model_dump_json(), "prepared": prepared, "stage_dir": stage.uri, "board": board},
        scaling_config=_scaling(job),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if job.workers.gpus_each else "gloo", timeout_s=job.workers.collective_timeout_s
        ),
        run_config=ray.train.RunConfig(
            name="ray-train", storage_path=stage.uri,
            failure_config=ray.train.FailureConfig(max_failures=job.workers.max_failures),
        ),
    )
    # Workers are polled every 2 s by default, which is longer than a small run's last steps.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    try:
        with _relayed(board, on_progress):
            _fit(trainer)
        error = ray.get(board.failure.remote())
        if error is not None:
            raise error
    finally:
        ray.kill(board)
    (stage / "ray-train").delete()
    return read_outcome(stage_dir)


def _fit(trainer: ray.train.torch.TorchTrainer) -> None:
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as failed:
        rank, cause = min(failed.worker_failures.items())
        reason = str(cause).strip().splitlines()[-1]
        raise TrainError(
            f"training failed too often; last on rank {rank}: {reason}", knob="workers.max_failures"
        ) from failed


def _scaling(job: TrainJob) -> ray.train.ScalingConfig:
    each = {"CPU": job.workers.cpus_each, **job.workers.resources_each}
    if job.workers.gpus_each:
        each["GPU"] = job.workers.gpus_each
    return ray.train.ScalingConfig(
        num_workers=job.workers.num, use_gpu=job.workers.gpus_each > 0, resources_per_worker=each
    )


class _Board:
    """The one thing workers tell the driver directly: progress rows, and an error that no retry mends."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, Row]] = []
        self._failure: ITuneError | None = None

    def put(self, step: int, total: int, row: Row) -> None:
        self._rows.append((step, total, row))

    def drain(self) -> list[tuple[int, int, Row]]:
        rows, self._rows = self._rows, []
        return rows

    def fail(self, error: ITuneError) -> None:
        self._failure = self._failure or error

    def failure(self) -> ITuneError | None:
        return self._failure


@contextlib.contextmanager
def _relayed(board: Any, on_progress: OnProgress | None) -> Iterator[None]:
    """Call back on the driver while `fit` blocks."""
    stop = threading.Event()

    def relay() -> None:
        while on_progress is not None:
            finished = stop.wait(POLL_S)
            for step, total, row in ray.get(board.drain.remote()):
                on_progress(step, total, row)
            if finished:
                return

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)


def _worker(config: dict[str, Any]) -> None:
    """One Ray Train worker. An error that is the user's to mend goes to the board and ends the run without retries;
    leaving the process group wakes the ranks that wait for this one."""
    job = TrainJob.model_validate_json(config["job"])
    board = config["board"]
    if ray.get(board.failure.remote()) is not None:
        return
    if not job.workers.gpus_each:
        torch.set_num_threads(job.workers.torch_threads or 1)
    try:
        outcome = train_rank(
            job, config["prepared"], config["stage_dir"],
            on_progress=lambda step, total, row: board.put.remote(step, total, row),
        )
    except ITuneError as error:
        ray.get(board.fail.remote(error))
        dist.destroy_process_group()
        return
    if ray.train.get_context().get_world_rank() == 0:
        Folder.at(config["stage_dir"]).write_json(OUTCOME, dataclasses.asdict(outcome))


def read_outcome(stage_dir: str) -> TrainOutcome:
    """What a finished training wrote down."""
    tree = Folder.at(stage_dir).read_json(OUTCOME)
    report = tree["parameters"]
    matrices = tuple(MatrixCost(**matrix) for matrix in report["matrices"])
    return TrainOutcome(**{**tree, "parameters": ParameterReport(report["total"], report["trainable"], matrices)})
