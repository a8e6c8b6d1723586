"""N-gram overlap of rows with benchmark texts (methods D37): one index of hashes, asked row by row.

Both sides are normalised first and cut into tokens after, so that neither case nor punctuation hides a match. A token
is a 64-bit hash of its text and an n-gram a polynomial in its tokens modulo 2^64: with a million n-grams in the index
and a hundred million asked, a false match has probability about 5e-6.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
MIN_TOKENS = 5
"""Shorter texts are too common to compare."""
MARK_BITS = 22
_MARK_SHIFT = np.uint64(64 - MARK_BITS)
_BASE = 0x9E3779B97F4A7C15
"""Of the polynomial; odd, so that no token is lost modulo 2^64."""
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
"""A word; of scripts without spaces between words, a character."""


_ASCII_TOKEN = re.compile(r"\w+", re.ASCII)


def tokens(text: str) -> list[str]:
    """Case-folded words of a text, punctuation left out (NFKC)."""
    if text.isascii():
        return _ASCII_TOKEN.findall(text.lower())
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True)
class Item:
    """A text of a benchmark row."""

    row: str
    """Key of the row; its texts are averaged over."""
    query: str
    label: str = ""
    """What follows the query and is compared with it: n-grams may span the border."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """The benchmark row that a text is most like."""

    row: str
    score: float
    """Covered share of its tokens, in (0, 1]."""


class OverlapIndex:
    """N-grams of benchmark texts, and where each stands in them.

    The score of a row is, averaged over its texts, the share of tokens that an n-gram shared with the asked text covers
    (as in open-instruct). A text of fewer than n tokens counts as one n-gram of its own length, and one of fewer than
    `MIN_TOKENS` is not compared. N-grams that more than `common` rows have are boilerplate: they cover nothing, and
    tokens that only they could cover are no part of the share.
    """

    def __init__(self, items: Iterable[Item], n: int, *, common: int, query_ngrams: bool = True):
        """Build it.

        Args:
            items: Texts of the benchmarks.
            n: Tokens per n-gram.
            common: Most rows that an n-gram may be in.
            query_ngrams: False indexes n-grams with at least one token of the label only (as datatrove does).
        """
        self._n = n
        self.rows: list[str] = []
        """Keys of the rows that can be compared."""
        self.too_short = 0
        """Texts that cannot be compared: fewer than `MIN_TOKENS` tokens, or no n-gram that may be indexed."""
        found = self._texts(items, query_ngrams)
        self._keep(found, _boilerplate(found, common))

    @property
    def ngrams(self) -> int:
        """Distinct n-grams in the index."""
        return sum(len(hashes) for hashes, _ in self._by_length.values())

    def best(self, texts: Sequence[str]) -> Overlap | None:
        """The row of which the texts hold most; None when they share no n-gram with any.

        Each benchmark text counts with the asked text that covers most of it. Of equal scores the smallest key wins.
        """
        shares: dict[int, float] = {}
        for text in texts:
            for number, share in self._shares(text).items():
                shares[number] = max(share, shares.get(number, 0.0))
        scores: dict[int, float] = defaultdict(float)
        for number, share in sorted(shares.items()):
            row = int(self._text_row[number])
            scores[row] += share / float(self._texts_per_row[row])
        if not scores:
            return None
        row = min(scores, key=lambda row: (-scores[row], self.rows[row]))
        return Overlap(self.rows[row], scores[row])

    def _texts(self, items: Iterable[Item], query_ngrams: bool) -> list["_Text"]:
        numbers: dict[str, int] = {}
        found: list[_Text] = []
        for item in items:
            query, label = tokens(item.query), tokens(item.label)
            hashed = hash_tokens([*query, *label])
            length = min(self._n, len(hashed))
            starts = np.arange(0 if query_ngrams else max(0, len(query) - length + 1), len(hashed) - length + 1)
            if length < min(MIN_TOKENS, self._n) or not len(starts):
                self.too_short += 1
                continue
            row = numbers.setdefault(item.row, len(numbers))
            found.append(_Text(row, len(hashed), length, ngram_hashes(hashed, length)[starts], starts))
        self.rows = list(numbers)
        return found

    def _keep(self, found: Sequence["_Text"], boilerplate: Hashes) -> None:
        self._text_row = np.array([text.row for text in found], np.int64)
        self._coverable = np.zeros(len(found), np.int64)
        self._sizes = np.array([text.size for text in found], np.int64)
        postings: dict[int, list[tuple[Hashes, NDArray[np.int64]]]] = defaultdict(list)
        for number, text in enumerate(found):
            kept = ~np.isin(text.hashes, boilerplate)
            starts = text.starts[kept]
            self._coverable[number] = _covered(starts, text.length, text.size).sum()
            places = np.stack([np.full(len(starts), number), starts], axis=1)
            postings[text.length].append((text.hashes[kept], places))
        self._texts_per_row = np.bincount(self._text_row[self._coverable > 0], minlength=len(self.rows))
        self._by_length: dict[int, tuple[Hashes, _Postings]] = {}
        for length, parts in sorted(postings.items()):
            self._by_length[length] = _sorted_postings(parts)
        self._marked = np.zeros(2**MARK_BITS, np.bool_)
        """Whether some n-gram's hash begins with these bits: most n-grams that are asked need no search."""
        for hashes, _ in self._by_length.values():
            self._marked[hashes >> _MARK_SHIFT] = True

    def _shares(self, text: str) -> dict[int, float]:
        """Number of a benchmark text -> its covered share, for those that share an n-gram with the asked text."""
        hashed = hash_tokens(tokens(text))
        starts: dict[int, list[int]] = defaultdict(list)
        lengths: dict[int, int] = {}
        for length, (hashes, postings) in self._by_length.items():
            if len(hashed) < length or not len(hashes):
                continue
            asked = ngram_hashes(hashed, length)
            asked = asked[self._marked[asked >> _MARK_SHIFT]]
            if not len(asked):
                continue
            at = np.searchsorted(hashes, asked)
            at[at == len(hashes)] = 0
            for index in np.unique(at[hashes[at] == asked]):
                for number, start in postings.of(int(index)):
                    starts[number].append(start)
                    lengths[number] = length
        shares: dict[int, float] = {}
        for number, found in starts.items():
            covered = _covered(np.array(found), lengths[number], int(self._sizes[number])).sum()
            shares[number] = float(covered) / float(self._coverable[number])
        return shares


