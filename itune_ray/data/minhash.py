"""MinHash-LSH in numpy: signatures, bands, candidate pairs, verification, representatives (methods D27).

Nothing here knows rows or Ray. Texts have integer ids; a smaller id is a better text, so that "the better one stays"
is "the smaller id stays". Shape letters: N texts, S shingles of all texts laid end to end, P permutations, B bands,
K pairs.
"""

import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from itune_ray.data.shingles import HASH_BITS, Hashes, Ids, ShingleSets, spread

MERSENNE_PRIME = np.uint64(2**61 - 1)
MAX_HASH = np.uint64(2**32 - 1)
PERMUTATION_SEED = 1
CROWD = 256
"""A bucket of more texts than this pairs each of them with its `CROWD` best only, so that it stays linear."""
RECALL = 0.99
"""Chance of a pair at the threshold to become a candidate that `recall_bands` asks for."""


def jaccard(a: Hashes, b: Hashes) -> float:
    """|a ∩ b| / |a ∪ b| of two sorted sets; 0 for two empty ones."""
    if not len(a) or not len(b):
        return 0.0
    common = np.intersect1d(a, b, assume_unique=True).size
    return common / (len(a) + len(b) - common)


# --- signatures and bands ------------------------------------------------------------------------------------------


@functools.cache
def permutations(num_perm: int, seed: int = PERMUTATION_SEED) -> tuple[Hashes, Hashes]:
    """(a, b) of each permutation, a in [1, p), b in [0, p): the draws of datasketch's MinHash for the same seed."""
    draws = np.random.RandomState(seed)
    high = int(MERSENNE_PRIME)
    drawn = [draws.randint(lowest, high, dtype=np.uint64) for _ in range(num_perm) for lowest in (1, 0)]
    return np.array(drawn[::2], np.uint64), np.array(drawn[1::2], np.uint64)


def signatures(sets: ShingleSets, num_perm: int = 128) -> NDArray[np.uint32]:
    """MinHash signatures [N, P]: min over a set of h_i(x) = ((a_i·H(x) + b_i) mod (2⁶¹ − 1)) & (2³² − 1).

    H is the low half of the shingle's hash. As in datasketch, a_i·H(x) wraps at 2⁶⁴, so signatures of equal hashes
    equal its "legacy" scheme. No set may be empty.
    """
    signature_NP = np.empty((len(sets), num_perm), np.uint32)
    first = 0
    while first < len(sets):
        last = max(first + 1, int(np.searchsorted(sets.offsets, sets.offsets[first] + CHUNK, "right")) - 1)
        signature_NP[first:last] = _signatures_of(sets, first, last, num_perm)
        first = last
    return signature_NP


CHUNK = 2**15
"""Shingles hashed at once: what they take must stay in a processor's cache."""


def _signatures_of(sets: ShingleSets, first: int, last: int, num_perm: int) -> NDArray[np.uint32]:
    """Signatures of the sets from `first` to before `last`.

    With p = 2⁶¹ − 1, the low half of x mod p is that of x + (x >> 61), but for one x in 2⁵⁸, where it is one less.
    """
    a, b = permutations(num_perm)
    start, end = sets.offsets[first], sets.offsets[last]
    base_S = sets.values[start:end] & MAX_HASH
    starts = sets.offsets[first:last] - start
    hashed_S, high_S = np.empty_like(base_S), np.empty_like(base_S)
    low_S = np.empty(len(base_S), np.uint32)
    signature_PN = np.empty((num_perm, last - first), np.uint32)
    for i in range(num_perm):
        np.multiply(base_S, a[i], out=hashed_S)
        np.add(hashed_S, b[i], out=hashed_S)
        np.right_shift(hashed_S, np.uint64(61), out=high_S)
        np.add(hashed_S, high_S, out=hashed_S)
        np.copyto(low_S, hashed_S, casting="unsafe")
        np.minimum.reduceat(low_S, starts, out=signature_PN[i])
    return signature_PN.T


def band_hashes(signature_NP: NDArray[np.uint32], bands: int, rows: int) -> Hashes:
    """Bucket keys [N, B]: a 64-bit hash of (band index, the band's rows). A collision costs one comparison."""
    keys_NB = np.empty((len(signature_NP), bands), np.uint64)
    for band in range(bands):
        mixed = np.full(len(signature_NP), band + 1, np.uint64)
        for column in signature_NP[:, band * rows : (band + 1) * rows].T:
            mixed = spread(mixed ^ column.astype(np.uint64))
        keys_NB[:, band] = mixed
    return keys_NB


