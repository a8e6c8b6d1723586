"""[Ray] Training on a cluster: Ray Data tokenises, Ray Train runs the one loop on every worker.

Tokenising and packing finish before the trainer starts, so that a slow read never sits inside a process group. Workers
share nothing with the driver but the stage directory and a small actor that carries progress one way and an error
message back: whatever kills a worker or the driver, the stage directory says how far the run is.

Torch and transformers are imported inside functions: Ray Train's controller and the progress actor unpickle what is
defined here, and would otherwise spend ten seconds on imports that only workers need.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from itune_ray import cluster, room
from itune_ray.config.train import TrainJob, TrainWorkers
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.hub import local_model_folder, resolve
from itune_ray.data.ledger import Funnel, Outcome
from itune_ray.data.records import Record, records_table
from itune_ray.data.storage import Folder
from itune_ray.engine.pool import EngineHost
from itune_ray.errors import ITuneError, TrainError
from itune_ray.observe import metrics
from itune_ray.observe.progress import Progress, Task
from itune_ray.observe.watch import explained_by
from itune_ray.train.rows import VALIDATION, read_held_out, read_rows, replay_counts, validation_job

if TYPE_CHECKING:
    import ray.data
    import ray.train

    from itune_ray.train.outcome import TrainOutcome
    from itune_ray.train.prepare import PreparedData

IN_PROCESS_ROWS = 50_000
"""Up to so many rows are tokenised by the driver (7,000 short chats a second); a cluster task first spends ten seconds
on importing a tokenizer."""
ROWS_PER_BLOCK = 2048
POLL_S = 0.5
_RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # 2 s by default, longer than a small run's last steps
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # 60 s by default, too short for a busy machine's imports
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a job file mean the job's working directory
}
OnProgress = Callable[[int, int, dict[str, Any]], None]
"""See `itune_ray.train.loop.OnProgress`."""


def run(job: TrainJob, runs: RunStore, stage: str, engines: EngineHost, progress: Progress) -> Artifact:
    """Train on a mixture of rows; a finished artifact is returned without touching Ray.

    Writes order/ (the tokenised steps), rejected/ (`LEDGER_SCHEMA`), checkpoint/, metrics.jsonl, model/ and, after
    adapter training, adapter/. Asked again after a kill, it continues from the last checkpoint.

    Raises:
        TrainError: No row is left to train on, or the workers failed for good.
        ClusterError: The cluster cannot hold the workers.
    """
    artifact = runs.artifact(stage, "train", job, version(job))
    if artifact.complete:
        return artifact
    cluster.connect(job.run.ray, progress.say)
    _make_room(job, engines, progress.say)
    records, unread = read_rows(job)
    prepared = prepare(job, records, artifact.path(), unread)
    if job.validation is not None:
        held_out, unread = read_held_out(job.validation.data)
        prepare(validation_job(job), held_out, artifact.path(VALIDATION), unread)
    with progress.task(stage, prepared.plan.steps, unit="steps") as task:
        outcome = fit(job, prepared, artifact.path(), _shown(task, job.workers))
    report = outcome.parameters
    rows_in = prepared.accepted + sum(prepared.rejected.values())
    artifact.finish(
        funnel=Funnel(rows_in, prepared.accepted, prepared.rejected, {}).to_json(),
        rows=prepared.accepted,
        tokens=prepared.plan.tokens,
        steps=outcome.steps,
        epochs=prepared.plan.epochs,
        unused=prepared.plan.unused,
        parameters={
            "total": report.total,
            "trainable": report.trainable,
            "ratio": report.ratio,
            "matrices": [{**dataclasses.asdict(m), "ratio": m.ratio} for m in report.matrices],
        },
        last_step=outcome.metrics,
        **({} if job.replay is None else {"replayed": replay_counts(records)}),
    )
    return artifact


def version(job: TrainJob) -> dict[str, Any]:
    """The commits that Hub ids mean now; paths are identified by their content."""
    commits: dict[str, Any] = {}
    if _on_hub(job.model.path):
        commits["revision"] = local_model_folder(job.model.reference()).revision
    if _on_hub(job.model.adapter):
        assert job.model.adapter is not None
        commits["adapter_revision"] = resolve(job.model.adapter, kind="adapter").revision
    return commits


def _on_hub(path: str | None) -> bool:
    return path is not None and "://" not in path and not os.path.exists(path)


def _make_room(job: TrainJob, engines: EngineHost, say: Callable[[str], None]) -> None:
    """Refuse workers the cluster can never hold, let engines make way, and bring the nodes up for all workers at once:
    Ray Train itself would ask again and again, and never say what is missing."""
    workers = job.workers
    needed = {name: amount * workers.num for name, amount in workers.each.items()}
    what, knob = f"{workers.num} training workers", "workers.num, workers.cpus_each or workers.gpus_each"
    engines.make_room(needed, workers.each, workers.num, what, knob, say)
    room.await_room([workers.each] * workers.num, workers.start_timeout_s, what, "workers.start_timeout_s", say)


GAUGES = {
    "loss": "itune_loss",
    "held_out_loss": "itune_held_out_loss",
    "grad_norm": "itune_grad_norm",
    "lr": "itune_learning_rate",
    "packing_efficiency": "itune_packing_efficiency",
    "checkpoint_seconds": "itune_checkpoint_seconds",
}
"""What the loop tells, as metrics."""


def _shown(task: Task, workers: TrainWorkers) -> OnProgress:
    seen = 0
    peak = workers.num * workers.peak_tflops * 1e12 if workers.peak_tflops else None

    def show(step: int, _: int, row: dict[str, Any]) -> None:
        nonlocal seen
        seen += int(row["tokens"])
        shown = {name: float(row[name]) for name in ("loss", "held_out_loss", "lr") if name in row}
        if peak is not None:
            shown["mfu"] = float(row["flops_per_s"]) / peak
            metrics.gauge("itune_mfu", shown["mfu"])
        task.update(step, seen, None, **shown)
        metrics.count("itune_tokens_total", int(row["tokens"]), kind="trained")
        for name in GAUGES.keys() & row.keys():
            metrics.gauge(GAUGES[name], float(row[name]))

    return show


def prepare(
    job: TrainJob, records: "Iterable[Record] | ray.data.Dataset", stage_dir: str, unread: Sequence[Outcome] = ()
) -> "PreparedData":
    """Tokenise, on the cluster where it is worth it, and write the order of a stage; finished work is found again.

    Args:
        records: Rows, or a dataset with the columns of `RECORD_SCHEMA`.
        stage_dir: Absolute path or URI that every node can reach.
        unread: Outcomes of rows that the sources could not read, to be counted with the rejected.

    Raises:
        TrainError: No row is left to train on.
    """
    import ray.data

    from itune_ray.train.prepare import finished_preparation, prepare_locally, renderer_for, write_prepared

    renderer = renderer_for(job.model.model_dump_json())
    done = finished_preparation(job, renderer, stage_dir)
    if done is not None:
        return done
    if not isinstance(records, ray.data.Dataset):
        rows = iter(records)
        head = list(itertools.islice(rows, IN_PROCESS_ROWS + 1))
        if len(head) <= IN_PROCESS_ROWS:
            return prepare_locally(job, head, stage_dir, unread)
        records = _dataset(itertools.chain(head, rows))
    return write_prepared(tokenise_on_cluster(records, job), job, renderer, stage_dir, unread)


def _dataset(records: Iterable[Record]) -> "ray.data.Dataset":
    import ray.data

    rows = iter(records)
    blocks = iter(lambda: list(itertools.islice(rows, ROWS_PER_BLOCK)), [])
    return ray.data.from_arrow([records_table(block) for block in blocks])


def tokenise_on_cluster(rows: "ray.data.Dataset", job: TrainJob) -> pa.Table:
    """`tokenised_schema` of a dataset with the columns of `RECORD_SCHEMA`, in no particular order."""
    from itune_ray.train.prepare import tokenised_schema

    schema = tokenised_schema(job)

    def tokenise_block(table: pa.Table) -> pa.Table:
        from itune_ray.train.prepare import renderer_for, tokenise

        renderer = renderer_for(job.model.model_dump_json())
        return tokenise((Record.from_row(row) for row in table.to_pylist()), job, renderer)

    tokenised = rows.map_batches(tokenise_block, batch_format="pyarrow", batch_size=ROWS_PER_BLOCK)
    references: list[Any] = tokenised.to_arrow_refs()
    tables: list[pa.Table] = [table for table in ray.get(references) if table.num_rows]
    return pa.concat_tables([t.cast(schema) for t in tables] or [schema.empty_table()])


def fit(
    job: TrainJob,
    prepared: "PreparedData",
    stage_dir: str,
    on_progress: OnProgress | None = None,
    *,
    stop_at: int | None = None,
) -> "TrainOutcome":
    """Train under Ray Train to the end, through worker failures, and export; continues where an earlier call stopped.

    Args:
        stop_at: Pause once so many steps are done (`itune_ray.train.loop.train_rank`); a pause that was reached
            before is found again.

    Raises:
        ITuneError: What a worker raised on purpose, unchanged.
        TrainError: The workers failed more often than `workers.max_failures` allows.
    """
    import ray.train
    import ray.train.torch

    from itune_ray.train.outcome import pause_folder, read_outcome

    for name, value in _RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    stage = Folder.at(stage_dir)
    out = stage_dir if stop_at is None else pause_folder(stage_dir, stop_at)
    if (finished := read_outcome(out)) is not None:
        return finished
    board: Any = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=room.beside_driver()).remote()
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "job": job.model_dump_json(),
            "prepared": prepared,
            "stage_dir": stage.uri,
            "stop_at": stop_at,
            "out": out,
            "board": board,
        },
        scaling_config=_scaling(job),
        torch_config=ray.train.torch.TorchConfig(
            backend=_backend(job.workers), timeout_s=job.workers.collective_timeout_s
        ),
        run_config=ray.train.RunConfig(
            name="ray-train",
            storage_path=stage.uri,
            failure_config=ray.train.FailureConfig(max_failures=job.workers.max_failures),
            worker_runtime_env={"env_vars": job.workers.env} if job.workers.env else None,
        ),
    )
    try:
        with _relayed(board, on_progress), explained_by(lambda: _ranks(board)):
            _fit(trainer, board)
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


def _ranks(board: Any) -> list[str]:
    from ray.exceptions import RayError

    try:
        lines: Any = ray.get(board.ranks.remote(), timeout=POLL_S * 4)
        return lines
    except RayError:
        return []


def _fit(trainer: Any, board: Any) -> None:
    import ray.train

    try:
        trainer.fit()
    except ray.train.WorkerGroupError as failed:
        rank, cause = min(failed.worker_failures.items())
        reason = str(cause).strip().splitlines()[-1]
        places = "; ".join(_ranks(board))
        told = f" ({places})" if places and _TIMED_OUT.search(reason) else ""
        raise TrainError(
            f"training failed too often; last on rank {rank}: {reason}{told}",
            knob="workers.collective_timeout_s" if told else "workers.max_failures",
        ) from failed


_TIMED_OUT = re.compile(r"tim(ed|e) ?out|Connection closed by peer|Connection reset", re.IGNORECASE)
"""What gloo and NCCL say when another rank did not come, or gave up first."""


def _backend(workers: TrainWorkers) -> str:
    if workers.backend == "auto":
        return "nccl" if workers.gpus_each else "gloo"
    return workers.backend


def _scaling(job: TrainJob) -> "ray.train.ScalingConfig":
    import ray.train

    return ray.train.ScalingConfig(
        num_workers=job.workers.num, use_gpu=job.workers.gpus_each > 0, resources_per_worker=job.workers.each
    )


RANKS_TOLD = 4
"""Of many ranks, the ones furthest behind are the ones to look at."""


class _Board:
    """The one thing workers tell the driver directly: progress rows, and an error that no retry mends."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, dict[str, Any]]] = []
        self._failure: ITuneError | None = None
        self._places: dict[int, tuple[int, str, str, float]] = {}

    def at(self, rank: int, host: str, step: int, place: str) -> None:
        self._places[rank] = step, place, host, time.monotonic()

    def ranks(self) -> list[str]:
        """Where each rank is, those behind the others first; many that are equal are counted."""
        order = ("prepares", "computes", "saves")
        ranked = sorted(self._places.items(), key=lambda item: (item[1][0], order.index(item[1][1]), item[0]))
        now = time.monotonic()
        lines = [
            f"rank {rank} on {host} {place} step {step} for {now - since:.0f} s"
            for rank, (step, place, host, since) in ranked
        ]
        return lines if len(lines) <= RANKS_TOLD else [*lines[:RANKS_TOLD], f"{len(lines) - RANKS_TOLD} ranks more"]

    def put(self, step: int, total: int, row: dict[str, Any]) -> None:
        self._rows.append((step, total, row))

    def drain(self) -> list[tuple[int, int, dict[str, Any]]]:
        rows, self._rows = self._rows, []
        return rows

    def fail(self, error: ITuneError) -> None:
        self._failure = self._failure or error

    def failure(self) -> ITuneError | None:
        return self._failure


