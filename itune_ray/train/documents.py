"""From a row to the document that an objective trains on: token ids, supervised flags, segments, further columns.

| rows | a row holds | a document has |
|---|---|---|
| answers | a chat with an answer, or a text | one segment (one per answer, if the template rewrites history) |
| pairs | a chat with an answer, and the answer it was preferred to | two segments: chosen, rejected |
| compared | as pairs | as pairs, and a margin |
| labelled | a chat with an answer and a label, or a pair | one segment per answer, and as many mismatched |
| ranked | a chat with several scored answers, or a pair | one segment per answer |
| distributions | a chat with an answer, and a teacher's top-k over it | one segment, k ids and log-probs per token |
| adapted | as answers; a general one is replayed | as answers, and which segments are general |
| classes | a chat or text with a label | the text without the label, one segment per label |
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from itune_ray.config.objectives import DomainConfig, KdConfig, KtoConfig, RewardConfig, RrhfConfig, SftConfig
from itune_ray.config.train import TrainJob
from itune_ray.data.chat import ChatRenderer, Rendered, Supervise, TemplateRewritesHistory, UnusableRow
from itune_ray.data.order import DOCUMENT_SCHEMA
from itune_ray.data.records import REPLAYED, UNSAFE, Record, row_seed
from itune_ray.errors import TrainError
from itune_ray.train.classes import Classes

MARGIN = "margin"
"""Column of `compared`: by how much the chosen answer is better, one per document."""
ROLE = "role"
"""Column of `labelled`: what each segment is."""
DESIRABLE, UNDESIRABLE, MISMATCHED = 1, 0, -1
GENERAL = "general"
"""Column of `adapted`: 1 for each segment of a general row, 0 for those of the domain."""
SEGMENTS = "document_segments"
"""Column of documents that have segments in varying number: how many, one per document."""
SCORE = "score"
"""Column of `ranked`: the score of each segment."""
Answer = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Token ids of a segment and which are supervised."""
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


@runtime_checkable
class Completed(Protocol):
    """Documents that need all others too before they are whole."""

    def completed(self, documents: pa.Table, job: TrainJob) -> pa.Table:
        """The documents with what only all of them together can give; a function of their keys, in any order."""
        ...


class Answers:
    """A chat or text as one segment, its answers supervised.

    Where the template renders earlier turns otherwise than the last one (reasoning models drop old thoughts), packed
    training takes one segment per answer, together within `pack_length`; unpacked, the row is rejected.
    """

    schema = DOCUMENT_SCHEMA
    wanted = "at least one row with an answer within max_length"

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """See `Documents.document`."""
        assert isinstance(job.objective, SftConfig | DomainConfig)
        try:
            parts = [rendered(record, renderer, job.objective.supervise)]
        except DocumentError as error:
            if error.reason != TemplateRewritesHistory.reason or not job.packing:
                raise
            parts = _one_per_answer(record, renderer)
        lengths = [len(part.input_ids) for part in parts]
        check_length(max(lengths), job)
        if job.packing and sum(lengths) > job.pack_capacity:
            raise DocumentError("too_long", f"{sum(lengths)} tokens, pack_length {job.pack_capacity}", sum(lengths))
        return {
            "input_ids": [i for part in parts for i in part.input_ids],
            "supervised": [flag for part in parts for flag in part.supervised],
            "lengths": lengths,
        }


def _one_per_answer(record: Record, renderer: ChatRenderer) -> list[Rendered]:
    """Each answer of a dialogue as the last turn of its own chat: what the model sees when it writes that answer."""
    turns = [k for k, m in enumerate(record.messages) if m["role"] == "assistant" and m["content"].strip()]
    return [rendered(replace(record, messages=record.messages[: k + 1]), renderer, "last_assistant") for k in turns]


class Adapted(Answers):
    """An answer or text of the domain, or a general one: those of `meta.replayed`. Reasons are those of `Answers`."""

    schema = pa.schema([*DOCUMENT_SCHEMA, (GENERAL, pa.list_(pa.int8())), (SEGMENTS, pa.list_(pa.int32()))])

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """See `Documents.document`."""
        made = super().document(record, job, renderer)
        count = len(made["lengths"])
        return {**made, GENERAL: [int(REPLAYED in record.meta)] * count, SEGMENTS: [count]}


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