def collision_probability(similarity: float, bands: int, rows: int) -> float:
    """Chance that two texts of a similarity share a bucket, 1 − (1 − sʳ)ᵇ."""
    return 1 - (1 - similarity**rows) ** bands


@functools.cache
def optimal_bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """(bands, rows) with bands·rows ≤ num_perm that minimise ½∫₀ᵗ P(s) ds + ½∫ₜ¹ (1 − P(s)) ds.

    The optimum balances both errors and promises no recall: at 0.9 with 128 permutations it finds a pair of similarity
    0.9 in 31 of 100 cases (`collision_probability`).
    """
    points, weights = np.polynomial.legendre.leggauss(200)
    below, above = threshold * (points + 1) / 2, threshold + (1 - threshold) * (points + 1) / 2
    best = (float("inf"), (1, 1))
    for bands in range(1, num_perm + 1):
        for rows in range(1, num_perm // bands + 1):
            false_positive = float(weights @ (1 - (1 - below**rows) ** bands)) * threshold / 2
            false_negative = float(weights @ ((1 - above**rows) ** bands)) * (1 - threshold) / 2
            best = min(best, (false_positive + false_negative, (bands, rows)), key=lambda scored: scored[0])
    return best[1]


@functools.cache
def recall_bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """(bands, rows) that find a pair at the threshold with a chance of `RECALL`, of the most rows that do so.

    More rows mean fewer candidates, and bands = ⌊num_perm / rows⌋ of them are all that the signature gives. False
    candidates cost time alone, since candidates are verified. Where even one row misses the aim, one row.
    """
    for rows in range(num_perm, 1, -1):
        if collision_probability(threshold, num_perm // rows, rows) >= RECALL:
            return num_perm // rows, rows
    return num_perm, 1


# --- candidates and decisions --------------------------------------------------------------------------------------


def candidate_pairs(keys: Hashes, ids: Ids) -> Ids:
    """Pairs [K, 2], smaller id first, sorted and distinct, of the ids that share a bucket key.

    Depends on the set of (key, id) alone. A bucket of more than `CROWD` texts pairs each with its `CROWD` best only.
    """
    shared = _repeated(keys)
    keys, ids = keys[shared], ids[shared]
    order = np.lexsort((ids, keys))
    keys, ids = keys[order], ids[order]
    bounds = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1], True]) if len(keys) else np.zeros(1, np.int64)
    sizes = np.diff(bounds)
    crowded = sizes > CROWD
    found = [_small_buckets(keys, ids, np.repeat(~crowded, sizes))]
    for bucket in np.flatnonzero(crowded):
        members = np.unique(ids[bounds[bucket] : bounds[bucket + 1]])
        left, right = np.meshgrid(np.arange(CROWD), np.arange(len(members)))
        found.append(np.stack([members[left[left < right]], members[right[left < right]]], axis=1))
    return distinct_pairs(np.concatenate(found))


def distinct_pairs(pairs: Ids) -> Ids:
    """Pairs [K, 2] sorted, each once; ids are below 2³¹."""
    ordered = np.sort((pairs[:, 0] << 32) | pairs[:, 1])
    ordered = ordered[np.r_[True, ordered[1:] != ordered[:-1]]] if len(ordered) else ordered
    return np.stack([ordered >> 32, ordered & (2**32 - 1)], axis=1)


def _small_buckets(keys: Hashes, ids: Ids, small: NDArray[np.bool_]) -> Ids:
    """All pairs within buckets, in the order of (key, id): each entry with the next one, with the one after, ..."""
    keys, ids = keys[small], ids[small]
    left = np.arange(len(keys))
    found = [np.empty((0, 2), np.int64)]
    for step in range(1, CROWD):
        left = left[: np.searchsorted(left, len(keys) - step)]
        left = left[keys[left] == keys[left + step]]
        if not len(left):
            break
        found.append(np.stack([ids[left], ids[left + step]], axis=1))
    pairs = np.concatenate(found)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _repeated(keys: Hashes) -> NDArray[np.bool_]:
    """Which keys occur more than once: few, so that only those need the slower sort by id."""
    ordered = np.sort(keys)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return np.zeros(len(keys), np.bool_)
    repeated = twice[np.r_[True, twice[1:] != twice[:-1]]]
    at = np.searchsorted(repeated, keys)
    at[at == len(repeated)] = 0
    return repeated[at] == keys