@dataclass(frozen=True)
class _Text:
    """The n-grams of one benchmark text."""

    row: int
    size: int
    length: int
    hashes: Hashes
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class _Postings:
    """(text, start) of every occurrence of each n-gram."""

    places: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def of(self, ngram: int) -> list[list[int]]:
        return self.places[self.offsets[ngram] : self.offsets[ngram + 1]].tolist()


def _sorted_postings(parts: Sequence[tuple[Hashes, NDArray[np.int64]]]) -> tuple[Hashes, _Postings]:
    hashes = np.concatenate([part for part, _ in parts])
    places = np.concatenate([part for _, part in parts])
    order = np.argsort(hashes, kind="stable")
    distinct, counts = np.unique(hashes, return_counts=True)
    return distinct, _Postings(places[order], np.concatenate([[0], np.cumsum(counts)]))


def _boilerplate(found: Sequence[_Text], common: int) -> Hashes:
    """N-grams of more than `common` rows."""
    seen: dict[int, list[Hashes]] = defaultdict(list)
    for text in found:
        seen[text.row].append(text.hashes)
    sets = [np.unique(np.concatenate(hashes)) for hashes in seen.values()]
    distinct, counts = np.unique(np.concatenate(sets or [np.empty(0, np.uint64)]), return_counts=True)
    return distinct[counts > common]


def _covered(starts: NDArray[np.int64], length: int, size: int) -> NDArray[np.bool_]:
    """Which of `size` tokens an n-gram at one of the starts covers."""
    bounds = np.zeros(size + 1, np.int64)
    starts = np.unique(starts)
    np.add.at(bounds, starts, 1)
    np.add.at(bounds, starts + length, -1)
    return np.cumsum(bounds[:-1]) > 0


_known: dict[str, int] = {}
_KNOWN_MOST = 2**20
"""Words whose hashes this process keeps."""


def hash_tokens(words: Sequence[str]) -> Hashes:
    """64-bit hash of each token, the same in every process."""
    if len(_known) > _KNOWN_MOST:
        _known.clear()
    for word in set(words).difference(_known):
        _known[word] = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())
    return np.fromiter(map(_known.__getitem__, words), np.uint64, len(words))


def ngram_hashes(hashed: Hashes, n: int) -> Hashes:
    """Hash of each run of n tokens: Σ token_i · base^i modulo 2^64; empty for fewer than n tokens."""
    count = max(0, len(hashed) - n + 1)
    total = np.zeros(count, np.uint64)
    power = 1
    for index in range(n):
        power = power * _BASE % 2**64
        total += hashed[index : index + count] * np.uint64(power)
    return total
