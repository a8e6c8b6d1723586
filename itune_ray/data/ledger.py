"""The row ledger: every input row of a stage ends in exactly one of accepted, rejected (reason) or failed (cause).

A commit is one Parquet file, written atomically, with the outcomes of whole input rows. Resuming is an anti-join: the
inputs of committed outcomes never reach an engine again, whether they were accepted or rejected. Failed inputs are
driven again until their attempts are spent; the later outcome of the same input replaces the earlier one.
"""

import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from itune_ray.data.records import RECORD_SCHEMA, Record
from itune_ray.data.storage import Folder, TableFile
from itune_ray.errors import DataError

MERGED = 64
"""Commits that become one file."""
_PART = re.compile(r"commit-(\d{6,})(?:-(\d{6,}))?\.parquet")
Status = Literal["accepted", "rejected", "failed"]

LEDGER_SCHEMA = pa.schema(
    [
        *RECORD_SCHEMA,
        ("input_key", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("score", pa.float64()),
        ("cause", pa.string()),
        ("attempts", pa.int32()),
        ("raw", pa.string()),
    ]
)
"""A record and how it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one output row of one input row ended."""

    record: Record
    input_key: str
    """Key of the input row; an input with n samples has n outcomes."""
    status: Status
    reason: str | None = None
    """Why it was rejected, as a short word that can be counted."""
    score: float = float("nan")
    """The score that decided; NaN where nothing was scored."""
    cause: str | None = None
    """What failed, as the engine said it."""
    attempts: int = 1
    raw: str | None = None
    """The reply as it came, kept where it could not be parsed."""

    def to_row(self) -> dict[str, Any]:
        """As a dict in `LEDGER_SCHEMA`."""
        return {
            **self.record.to_row(),
            "input_key": self.input_key,
            "status": self.status,
            "reason": self.reason,
            "score": self.score,
            "cause": self.cause,
            "attempts": self.attempts,
            "raw": self.raw,
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """The inverse of `to_row`."""
        kept = ("input_key", "status", "reason", "cause", "attempts", "raw")
        score = row.get("score")
        return cls(
            record=Record.from_row(row),
            score=float("nan") if score is None else float(score),
            **{name: row[name] for name in kept},
        )


@dataclass(frozen=True)
class Funnel:
    """Where the rows of a stage went; `rows_in = accepted + rejected + failed` always."""

    rows_in: int
    accepted: int
    rejected: dict[str, int]
    """Rows by reason."""
    failed: dict[str, int]
    """Rows by cause."""

    def __post_init__(self) -> None:
        out = self.accepted + sum(self.rejected.values()) + sum(self.failed.values())
        if self.rows_in != out:
            raise DataError(
                f"the ledger does not balance: {self.rows_in} rows in, {out} out "
                f"({self.accepted} accepted, {self.rejected} rejected, {self.failed} failed)"
            )

    def to_json(self) -> dict[str, Any]:
        """`{in, accepted, rejected: {reason: n}, failed: {cause: n}}`, as summary.json has it."""
        return {"in": self.rows_in, "accepted": self.accepted, "rejected": self.rejected, "failed": self.failed}


class Ledger:
    """The commits of one stage, in `<artifact>/ledger/`.

    A commit is one small file; every `MERGED` of them become one larger file, so that a resume opens few. The larger
    one is written whole before the small ones go, and what it covers no longer counts: a crash repeats nothing.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        self._parts = _standing(folder.names())

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Make outcomes durable in one atomic file. All outcomes of an input must be in one commit."""
        if outcomes:
            self.append(pa.Table.from_pylist([o.to_row() for o in outcomes], schema=LEDGER_SCHEMA))

    def append(self, table: pa.Table) -> None:
        """Commit a table of `LEDGER_SCHEMA`."""
        part = _Part.single(max((part.last for part in self._parts), default=-1) + 1)
        self.folder.write_table(part.name, table)
        self._parts.append(part)
        self._merge()

    def table(self) -> pa.Table:
        """All outcomes that hold, sorted by key: of an input committed twice, only the later commit's."""
        return self._latest(self._parts, LEDGER_SCHEMA.names).sort_by("key")

    def settled(self, max_attempts: int) -> set[str]:
        """Keys of the inputs that need no engine any more: accepted, rejected, or failed for good."""
        table = self._latest(self._parts, ["input_key", "status", "attempts"])
        still = table.filter((pc.field("status") == "failed") & (pc.field("attempts") < max_attempts))
        return set(table["input_key"].unique().to_pylist()) - set(still["input_key"].to_pylist())

    def attempts(self) -> dict[str, int]:
        """Attempts so far of each failed input."""
        table = self._latest(self._parts, ["input_key", "status", "attempts"])
        failed = table.filter(pc.field("status") == "failed")
        return dict(zip(failed["input_key"].to_pylist(), failed["attempts"].to_pylist(), strict=True))

    def _latest(self, parts: Sequence["_Part"], columns: list[str]) -> pa.Table:
        """Columns, the input's key among them, of the outcomes that hold."""
        schema = pa.schema([LEDGER_SCHEMA.field(name) for name in columns])
        read = [self.folder.read_table(part.name, columns).select(columns).cast(schema) for part in parts]
        if not read:
            return schema.empty_table()
        table = pa.concat_tables(read)
        keys: Any = table["input_key"].combine_chunks().dictionary_encode()
        inputs = np.asarray(keys.indices)
        commits = np.repeat(np.arange(len(read)), [part.num_rows for part in read])
        last = np.zeros(len(keys.dictionary), np.int64)
        last[inputs] = commits  # in order, so the last one stays
        keep = last[inputs] == commits
        return table if keep.all() else table.filter(pa.array(keep))

    def _merge(self) -> None:
        small = [part for part in self._parts if part.first == part.last]
        if len(small) < MERGED:
            return
        whole = _Part(small[0].first, small[-1].last)
        self.folder.write_table(whole.name, self._latest(small, LEDGER_SCHEMA.names))
        self._parts = [*(part for part in self._parts if part not in small), whole]
        for part in small:
            self.folder.delete(part.name)

    def publish(self, target: Folder, names: dict[Status, str] | None = None) -> Funnel:
        """Write the final tables (sorted by key, so equal runs give equal files) and count them.

        Args:
            target: The artifact; one folder per status is written into it.
            names: Folder name per status, where it is not the status itself.
        """
        return publish_table(self.table(), target, names)


def publish_table(table: pa.Table, target: Folder, names: dict[Status, str] | None = None) -> Funnel:
    """Write a table of `LEDGER_SCHEMA` (further columns are kept) as one folder per status, and count it."""
    publish_parts([table], target, names)
    return funnel_of(table)


def publish_parts(parts: Iterable[pa.Table], target: Folder, names: dict[Status, str] | None = None) -> None:
    """The same of a table that comes in parts, at least one."""
    statuses: tuple[Status, ...] = ("accepted", "rejected", "failed")
    files: dict[Status, TableFile] = {status: TableFile() for status in statuses}
    for part in parts:
        for status, file in files.items():
            file.add(part.filter(pc.field("status") == status))
    for status, file in files.items():
        target.write_bytes(f"{(names or {}).get(status, status)}/part-0.parquet", file.finished())


def funnel_of(table: pa.Table) -> Funnel:
    """Count a table of `LEDGER_SCHEMA` by status, reason and cause."""
    ends = table.group_by(["status", "reason", "cause"]).aggregate([([], "count_all")]).to_pylist()
    return Funnel(
        rows_in=table.num_rows,
        accepted=sum(end["count_all"] for end in ends if end["status"] == "accepted"),
        rejected=_counted((end["reason"], end["count_all"]) for end in ends if end["status"] == "rejected"),
        failed=_counted((end["cause"], end["count_all"]) for end in ends if end["status"] == "failed"),
    )


@dataclass(frozen=True)
class _Part:
    """A file of commits, by the numbers of its first and last."""

    first: int
    last: int

    @classmethod
    def single(cls, number: int) -> Self:
        return cls(number, number)

    @property
    def name(self) -> str:
        span = f"{self.first:06d}" if self.first == self.last else f"{self.first:06d}-{self.last:06d}"
        return f"commit-{span}.parquet"


def _standing(names: Iterable[str]) -> list[_Part]:
    """The parts that count, in the order of their commits: those that no larger one covers."""
    found = [_PART.fullmatch(name) for name in names]
    parts = [_Part(int(match[1]), int(match[2] or match[1])) for match in found if match]
    standing: list[_Part] = []
    for part in sorted(parts, key=lambda part: (part.first, -part.last)):
        if not standing or part.first > standing[-1].last:
            standing.append(part)
    return standing


def _counted(words: Iterable[tuple[str | None, int]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for word, count in words:
        found[word or "unknown"] += count
    return dict(sorted(found.items()))


class Committer:
    """Collects outcomes and commits them every `rows` rows or `seconds` seconds, whichever comes first.

    Use as a context manager: what is left is committed on a clean exit, and also when an error ends the stage.
    """

    def __init__(self, ledger: Ledger, rows: int = 256, seconds: float = 5.0):
        self._ledger, self._rows, self._seconds = ledger, rows, seconds
        self._pending: list[Outcome] = []
        self._since = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._timer = threading.Thread(target=self._flush_on_time, daemon=True, name="ledger-commit")

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._timer.join()
        self.flush()

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Take the outcomes of one or more whole inputs; an input driven again goes into a later commit."""
        taken = list(outcomes)
        with self._lock:
            self._raise_pending_error()
            if {o.input_key for o in self._pending} & {o.input_key for o in taken}:
                self._commit()
            self._pending.extend(taken)
            if len(self._pending) >= self._rows:
                self._commit()

    def flush(self) -> None:
        """Commit what is pending now."""
        with self._lock:
            self._raise_pending_error()
            self._commit()

    def _commit(self) -> None:
        self._ledger.commit(self._pending)
        self._pending, self._since = [], time.monotonic()

    def _flush_on_time(self) -> None:
        while not self._stop.wait(min(0.25, self._seconds / 4)):
            with self._lock:
                if not self._pending or time.monotonic() - self._since < self._seconds:
                    continue
                try:
                    self._commit()
                except Exception as error:  # noqa: BLE001  re-raised in the thread that adds: a timer has nobody to tell
                    self._error = error
                    return

    def _raise_pending_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