class Labelled:
    """An answer with its label, or a pair as a desirable and an undesirable one; and each prompt with a foreign answer.

    The foreign answers are those of the next row in an order drawn from the seed: each answer of that row meets this
    row's prompt, in turn, cut where the segment would be longer than `max_length`. A lone row meets its own answers.

    Reasons: `no_label` (neither a pair nor a label of true, false, 1 or 0), and those of `Pairs`.
    """

    schema = pa.schema([*DOCUMENT_SCHEMA, (ROLE, pa.list_(pa.int8())), (SEGMENTS, pa.list_(pa.int32()))])
    wanted = "at least one row with an answer and a label, or with a chosen and a rejected answer"

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """See `Documents.document`; the foreign answers are still missing."""
        assert isinstance(job.objective, KtoConfig)
        if record.rejected is not None:
            return {**Pairs().document(record, job, renderer), ROLE: [DESIRABLE, UNDESIRABLE], SEGMENTS: [2]}
        label = record.meta.get(job.objective.label)
        if record.text is not None or label not in (0, 1):
            raise DocumentError("no_label", f"meta.{job.objective.label}: {label!r}")
        ids, supervised = rendered(record, renderer, "last_assistant")
        check_length(len(ids), job)
        role = DESIRABLE if label else UNDESIRABLE
        return {"input_ids": ids, "supervised": supervised, "lengths": [len(ids)], ROLE: [role], SEGMENTS: [1]}

    def completed(self, documents: pa.Table, job: TrainJob) -> pa.Table:
        """See `Completed.completed`."""
        rows = [_answers(documents, index) for index in range(documents.num_rows)]
        keys = documents["key"].to_pylist()
        circle = sorted(range(len(rows)), key=lambda i: (row_seed(job.seed, "train.mismatch", keys[i]), keys[i]))
        columns: dict[str, list[Any]] = {name: [[]] * len(rows) for name in self.schema.names}
        columns |= {"key": keys, "weight": documents["weight"].to_pylist()}
        for place, index in enumerate(circle):
            own, foreign = rows[index], rows[circle[(place + 1) % len(circle)]]
            mixed = [_mismatched(a, foreign[i % len(foreign)], job.max_length) for i, a in enumerate(own)]
            columns["input_ids"][index] = np.concatenate([ids for ids, _ in (*own, *mixed)])
            columns["supervised"][index] = np.concatenate([flags for _, flags in (*own, *mixed)])
            columns["lengths"][index] = [len(ids) for ids, _ in (*own, *mixed)]
            columns[ROLE][index] = [*documents[ROLE][index].as_py(), *[MISMATCHED] * len(mixed)]
            columns[SEGMENTS][index] = [2 * len(own)]
        return pa.table(columns, schema=self.schema)


def _answers(documents: pa.Table, index: int) -> list[Answer]:
    """(ids, supervised flags) of each segment of a document."""
    ids = documents["input_ids"][index].values.to_numpy()
    flags = documents["supervised"][index].values.to_numpy(zero_copy_only=False)
    cuts = np.cumsum(documents["lengths"][index].values.to_numpy())[:-1]
    return list(zip(np.split(ids, cuts), np.split(flags, cuts), strict=True))


def _mismatched(own: Answer, foreign: Answer, max_length: int) -> Answer:
    """The prompt of one segment with the answer of another."""
    prompt = own[0][: int(np.argmax(own[1]))]
    answer = foreign[0][foreign[1]][: max_length - len(prompt)]
    flags = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return np.concatenate([prompt, answer]), flags


