"""Benchmark rows from the sources that every job reads; what cannot be a question is counted with its reason."""

from collections import Counter
from dataclasses import dataclass

from itune_ray.config.shared import Source
from itune_ray.data.records import Record
from itune_ray.data.sources import read_source


@dataclass(frozen=True)
class AnsweredRows:
    """Rows that hold a reference: texts, and chats that end in an answer."""

    rows: list[Record]
    rejected: dict[str, int]
    """Rows without one by reason, those among them that the source itself could not read."""
    source: str
    """Name of the source, with the commit it was read at where it has one."""


def answered_rows(source: Source, texts: bool) -> AnsweredRows:
    """Read a source.

    Args:
        texts: Whether rows of plain text can be used.
    """
    table = read_source(source)
    rejected = Counter(outcome.reason or "unreadable" for outcome in table.quarantined)
    rows: list[Record] = []
    for record in table.records:
        reason = _reason_against(record, texts)
        if reason is None:
            rows.append(record)
        else:
            rejected[reason] += 1
    name = f"{table.name}@{table.revision}" if table.revision else table.name
    return AnsweredRows(rows, dict(sorted(rejected.items())), name)


def _reason_against(record: Record, texts: bool) -> str | None:
    if record.text is not None:
        if not texts:
            return "no_prompt"
        return None if record.text.strip() else "empty_text"
    if not (record.response or "").strip():
        return "no_answer"
    return None if record.prompt else "no_prompt"
