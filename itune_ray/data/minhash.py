"""MinHash-LSH in numpy: shingles, signatures, bands, candidate pairs, verification, representatives (methods D27).

Nothing here knows rows or Ray. Texts have integer ids; a smaller id is a better text, so that "the better one stays"
is "the smaller id stays". Shape letters: N texts, S shingles of all texts laid end to end, P permutations, B bands.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Ids = NDArray[np.int64]

MERSENNE_PRIME = np.uint64(2**61 - 1)
MAX_HASH = np.uint64(2**32 - 1)
PERMUTATION_SEED = 1
SHORT_TEXT_TOKENS = 12
"""Texts with fewer tokens are cut into pairs of words whatever the n-gram: triples would be too few to compare."""
CROWD = 256
"""A bucket of more texts than this pairs each of them with its `CROWD` best only, so that it stays linear."""
_WORD = re.compile(r"\w+")


# --- shingles ------------------------------------------------------------------------------------------------------


def shingles(text: str, ngram: int = 3, min_tokens: int = 5) -> Hashes:
    """Sorted 64-bit hashes of the set of word n-grams of a text; empty when it has fewer than `min_tokens` words.

    Words are lower-cased runs of word characters, and an n-gram is its words joined by one space.
    """
    words = _WORD.findall(text.lower())
    if len(words) < min_tokens:
        return np.empty(0, np.uint64)
    n = min(ngram, 2) if len(words) < SHORT_TEXT_TOKENS else ngram
    n = min(n, len(words))
    encoded = " ".join(words).encode().split(b" ")
    grams = set(map(b" ".join, zip(*(encoded[i:] for i in range(n)), strict=False)))
    digests = b"".join([hashed.digest() for hashed in map(_sha1, grams)])
    return np.sort(np.frombuffer(digests, np.dtype({"names": ["head"], "formats": ["<u8"], "itemsize": 20}))["head"])


_sha1 = functools.partial(hashlib.sha1, usedforsecurity=False)


@dataclass(frozen=True)
class ShingleSets:
    """The shingle sets of N texts, one after another."""

    values: Hashes
    offsets: Ids
    """N + 1 bounds of each text's part of `values`."""

    @classmethod
    def of(cls, sets: Sequence[Hashes]) -> "ShingleSets":
        """Lay sets end to end."""
        values = np.concatenate(sets) if len(sets) else np.empty(0, np.uint64)
        return cls(values, np.cumsum([0, *(len(s) for s in sets)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Hashes:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: Ids) -> "ShingleSets":
        """The sets at ascending indices; no copy where that is all of them."""
        if len(indices) == len(self):
            return self
        chosen = np.zeros(len(self), np.bool_)
        chosen[indices] = True
        sizes = np.diff(self.offsets)
        return ShingleSets(self.values[np.repeat(chosen, sizes)], np.cumsum(np.r_[0, sizes[indices]], dtype=np.int64))


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

    H is the low half of the shingle's hash. As in datasketch, a_i·H(x) wraps at 2⁶⁴, so signatures equal its "legacy"
    scheme bit for bit. No set may be empty.
    """
    signature_NP = np.empty((len(sets), num_perm), np.uint32)
    first = 0
    while first < len(sets):
        last = max(first + 1, int(np.searchsorted(sets.offsets, sets.offsets[first] + CHUNK, "right")) - 1)
        signature_NP[first:last] = _signatures_of(sets, first, last, num_perm)
        first = last
    return signature_NP


CHUNK = 2**14
"""Shingles hashed at once: what they take must stay in a processor's cache."""


def _signatures_of(sets: ShingleSets, first: int, last: int, num_perm: int) -> NDArray[np.uint32]:
    """Signatures of the sets from `first` to before `last`.

    With p = 2⁶¹ − 1, x mod p is (x & p) + (x >> 61), less p where that reaches p.
    """
    a, b = permutations(num_perm)
    start, end = sets.offsets[first], sets.offsets[last]
    base_S = sets.values[start:end] & MAX_HASH
    starts = sets.offsets[first:last] - start
    hashed_S, high_S = np.empty_like(base_S), np.empty_like(base_S)
    signature_PN = np.empty((num_perm, last - first), np.uint32)
    for i in range(num_perm):
        np.multiply(base_S, a[i], out=hashed_S)
        np.add(hashed_S, b[i], out=hashed_S)
        np.right_shift(hashed_S, np.uint64(61), out=high_S)
        np.bitwise_and(hashed_S, MERSENNE_PRIME, out=hashed_S)
        np.add(hashed_S, high_S, out=hashed_S)
        if hashed_S.max() >= MERSENNE_PRIME:
            hashed_S[hashed_S >= MERSENNE_PRIME] -= MERSENNE_PRIME
        np.minimum.reduceat(hashed_S.astype(np.uint32), starts, out=signature_PN[i])
    return signature_PN.T


def band_hashes(signature_NP: NDArray[np.uint32], bands: int, rows: int) -> Hashes:
    """Bucket keys [N, B]: a 64-bit hash of (band index, the band's rows). A collision costs one comparison."""
    keys_NB = np.empty((len(signature_NP), bands), np.uint64)
    for band in range(bands):
        mixed = np.full(len(signature_NP), band + 1, np.uint64)
        for column in signature_NP[:, band * rows : (band + 1) * rows].T:
            mixed = _mix(mixed ^ column.astype(np.uint64))
        keys_NB[:, band] = mixed
    return keys_NB


def _mix(x: Hashes) -> Hashes:
    """The splitmix64 finaliser, a bijection of 64-bit numbers that spreads every bit."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def collision_probability(similarity: float, bands: int, rows: int) -> float:
    """Chance that two texts of a similarity share a bucket, 1 − (1 − sʳ)ᵇ."""
    return 1 - (1 - similarity**rows) ** bands


@functools.cache
def optimal_bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """(bands, rows) with bands·rows ≤ num_perm that minimise ½∫₀ᵗ P(s) ds + ½∫ₜ¹ (1 − P(s)) ds.

    The optimum balances both errors and promises no recall: at 0.9 with 128 permutations it finds a pair of similarity
    0.9 in 31 of 100 cases (`collision_probability`). Since candidates are verified, more bands cost only time.
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
    found = [np.empty((0, 2), np.int64)]
    for start, end in itertools.pairwise(bounds):
        if end - start > 1:
            found.append(_pairs_in(np.unique(ids[start:end])))
    return np.unique(np.concatenate(found), axis=0)


def _repeated(keys: Hashes) -> NDArray[np.bool_]:
    """Which keys occur more than once: few, so that only those need the slower sort by id."""
    ordered = np.sort(keys)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return np.zeros(len(keys), np.bool_)
    at = np.searchsorted(repeated, keys)
    at[at == len(repeated)] = 0
    return repeated[at] == keys


def _pairs_in(members: Ids) -> Ids:
    left, right = np.triu_indices(len(members), k=1) if len(members) <= CROWD else _crowded(len(members))
    return np.stack([members[left], members[right]], axis=1)


def _crowded(size: int) -> tuple[Ids, Ids]:
    left, right = np.meshgrid(np.arange(CROWD), np.arange(size))
    forward = left < right
    return left[forward], right[forward]


def verified(pairs: Ids, sets: ShingleSets, threshold: float) -> NDArray[np.float64]:
    """True Jaccard similarity of each pair of indices into `sets`, NaN where it is below the threshold."""
    found = np.array([jaccard(sets[int(i)], sets[int(j)]) for i, j in pairs], dtype=np.float64)
    return np.where(found >= threshold, found, np.nan)


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
