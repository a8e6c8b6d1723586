"""The filter contract: a row in, a verdict with its reason out; every reason is counted and every reject is kept.

Three kinds. A row filter judges one row by itself. A group filter compares rows with each other. A model filter asks a
model. Most filters are row filters, and so are the user's own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from itune_ray.data.dedup import Duplicates
from itune_ray.data.records import Record


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
