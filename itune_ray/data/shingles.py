"""Shingle sets: the distinct word n-grams of many texts as sorted 52-bit hashes (methods D27).

Texts are hashed many at a time and no word becomes a Python object: words are runs of word characters in an array of
code points, and their hashes are differences of one running sum. Shape letters: C characters, W words and S shingles
of a chunk, T texts of it.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Ids = NDArray[np.int64]

SHORT_TEXT_TOKENS = 12
"""Texts with fewer words are cut into pairs of words whatever the n-gram: triples would be too few to compare."""
CHUNK_TEXTS = 2**12
"""Texts hashed together, so that the number of a text and the hash of a shingle fit into one sortable number."""
CHUNK_CHARACTERS = 2**17
"""Characters hashed together, unless one text is longer: what they take stays in a processor's cache."""
HASH_BITS = 52
_BASE = 0x9E3779B97F4A7C15
"""Of the polynomials below; odd, so that it has an inverse modulo 2^64."""
_HASH = np.uint64(2**HASH_BITS - 1)


@dataclass(frozen=True)
class ShingleSets:
    """The shingle sets of N texts, one after another, each sorted."""

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

    @property
    def sizes(self) -> Ids:
        """Shingles of each text."""
        return np.diff(self.offsets)

    def take(self, indices: Ids) -> "ShingleSets":
        """The sets at ascending indices; no copy where that is all of them."""
        if len(indices) == len(self):
            return self
        chosen = np.zeros(len(self), np.bool_)
        chosen[indices] = True
        sizes = self.sizes
        return ShingleSets(self.values[np.repeat(chosen, sizes)], np.cumsum(np.r_[0, sizes[indices]], dtype=np.int64))


def shingle_sets(texts: Iterable[str], ngram: int = 3, min_tokens: int = 5) -> ShingleSets:
    """The set of word n-grams of each text; empty where it has fewer than `min_tokens` words.

    Words are lower-cased runs of word characters (letters, digits, underscore: the `\\w` of `re`). The hash of a word
    of characters c_i is Σ c_i·bⁱ modulo 2⁶⁴ with every bit spread, that of an n-gram the same sum over its words; two
    different n-grams share a hash with a probability of about 2⁻⁵².
    """
    parts = [_sets_of_chunk(chunk, ngram, min_tokens) for chunk in _chunks(texts)]
    values = np.concatenate([part.values for part in parts]) if parts else np.empty(0, np.uint64)
    sizes = [part.sizes for part in parts]
    return ShingleSets(values, np.cumsum(np.concatenate([np.zeros(1, np.int64), *sizes]), dtype=np.int64))


def shingles(text: str, ngram: int = 3, min_tokens: int = 5) -> Hashes:
    """The shingle set of one text."""
    return shingle_sets([text], ngram, min_tokens)[0]


def spread(x: Hashes) -> Hashes:
    """The splitmix64 finaliser, a bijection of 64-bit numbers that spreads every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lower case, so many at a time that neither bound is passed."""
    chunk: list[str] = []
    characters = 0
    for text in texts:
        lowered = text.lower()
        if chunk and (characters + len(lowered) > CHUNK_CHARACTERS or len(chunk) == CHUNK_TEXTS):
            yield chunk
            chunk, characters = [], 0
        chunk.append(lowered)
        characters += len(lowered) + 1
    if chunk:
        yield chunk


def _sets_of_chunk(texts: list[str], ngram: int, min_tokens: int) -> ShingleSets:
    codes_C = _codes(texts)
    starts_W, ends_W = _words(codes_C)
    hashed_W = _hashed_words(codes_C, starts_W, ends_W)
    first_T = np.cumsum([0, *(len(text) + 1 for text in texts)])
    bounds_T = np.searchsorted(starts_W, first_T)  # the words of text t are those from bounds_T[t] to bounds_T[t + 1]
    count_T = np.diff(bounds_T)
    n_T = np.minimum(np.where(count_T < SHORT_TEXT_TOKENS, min(ngram, 2), ngram), count_T)
    n_T[count_T < min_tokens] = 0
    found: list[Hashes] = []
    for n in np.unique(n_T[n_T > 0]).tolist():
        owner_W = np.repeat(np.arange(len(texts)), np.where(n_T == n, count_T, 0))
        word_W = np.flatnonzero(np.repeat(n_T == n, count_T))
        inside = word_W + n <= bounds_T[1:][owner_W]
        gram_S = _hashed_grams(hashed_W, n)[word_W[inside]]
        found.append((owner_W[inside].astype(np.uint64) << np.uint64(HASH_BITS)) | (gram_S & _HASH))
    return _distinct(found, len(texts))


def _distinct(found: list[Hashes], num_texts: int) -> ShingleSets:
    """Sets of the numbers text·2⁵² + hash."""
    ordered_S = np.sort(np.concatenate(found)) if found else np.empty(0, np.uint64)
    ordered_S = ordered_S[np.r_[True, ordered_S[1:] != ordered_S[:-1]]] if len(ordered_S) else ordered_S
    # The end of the last set has no bound of its own: with a full chunk it would be 2⁶⁴.
    starts = np.searchsorted(ordered_S, np.arange(num_texts, dtype=np.uint64) << np.uint64(HASH_BITS))
    return ShingleSets(ordered_S & _HASH, np.r_[starts, len(ordered_S)].astype(np.int64))


def _codes(texts: list[str]) -> NDArray[Any]:
    """Code points of the texts, a line feed after each."""
    joined = "\n".join([*texts, ""])
    if joined.isascii():
        return np.frombuffer(joined.encode("ascii"), np.uint8)
    return np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)


def _words(codes_C: NDArray[Any]) -> tuple[Ids, Ids]:
    """Where each word starts and ends; a chunk ends in a line feed, so the last word ends too."""
    inside_C = _word_characters()[codes_C]
    edges = np.flatnonzero(inside_C[1:] != inside_C[:-1]) + 1
    if inside_C[0]:
        edges = np.r_[0, edges]
    return edges[::2], edges[1::2]


def _hashed_words(codes_C: NDArray[Any], starts_W: Ids, ends_W: Ids) -> Hashes:
    """(Σ_{start ≤ i < end} c_i·bⁱ)·b^(−start), every bit spread."""
    powers, inverses = _powers(1 << (len(codes_C) - 1).bit_length())
    terms_C = codes_C.astype(np.uint64)
    terms_C *= powers[: len(codes_C)]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms_C, out=terms_C)])
    return spread((sums[ends_W] - sums[starts_W]) * inverses[starts_W])


def _hashed_grams(hashed_W: Hashes, n: int) -> Hashes:
    """Hash of the n words from each word on; the last n − 1 words start none."""
    count = max(0, len(hashed_W) - n + 1)
    total = hashed_W[:count].copy()
    for i in range(1, n):
        total *= np.uint64(_BASE)
        total += hashed_W[i : count + i]
    return spread(total)


@functools.lru_cache(maxsize=4)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """b⁰, b¹, ... and their inverses modulo 2⁶⁴."""
    both: list[Hashes] = []
    for base in (_BASE, pow(_BASE, -1, 2**64)):
        powers = np.full(count, base, np.uint64)
        powers[0] = 1
        both.append(np.cumprod(powers, dtype=np.uint64))
    return both[0], both[1]


@functools.cache
def _word_characters() -> NDArray[np.bool_]:
    """Whether each code point is a word character."""
    everything = np.array([chr(code).isalnum() for code in range(0x110000)])
    everything[ord("_")] = True
    return everything
