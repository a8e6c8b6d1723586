"""Subset selection: M of N rows, by hash, strata, coverage, length, score or tags (methods D24)."""

import math
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from itune_ray.config.curate import SelectConfig
from itune_ray.curate.embeddings import Vectors
from itune_ray.curate.filters.base import Choice, Dropped, Reached, SetFilter
from itune_ray.curate.geometry import k_center, nearest, spherical_kmeans
from itune_ray.curate.tags import complexity_first, tag_sets
from itune_ray.data.mixture import largest_remainder
from itune_ray.data.records import row_rng, row_seed


class Select(SetFilter):
    """Keeps M rows and drops the rest as `not_selected`.

    Rows that the strategy cannot rank go as `no_score` or `not_embedded`; fewer than M are then kept when the rest is
    too small. Equal rows are ranked by key.
    """

    def __init__(self, config: SelectConfig):
        self._config = config
        self.references = (config.by,) if config.by and config.strategy in ("stratified", "score", "tags") else ()

    def choose(self, reached: Reached) -> Choice:
        count = subset_size(len(reached.records), self._config.rows, self._config.share)
        kept, missing, facts = getattr(self, f"_{self._config.strategy}")(reached, count)
        stay = set(kept)
        dropped = {
            row: Dropped(missing.get(row, "not_selected")) for row in range(len(reached.records)) if row not in stay
        }
        return Choice(dropped, facts={"strategy": self._config.strategy, "asked": count, "kept": len(stay), **facts})

    def _hash(self, reached: Reached, count: int) -> "_Kept":
        return by_hash(reached, range(len(reached.records)), count), {}, {}

    def _stratified(self, reached: Reached, count: int) -> "_Kept":
        strata: defaultdict[str, list[int]] = defaultdict(list)
        for row, value in enumerate(reached.read(self._config.by or "")):
            strata["(none)" if value is None else str(value)].append(row)
        names = sorted(strata)
        quotas = largest_remainder([len(strata[name]) for name in names], count)
        kept = [row for name, quota in zip(names, quotas, strict=True) for row in by_hash(reached, strata[name], quota)]
        counts = {name: {"in": len(strata[name]), "kept": q} for name, q in zip(names, quotas, strict=True)}
        return kept, {}, {"strata": counts, "vanished": [n for n, q in zip(names, quotas, strict=True) if q == 0]}

    def _k_center(self, reached: Reached, count: int) -> "_Kept":
        config = self._config
        vectors, rows = reached.vectors(config.embedder, config.key)
        missing = dict.fromkeys(set(range(len(reached.records))) - set(rows.tolist()), "not_embedded")
        if not len(rows):
            return [], missing, {"clusters": []}
        centroids = spherical_kmeans(vectors, config.clusters, row_rng(reached.seed, "curate.kmeans", "all"))
        own = nearest(vectors, centroids)[:, 0]
        groups = [np.flatnonzero(own == cluster) for cluster in range(len(centroids))]
        quotas = largest_remainder([len(group) for group in groups], min(count, len(rows)))
        kept: list[int] = []
        report: list[dict[str, Any]] = []
        for group, centroid, quota in zip(groups, centroids, quotas, strict=True):
            chosen, radius = _cover(vectors[group], centroid, quota, config.trim)
            kept += [int(rows[group[i]]) for i in chosen]
            report.append({"in": len(group), "kept": quota, "radius": None if radius is None else round(radius, 6)})
        return kept, missing, {"clusters": report}

    def _longest(self, reached: Reached, count: int) -> "_Kept":
        return _highest(reached.numbers("length").tolist(), count, {})

    def _score(self, reached: Reached, count: int) -> "_Kept":
        sign = -1.0 if self._config.lowest else 1.0
        return _highest((sign * reached.numbers(self._config.by or "")).tolist(), count, {})

    def _tags(self, reached: Reached, count: int) -> "_Kept":
        given = [value if isinstance(value, list) else None for value in reached.read(self._config.by or "")]
        sets = tag_sets([row or () for row in given], self._config.min_count)
        missing = {row: "no_tags" for row, tags in enumerate(sets) if not tags}
        kept = complexity_first(sets, count)
        covered = frozenset[str]().union(*(sets[row] for row in kept))
        return kept, missing, {"tags": len(frozenset[str]().union(*sets)), "tags_kept": len(covered)}


_Kept = tuple[list[int], dict[int, str], dict[str, Any]]
"""Rows kept; why some could not be; figures."""


def subset_size(total: int, rows: int | None, share: float | None) -> int:
    """M: `rows`, or max(1, ⌊αN⌋) in exact decimals; never more than N."""
    if share is None:
        return min(rows or 0, total)
    return min(max(1, math.floor(Fraction(str(share)) * total)), total)


def by_hash(reached: Reached, rows: Sequence[int], count: int) -> list[int]:
    """The rows of smallest hash of (seed, key): a larger count keeps all that a smaller one does."""
    return sorted(rows, key=lambda row: (row_seed(reached.seed, "curate.select", reached.records[row].key), row))[
        :count
    ]


def _highest(scores: Sequence[float], count: int, facts: dict[str, Any]) -> _Kept:
    missing = {row: "no_score" for row, score in enumerate(scores) if math.isnan(score)}
    ranked = sorted((row for row in range(len(scores)) if row not in missing), key=lambda row: (-scores[row], row))
    return ranked[:count], missing, facts


def _cover(vectors: Vectors, centroid: Vectors, quota: int, trim: float) -> tuple[list[int], float | None]:
    """Farthest-first from the row nearest the centroid; trimmed rows are chosen only when nothing else is left."""
    if quota == 0:
        return [], None
    distance = np.linalg.norm(vectors - centroid, axis=1)
    outer = np.argsort(-distance, kind="stable")[: math.floor(trim * len(vectors))]
    candidates = np.ones(len(vectors), bool)
    candidates[outer[: len(vectors) - quota]] = False
    found = k_center(vectors, quota, int(np.argmin(distance)), candidates)
    return found.chosen, found.radius
