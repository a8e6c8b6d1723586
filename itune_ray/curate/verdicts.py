"""Row filters over a block of rows: what runs inside Ray Data, and runs the same without it."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from itune_ray.curate.filters.base import KEEP, RowFilter, Verdict
from itune_ray.data.records import RECORD_SCHEMA, Record, records_table, rows_of

BLOCK_SCHEMA = pa.schema([*RECORD_SCHEMA, ("row", pa.int64()), ("input", pa.string())])
"""A record, its derived columns null, with its number on the board and the name of its source."""
VERDICT_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("link", pa.int32()),
        ("keep", pa.bool_()),
        ("reason", pa.string()),
        ("score", pa.float64()),
        ("failure", pa.string()),
        ("of", pa.string()),
        ("meta", pa.string()),
        ("texts", pa.string()),
    ]
)
"""The verdict of one link of the chain on one row; a row has one per link it reached, skipped links aside. `meta` is
JSON, and so is `texts`, new values of `TEXTS`."""
TEXTS = ("messages", "rejected", "text")
"""Fields that a filter may rewrite."""


@dataclass(frozen=True)
class Link:
    """One filter of a chain."""

    name: str
    filter: RowFilter
    only: tuple[str, ...] = ()
    """Sources it applies to; empty for all."""


def block_table(rows: Sequence[int], records: Iterable[Record], inputs: Sequence[str]) -> pa.Table:
    """`BLOCK_SCHEMA` of numbered records."""
    table = records_table(records, derived=False)
    return table.append_column("row", pa.array(rows, pa.int64())).append_column("input", pa.array(inputs, pa.string()))


def judge_block(block: pa.Table, chain: Sequence[Link]) -> pa.Table:
    """Each row through the chain until a link rejects it; `VERDICT_SCHEMA`, without plain approvals of no score."""
    found: list[tuple[Any, ...]] = []
    for fields in rows_of(block):
        record = Record.from_row(fields)
        for index, link in enumerate(chain):
            if link.only and fields["input"] not in link.only:
                continue
            verdict = link.filter.keep(record)
            if verdict is not KEEP and _says_something(verdict):
                found.append((fields["row"], index, *_columns(verdict)))
            if not verdict.keep:
                break
            record = _after(record, verdict)
    columns = list(zip(*found, strict=True)) or [()] * len(VERDICT_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, VERDICT_SCHEMA, strict=True)]
    return pa.table(arrays, schema=VERDICT_SCHEMA)


def _columns(verdict: Verdict) -> tuple[Any, ...]:
    meta = json.dumps(dict(verdict.meta), ensure_ascii=False) if verdict.meta else None
    changed = verdict.changed
    texts = None if changed is None else json.dumps({n: getattr(changed, n) for n in TEXTS}, ensure_ascii=False)
    return verdict.keep, verdict.reason, verdict.score, verdict.failure, verdict.of, meta, texts


def _after(record: Record, verdict: Verdict) -> Record:
    """The row as the next filter sees it."""
    if verdict.changed is not None:
        record = replace(record, **{name: getattr(verdict.changed, name) for name in TEXTS})
    return replace(record, meta={**record.meta, **verdict.meta}) if verdict.meta else record


def _says_something(verdict: Verdict) -> bool:
    return not verdict.keep or bool(verdict.meta) or verdict.changed is not None or not math.isnan(verdict.score)
