"""From a row to the document that an objective trains on: token ids, supervised flags, segments, further columns.

| rows | a row holds | a document has |
|---|---|---|
| answers | a chat with an answer, or a text | one segment |
| pairs | a chat with an answer, and the answer it was preferred to | two segments: chosen, rejected |
| distributions | a chat with an answer, and a teacher's top-k over it | one segment, k ids and log-probs per token |
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from itune_ray.config.train import ObjectiveConfig, TrainJob
from itune_ray.data.chat import ChatRenderer, UnusableRow
from itune_ray.data.order import DOCUMENT_SCHEMA
from itune_ray.data.records import Record

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

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """One document; raises `DocumentError` for a row that becomes none."""
        ...


class Answers:
    """A chat or text as one segment, its answers supervised."""

    schema = DOCUMENT_SCHEMA

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """See `Documents.document`."""
        try:
            ids, supervised = renderer.record_ids(record, job.objective.supervise)
        except UnusableRow as error:
            raise DocumentError(error.reason, str(error)) from None
        check_length(len(ids), job)
        return {"input_ids": ids, "supervised": supervised, "lengths": [len(ids)]}


DOCUMENTS: dict[str, Documents] = {"answers": Answers()}
"""Kind of rows, as objectives name it in `rows`, to how they become documents."""


def documents_of(objective: ObjectiveConfig) -> Documents:
    """How rows become documents of this objective."""
    return DOCUMENTS[objective.rows]


def check_length(tokens: int, job: TrainJob) -> None:
    """Refuse a segment that is longer than `max_length`; what is cut teaches the wrong end."""
    if tokens > job.max_length:
        raise DocumentError("too_long", f"{tokens} tokens, max_length {job.max_length}", float(tokens))
