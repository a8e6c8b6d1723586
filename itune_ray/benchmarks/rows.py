"""Benchmark rows from the sources that every job reads; what cannot be a question is counted with its reason."""

from collections import Counter
from collections.abc import Iterator

from itune_ray.config.shared import Source
from itune_ray.data.records import Record


def records_of(source: Source) -> Iterator[Record]:
    """The rows of a source, in its own order."""
    from itune_ray.data.sources import read_source

    return read_source(source)


def answered_rows(source: Source) -> tuple[list[Record], dict[str, int]]:
    """Rows that hold a reference, and how many do not, by reason: texts and chats that end in a non-empty answer do."""
    rows: list[Record] = []
    rejected: Counter[str] = Counter()
    for record in records_of(source):
        reason = _reason_against(record)
        if reason is None:
            rows.append(record)
        else:
            rejected[reason] += 1
    return rows, dict(sorted(rejected.items()))


def _reason_against(record: Record) -> str | None:
    if record.text is not None:
        return None if record.text.strip() else "empty_text"
    if not (record.response or "").strip():
        return "no_answer"
    return None if record.prompt else "no_prompt"
