"""The row: one flat Arrow table that every stage reads and writes.

A row is keyed by (source, position, sample): where its input came from, the place there, and which of the n samples it
is. Equal texts do not collide; `content_hash` says that they are equal.
"""

import hashlib
import itertools
import json
import random
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import pyarrow as pa

from itune_ray.data.images import digest_of

UNSAFE = "unsafe"
"""Entry of `meta` that is true in rows made to provoke; they serve evaluation, and no training takes them."""
REPLAYED = "replayed"
"""Entry of `meta` that names the part a row of earlier stages is of."""

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant" | "tool", "content": str}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """A teacher's next-token distributions over a rendered chat, cut to the k likeliest tokens (survey eq. 3).

    Probabilities are the teacher's own at T = 1 and are not renormalised: 1 - Σ p over the k is the tail's mass.
    """

    input_ids: tuple[int, ...]
    """The chat as the teacher's template renders it: the student must render the same."""
    positions: tuple[int, ...]
    """Which of `input_ids` are predicted: the M supervised tokens, position 0 never among them."""
    k: int
    ids: bytes
    """[M, k] int32, little-endian, likeliest first."""
    log_probs: bytes
    """[M, k] float16, natural logarithms; values below -65504 are clamped to -1e4."""
    tokenizer: str
    """`ChatRenderer.vocabulary_hash` of the teacher: ids of another vocabulary mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row of instruction data, before or after any stage.

    A prompt row ends in a user turn, a training row in an assistant turn, and a text row (pretraining) has `text` and
    no messages.
    """

    source: str
    """Name of the source in the job file, e.g. `alpaca`; the first part of the key."""
    position: int
    """Index of the input within its source, stable over runs."""
    sample: int = 0
    """Which of the n samples of this input; 0 for rows that were read, not generated."""
    messages: tuple[Message, ...] = ()
    text: str | None = None
    """Plain text to model whole; excludes `messages`."""
    rejected: str | None = None
    """Preference rows: the answer that lost against the final assistant turn (survey eq. 12)."""
    teacher: TopK | None = None
    """Distillation rows: what the teacher would have said at each token of the answer."""
    meta: dict[str, Any] = field(default_factory=dict[str, Any])
    """Facts that travel with the row for graders and reports (family, language, ratings, ...): JSON values."""
    weight: float = 1.0
    """Weight of the row's source in the mixture (survey eq. 5)."""
    parents: tuple[str, ...] = ()
    """Keys of the rows this one was made from."""
    recipe: str | None = None
    round: int = 0
    seed: int | None = None
    model: str | None = None
    """Model that wrote the last turn, as `path@revision`; None for human rows."""
    sampling: dict[str, Any] | None = None
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    num_tokens: int | None = None
    """Tokens the model generated for this row."""

    @property
    def key(self) -> str:
        """`source:position:sample`, unique in a table."""
        return f"{self.source}:{self.position}:{self.sample}"

    @property
    def content_hash(self) -> str:
        """First 32 hex of SHA-256 over the normalised messages or text (NFC, `\\n` line ends, no trailing spaces) and
        images; of a row that has none of these, over its `meta`."""
        turns = [[m["role"], _normalise(m["content"])] for m in self.messages]
        if self.rejected is not None:
            turns.append(["rejected", _normalise(self.rejected)])
        if turns and (shown := digest_of(self.meta)) is not None:
            turns.append(["images", shown])
        content: Any = turns or self.meta if self.text is None else _normalise(self.text)
        return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages without a final assistant turn."""
        return self.messages[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def response(self) -> str | None:
        """The final assistant turn, or None for a prompt row."""
        return self.messages[-1]["content"] if self.messages and self.messages[-1]["role"] == "assistant" else None

    def to_row(self, derived: bool = True) -> dict[str, Any]:
        """As a dict of Arrow values, `meta` and `sampling` as JSON.

        Args:
            derived: Add `key` and `content_hash`, which cost more than all the rest.
        """
        row = {name: getattr(self, name) for name in _FIELDS}  # not asdict, which takes ten times as long
        row["teacher"] = None if self.teacher is None else asdict(self.teacher)
        row["messages"], row["parents"] = [dict(m) for m in self.messages], list(self.parents)
        row["meta"] = json.dumps(self.meta, ensure_ascii=False, sort_keys=True)
        row["sampling"] = None if self.sampling is None else json.dumps(self.sampling, sort_keys=True)
        return {"key": self.key, "content_hash": self.content_hash, **row} if derived else row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """The inverse of `to_row`; columns that are no fields (ledger columns, scores) are left out."""
        values = {name: row[name] for name in _FIELDS if name in row and row[name] is not None}
        values["messages"] = tuple(
            {"role": m["role"], "content": m["content"]} for m in _listed(values.get("messages"))
        )
        values["parents"] = tuple(_listed(values.get("parents")))
        if isinstance(values.get("teacher"), Mapping):
            values["teacher"] = _topk(values["teacher"])
        for name in ("meta", "sampling"):
            if isinstance(values.get(name), str):
                values[name] = json.loads(values[name])
        for name in ("position", "sample", "round", "seed", "num_prompt_tokens", "num_tokens"):
            if name in values:
                values[name] = int(values[name])
        return cls(**values)


_FIELDS = tuple(f.name for f in fields(Record))
TOPK_TYPE = pa.struct(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("positions", pa.list_(pa.int32())),
        ("k", pa.int32()),
        ("ids", pa.binary()),
        ("log_probs", pa.binary()),
        ("tokenizer", pa.string()),
    ]
)
RECORD_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("content_hash", pa.string()),
        ("source", pa.string()),
        ("position", pa.int64()),
        ("sample", pa.int32()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("text", pa.string()),
        ("rejected", pa.string()),
        ("teacher", TOPK_TYPE),
        ("meta", pa.string()),
        ("weight", pa.float64()),
        ("parents", pa.list_(pa.string())),
        ("recipe", pa.string()),
        ("round", pa.int32()),
        ("seed", pa.int64()),
        ("model", pa.string()),
        ("sampling", pa.string()),
        ("finish_reason", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_tokens", pa.int32()),
    ]
)
"""Columns of `Record.to_row()`."""


def records_table(records: Iterable[Record], derived: bool = True) -> pa.Table:
    """Arrow table of records in `RECORD_SCHEMA`; `key` and `content_hash` are null where not `derived`."""
    rest = iter(records)
    parts = [RECORD_SCHEMA.empty_table()]
    while rows := [record.to_row(derived) for record in itertools.islice(rest, ROWS_AT_ONCE)]:
        parts.append(pa.Table.from_pylist(rows, schema=RECORD_SCHEMA))
    return pa.concat_tables(parts)


ROWS_AT_ONCE = 4096
"""Rows that are Python dicts at one time: a dict takes ten times what its row takes in Arrow."""


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table as dicts, `ROWS_AT_ONCE` of them at a time."""
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        yield from batch.to_pylist()


def row_seed(run_seed: int, stage: str, key: str, round: int = 0) -> int:
    """63-bit seed of one row's randomness: a pure function of (run seed, stage, row key, round).

    Any block count, worker count, order or retry therefore draws the same numbers.
    """
    identity = f"{run_seed}\x1f{stage}\x1f{key}\x1f{round}".encode()
    return int.from_bytes(hashlib.sha256(identity).digest()[:8], "big") >> 1


def row_rng(run_seed: int, stage: str, key: str, round: int = 0) -> random.Random:
    """A generator seeded by `row_seed`."""
    return random.Random(row_seed(run_seed, stage, key, round))


def _topk(value: Mapping[str, Any]) -> TopK:
    ids, positions = (tuple(map(int, value[name])) for name in ("input_ids", "positions"))
    return TopK(**{**value, "input_ids": ids, "positions": positions, "k": int(value["k"])})


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value)


def _normalise(text: str) -> str:
    lines = unicodedata.normalize("NFC", text).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).rstrip()