PAIRS_AT_ONCE = 2 ** (64 - HASH_BITS)
"""Pairs compared together: the number of a pair and the hash of a shingle make one sortable number."""


def similarities(pairs: Ids, sets: ShingleSets) -> NDArray[np.float64]:
    """Jaccard similarity of each pair of indices into `sets`; 0 for two empty ones."""
    parts = [_similarities(pairs[i : i + PAIRS_AT_ONCE], sets) for i in range(0, len(pairs), PAIRS_AT_ONCE)]
    return np.concatenate([np.empty(0), *parts])


def _similarities(pairs_K2: Ids, sets: ShingleSets) -> NDArray[np.float64]:
    """What occurs twice under the number of a pair is in both of its sets."""
    sizes_K2 = sets.sizes[pairs_K2]
    numbered = np.concatenate(list(_numbered(pairs_K2, sizes_K2, sets)))
    numbered.sort()
    twice = numbered[1:][numbered[1:] == numbered[:-1]] >> np.uint64(HASH_BITS)
    common_K = np.bincount(twice.astype(np.int64), minlength=len(pairs_K2))
    return common_K / np.maximum(1, sizes_K2.sum(axis=1) - common_K)


def _numbered(pairs_K2: Ids, sizes_K2: Ids, sets: ShingleSets) -> Iterator[Hashes]:
    """The shingles of either side, the number of their pair above them."""
    for side_K, sizes_K in zip(pairs_K2.T, sizes_K2.T, strict=True):
        number = np.repeat(np.arange(len(side_K), dtype=np.uint64), sizes_K)
        before = np.cumsum(sizes_K) - sizes_K
        place = np.arange(sizes_K.sum()) + np.repeat(sets.offsets[side_K] - before, sizes_K)
        yield (number << np.uint64(HASH_BITS)) | sets.values[place]


def verified(pairs: Ids, sets: ShingleSets, threshold: float) -> NDArray[np.float64]:
    """True Jaccard similarity of each pair of indices into `sets`, NaN where it is below the threshold."""
    found = similarities(pairs, sets)
    return np.where(found >= threshold, found, np.nan)


def identical(sets: ShingleSets) -> tuple[Ids, Ids]:
    """Indices of the sets that equal one before them, and the first such index of each.

    Equal sets have equal sums of spread hashes and equal sizes; what has is then compared.
    """
    sums = np.zeros(len(sets), np.uint64)
    filled = np.flatnonzero(sets.sizes)
    if len(filled):
        for part in np.array_split(filled, max(1, len(sets.values) // CHUNK)):
            if len(part):
                start, end = sets.offsets[part[0]], sets.offsets[part[-1] + 1]
                sums[part] = np.add.reduceat(spread(sets.values[start:end]), sets.offsets[part] - start)
    _, first, inverse = np.unique(sums ^ sets.sizes.astype(np.uint64), return_index=True, return_inverse=True)
    twin = first[inverse]
    pairs = np.stack([twin, np.arange(len(sets))], axis=1)[twin != np.arange(len(sets))]
    pairs = pairs[(similarities(pairs, sets) == 1) | (sets.sizes[pairs].sum(axis=1) == 0)]
    return pairs[:, 1], pairs[:, 0]


def leaders(pairs: Ids, similarity: NDArray[np.float64]) -> dict[int, tuple[int, float]]:
    """Who makes way for whom: loser id -> (representative's id, their similarity), from verified pairs.

    In the order of the ids, a text is dropped when a text that stays is similar to it, the best such being its
    representative. So no chain a~b~c drops a c that is unlike a, as components of a union-find would, and no two texts
    that stay form a verified pair.
    """
    known = ~np.isnan(similarity)
    pairs, similarity = pairs[known], similarity[known]
    dropped: dict[int, tuple[int, float]] = {}
    for index in np.lexsort((pairs[:, 0], pairs[:, 1])):
        better, worse = int(pairs[index, 0]), int(pairs[index, 1])
        if better not in dropped and worse not in dropped:
            dropped[worse] = (better, float(similarity[index]))
    return dropped
