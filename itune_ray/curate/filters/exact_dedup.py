"""Exact deduplication: one row per normalised text (methods D26)."""

import pyarrow as pa

from itune_ray.config.curate import ExactDedupConfig
from itune_ray.curate.filters.base import GroupFilter
from itune_ray.data.dedup import Duplicates, exact_duplicates, exact_text
from itune_ray.data.records import Record


class ExactDedup(GroupFilter):
    """Of rows with equal normalised text the best stays: highest priority of the input, then score, then smallest key.

    The number of rows kept is the number of distinct texts, whatever the order of the rows.
    """

    reason = "duplicate"
    scores = False

    def __init__(self, config: ExactDedupConfig):
        self._config = config

    def text(self, record: Record) -> str | None:
        return exact_text(record, self._config.key)

    def duplicates(self, texts: pa.Table, blocks: int | None) -> Duplicates:
        return exact_duplicates(texts, self._config.level, blocks)
