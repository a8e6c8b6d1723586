"""Semantic deduplication: rows whose embeddings are near each other (SemDeDup, methods D28)."""

import math
from collections.abc import Sequence

import numpy as np

from itune_ray.config.curate import SemanticDedupConfig
from itune_ray.curate.embeddings import Vectors
from itune_ray.curate.filters.base import Choice, Dropped, Reached, SetFilter
from itune_ray.curate.geometry import losers, near_pairs, nearest, spherical_kmeans
from itune_ray.data.records import row_rng, row_seed

ROWS_PER_CLUSTER = 1000


class SemanticDedup(SetFilter):
    """Of rows in one cluster with a cosine above 1 - ε the first of the order stays (Abbas et al. 2303.09540).

    Clusters are those of spherical k-means over all rows. Rows without an embedding are not compared and stay.
    """

    def __init__(self, config: SemanticDedupConfig):
        self._config = config

    def choose(self, reached: Reached) -> Choice:
        config = self._config
        vectors, rows = reached.vectors(config.embedder, config.key)
        if not len(rows):
            return Choice(facts={"compared": 0, "clusters": 0})
        clusters = config.clusters or math.ceil(len(rows) / ROWS_PER_CLUSTER)
        centroids = spherical_kmeans(vectors, clusters, row_rng(reached.seed, "curate.kmeans", "all"))
        own = nearest(vectors, centroids, config.assignments)
        distance = 1 - np.einsum("nd,nd->n", vectors, centroids[own[:, 0]])
        order = self._order(reached, rows.tolist(), distance)
        near = near_pairs(vectors, own, order, 1 - config.epsilon)
        place = [int(rows[index]) for index in order]
        dropped = {
            place[loser]: Dropped("semantic_duplicate", of=place[of], score=cosine)
            for loser, (of, cosine) in losers(near, config.mode).items()
        }
        return Choice(dropped, facts={"compared": len(rows), "clusters": len(centroids)})

    def _order(self, reached: Reached, rows: Sequence[int], distance: Vectors) -> list[int]:
        """Indices of the compared rows, those that stay first; equal ones by key."""
        kind = self._config.order
        if kind == "best":
            rank = {row: index for index, row in enumerate(reached.best_first)}
            return sorted(range(len(rows)), key=lambda i: rank[rows[i]])
        if kind == "random":
            keys = [reached.records[row].key for row in rows]
            return sorted(range(len(rows)), key=lambda i: (row_seed(reached.seed, "curate.semantic", keys[i]), i))
        sign = -1 if kind == "hard" else 1
        return sorted(range(len(rows)), key=lambda i: (sign * round(float(distance[i]), 12), i))