@contextlib.contextmanager
def _relayed(board: Any, on_progress: OnProgress | None) -> Iterator[None]:
    """Call back on the driver while `fit` blocks; an error of the callback is raised when it ends."""
    stop = threading.Event()
    errors: list[Exception] = []

    def relay() -> None:
        try:
            while on_progress is not None:
                finished = stop.wait(POLL_S)
                for step, total, row in ray.get(board.drain.remote()):
                    on_progress(step, total, row)
                if finished:
                    return
        except Exception as error:  # noqa: BLE001  raised below, in the thread that can end the stage
            errors.append(error)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)
    if errors:
        raise errors[0]


def _worker(config: dict[str, Any]) -> None:
    """One Ray Train worker. An error that is the user's to mend goes to the board and ends the run without retries;
    leaving the process group wakes the ranks that wait for this one."""
    import ray.train
    import torch
    import torch.distributed as dist

    from itune_ray.train.loop import train_rank
    from itune_ray.train.outcome import write_outcome

    job = TrainJob.model_validate_json(config["job"])
    board = config["board"]
    if ray.get(board.failure.remote()) is not None:
        return
    if not job.workers.gpus_each:
        torch.set_num_threads(job.workers.torch_threads or 1)
    rank, host = ray.train.get_context().get_world_rank(), socket.gethostname()
    try:
        outcome = train_rank(
            job,
            config["prepared"],
            config["stage_dir"],
            on_progress=lambda step, total, row: board.put.remote(step, total, row),
            on_place=lambda step, place: board.at.remote(rank, host, step, place),
            leaving=_noticed,
            stop_at=config["stop_at"],
        )
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
