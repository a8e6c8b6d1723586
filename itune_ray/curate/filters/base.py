"""The filter contract: a row in, a verdict with its reason out; every reason is counted and every reject is kept.

Four kinds. A row filter judges one row by itself. A group filter compares the texts of rows with each other. A model
filter asks a model about each row. A set filter sees all rows at once and chooses among them. Most filters are row
filters, and so are the user's own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from itune_ray.config.base import digest
from itune_ray.config.curate import HashedEmbedder
from itune_ray.config.filters.base import ModelEmbedder
from itune_ray.config.generate import CommitConfig
from itune_ray.config.shared import SamplingConfig, ServedModel
from itune_ray.data.dedup import Duplicates, TextKey, near_text
from itune_ray.data.fingerprint import content_identity
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Llm

MAX_ATTEMPTS = 3
"""How often a model is asked about a content before its row counts as failed."""
AnyEmbedder = HashedEmbedder | ModelEmbedder


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a filter says of a row."""

    keep: bool
    reason: str | None = None
    """Why not, as a short word that can be counted."""
    score: float = math.nan
    """What was measured; NaN where nothing was."""
    failure: str | None = None
    """Set when the filter itself broke on the row, which then counts as failed."""
    of: str | None = None
    """Key of the row that this one repeats, e.g. of a benchmark; published as `duplicate_of`."""
    meta: Mapping[str, Any] | None = None
    """Facts to add to the row's `meta`, JSON values: later filters and the published tables have them."""
    changed: Record | None = None
    """The row with other texts (messages, rejected, text), where the filter rewrites it; its other fields count for
    nothing."""


KEEP = Verdict(True)


@dataclass(frozen=True)
class Seen:
    """All rows that a filter was applied to, with its verdicts, in the order of the row keys."""

    records: Sequence[Record]
    kept: Sequence[bool]
    scores: Sequence[float]


@dataclass(frozen=True)
class Settled:
    """What a filter makes of all its verdicts together."""

    reprieved: frozenset[str] = frozenset()
    """Keys of rejected rows that stay after all."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Figures for the manifest, JSON values."""
    dropped: Mapping[str, str] = field(default_factory=dict[str, str])
    """Key of each kept row that goes after all -> why."""
    meta: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Key of a row -> facts to add to its `meta`, JSON values."""


class Filter(ABC):  # noqa: B024  what is abstract depends on the kind
    """What every filter has."""

    version: ClassVar[int] = 1
    """Raised whenever verdicts may change: part of the artifact's identity."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Facets without which the filter is pointless, see `itune_ray.data.contract`."""
    provides: ClassVar[frozenset[str]] = frozenset()
    """Facets that the filter adds, e.g. `meta.language`."""

    def identity(self) -> dict[str, Any]:
        """What decides the verdicts beside the config."""
        return {"version": self.version}

    def prepare(self) -> None:  # noqa: B027  most filters have nothing to read
        """Read what the filter needs beside the rows, on the driver, before the first row; may raise `DataError`."""

    def facts(self) -> dict[str, Any]:
        """Figures for the manifest, JSON values."""
        return {}


class RowFilter(Filter):
    """Judges rows one by one; picklable, runs anywhere."""

    settles: bool = False
    """Whether `settle` must see all verdicts before the next filter may start."""

    @abstractmethod
    def keep(self, record: Record) -> Verdict:
        """The verdict on one row, a pure function of it."""

    def settle(self, seen: Seen) -> Settled:
        """Look at all verdicts at once, on the driver; may raise `DataError` to stop the job."""
        return Settled()


class GroupFilter(Filter):
    """Compares rows with each other: of rows that are alike, the best stays."""

    reason: ClassVar[str]
    """Why the others go."""
    scores: ClassVar[bool] = True
    """Whether the similarity is worth reporting: exact duplicates have none to speak of."""

    @abstractmethod
    def text(self, record: Record) -> str | None:
        """What is compared; None leaves the row out of the comparison."""

    @abstractmethod
    def duplicates(self, texts: pa.Table, blocks: int | None) -> Duplicates:
        """Rows that make way.

        Args:
            texts: (id, text), smaller ids being better rows.
            blocks: Ray Data blocks to spread the work over; None for this process alone.
        """


class AskingConfig(Protocol):
    """What the config of every model filter has."""

    @property
    def commit(self) -> CommitConfig:
        """When ratings become durable."""
        ...

    def identity(self) -> dict[str, Any]:
        """As in `Schema`."""
        ...


