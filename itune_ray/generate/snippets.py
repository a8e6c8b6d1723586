"""Related passages of different documents: near in their words, but not the same (MDCure, methods D19)."""

import math
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from itune_ray.generate.novelty import tokens_of

MIN_WORDS = 10
"""A snippet has more words than this."""
MAX_SIMILARITY = 0.7
"""Partners are less alike than this, so that they are related and no duplicates."""
AROUND = 3
"""Sentences of context before and after a snippet."""


class Place(NamedTuple):
    """Where a sentence stands."""

    document: int
    sentence: int


def sentences_of(document: str) -> list[str]:
    """The lines of a document that say something."""
    return [line.strip() for line in document.splitlines() if line.strip()]


def word_vectors(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors [num_texts, num_words] of tf-idf weights, idf = ln((1 + n) / (1 + df)) + 1, so that their products
    are cosines. A text without words is 0.

    MDCure embeds with a sentence encoder instead; words need no model, and find passages that share names and terms.
    """
    counts = [Counter(tokens_of(text)) for text in texts]
    in_texts = Counter(word for count in counts for word in count)
    places = {word: place for place, word in enumerate(sorted(in_texts))}
    vectors = np.zeros((len(texts), len(places)))
    for row, count in enumerate(counts):
        for word, times in count.items():
            vectors[row, places[word]] = times * (math.log((1 + len(texts)) / (1 + in_texts[word])) + 1)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def snippet_pairs(documents: Sequence[Sequence[str]], vectors: np.ndarray, rng: Random) -> list[tuple[Place, Place]]:
    """Disjoint pairs of related sentences of different documents.

    ⌊n/2⌋ times over n sentences of more than `MIN_WORDS` words: one is drawn, and its partner is the most similar of
    those below `MAX_SIMILARITY`. Both leave the pool, and the pair is kept where they are of different documents.

    Args:
        documents: The sentences of each document.
        vectors: Unit vectors of all sentences, in the order of the documents.
        rng: Draws the sentences.
    """
    places = [Place(d, s) for d, sentences in enumerate(documents) for s in range(len(sentences))]
    pool = [i for i, place in enumerate(places) if len(documents[place.document][place.sentence].split()) > MIN_WORDS]
    pairs: list[tuple[Place, Place]] = []
    for _ in range(len(pool) // 2):
        drawn = pool.pop(rng.randrange(len(pool)))
        similarities = vectors[pool] @ vectors[drawn]
        related = np.where(similarities < MAX_SIMILARITY, similarities, -np.inf)
        if not len(pool) or np.isneginf(related.max()):
            continue
        partner = pool.pop(int(related.argmax()))
        if places[drawn].document != places[partner].document:
            pairs.append((places[drawn], places[partner]))
    return pairs


def context_of(sentences: Sequence[str], place: int) -> str:
    """A sentence with up to `AROUND` before and after it, on one line."""
    return " ".join(sentences[max(0, place - AROUND) : place + AROUND + 1])
