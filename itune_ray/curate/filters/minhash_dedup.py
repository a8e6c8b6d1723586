"""Near deduplication: MinHash-LSH candidates, verified (methods D27)."""

from typing import Any, ClassVar

import pyarrow as pa

from itune_ray.config.curate import MinhashDedupConfig
from itune_ray.curate.filters.base import GroupFilter
from itune_ray.data.dedup import Duplicates, NearSettings, near_duplicates, near_text
from itune_ray.data.minhash import collision_probability, recall_bands
from itune_ray.data.records import Record
from itune_ray.errors import ConfigError


class MinhashDedup(GroupFilter):
    """Drops rows whose word n-grams have Jaccard similarity ≥ threshold with those of a better row that stays."""

    version: ClassVar[int] = 2
    reason = "near_duplicate"

    def __init__(self, config: MinhashDedupConfig):
        self._config = config
        bands, rows = _bands(config)
        self._settings = NearSettings(
            threshold=config.threshold,
            num_perm=config.num_perm,
            bands=bands,
            rows=rows,
            ngram=config.ngram,
            min_tokens=config.min_tokens,
        )

    def text(self, record: Record) -> str | None:
        return near_text(record, self._config.key)

    def duplicates(self, texts: pa.Table, blocks: int | None) -> Duplicates:
        return near_duplicates(texts, self._settings, blocks)

    def facts(self) -> dict[str, Any]:
        bands, rows = self._settings.bands, self._settings.rows
        found = collision_probability(self._settings.threshold, bands, rows)
        return {"bands": bands, "rows": rows, "recall_at_threshold": round(found, 4)}


def _bands(config: MinhashDedupConfig) -> tuple[int, int]:
    if config.bands is None and config.rows is None:
        return recall_bands(config.threshold, config.num_perm)
    if config.bands is None or config.rows is None:
        raise ConfigError(
            "minhash_dedup needs both bands and rows, or neither",
            got={"bands": config.bands, "rows": config.rows},
            knob="filters.N.bands, filters.N.rows",
        )
    if config.bands * config.rows > config.num_perm:
        raise ConfigError(
            "bands times rows exceeds the signature",
            got=f"{config.bands} x {config.rows}",
            allowed=f"at most {config.num_perm} (num_perm)",
            knob="filters.N.num_perm",
        )
    return config.bands, config.rows
