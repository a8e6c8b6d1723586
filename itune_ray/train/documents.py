"""From a row to the document that an objective trains on: token ids, supervised flags, segments, further columns.

| rows | a row holds | a document has |
|---|---|---|
| answers | a chat with an answer, or a text | one segment |
| pairs | a chat with an answer, and the answer it was preferred to | two segments: chosen, rejected |
| compared | as pairs | as pairs, and a margin |
| distributions | a chat with an answer, and a teacher's top-k over it | one segment, k ids and log-probs per token |
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from itune_ray.config.train import KdConfig, ObjectiveConfig, RewardConfig, SftConfig, TrainJob
from itune_ray.data.chat import ChatRenderer, Rendered, Supervise, UnusableRow
from itune_ray.data.order import DOCUMENT_SCHEMA
from itune_ray.data.records import Record
from itune_ray.errors import TrainError

MARGIN = "margin"
"""Column of `compared`: by how much the chosen answer is better, one per document."""
TEACHER_IDS, TEACHER_LOG_PROBS = "teacher_ids", "teacher_log_probs"
"""Columns of `distributions`: k values per supervised token, flat."""
Document = dict[str, Any]
"""The columns of `Documents.schema` but `key` and `weight`."""


@dataclass(frozen=True)
class DocumentError(Exception):
    """A row that becomes no document: the code it is quarantined under, and what was seen."""

    reason: str
    detail: str | None = None
    score: float = math.nan


class Documents(Protocol):
    """How rows of one kind become documents."""

    schema: pa.Schema
    """`DOCUMENT_SCHEMA` and the columns that the objective needs."""
    wanted: str
    """What a row must hold, for the message when none does."""

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """One document; raises `DocumentError` for a row that becomes none."""
        ...


class Answers:
    """A chat or text as one segment, its answers supervised."""

    schema = DOCUMENT_SCHEMA
    wanted = "at least one row with an answer within max_length"

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """See `Documents.document`."""
        assert isinstance(job.objective, SftConfig)
        ids, supervised = rendered(record, renderer, job.objective.supervise)
        check_length(len(ids), job)
        return {"input_ids": ids, "supervised": supervised, "lengths": [len(ids)]}


class Pairs:
    """One chat with the better answer, and the same chat with the worse one; only those two answers are supervised.

    Reasons: `no_pair` (a text, or nothing it was preferred to), `equal_answers` (the same tokens), `too_long` (either).
    """

    schema = DOCUMENT_SCHEMA
    wanted = "at least one row with a chosen and another, rejected answer, each within max_length"

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """See `Documents.document`."""
        if record.rejected is None or record.text is not None:
            raise DocumentError("no_pair")
        answer = {"role": "assistant", "content": record.rejected}
        other = replace(record, messages=(*record.prompt, answer))
        chosen, rejected = (rendered(chat, renderer, "last_assistant") for chat in (record, other))
        if chosen.input_ids == rejected.input_ids:
            raise DocumentError("equal_answers", record.rejected)
        lengths = [len(chosen.input_ids), len(rejected.input_ids)]
        check_length(max(lengths), job)
        ids, supervised = chosen.input_ids + rejected.input_ids, chosen.supervised + rejected.supervised
        return {"input_ids": ids, "supervised": supervised, "lengths": lengths}


class Compared(Pairs):
    """A pair with its margin, read from the row's `meta` where the objective names a field.

    Reasons: those of `Pairs`, and `no_margin` (the field is missing or no finite number).
    """

    schema = pa.schema([*DOCUMENT_SCHEMA, (MARGIN, pa.list_(pa.float32()))])

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """See `Documents.document`."""
        assert isinstance(job.objective, RewardConfig)
        name = job.objective.margin
        margin = 0.0 if name is None else number(record.meta.get(name))
        if not math.isfinite(margin):
            raise DocumentError("no_margin", f"meta.{name}: {record.meta.get(str(name))!r}")
        return {**super().document(record, job, renderer), MARGIN: [margin]}


class Distributions:
    """One chat with a teacher's k likeliest tokens at each supervised position.

    Reasons: `no_teacher` (nothing was captured), `teacher_k` (fewer tokens than the objective uses),
    `template_mismatch` (the student renders the chat otherwise), `too_long`. A teacher of another vocabulary ends the
    job: none of its ids would mean what the student takes them for.
    """

    schema = pa.schema(
        [*DOCUMENT_SCHEMA, (TEACHER_IDS, pa.list_(pa.int32())), (TEACHER_LOG_PROBS, pa.list_(pa.float32()))]
    )
    wanted = "at least one row with a teacher's top-k over its answer (generate, recipe teacher_topk)"

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """See `Documents.document`."""
        assert isinstance(job.objective, KdConfig)
        teacher, k = record.teacher, job.objective.k
        if teacher is None:
            raise DocumentError("no_teacher")
        if teacher.tokenizer != renderer.vocabulary_hash:
            raise TrainError(
                "the teacher has another tokenizer than the student",
                got=f"vocabulary {teacher.tokenizer} in row {record.key}",
                allowed=f"vocabulary {renderer.vocabulary_hash}; else distil its answers with objective.type=sft",
                knob="data",
            )
        if teacher.k < k:
            raise DocumentError("teacher_k", f"{teacher.k} tokens stored, objective.k {k}", float(teacher.k))
        ids, supervised = rendered(record, renderer, "assistant")
        wanted = tuple(i for i, flag in enumerate(supervised) if flag and i > 0)
        if (tuple(ids), wanted) != (teacher.input_ids, teacher.positions):
            raise DocumentError("template_mismatch")
        check_length(len(ids), job)
        shape = (len(wanted), teacher.k)
        top = np.frombuffer(teacher.ids, "<i4").reshape(shape)[:, :k]
        log_probs = np.frombuffer(teacher.log_probs, "<f2").astype(np.float32).reshape(shape)[:, :k]
        return {
            "input_ids": ids,
            "supervised": supervised,
            "lengths": [len(ids)],
            TEACHER_IDS: top.flatten(),
            TEACHER_LOG_PROBS: log_probs.flatten(),
        }


DOCUMENTS: dict[str, Documents] = {
    "answers": Answers(),
    "pairs": Pairs(),
    "compared": Compared(),
    "distributions": Distributions(),
}
"""Kind of rows, as objectives name it in `rows`, to how they become documents."""


def documents_of(objective: ObjectiveConfig) -> Documents:
    """How rows become documents of this objective."""
    return DOCUMENTS[objective.rows]


def rendered(record: Record, renderer: ChatRenderer, supervise: Supervise) -> Rendered:
    """Token ids of a row and its supervised flags; raises `DocumentError` where the renderer cannot tell them."""
    try:
        return renderer.record_ids(record, supervise)
    except UnusableRow as error:
        raise DocumentError(error.reason, str(error)) from None


def number(value: object) -> float:
    """A JSON number as float; NaN for anything else, true and false included."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def check_length(tokens: int, job: TrainJob) -> None:
    """Refuse a segment that is longer than `max_length`; what is cut teaches the wrong end."""
    if tokens > job.max_length:
        raise DocumentError("too_long", f"{tokens} tokens, max_length {job.max_length}", float(tokens))
