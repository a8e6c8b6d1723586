"""Rows to a durable training order: tokenise, quarantine what cannot be trained on, pack, write down.

Everything here happens before any process group exists, once per stage. A row ends up accepted or rejected with a
reason; nothing is dropped. Whether tokenising runs in this process or on a cluster (`train.run`) changes nothing in
the result, since the order depends on row keys alone.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from itune_ray.config.base import digest
from itune_ray.config.train import TrainJob
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.curriculum import CurriculumOrder
from itune_ray.data.ledger import LEDGER_SCHEMA, Outcome
from itune_ray.data.order import Order, Plan, read_plan, write_order
from itune_ray.data.records import Record
from itune_ray.data.storage import Folder
from itune_ray.data.tasks import TaskOrder
from itune_ray.errors import TrainError
from itune_ray.train.documents import Completed, DocumentError, documents_for, number
from itune_ray.train.rows import rejection

DIFFICULTY = "difficulty"
"""Column of tokenised documents where the job has a curriculum."""
TASK = "task"
"""Column of tokenised documents where tasks take turns."""


@dataclass(frozen=True)
class PreparedData:
    """A training order on disk and what became of the rows."""

    folder: str
    """`order/` of the stage."""
    plan: Plan
    accepted: int
    rejected: dict[str, int]
    """Rows by reason; the rows themselves are in `rejected/` of the stage, in `LEDGER_SCHEMA`."""


@lru_cache(maxsize=4)
def renderer_for(model_json: str, sees: bool = False) -> ChatRenderer:
    """One renderer per process and model section (as JSON), since loading a tokenizer takes longer than a batch."""
    from itune_ray.config.train import TrainedModel
    from itune_ray.train.renderer import load_renderer

    return load_renderer(TrainedModel.model_validate_json(model_json), sees)


def tokenised_schema(job: TrainJob) -> pa.Schema:
    """A tokenised document of the job's objective, or no tokens and the row's outcome as JSON."""
    course = [] if job.curriculum is None else [(DIFFICULTY, pa.float64())]
    course += [] if job.reptile is None else [(TASK, pa.string())]
    return pa.schema([*documents_for(job).schema, *course, ("rejection", pa.string())])


def tokenise(records: Iterable[Record], job: TrainJob, renderer: ChatRenderer) -> pa.Table:
    """`tokenised_schema` of a batch of rows."""
    return pa.Table.from_pylist([_tokenised_row(r, job, renderer) for r in records], schema=tokenised_schema(job))


def _tokenised_row(record: Record, job: TrainJob, renderer: ChatRenderer) -> dict[str, Any]:
    row: dict[str, Any] = {"key": record.key, "weight": record.weight}
    try:
        document = documents_for(job).document(record, job, renderer)
        document |= {} if job.reptile is None else {TASK: _task(record, job.reptile.task)}
    except DocumentError as error:
        return row | {"rejection": _json(rejection(record, error.reason, error.detail, score=error.score))}
    return row | document | ({} if job.curriculum is None else {DIFFICULTY: _difficulty(record)})


def _task(record: Record, field: str) -> str:
    task: object = record.meta.get(field)
    if task is None:
        raise DocumentError("no_task", f"meta.{field} is missing")
    return str(task)


def _difficulty(record: Record) -> float:
    """What the curriculum filter wrote, or NaN."""
    written: object = record.meta.get("curriculum")
    return number(written.get("difficulty")) if isinstance(written, dict) else math.nan


def _json(outcome: Outcome) -> str:
    return json.dumps(outcome.to_row())


def preparation_digest(job: TrainJob, renderer: ChatRenderer) -> str:
    """Identity of the order, as far as the job decides it: settings, tokenizer and template."""
    settings = (job.seed, job.batch, job.epochs, job.steps, job.max_length, job.packing, job.pack_length)
    objective = job.objective.model_dump(mode="json")
    course = [c.model_dump(mode="json") for c in (job.curriculum, job.reptile) if c is not None]
    return digest([settings, objective, renderer.vocabulary_hash, renderer.template_hash, *course], length=16)


def finished_preparation(job: TrainJob, renderer: ChatRenderer, stage_dir: str) -> PreparedData | None:
    """The order of an earlier attempt at the same stage, or None."""
    folder = Folder.at(stage_dir) / "order"
    plan = read_plan(folder.uri)
    if plan is None or plan.digest != preparation_digest(job, renderer):
        return None
    rows = folder.read_json("rows.json")
    return PreparedData(folder.uri, plan, rows["accepted"], rows["rejected"])


def write_prepared(
    tokenised: pa.Table, job: TrainJob, renderer: ChatRenderer, stage_dir: str, unread: Sequence[Outcome] = ()
) -> PreparedData:
    """Split accepted from rejected rows, and write `rejected/` and `order/`; refuses to go on with nothing to train.

    Args:
        tokenised: `tokenised_schema` of the job.
        unread: Outcomes of rows that never got as far as tokenising.
    """
    documents = tokenised.filter(pc.field("rejection").is_null())
    rejected = [outcome.to_row() for outcome in unread]
    rejected += [json.loads(text) for text in tokenised["rejection"].drop_null().to_pylist()]
    rejected.sort(key=lambda row: row["key"])
    counts = dict(sorted(Counter(str(row["reason"] or row["cause"]) for row in rejected).items()))
    stage = Folder.at(stage_dir)
    stage.write_table("rejected/part-0.parquet", pa.Table.from_pylist(rejected, schema=LEDGER_SCHEMA))
    if not documents.num_rows:
        raise TrainError(
            f"no row is left to train on{_all_of_one(counts)}",
            got=counts or "no rows at all",
            allowed=documents_for(job).wanted,
            knob="data",
        )
    kind = documents_for(job)
    documents = documents.drop_columns(["rejection"])
    order, documents = _order(documents, job)
    if isinstance(kind, Completed):
        documents = kind.completed(documents, job)
    folder = stage / "order"
    capacity = job.pack_capacity if job.packing else None
    folder.write_json("rows.json", {"accepted": documents.num_rows, "rejected": counts})
    plan = write_order(
        documents,
        folder.uri,
        digest=preparation_digest(job, renderer),
        seed=job.seed,
        batch=job.batch,
        capacity=capacity,
        epochs=job.epochs,
        steps=job.steps,
        order=order,
    )
    return PreparedData(folder.uri, plan, documents.num_rows, counts)


def _order(documents: pa.Table, job: TrainJob) -> tuple[Order | None, pa.Table]:
    """The order that a curriculum or tasks ask for, and the documents without what it follows."""
    keys, weights = documents["key"].to_pylist(), documents["weight"].to_pylist()
    if job.reptile is not None:
        tasks: list[str] = documents[TASK].to_pylist()
        by_task = TaskOrder(keys, weights, job.seed, job.batch, tasks, job.reptile.inner_steps)
        return by_task, documents.drop_columns([TASK])
    if job.curriculum is None:
        return None, documents
    difficulties: list[float] = documents[DIFFICULTY].to_pylist()
    if all(map(math.isnan, difficulties)):
        raise TrainError(
            "no row says how difficult it is",
            got=f"{len(difficulties)} rows without meta.curriculum",
            allowed="rows of a curate job with the filter `curriculum`",
            knob="curriculum",
        )
    order = CurriculumOrder(keys, weights, job.seed, job.batch, difficulties, job.curriculum)
    return order, documents.drop_columns([DIFFICULTY])


def _all_of_one(rejected: dict[str, int]) -> str:
    (reason, *others) = rejected or [""]
    return f": every one is rejected as {reason}" if reason and not others else ""


def prepare_locally(
    job: TrainJob, records: Iterable[Record], stage_dir: str, unread: Sequence[Outcome] = ()
) -> PreparedData:
    """Tokenise in this process and write the order; an order that is already there is used as it is."""
    renderer = renderer_for(job.model.model_dump_json(), job.images is not None)
    done = finished_preparation(job, renderer, stage_dir)
    if done is not None:
        return done
    tables = [tokenise(chunk, job, renderer) for chunk in _chunks(records, 4096)]
    tokenised = pa.concat_tables(tables or [tokenised_schema(job).empty_table()])
    return write_prepared(tokenised, job, renderer, stage_dir, unread)


def _chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