class Ranked:
    """Several answers to one chat with their scores; a pair counts as two, of scores 1 and 0.

    Reasons: `no_ranking` (a text, or neither a list of {response, score} nor a pair), `too_many_answers`,
    `equal_scores` (nothing is ranked), `equal_answers` (two have the same tokens), `too_long` (any of them).
    """

    schema = pa.schema([*DOCUMENT_SCHEMA, (SCORE, pa.list_(pa.float64())), (SEGMENTS, pa.list_(pa.int32()))])
    wanted = "at least one row with two answers or more of different scores, each within max_length"

    def document(self, record: Record, job: TrainJob, renderer: ChatRenderer) -> Document:
        """See `Documents.document`."""
        assert isinstance(job.objective, RrhfConfig)
        answers = scored_answers(record, job.objective.field)
        if len(answers) > job.objective.answers:
            raise DocumentError(
                "too_many_answers", f"{len(answers)} answers, objective.answers {job.objective.answers}"
            )
        scores = [score for _, score in answers]
        if len(set(scores)) < 2:
            raise DocumentError("equal_scores", f"all {scores[0]}")
        turns = [(*record.prompt, {"role": "assistant", "content": text}) for text, _ in answers]
        made = [rendered(replace(record, messages=chat), renderer, "last_assistant") for chat in turns]
        if len({tuple(one.input_ids) for one in made}) < len(made):
            raise DocumentError("equal_answers")
        lengths = [len(one.input_ids) for one in made]
        check_length(max(lengths), job)
        return {
            "input_ids": [i for one in made for i in one.input_ids],
            "supervised": [flag for one in made for flag in one.supervised],
            "lengths": lengths,
            SCORE: scores,
            SEGMENTS: [len(made)],
        }


def scored_answers(record: Record, field: str) -> list[tuple[str, float]]:
    """(answer, score) of a row's answers."""
    listed: object = record.meta.get(field)
    if record.text is None and listed is None and record.rejected is not None:
        return [(record.response or "", 1.0), (record.rejected, 0.0)]
    found: list[tuple[str, float]] = []
    for entry in listed if isinstance(listed, list) and record.text is None else []:
        text, score = (
            (entry.get("response"), number(entry.get("score"))) if isinstance(entry, dict) else (None, math.nan)
        )
        if not isinstance(text, str) or not math.isfinite(score):
            raise DocumentError("no_ranking", f"meta.{field}: {entry!r}")
        found.append((text, score))
    if not found:
        raise DocumentError("no_ranking", f"meta.{field}: {listed!r}")
    return found


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
    "labelled": Labelled(),
    "ranked": Ranked(),
    "distributions": Distributions(),
    "adapted": Adapted(),
    "classes": Classes(),
}
"""Kind of rows, as objectives name it in `rows`, to how they become documents."""


def documents_for(job: TrainJob) -> Documents:
    """How rows become documents of a job."""
    if job.images is not None:
        from itune_ray.train.pictured import Pictured  # loads torch, which text can do without

        return Pictured()
    return DOCUMENTS[job.objective.rows]


def rendered(record: Record, renderer: ChatRenderer, supervise: Supervise) -> Rendered:
    """Token ids of a row and its supervised flags; raises `DocumentError` where the renderer cannot tell them, where
    the row was made to provoke (`red_team`), or where no end of an answer would be learned (`no_end_of_turn`)."""
    if record.meta.get(UNSAFE) is True:
        raise DocumentError("unsafe", "meta.unsafe: a row for evaluation, not for training")
    task_tokens: object = record.meta.get("task_tokens")
    for token in task_tokens if isinstance(task_tokens, list) else ():
        if str(token).startswith("<|") and not renderer.knows(str(token)):
            raise DocumentError("token_not_added", f"{token} is no token: name it in model.added_tokens")
    try:
        made = renderer.record_ids(record, supervise)
    except UnusableRow as error:
        raise DocumentError(error.reason, str(error)) from None
    if record.text is None and supervise != "all" and renderer.never_ends(made):
        raise DocumentError("no_end_of_turn", "the chat template leaves the token that ends an answer untrained")
    return made


def number(value: object) -> float:
    """A JSON number as float; NaN for anything else, true and false included."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def check_length(tokens: int, job: TrainJob) -> None:
    """Refuse a segment that is longer than `max_length`; what is cut teaches the wrong end."""
    if tokens > job.max_length:
        raise DocumentError("too_long", f"{tokens} tokens, max_length {job.max_length}", float(tokens))
