"""ROUGE-L between instructions, in integers: near enough to be no news, or not (Self-Instruct, methods D08).

F = 2 LCS / (m + n) over lower-case alphanumeric tokens. A 7-token instruction inside a 13-token one has F = 0.7, which
floating point puts above 0.7; here F > p/q is decided as 2 LCS q > p (m + n).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

Tokens = tuple[str, ...]
_WORD = re.compile(r"[a-z0-9]+")


class Nearest(NamedTuple):
    """The likest of a pool."""

    score: float
    """ROUGE-L F, 0 in an empty pool."""
    index: int
    """-1 in an empty pool."""
    is_near: bool
    """Whether it is above the threshold."""


def tokens_of(text: str) -> Tokens:
    """Lower-case runs of letters and digits, as the `rouge_score` package splits without a stemmer; scripts that it
    would delete whole are split into characters."""
    words = tuple(_WORD.findall(text.lower()))
    return words or tuple(text.split())


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one machine word per 64 tokens of `a` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | (1 << i)
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def nearest(candidate: Tokens, pool: Iterable[Tokens], threshold: float) -> Nearest:
    """The instruction of the pool that is likest the candidate; those that cannot be likest are not compared."""
    exact = Fraction(str(threshold))
    best, best_index, counts = Fraction(0), -1, Counter(candidate)
    for index, other in enumerate(pool):
        total = len(candidate) + len(other)
        if not total or Fraction(2 * min(len(candidate), len(other)), total) <= best:
            continue
        shared = sum(min(count, counts[token]) for token, count in Counter(other).items())
        if Fraction(2 * shared, total) <= best:
            continue
        score = Fraction(2 * lcs(candidate, other), total)
        if score > best:
            best, best_index = score, index
    return Nearest(float(best), best_index, best > exact)
