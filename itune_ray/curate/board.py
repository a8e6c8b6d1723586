"""The board: every row of the union and how it stands, so that none is lost or counted twice.

Rows are numbered in the order of their keys, so nothing depends on the order in which they were read. Filters only
ever turn a standing row into a rejected or failed one; the outcome table at the end holds each row once.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from itune_ray.data.ledger import LEDGER_SCHEMA, Outcome
from itune_ray.data.mixture import Member, Mixture
from itune_ray.data.records import Record, records_table

REASON_DUPLICATE_OF_SOURCE = "duplicate_of_source"
ROWS_PER_PART = 2**16
"""Rows of a part of the outcome table: a million rows need not be in memory twice."""


@dataclass(slots=True)
class Standing:
    """How a row stands now."""

    reason: str | None = None
    """Set once it is rejected."""
    cause: str | None = None
    """Set once it has failed."""
    attempts: int = 1
    score: float = math.nan
    """The last score it got."""
    raw: str | None = None
    duplicate_of: str | None = None
    """Key of the row it makes way for."""
    by: str | None = None
    """Name of the filter that decided."""

    @property
    def status(self) -> str:
        """As in the ledger."""
        return "failed" if self.cause is not None else "accepted" if self.reason is None else "rejected"


class Board:
    """The rows of a mixture and their standing."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        self._records = [member.record for member in mixture.members]
        self._standing = [Standing() for _ in mixture.members]
        self._scores: dict[str, NDArray[np.float64]] = {}
        for row, member in enumerate(mixture.members):
            if member.duplicate_of is not None:
                self._standing[row] = Standing(
                    reason=REASON_DUPLICATE_OF_SOURCE, duplicate_of=member.duplicate_of, by="union"
                )

    def alive(self, only: Sequence[str] = ()) -> list[int]:
        """Numbers of the rows still standing, of the named sources or of all."""
        wanted = {index for index, name in enumerate(self.mixture.names) if not only or name in only}
        return [
            row
            for row, member in enumerate(self.mixture.members)
            if member.part in wanted and self._standing[row].status == "accepted"
        ]

    def record(self, row: int) -> Record:
        """The row of that number."""
        return self._records[row]

    def annotate(self, row: int, meta: Mapping[str, Any]) -> None:
        """Add entries to the row's `meta`."""
        record = self._records[row]
        self._records[row] = replace(record, meta={**record.meta, **meta})

    def rewrite(self, row: int, texts: Mapping[str, Any]) -> None:
        """Give the row new texts: JSON values of `messages`, `rejected` and `text`."""
        turns = tuple(texts["messages"])
        self._records[row] = replace(self._records[row], **{**texts, "messages": turns})

    def reweigh(self, row: int, factor: float) -> None:
        """Multiply the row's weight."""
        record = self._records[row]
        self._records[row] = replace(record, weight=record.weight * factor)

    def part(self, row: int) -> int:
        """Index of the input that the row came from."""
        return self.mixture.members[row].part

    def source(self, row: int) -> str:
        """Name of the input that the row came from."""
        return self.mixture.names[self.mixture.members[row].part]

    def best_first(self, rows: Iterable[int]) -> list[int]:
        """Rows by the keep rule: highest priority of the input, then highest score, then smallest key."""
        return sorted(rows, key=self._rank)

    def _rank(self, row: int) -> tuple[int, float, int]:
        score = self._standing[row].score
        priority = self.mixture.parts[self.mixture.members[row].part].priority
        return -priority, math.inf if math.isnan(score) else -score, row

    def reject(
        self, row: int, reason: str, by: str, *, score: float = math.nan, raw: str | None = None, of: str | None = None
    ) -> None:
        """End a standing row as rejected; `of` is the key of the row it duplicates."""
        standing = self._standing[row]
        standing.reason, standing.by, standing.raw = reason, by, raw
        standing.duplicate_of = of
        standing.score = standing.score if math.isnan(score) else score

    def fail(self, row: int, cause: str, by: str, attempts: int = 1) -> None:
        """End a standing row as failed."""
        standing = self._standing[row]
        standing.cause, standing.by, standing.attempts = cause, by, attempts

    def reprieve(self, row: int) -> None:
        """Let the row that the last filter rejected stand again."""
        self._standing[row] = Standing(score=self._standing[row].score)

    def score(self, filter_name: str, row: int, score: float) -> None:
        """Note a score, in the filter's own column and as the row's last."""
        self.measure(filter_name, row, score)
        if not math.isnan(score):
            self._standing[row].score = score

    def measure(self, name: str, row: int, value: float) -> None:
        """Note a figure in a column of its own; NaN says nothing."""
        if not math.isnan(value):
            self._scores.setdefault(name, np.full(len(self._standing), np.nan))[row] = value

    def score_of(self, filter_name: str, row: int) -> float:
        """What a filter scored the row; NaN where it did not."""
        column = self._scores.get(filter_name)
        return math.nan if column is None else float(column[row])

    def ended_by(self, row: int) -> str | None:
        """Name of the filter that rejected or failed the row; None while it stands."""
        return self._standing[row].by

    def rejected_by(self, name: str) -> int:
        """Rows that a filter ended."""
        return sum(standing.by == name for standing in self._standing)

    def kept(self) -> Iterator[Member]:
        """Members that stand."""
        return (replace(self.mixture.members[row], record=self._records[row]) for row in self.alive())

    def outcomes(self) -> pa.Table:
        """Every row that came in, in `LEDGER_SCHEMA`, sorted by key.

        Further columns: `input` (name of its source), `duplicate_of`, and `score_NAME` for each filter that scores
        (NaN where it did not).
        """
        return pa.concat_tables(self.outcome_parts())

    def outcome_parts(self) -> Iterator[pa.Table]:
        """`outcomes` in parts of `ROWS_PER_PART` rows; one without rows where none came in."""
        unread = [outcome.record.key for _, outcome in self.mixture.quarantined]
        last = sorted(range(len(unread)), key=unread.__getitem__)

        def key(entry: int) -> str:
            return self._records[entry].key if entry >= 0 else unread[~entry]

        entries = heapq.merge(range(len(self._records)), (~index for index in last), key=key)
        yield self._part(list(itertools.islice(entries, ROWS_PER_PART)))
        while part := list(itertools.islice(entries, ROWS_PER_PART)):
            yield self._part(part)

    def _part(self, entries: Sequence[int]) -> pa.Table:
        """The outcomes of rows (their numbers) and of quarantined rows (the complements of theirs)."""
        quarantined = self.mixture.quarantined
        records = records_table(self._records[i] if i >= 0 else quarantined[~i][1].record for i in entries)
        parts = [self.part(i) if i >= 0 else quarantined[~i][0] for i in entries]
        ends = [self._standing[i] if i >= 0 else _standing_of(quarantined[~i][1]) for i in entries]
        columns = {
            "input_key": records["key"],
            "status": [end.status for end in ends],
            "reason": [end.reason for end in ends],
            "score": [end.score for end in ends],
            "cause": [end.cause for end in ends],
            "attempts": [end.attempts for end in ends],
            "raw": [end.raw for end in ends],
            "input": [self.mixture.names[part] for part in parts],
            "duplicate_of": pa.array([end.duplicate_of for end in ends], pa.string()),
        }
        table = pa.table({**{name: records[name] for name in records.column_names}, **columns})
        places = np.array(entries, np.int64)
        for name, scores in sorted(self._scores.items()):
            column = np.full(len(places), np.nan)
            column[places >= 0] = scores[places[places >= 0]]
            table = table.append_column(f"score_{name}", pa.array(column))
        extra = [table.schema.field(name) for name in table.column_names if name not in LEDGER_SCHEMA.names]
        types = [pa.field(f.name, pa.string()) if f.name == "input" else f for f in extra]
        return table.cast(pa.schema([*LEDGER_SCHEMA, *types]))


def _standing_of(outcome: Outcome) -> Standing:
    return Standing(
        reason=outcome.reason,
        cause=outcome.cause,
        attempts=outcome.attempts,
        score=outcome.score,
        raw=outcome.raw,
        by="union",
    )
