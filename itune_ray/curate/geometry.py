"""Unit vectors in groups: spherical k-means, near pairs within groups, farthest-first and far-enough selection.

Rows have indices; every function breaks ties by the smaller index, so that the order of equal vectors decides nothing
else. Shape letters: N rows, D dimensions, K centroids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from itune_ray.curate.embeddings import Vectors, unit
from itune_ray.data import minhash

Ids = NDArray[np.int64]
CHUNK = 1024
"""Rows whose similarities are held at once."""
FIT_ROWS = 20_000
"""Centroids are fitted to at most so many rows; all rows are then assigned."""
MAX_ITERATIONS = 50


# --- k-means -------------------------------------------------------------------------------------------------------


def spherical_kmeans(vectors_ND: Vectors, clusters: int, rng: Random) -> Vectors:
    """Centroids [K, D] of spherical k-means (Dhillon and Modha 2001): assign by cosine, centroid = unit mean.

    Begins with k-means++ by cosine distance, and ends when no row changes its cluster or after 50 rounds. K is smaller
    than asked where there are fewer distinct directions; a cluster that loses all its rows keeps its centroid.
    """
    count = len(vectors_ND)
    if count > FIT_ROWS:
        vectors_ND = vectors_ND[sorted(rng.sample(range(count), FIT_ROWS))]
    centroids = _first_centroids(vectors_ND, clusters, rng)
    labels = nearest(vectors_ND, centroids)[:, 0]
    for _ in range(MAX_ITERATIONS):
        sums = np.zeros_like(centroids)
        np.add.at(sums, labels, vectors_ND)
        moved = np.linalg.norm(sums, axis=1) > 0
        centroids = np.where(moved[:, None], unit(sums), centroids)
        again = nearest(vectors_ND, centroids)[:, 0]
        if (again == labels).all():
            break
        labels = again
    return centroids


def nearest(vectors_ND: Vectors, centroids_KD: Vectors, count: int = 1) -> Ids:
    """Indices [N, count] of the centroids of highest cosine, the nearest first."""
    parts = [np.argsort(-(part @ centroids_KD.T), axis=1, kind="stable")[:, :count] for part in _chunks(vectors_ND)]
    return np.concatenate(parts) if parts else np.empty((0, count), np.int64)


def _first_centroids(vectors_ND: Vectors, clusters: int, rng: Random) -> Vectors:
    chosen = [rng.randrange(len(vectors_ND))]
    distance = np.full(len(vectors_ND), np.inf)
    while len(chosen) < clusters:
        distance = np.minimum(distance, 1 - vectors_ND @ vectors_ND[chosen[-1]])
        distance[distance < 1e-12] = 0.0
        if not distance.any():
            break
        weights = list(accumulate(distance.tolist()))
        chosen.append(rng.choices(range(len(weights)), cum_weights=weights)[0])
    return vectors_ND[chosen]


# --- near pairs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearPairs:
    """Pairs of rows that are near each other, by their places in an order."""

    pairs: Ids
    """[P, 2] (earlier, later), sorted, each once."""
    similarity: NDArray[np.float64]


def near_pairs(vectors_ND: Vectors, clusters_NA: Ids, order: Sequence[int], floor: float) -> NearPairs:
    """Pairs with a cosine above `floor` that share a cluster.

    Args:
        vectors_ND: Unit vectors.
        clusters_NA: The clusters of each row: one, or several so that a duplicate across a border is found too.
        order: Row indices; places in it are what the pairs hold.
        floor: Cosine that must be exceeded.
    """
    ordered = np.asarray(order, np.int64)
    labels = clusters_NA[ordered]
    found: dict[tuple[int, int], float] = {}
    for cluster in np.unique(labels):
        places = np.flatnonzero((labels == cluster).any(axis=1))
        members = vectors_ND[ordered[places]]
        for start in range(0, len(places), CHUNK):
            cosine = members[start : start + CHUNK] @ members.T
            later, earlier = np.nonzero(cosine > floor)
            before = earlier < later + start
            for i, j in zip(earlier[before], later[before], strict=True):
                found[int(places[i]), int(places[j + start])] = float(cosine[j, i])
    pairs = sorted(found)
    return NearPairs(np.array(pairs, np.int64).reshape(-1, 2), np.array([found[pair] for pair in pairs], np.float64))


def losers(near: NearPairs, mode: Literal["paper", "greedy"]) -> dict[int, tuple[int, float]]:
    """Place of each row that goes -> (place of the row it is near to, their cosine).

    paper: a row goes when any earlier row is near, even one that went itself, so a chain collapses to its first
    (SemDeDup). greedy: only rows that stay remove others, so no row goes that is unlike all that stay.
    """
    if mode == "greedy":
        return minhash.leaders(near.pairs, near.similarity)
    removed: dict[int, tuple[int, float]] = {}
    for (earlier, later), cosine in zip(near.pairs.tolist(), near.similarity.tolist(), strict=True):
        if later not in removed or cosine > removed[later][1]:
            removed[later] = (earlier, cosine)
    return removed


# --- selection -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Far:
    """What farthest-first selection took."""

    chosen: list[int]
    """In the order taken."""
    radius: float
    """Largest Euclidean distance of any row to the nearest chosen one."""


def k_center(vectors_ND: Vectors, count: int, start: int, candidates: NDArray[np.bool_] | None = None) -> Far:
    """Greedy k-center (Gonzalez 1985): from `start`, again and again the row farthest from all chosen ones.

    The radius is at most twice the best possible where every row is a candidate. A duplicate of a chosen row is taken
    only when every candidate is one.
    """
    allowed = np.ones(len(vectors_ND), bool) if candidates is None else candidates.copy()
    chosen, distance = [start], _distances(vectors_ND, start)
    allowed[start] = False
    while len(chosen) < count and allowed.any():
        index = int(np.argmax(np.where(allowed, distance, -1.0)))
        chosen.append(index)
        allowed[index] = False
        distance = np.minimum(distance, _distances(vectors_ND, index))
    return Far(chosen, float(distance.max()))


def far_enough(
    vectors_ND: Vectors, order: Sequence[int], ceiling: float, limit: int, block: int = 256
) -> tuple[list[int], dict[int, tuple[int, float]]]:
    """Walk rows in order and take each whose largest cosine to a taken one is at most `ceiling`, until `limit`.

    Equal for every block size: rows that are too near to what was taken before the block go together, the rest are
    compared one by one with what the block took. A row that is dropped never drops another.

    Returns:
        Rows taken, and row dropped -> (the taken row nearest to it then, their cosine). Rows beyond are in neither.
    """
    taken: list[int] = []
    dropped: dict[int, tuple[int, float]] = {}
    pool = np.empty((max(1, min(limit, len(order))), vectors_ND.shape[1]))
    for start in range(0, len(order), block):
        indices = order[start : start + block]
        known = len(taken)
        cosine = vectors_ND[list(indices)] @ pool[:known].T
        for row, index in enumerate(indices):
            if len(taken) >= limit:
                return taken, dropped
            similar = np.concatenate([cosine[row], pool[known : len(taken)] @ vectors_ND[index]])
            nearest_taken = int(np.argmax(similar)) if len(similar) else -1
            if nearest_taken >= 0 and similar[nearest_taken] > ceiling:
                dropped[index] = (taken[nearest_taken], float(similar[nearest_taken]))
                continue
            pool[len(taken)] = vectors_ND[index]
            taken.append(index)
    return taken, dropped


def _distances(vectors_ND: Vectors, index: int) -> NDArray[np.float64]:
    return np.linalg.norm(vectors_ND - vectors_ND[index], axis=1)


def _chunks(vectors_ND: Vectors) -> Iterator[Vectors]:
    for start in range(0, len(vectors_ND), CHUNK):
        yield vectors_ND[start : start + CHUNK]
