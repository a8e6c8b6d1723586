"""[Ray] A training stage on a cluster: rows are tokenised, by Ray Data where it is worth it, then workers train.

Tokenising and packing finish before the trainer starts (`train.workers`), so that a slow read never sits inside a
process group. Torch and transformers are imported inside functions, where they are needed.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from itune_ray import cluster, room
from itune_ray.config.strategies import TrainWorkers
from itune_ray.config.train import TrainJob
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.hub import local_model_folder, resolve
from itune_ray.data.ledger import Funnel, Outcome
from itune_ray.data.records import Record, records_table
from itune_ray.engine.host import EngineHost
from itune_ray.observe import metrics
from itune_ray.observe.progress import Progress, Task
from itune_ray.train.board import OnProgress
from itune_ray.train.rows import VALIDATION, read_held_out, read_rows, replay_counts, validation_job
from itune_ray.train.trackers import Tracked, check_trackers, open_trackers
from itune_ray.train.workers import fit

if TYPE_CHECKING:
    import ray.data

    from itune_ray.train.prepare import PreparedData

IN_PROCESS_ROWS = 50_000
"""Up to so many rows are tokenised by the driver (7,000 short chats a second); a cluster task first spends four
seconds on importing a tokenizer."""
ROWS_PER_BLOCK = 2048


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
    check_trackers(job.trackers)
    cluster.connect(job.run.ray, progress.say, meanwhile=["itune_ray.train.renderer"])
    _make_room(job, engines, progress.say)
    records, unread = read_rows(job)
    prepared = prepare(job, records, artifact.path(), unread)
    if job.validation is not None:
        held_out, unread = read_held_out(job.validation)
        prepare(validation_job(job), held_out, artifact.path(VALIDATION), unread)
    tracked = _tracked(job, artifact, progress.say)
    with tracked:
        with progress.task(stage, prepared.plan.steps, unit="steps") as task:
            outcome = fit(job, prepared, artifact.path(), _shown(task, job.workers, tracked), say=progress.say)
        if job.gate is not None and job.gate.vllm is not None:
            from itune_ray.train.served import check_served

            check_served(job, outcome, artifact.path(), engines)
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
    count = max(workers.fewest, room.most(workers.each, workers.most, {}))
    needed = {name: amount * count for name, amount in workers.each.items()}
    what, knob = f"{count} training workers", "workers.num, workers.cpus_each or workers.gpus_each"
    engines.make_room(needed, workers.each, count, what, knob, say)
    room.await_room([workers.each] * workers.fewest, workers.start_timeout_s, what, "workers.start_timeout_s", say)


GAUGES = {
    "loss": "itune_loss",
    "held_out_loss": "itune_held_out_loss",
    "grad_norm": "itune_grad_norm",
    "lr": "itune_learning_rate",
    "packing_efficiency": "itune_packing_efficiency",
    "checkpoint_seconds": "itune_checkpoint_seconds",
}
"""What the loop tells, as metrics."""


def _tracked(job: TrainJob, artifact: Artifact, say: Callable[[str], None]) -> Tracked:
    path = artifact.path()
    name = f"{job.name}/{path.rstrip('/').rpartition('/')[2]}"
    return open_trackers(
        job.trackers,
        folder=path,
        name=name,
        run_id=name.replace("/", "-"),
        settings=job.identity(),
        say=say,
    )


def _shown(task: Task, workers: TrainWorkers, tracked: Tracked) -> OnProgress:
    seen = 0
    peak = workers.peak_tflops * 1e12 if workers.peak_tflops else None

    def show(step: int, _: int, row: dict[str, Any]) -> None:
        nonlocal seen
        seen += int(row["tokens"])
        shown = {name: float(row[name]) for name in ("loss", "held_out_loss", "lr") if name in row}
        if peak is not None:
            shown["mfu"] = float(row["flops_per_s"]) / (peak * int(row["ranks"]))
            metrics.gauge("itune_mfu", shown["mfu"])
        task.update(step, seen, None, **shown)
        tracked.log(row)
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

    renderer = renderer_for(job.model.model_dump_json(), job.images is not None)
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

        renderer = renderer_for(job.model.model_dump_json(), job.images is not None)
        return tokenise((Record.from_row(row) for row in table.to_pylist()), job, renderer)

    tokenised = rows.map_batches(tokenise_block, batch_format="pyarrow", batch_size=ROWS_PER_BLOCK)
    references: list[Any] = tokenised.to_arrow_refs()
    tables: list[pa.Table] = [table for table in ray.get(references) if table.num_rows]
    return pa.concat_tables([t.cast(schema) for t in tables] or [schema.empty_table()])
