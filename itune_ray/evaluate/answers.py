"""Answers as ledger outcomes, and the ledger as the table of answers."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.errors import EvalError
from itune_ray.evaluate.ask import Answer

MAX_ATTEMPTS = 3
"""Times an item whose failure another attempt may mend is asked before it counts as failed."""

ANSWERS_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("benchmark", pa.string()),
        ("item", pa.string()),
        ("category", pa.string()),
        ("groups", pa.list_(pa.string())),
        ("prompt", pa.string()),
        ("reply", pa.string()),
        ("reference", pa.string()),
        ("score", pa.float64()),
        ("ok", pa.bool_()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("tokens", pa.int32()),
        ("failure", pa.string()),
        ("sums", pa.string()),
    ]
)
"""answers.parquet: every prompt, reply and grade. `sums` holds each metric's additive statistics as JSON."""


def outcome_of(answer: Answer, attempts: int) -> Outcome:
    """How a question ended: accepted with its grade, or failed with its cause."""
    question, item = answer.question, answer.question.item
    grade, reply = answer.grade, answer.reply
    meta: dict[str, Any] = {
        "model": question.model,
        "benchmark": question.benchmark,
        "item": item.key,
        "category": item.category,
        "groups": list(item.groups),
        "prompt": item.prompt,
        "reference": item.reference,
        "retryable": answer.retryable,
    }
    if grade is not None:
        meta |= {"ok": grade.ok, "sums": grade.sums, "details": grade.details}
    record = Record(
        source=question.source,
        position=question.position,
        messages=item.messages or (),
        text=item.text,
        meta=meta,
        model=question.model,
        seed=answer.seed,
        finish_reason=reply.finish_reason if reply else "error",
        num_prompt_tokens=answer.num_prompt_tokens,
        num_tokens=answer.num_tokens,
    )
    return Outcome(
        record=record,
        input_key=question.key,
        status="failed" if grade is None else "accepted",
        score=math.nan if grade is None else grade.score,
        cause=cause_of(answer.cause),
        attempts=attempts,
        raw=reply.text if reply else None,
    )


def cause_of(error: str | None) -> str | None:
    """The code an engine's error starts with, else its first line without numbers: equal causes count together."""
    if error is None:
        return None
    line = (error.strip().splitlines() or ["unknown"])[0]
    code = re.match(r"[a-z][a-z0-9_]*(?=:)", line)
    return code[0] if code else re.sub(r"\d+", "N", line)[:120]


def is_settled(row: Mapping[str, Any]) -> bool:
    """Whether a ledger row needs no engine any more."""
    retryable = json.loads(row["meta"])["retryable"]
    return row["status"] == "accepted" or not retryable or row["attempts"] >= MAX_ATTEMPTS


def check_answered(model: str, benchmark: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `EvalError` when none of a model's answers to a benchmark came: there is nothing to score."""
    causes = Counter(row["failure"] for row in rows)
    if None not in causes:
        cause, count = causes.most_common(1)[0]
        raise EvalError(
            f"model {model} answered none of the {len(rows)} items of {benchmark}: {cause} ({count} times)",
            knob="models.N.engine, sampling.max_tokens",
        )


def answers_table(ledger: pa.Table) -> pa.Table:
    """The ledger's rows in `ANSWERS_SCHEMA`, in the order of model, benchmark and item position."""
    in_order = ledger.sort_by([("source", "ascending"), ("position", "ascending")])
    return pa.Table.from_pylist([_answer_row(row) for row in in_order.to_pylist()], schema=ANSWERS_SCHEMA)


def _answer_row(row: Mapping[str, Any]) -> dict[str, Any]:
    meta = json.loads(row["meta"])
    return {
        **{name: meta[name] for name in ("model", "benchmark", "item", "category", "groups", "prompt", "reference")},
        "reply": row["raw"],
        "score": row["score"],
        "ok": meta.get("ok"),
        "finish_reason": row["finish_reason"],
        "prompt_tokens": row["num_prompt_tokens"],
        "tokens": row["num_tokens"],
        "failure": row["cause"],
        "sums": json.dumps(meta.get("sums", {})),
    }
