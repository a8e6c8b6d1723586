"""Tags of instructions: parsing, normalising, and sampling for coverage (InsTag, methods D33)."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from itune_ray.config.filters.base import HashedEmbedder
from itune_ray.curate.embeddings import hashed_vectors

_NOT_WORD = re.compile(r"[\W_]+")


def parse_tags(reply: str) -> list[str] | None:
    """Tags of a model's reply: the first JSON list in it, of strings or of objects with a `tag`.

    An empty list is a reply without tags; None is a reply that cannot be read, never a guess.
    """
    for start in (match.start() for match in re.finditer(r"\[", reply)):
        try:
            found, _ = json.JSONDecoder().raw_decode(reply[start:])
        except json.JSONDecodeError:
            continue
        tags = [entry.get("tag") if isinstance(entry, Mapping) else entry for entry in found]
        words = [tag.strip() for tag in tags if isinstance(tag, str)]
        return words if len(words) == len(tags) and all(words) else None
    return None


def normalise_tag(tag: str) -> str:
    """NFKC, case folded, one space between words, a plural `s` of the last word dropped; empty for punctuation alone.

    So `Data-Analysis`, `data analysis` and `DATA ANALYSIS` are one tag, and `code reviews` is `code review`; words in
    `ss`, `us` and `is` keep their s.
    """
    words = _NOT_WORD.sub(" ", unicodedata.normalize("NFKC", tag).casefold()).strip()
    plural = len(words) > 3 and words.endswith("s") and not words.endswith(("ss", "us", "is"))
    return words[:-1] if plural else words


def tag_sets(
    rows: Sequence[Iterable[Any]], min_count: int = 1, merged: Mapping[str, str] | None = None
) -> list[frozenset[str]]:
    """The normalised tags of each row, without those that fewer than `min_count` rows have.

    Args:
        rows: Tags as they were given; what is no string is left out.
        min_count: Rows that must share a tag (α of InsTag).
        merged: Tag -> the tag that stands for it, by normalised names.
    """
    stands_for = merged or {}
    normal = [{normalise_tag(tag) for tag in row if isinstance(tag, str)} - {""} for row in rows]
    sets = [frozenset(stands_for.get(tag, tag) for tag in row) for row in normal]
    counts = Counter(tag for row in sets for tag in row)
    return [frozenset(tag for tag in row if counts[tag] >= min_count) for row in sets]


def merged_tags(counts: Mapping[str, int], threshold: float) -> dict[str, str]:
    """Tag -> the tag that stands for it, of those that do not stand for themselves.

    Tags are walked from the most frequent; each is merged into the first before it that stands for itself and whose bag
    of words is near it: `review code` into `code review`. Of equal counts the smaller tag comes first.

    Args:
        counts: Normalised tags, and the rows that have them.
        threshold: Least cosine.
    """
    ranked = sorted(counts, key=lambda tag: (-counts[tag], tag))
    vectors = hashed_vectors(ranked, HashedEmbedder(ngram=1))
    kept: list[int] = []
    merged: dict[str, str] = {}
    for place, tag in enumerate(ranked):
        near = np.flatnonzero(vectors[kept] @ vectors[place] >= threshold - 1e-12)
        if len(near):
            merged[tag] = ranked[kept[int(near[0])]]
        else:
            kept.append(place)
    return merged


def complexity_first(tags: Sequence[frozenset[str]], limit: int) -> list[int]:
    """Complexity-first diverse sampling: rows by number of tags, the most first, each taken when it adds a tag.

    After a pass the coverage is forgotten and the rows left are walked again, until `limit` rows are taken or no row
    left has a tag. Of equal counts the smaller index comes first.
    """
    left = sorted((i for i, row in enumerate(tags) if row), key=lambda i: (-len(tags[i]), i))
    taken: list[int] = []
    while left and len(taken) < limit:
        covered: set[str] = set()
        passed: list[int] = []
        for index in left:
            if len(taken) < limit and not tags[index] <= covered:
                taken.append(index)
                covered |= tags[index]
            else:
                passed.append(index)
        left = passed
    return taken