class ModelFilter(Filter):
    """Asks a model about each distinct content once.

    Ratings are stored by content and by what decides them, beside the artifacts of a run: a setting that only chooses
    among ratings asks nothing again.
    """

    config: AskingConfig
    selection: ClassVar[frozenset[str]] = frozenset({"only", "commit"})
    """Settings that choose among ratings and leave the ratings themselves alone."""

    @property
    @abstractmethod
    def served(self) -> ServedModel:
        """The model that is asked."""

    @property
    def sampling(self) -> SamplingConfig:
        """How it answers."""
        return SamplingConfig(temperature=0.0, top_p=1.0)

    def ratings_id(self, seed: int) -> str:
        """Names the ratings by all that decides them: model, engine, sampling, the filter's own settings and seed."""
        config = {name: value for name, value in self.config.identity().items() if name not in self.selection}
        return digest([content_identity(config), self.identity(), seed])

    def unfit(self, record: Record) -> str | None:
        """Why the model need not be asked about a row; by default that it has no answer."""
        return None if (record.response or "").strip() else "no_answer"

    @abstractmethod
    async def rate(self, record: Record, llm: Llm, attempt: int) -> Outcome:
        """What the model says of one content. `accepted` means rated, `rejected` that the reply says nothing."""

    @abstractmethod
    def verdict(self, rating: Outcome) -> Verdict:
        """What a stored rating means for the row."""

    def measures(self, rating: Outcome) -> Mapping[str, float]:
        """Figures of a rating beside its score; each becomes a column `score_FILTER_NAME`."""
        return {}

    def probes(self, records: Sequence[Record]) -> Mapping[str, Record]:
        """What is asked beside the rows themselves: content hash of a row -> a changed copy of it."""
        return {}

    def check(self, replies: int, unscored: int) -> None:
        """Stop the job by raising when too many replies say nothing."""

    def settle(self, seen: Seen) -> Settled:
        """Look at all verdicts at once."""
        return Settled()

    def findings(self, probes: Mapping[str, Record], known: Mapping[str, Outcome]) -> dict[str, Any]:
        """Figures for the manifest, from the ratings by content hash."""
        return {}


@dataclass(frozen=True)
class Reached:
    """All rows that a set filter chooses among, in the order of their keys; a row is known by its place here."""

    records: Sequence[Record]
    best_first: Sequence[int]
    """The rows by the keep rule: priority of the input, then score, then key."""
    seed: int
    """The run's; draws are by row, see `itune_ray.data.records.row_rng`."""
    read: Callable[[str], Sequence[Any]]
    """What a `Reference` stands for, per row; None where the row has no such thing."""
    embed: Callable[[AnyEmbedder, Sequence[str]], NDArray[np.float64]]
    """Unit vectors [N, D] of texts; a text that the model refuses is all NaN."""

    def vectors(self, embedder: AnyEmbedder, key: TextKey) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Unit vectors [M, D] of the rows that have one, and the places of those rows: a row goes without when it has
        no such text or no words, or when the model refuses it."""
        texts = [near_text(record, key) for record in self.records]
        there = np.array([place for place, text in enumerate(texts) if text is not None], np.int64)
        if not len(there):
            return np.empty((0, 0)), there
        found = self.embed(embedder, [texts[place] or "" for place in there])
        known = np.isfinite(found).all(axis=1) & (found != 0).any(axis=1)
        return found[known], there[known]

    def numbers(self, reference: str) -> NDArray[np.float64]:
        """The reference as numbers; NaN where the row has none."""
        return np.array([number(value) for value in self.read(reference)], np.float64)


@dataclass(frozen=True)
class Dropped:
    """Why a set filter drops a row."""

    reason: str
    of: int | None = None
    """Place of the row that stays in its stead."""
    score: float = math.nan


@dataclass(frozen=True)
class Choice:
    """What a set filter makes of its rows; a row that is not dropped stays."""

    dropped: Mapping[int, Dropped] = field(default_factory=dict[int, Dropped])
    scores: Mapping[int, float] = field(default_factory=dict[int, float])
    meta: Mapping[int, Mapping[str, Any]] = field(default_factory=dict[int, Mapping[str, Any]])
    """Entries for the `meta` of rows."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Figures for the manifest, JSON values."""


class SetFilter(Filter):
    """Chooses among all rows that reach it, on the driver."""

    references: tuple[str, ...] = ()
    """What it reads of rows, see `Reference`; checked before anything runs."""

    @abstractmethod
    def choose(self, reached: Reached) -> Choice:
        """The choice, a function of the rows and the seed alone."""


def number(value: Any) -> float:
    """A JSON value as a number; NaN for everything that is none, truth values among them."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def unanswered(record: Record, error: str, retryable: bool, attempt: int) -> Outcome:
    """The rating of a content whose question failed; what asking again cannot mend has no attempt left."""
    attempts = attempt if retryable else MAX_ATTEMPTS
    asked = blank(record)
    return Outcome(record=asked, input_key=record.content_hash, status="failed", cause=error, attempts=attempts)


def blank(record: Record, num_tokens: int | None = None, num_prompt_tokens: int | None = None) -> Record:
    """The record of a rating: where the row came from and what the question cost, without its text."""
    return Record(
        source=record.source,
        position=record.position,
        sample=record.sample,
        num_tokens=num_tokens,
        num_prompt_tokens=num_prompt_tokens,
    )
